"""What is left of somebody in a folder: every byte of every file searched, also for what the bytes are a form of.

    raw bytes      so free pages and write-ahead logs of a database, and files under any name
    forms          UTF-8, UTF-16 in both orders, JSON escapes, URL escapes, hexadecimal, base64 at each of its three alignments
    token ids      runs of 16, 32 or 64 bits in both orders, and as printed lists
    archives       gzip, bzip2, xz, zstd, zip (so npz), tar, and Parquet by its columns, inside one another up to three deep

Why this way: an erasure is believed only if somebody else looked, with another eye than the stores' own. A needle is looked for whole: give the identifiers beside the texts, so that a text that was
cut is found by them (pieces of texts are not looked for: people share phrases).

Does not cover: what is encrypted (the caller opens it with the keys that live: documents, and the passages and term vectors of an index), paraphrases, dense vectors (nothing of a text can be read
in them; a store of such vectors answers for itself), compressed pieces inside a file of another format.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import mmap
import tarfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

MAX_DEPTH = 3
MAX_UNPACKED_BYTES = 1 << 30
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_LEAST_BYTES = 8
"""A shorter form would be found by chance in weights."""


def find(folder: Path, needles: Sequence[str], *, tokens: Sequence[Sequence[int]] = ()) -> list[str]:
    """Returns the files below a folder that hold something of a person, each with the form in which it was found; empty when nothing is left.

    Args:
        folder: searched with everything below it; links are not followed.
        needles: texts and identifiers, each of 4 characters or more; shorter ones are everywhere.
        tokens: their texts as token ids, each of 4 ids or more.
    """
    patterns = _patterns([needle for needle in needles if len(needle) >= 4], [ids for ids in tokens if len(ids) >= 4])
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found += [f"{path.relative_to(folder)} ({form})" for form in _search(content, patterns, depth=0)]
    return found


def _patterns(needles: Sequence[str], tokens: Sequence[Sequence[int]]) -> dict[bytes, str]:
    made: dict[bytes, str] = {}
    for needle in needles:
        plain = needle.encode()
        made |= dict.fromkeys((needle.encode("utf-16-le"), needle.encode("utf-16-be")), "UTF-16")
        made |= dict.fromkeys((plain.hex().encode(), plain.hex().upper().encode()), "hexadecimal")
        made |= dict.fromkeys((urllib.parse.quote(needle).encode(), urllib.parse.quote_plus(needle).encode()), "URL escapes")
        made |= dict.fromkeys(_base64(plain), "base64")
        made |= {json.dumps(needle)[1:-1].encode(): "JSON escapes", plain: "as it is"}
    for ids in tokens:
        for width, largest in ((2, 1 << 16), (4, 1 << 32), (8, 1 << 63)):
            if max(ids) < largest:
                made |= {b"".join(i.to_bytes(width, order) for i in ids): f"token ids of {8 * width} bits" for order in _ORDERS}
        made |= {glue.join(map(str, ids)).encode(): "token ids, printed" for glue in (",", ", ", " ", "\n")}
    return {pattern: form for pattern, form in made.items() if form == "as it is" or len(pattern) >= _LEAST_BYTES}


def _base64(plain: bytes) -> Iterator[bytes]:
    """The characters that base64 has for these bytes wherever they begin, without those that depend on what is around them."""
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + plain).rstrip(b"=")
        whole = encoded[(0, 2, 3)[shift] : len(encoded) - (1 if (shift + len(plain)) % 3 else 0)]
        yield whole
        yield whole.replace(b"+", b"-").replace(b"/", b"_")


def _search(content: bytes | mmap.mmap, patterns: dict[bytes, str], *, depth: int) -> list[str]:
    found = sorted({form for pattern, form in patterns.items() if content.find(pattern) >= 0})
    if depth < MAX_DEPTH:
        for kind, inner in _unpacked(content):
            found += [f"{kind}, {form}" for form in _search(inner, patterns, depth=depth + 1)]
    return found


def _unpacked(content: bytes | mmap.mmap) -> Iterator[tuple[str, bytes]]:
    """What is packed in these bytes; nothing when they are no archive, or a broken one (the raw bytes were searched)."""
    try:
        head = content[:262]
        if head.startswith(b"\x1f\x8b"):
            yield "gzip", gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_UNPACKED_BYTES)
        elif head.startswith(b"BZh"):
            yield "bzip2", bz2.BZ2File(io.BytesIO(content)).read(MAX_UNPACKED_BYTES)
        elif head.startswith(b"\xfd7zXZ\x00"):
            yield "xz", lzma.LZMADecompressor().decompress(bytes(content), MAX_UNPACKED_BYTES)
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            from pyarrow import BufferReader, CompressedInputStream  # 0.3 s to import; only folders with such files pay

            yield "zstd", CompressedInputStream(BufferReader(bytes(content)), "zstd").read(MAX_UNPACKED_BYTES)
        elif head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                yield from (("zip", archive.read(member)) for member in archive.infolist() if member.file_size <= MAX_UNPACKED_BYTES)
        elif head[257:262] == b"ustar":
            with tarfile.open(fileobj=io.BytesIO(content)) as archive_:
                yield from (("tar", file.read()) for member in archive_ if member.isfile() and (file := archive_.extractfile(member)))
        elif head.startswith(b"PAR1"):
            from pyarrow import BufferReader
            from pyarrow.parquet import ParquetFile

            yield "Parquet", json.dumps(ParquetFile(BufferReader(bytes(content))).read().to_pydict(), ensure_ascii=False, default=str).encode()
    except (OSError, EOFError, ValueError, RuntimeError, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, zlib.error):
        return
