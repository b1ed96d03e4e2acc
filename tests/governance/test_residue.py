"""The search after an erasure: every form in which something could be left is planted and found, and nothing is found where nothing is."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from discreet.governance.residue import find

NAME = "Zebulon Quimby"
TEXT = f"{NAME} came in with a cough on 3 May, çœur und Fieber, and was sent home with rest and tea and a letter for the family doctor."
IDS = [40121, 5, 77, 65000, 3]


def _archive(member: bytes) -> dict[str, bytes]:
    zipped, tarred, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", member)
    with tarfile.open(fileobj=tarred, mode="w") as archive_:
        info = tarfile.TarInfo("a.txt")
        info.size = len(member)
        archive_.addfile(info, io.BytesIO(member))
    pyarrow.parquet.write_table(pyarrow.table({"text": [member.decode()]}), table, compression="zstd")
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(member)
    made = {"gzip": gzip.compress(member), "bzip2": bz2.compress(member), "xz": lzma.compress(member), "zstd": packed.getvalue().to_pybytes()}
    return made | {"zip": zipped.getvalue(), "tar": tarred.getvalue(), "Parquet": table.getvalue(), "gzip, tar": gzip.compress(tarred.getvalue())}


def _planted() -> dict[str, bytes]:
    around = b"before " * 20, b" after" * 20
    forms = {
        "as it is": TEXT.encode(),
        "as it is, cut": TEXT.encode()[:20],
        "UTF-16": TEXT.encode("utf-16"),
        "JSON escapes": json.dumps({"text": TEXT}).encode(),
        "URL escapes": urllib.parse.quote_plus(TEXT).encode(),
        "hexadecimal": TEXT.encode().hex().encode(),
        **{f"base64 {shift}": base64.b64encode(b"x" * shift + TEXT.encode()) for shift in range(3)},
        **{f"base64 of a name {shift}": base64.urlsafe_b64encode(b"x" * shift + NAME.encode() + b"yz") for shift in range(3)},
        **{f"token ids {kind}": np.array([1, *IDS, 2], dtype=kind).tobytes() for kind in ("<u2", ">u2", "<i4", "<i8", ">i8")},
        "token ids, printed": json.dumps([1, *IDS, 2]).encode(),
    }
    made = {name: around[0] + content + around[1] for name, content in forms.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, ids=np.array(IDS, dtype=np.int32))
    return made | {f"in {name}": content for name, content in _archive(TEXT.encode()).items()} | {"in npz": packed.getvalue()}


PLANTED = _planted()


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_left_is_found_in_every_form(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(PLANTED[name])
    found = find(tmp_path, [NAME, TEXT], tokens=[IDS])
    assert found, name
    assert all(place.startswith("deep/file (") for place in found)


def test_a_deleted_row_in_a_free_page_is_found(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "a.db")
    database.execute("PRAGMA secure_delete = OFF")
    database.execute("CREATE TABLE notes (text)")
    database.execute("INSERT INTO notes VALUES (?)", (TEXT,))
    database.commit()
    database.execute("DELETE FROM notes")
    database.commit()
    database.close()
    assert find(tmp_path, [NAME]) == ["a.db (as it is)"]


def test_where_nothing_is_nothing_is_found(tmp_path: Path) -> None:
    other = TEXT.replace(NAME, "Wilhelmina Fox").replace("cough", "fracture")[:40].encode()
    for name, content in {"a": other, "broken.gz": b"\x1f\x8bnot", "broken.zip": b"PK\x03\x04not", "empty": b"", **_archive(other)}.items():
        (tmp_path / name.replace(", ", "-")).write_bytes(content)
    assert find(tmp_path, [NAME, TEXT, "abc"], tokens=[IDS, [1, 2]]) == []
