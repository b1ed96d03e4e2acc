"""RFC 6962 vectors (certificate-transparency's eight leaves), the recursive definition as an oracle, round trips, and every refusal."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.evidence import merkle

LEAVES = [bytes.fromhex(h) for h in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
ROOTS = [
    bytes.fromhex(h)
    for h in (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    )
]
INCLUSION = {  # (index, size) -> proof
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
}
CONSISTENCY = {  # (old size, size) -> proof
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
HASHES = [merkle.leaf_hash(leaf) for leaf in LEAVES]


def tree(size: int) -> list[bytes]:
    return [merkle.leaf_hash(i.to_bytes(4, "big")) for i in range(size)]


def mth(hashes: list[bytes]) -> bytes:
    """The recursive definition of RFC 6962 section 2.1, over leaf hashes."""
    if len(hashes) <= 1:
        return hashes[0] if hashes else merkle.EMPTY_ROOT
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return merkle.node_hash(mth(hashes[:split]), mth(hashes[split:]))


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert merkle.root(HASHES[:size]) == ROOTS[size]


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_inclusion_proofs_are_those_of_certificate_transparency(index: int, size: int) -> None:
    proof = merkle.inclusion_proof(HASHES[:size], index)
    assert [p.hex() for p in proof] == INCLUSION[index, size]
    merkle.verify_inclusion(HASHES[index], index=index, size=size, proof=proof, root=ROOTS[size])


@pytest.mark.parametrize(("old", "size"), CONSISTENCY)
def test_consistency_proofs_are_those_of_certificate_transparency(old: int, size: int) -> None:
    proof = merkle.consistency_proof(HASHES[:size], old)
    assert [p.hex() for p in proof] == CONSISTENCY[old, size]
    merkle.verify_consistency(old_size=old, old_root=ROOTS[old], size=size, root=ROOTS[size], proof=proof)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000])
def test_root_is_the_recursive_definition(size: int) -> None:
    assert merkle.root(tree(size)) == mth(tree(size))


def test_every_inclusion_and_consistency_proof_of_small_trees_verifies() -> None:
    for size in range(1, 34):
        hashes = tree(size)
        root = mth(hashes)
        for index in range(size):
            merkle.verify_inclusion(hashes[index], index=index, size=size, proof=merkle.inclusion_proof(hashes, index), root=root)
        for old in range(size + 1):
            merkle.verify_consistency(old_size=old, old_root=mth(hashes[:old]), size=size, root=root, proof=merkle.consistency_proof(hashes, old))


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=200), st.data())
@settings(max_examples=60, deadline=None)
def test_a_proof_verifies_for_its_leaf_and_place_only(entries: list[bytes], data: st.DataObject) -> None:
    hashes = [merkle.leaf_hash(i.to_bytes(4, "big") + entry) for i, entry in enumerate(entries)]
    size, root = len(hashes), merkle.root(hashes)
    index = data.draw(st.integers(0, size - 1))
    other = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(hashes, index)
    merkle.verify_inclusion(hashes[index], index=index, size=size, proof=proof, root=root)
    if other != index:
        for leaf, place in ((hashes[index], other), (hashes[other], index)):
            with pytest.raises(ValueError):
                merkle.verify_inclusion(leaf, index=place, size=size, proof=proof, root=root)
    for wrong in (
        proof[:-1] if proof else [bytes(32)],
        [*proof, bytes(32)],
        [bytes(32), *proof],
        [bytes(32) if i == 0 else p for i, p in enumerate(proof)] or [bytes(32)],
    ):
        with pytest.raises(ValueError):
            merkle.verify_inclusion(hashes[index], index=index, size=size, proof=wrong, root=root)


@given(st.integers(2, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_a_consistency_proof_verifies_for_its_two_trees_only(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    hashes = tree(size)
    proof, old_root, root = merkle.consistency_proof(hashes, old), merkle.root(hashes[:old]), merkle.root(hashes)
    merkle.verify_consistency(old_size=old, old_root=old_root, size=size, root=root, proof=proof)
    rewritten = merkle.root([merkle.leaf_hash(b"rewritten"), *hashes[1:old]])
    cases = [
        {"old_root": rewritten},
        {"root": merkle.root([merkle.leaf_hash(b"rewritten"), *hashes[1:]])},
        {"proof": proof[:-1]},
        {"proof": [*proof, bytes(32)]},
        {"proof": [bytes(32), *proof[1:]]},
    ]
    for case in cases:
        with pytest.raises(ValueError):
            merkle.verify_consistency(**{"old_size": old, "old_root": old_root, "size": size, "root": root, "proof": proof, **case})


def test_a_node_is_not_a_leaf() -> None:
    left, right = HASHES[:2]
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)
    with pytest.raises(ValueError):  # the inner node of a tree of 4 as a leaf of a tree of 2: the size comes from the checkpoint
        merkle.verify_inclusion(merkle.node_hash(left, right), index=0, size=4, proof=[merkle.node_hash(*HASHES[2:4])], root=ROOTS[4])


@pytest.mark.parametrize(
    "call",
    [
        lambda: merkle.inclusion_proof(HASHES, 8),
        lambda: merkle.inclusion_proof(HASHES, -1),
        lambda: merkle.inclusion_proof([], 0),
        lambda: merkle.consistency_proof(HASHES, 9),
        lambda: merkle.consistency_proof(HASHES, -1),
        lambda: merkle.root([b"short"]),
        lambda: merkle.verify_inclusion(HASHES[0], index=8, size=8, proof=[], root=ROOTS[8]),
        lambda: merkle.verify_inclusion(HASHES[0], index=-1, size=8, proof=[], root=ROOTS[8]),
        lambda: merkle.verify_inclusion(HASHES[0], index=0, size=1, proof=[], root=ROOTS[2]),
        lambda: merkle.verify_inclusion(HASHES[0], index=0, size=1, proof=[], root=b""),
        lambda: merkle.verify_consistency(old_size=3, old_root=ROOTS[3], size=2, root=ROOTS[2], proof=[]),
        lambda: merkle.verify_consistency(old_size=2, old_root=ROOTS[2], size=2, root=ROOTS[3], proof=[]),
        lambda: merkle.verify_consistency(old_size=2, old_root=ROOTS[2], size=2, root=ROOTS[2], proof=[ROOTS[1]]),
        lambda: merkle.verify_consistency(old_size=0, old_root=ROOTS[1], size=2, root=ROOTS[2], proof=[]),
        lambda: merkle.verify_consistency(old_size=0, old_root=ROOTS[0], size=0, root=ROOTS[1], proof=[]),
        lambda: merkle.verify_consistency(old_size=3, old_root=ROOTS[3], size=5, root=ROOTS[5], proof=[]),
        lambda: merkle.verify_consistency(old_size=6, old_root=ROOTS[5], size=8, root=ROOTS[8], proof=merkle.consistency_proof(HASHES, 6)),
    ],
)
def test_refuses(call) -> None:
    with pytest.raises(ValueError, match="Expected"):
        call()


def test_a_large_tree_takes_seconds() -> None:
    hashes = tree(200_000)
    start = time.process_time()
    merkle.root(hashes)
    assert time.process_time() - start < 4
