"""The Merkle tree of RFC 6962 and RFC 9162 over SHA-256: roots, inclusion proofs and consistency proofs; bytes in, bytes out.

Every function takes the *leaf hashes* of the tree in order (`leaf_hash` of each entry), never the entries, so that a leaf is prefixed in one place and a node can
not be passed off as a leaf. Building is level by level: each pair becomes its node, an odd last one moves up unchanged, which gives the same tree as the
recursive definition of RFC 6962 section 2.1 (split at the largest power of two below the size) without recursion.

Guarantees, as long as SHA-256 resists collisions: a verified inclusion proof means that the leaf is at that index of the tree with that root; a verified
consistency proof means that the old tree is a prefix of the new one. Verification returns None or raises `ValueError`: there is no boolean to forget. Proofs
of another length than the sizes demand are refused, before and after hashing.

Sources: RFC 6962 section 2.1; RFC 9162 sections 2.1.1 to 2.1.4 (the verification algorithms); c2sp.org/tlog-tiles.

A large log is not read whole: `Tiles` gives roots and proofs from the tiles of c2sp.org/tlog-tiles, runs of 256 hashes of every eighth level. A root, or a proof, of a million leaves reads
the last tile of each level and the tiles above the leaf: six of them.

Does not cover: who signed a root (`note.py`), what a leaf means (`statement.py`), where tiles are kept (`log.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import final

HASH_BYTES = 32

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""The root of the tree without leaves: SHA-256 of nothing (RFC 6962 section 2.1)."""


def leaf_hash(entry: bytes) -> bytes:
    """Returns the hash of an entry as a leaf: SHA-256 of 0x00 and the entry, 32 bytes."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Returns the hash of an inner node: SHA-256 of 0x01, the left and the right child, 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Returns the root of the tree over these leaves.

    Args:
        leaf_hashes: 32 bytes each, in order; may be empty.

    Returns:
        32 bytes; `EMPTY_ROOT` without leaves.

    Raises:
        ValueError: when an item is not 32 bytes long.
    """
    _check_hashes(leaf_hashes)
    return _root(leaf_hashes)


def inclusion_proof(leaf_hashes: Sequence[bytes], index: int) -> list[bytes]:
    """Returns the siblings on the way from leaf `index` to the root, lowest first (RFC 9162 section 2.1.3.1).

    Args:
        leaf_hashes: 32 bytes each, the whole tree in order.
        index: of the leaf, 0 <= index < len(leaf_hashes).

    Raises:
        ValueError: when there is no leaf at that index, or an item is not 32 bytes long.
    """
    _check_hashes(leaf_hashes)
    if not 0 <= index < len(leaf_hashes):
        raise ValueError(f"Expected 0 <= index < {len(leaf_hashes)} leaves, got {index}.")
    proof: list[bytes] = []
    level = list(leaf_hashes)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):  # an odd last node has none: it moves up unchanged
            proof.append(level[sibling])
        level = _parents(level)
        index >>= 1
    return proof


def verify_inclusion(leaf: bytes, *, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Verifies that the leaf hash `leaf` is at `index` of the tree of `size` leaves with this root (RFC 9162 section 2.1.3.2).

    Args:
        leaf: the leaf hash, 32 bytes.
        index: 0 <= index < size.
        size: number of leaves of the tree, from a verified checkpoint.
        proof: siblings, lowest first, 32 bytes each; exactly as many as index and size demand.
        root: 32 bytes, from the same checkpoint.

    Raises:
        ValueError: when the proof does not lead from this leaf to this root, or has the wrong length.
    """
    _check_hashes([leaf, root, *proof])
    if not 0 <= index < size:
        raise ValueError(f"Expected 0 <= index < size={size}, got {index}.")
    node, last, computed = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ValueError(f"Expected a shorter inclusion proof for index {index} of {size}, got {len(proof)} hashes.")
        if node & 1 or node == last:
            computed = node_hash(sibling, computed)
            while not node & 1 and node:  # the node moved up without a sibling
                node, last = node >> 1, last >> 1
        else:
            computed = node_hash(computed, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise ValueError(f"Expected a longer inclusion proof for index {index} of {size}, got {len(proof)} hashes.")
    if computed != root:
        raise ValueError(f"Expected the inclusion proof for index {index} of {size} to lead to the root.")


def consistency_proof(leaf_hashes: Sequence[bytes], old_size: int) -> list[bytes]:
    """Returns the proof that the first `old_size` leaves are a prefix of this tree (RFC 9162 section 2.1.4.1).

    Args:
        leaf_hashes: 32 bytes each, the whole new tree in order.
        old_size: 0 <= old_size <= len(leaf_hashes). From nothing and from itself, the proof is empty.

    Raises:
        ValueError: when the old tree is larger than the new one, or an item is not 32 bytes long.
    """
    _check_hashes(leaf_hashes)
    return _consistency(lambda low, high: _root(leaf_hashes[low:high]), old_size, len(leaf_hashes))


def _consistency(root_of: Callable[[int, int], bytes], old_size: int, size: int) -> list[bytes]:
    """The proof, with the roots of ranges of leaves from `root_of`."""
    low, high, remaining = 0, size, old_size
    if not 0 <= old_size <= high:
        raise ValueError(f"Expected 0 <= old_size <= {high} leaves, got {old_size}.")
    if old_size == 0:
        return []
    proof: list[bytes] = []
    while remaining != high - low:
        split = _split(high - low)
        if remaining <= split:
            proof.append(root_of(low + split, high))
            high = low + split
        else:
            proof.append(root_of(low, low + split))
            low, remaining = low + split, remaining - split
    if low > 0:  # the verifier knows the old root itself, but not a part of it
        proof.append(root_of(low, high))
    return proof[::-1]


def _split(size: int) -> int:
    """The largest power of two below a size."""
    return 1 << (size - 1).bit_length() - 1


@final
class Tiles:
    """A tree whose hashes are read by the tile; answers as `root`, `inclusion_proof` and `consistency_proof` of its first `size` leaves would."""

    def __init__(self, read: Callable[[int, int], Sequence[bytes]]) -> None:
        """Reads nothing yet.

        Args:
            read: (level, number) to the hashes of that tile, 1 to 256 of 32 bytes: leaves at level 0, roots of full tiles of the level below above it. Asked once for each.
        """
        self._read = read
        self._tiles: dict[tuple[int, int], Sequence[bytes]] = {}

    def root(self, size: int) -> bytes:
        """Returns the root of the first `size` leaves."""
        return self._range(0, size)

    def inclusion_proof(self, index: int, size: int) -> list[bytes]:
        """Returns the siblings on the way from leaf `index` to the root of the first `size` leaves, lowest first.

        Raises:
            ValueError: when there is no such leaf, or a tile lacks a hash that the size promises.
        """
        if not 0 <= index < size:
            raise ValueError(f"Expected 0 <= index < {size} leaves, got {index}.")
        low, high = 0, size
        proof: list[bytes] = []
        while high - low > 1:
            middle = low + _split(high - low)
            proof.append(self._range(middle, high) if index < middle else self._range(low, middle))
            low, high = (low, middle) if index < middle else (middle, high)
        return proof[::-1]

    def consistency_proof(self, old_size: int, size: int) -> list[bytes]:
        """Returns the proof that the first `old_size` leaves are a prefix of the first `size`. Errors as `inclusion_proof`."""
        return _consistency(self._range, old_size, size)

    def _range(self, low: int, high: int) -> bytes:
        """The root of leaves `low` to `high`; `low` is a multiple of a power of two that is not below the width."""
        peaks: list[bytes] = []
        while low < high:
            height = min((high - low).bit_length() - 1, (low & -low).bit_length() - 1 if low else 64)
            peaks.append(self._node(height, low >> height))
            low += 1 << height
        if not peaks:
            return EMPTY_ROOT
        joined = peaks.pop()
        while peaks:
            joined = node_hash(peaks.pop(), joined)
        return joined

    def _node(self, height: int, index: int) -> bytes:
        """The root of the complete subtree of 2^height leaves that begins at leaf index * 2^height."""
        level, above = divmod(height, TILE_HEIGHT)
        number, place = divmod(index << above, TILE_WIDTH)
        if (level, number) not in self._tiles:
            self._tiles[level, number] = self._read(level, number)
        hashes = self._tiles[level, number][place : place + (1 << above)]
        if len(hashes) != 1 << above or any(len(item) != HASH_BYTES for item in hashes):
            raise ValueError(f"Expected tile {number} of level {level} to hold {place + (1 << above)} hashes of {HASH_BYTES} bytes.")
        return _root(hashes)


def verify_consistency(*, old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Verifies that the tree of `old_size` leaves is a prefix of the tree of `size` leaves (RFC 9162 section 2.1.4.2).

    Args:
        old_size: 0 <= old_size <= size.
        old_root: 32 bytes, from the older checkpoint.
        size: number of leaves of the newer tree.
        root: 32 bytes, from the newer checkpoint.
        proof: 32 bytes each, lowest first; empty when old_size is 0 or size.

    Raises:
        ValueError: when the two trees are not shown to be consistent, or the proof has the wrong length.
    """
    _check_hashes([old_root, root, *proof])
    if not 0 <= old_size <= size:
        raise ValueError(f"Expected 0 <= old_size <= size={size}, got {old_size}: a log never shrinks.")
    if old_size in (0, size):
        _verify_trivial_consistency(old_size, old_root, size, root, proof)
        return
    path = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    if not path:
        raise ValueError(f"Expected a consistency proof from {old_size} to {size}, got none.")
    node, last = old_size - 1, size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    old_computed = computed = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise ValueError(f"Expected a shorter consistency proof from {old_size} to {size}, got {len(proof)} hashes.")
        if node & 1 or node == last:
            old_computed, computed = node_hash(sibling, old_computed), node_hash(sibling, computed)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            computed = node_hash(computed, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise ValueError(f"Expected a longer consistency proof from {old_size} to {size}, got {len(proof)} hashes.")
    if old_computed != old_root or computed != root:
        raise ValueError(f"Expected the consistency proof from {old_size} to {size} to lead to both roots.")


def _verify_trivial_consistency(old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """From nothing, or from itself: no proof is needed, and none is accepted."""
    expected = EMPTY_ROOT if old_size == 0 else root
    if proof or old_root != expected or (size == 0 and root != EMPTY_ROOT):
        raise ValueError(f"Expected an empty consistency proof from {old_size} to {size} and the roots that belong to it.")


def _root(leaf_hashes: Sequence[bytes]) -> bytes:
    level = list(leaf_hashes)
    while len(level) > 1:
        level = _parents(level)
    return level[0] if level else EMPTY_ROOT


def _parents(level: Sequence[bytes]) -> list[bytes]:
    """One level up; the prefix and the hash are spelled out here because this line is where a large tree spends its time."""
    sha256 = hashlib.sha256
    parents = [sha256(b"\x01" + left + right).digest() for left, right in zip(level[::2], level[1::2], strict=False)]
    if len(level) & 1:
        parents.append(level[-1])
    return parents


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(item) != HASH_BYTES for item in hashes):
        raise ValueError(f"Expected hashes of {HASH_BYTES} bytes.")
