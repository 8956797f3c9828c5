"""Merkle tree over the slots of a store; docs/state-format.md, "Root record".

Of fixed depth, so that a change costs the same whatever the number of vTPMs, and sparse, so that memory follows that
number. Leaves and nodes are hashed apart, as in RFC 9162, 2.1.1. Pure. Imported by the stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

DEPTH = 20
MAX_SLOTS = 1 << DEPTH
POLICY_SLOT = MAX_SLOTS - 1
"""Slot of the launch policy, which no vTPM gets."""
HOLDINGS_SLOT = MAX_SLOTS - 2
"""Slot of the holdings, which no vTPM gets."""
VTPM_SLOTS = MAX_SLOTS - 2
"""How many slots there are for vTPMs: all below the two."""
EMPTY_LEAF = bytes(32)
"""Stands in a slot that no vTPM has; no SHA-256 is known to give it."""


def leaf_hash(entry: bytes) -> bytes:
    """Return the leaf for the entry of one vTPM."""
    return hashlib.sha256(b"\x00" + entry).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _empty_subtrees() -> tuple[bytes, ...]:
    hashes = [EMPTY_LEAF]
    for _ in range(DEPTH):
        hashes.append(_node_hash(hashes[-1], hashes[-1]))
    return tuple(hashes)


_EMPTY = _empty_subtrees()
"""Hash of a subtree without vTPMs, by its height."""


class MerkleTree:
    """Hashes of all nodes that differ from those of an empty tree.

    A node has the number of its place in a binary heap: the root 1, children 2n and 2n+1, slot s MAX_SLOTS+s.

    Args:
        leaves: by slot, 0 to MAX_SLOTS-1.
    """

    def __init__(self, leaves: Mapping[int, bytes]) -> None:
        self._nodes: dict[int, bytes] = {}
        self.adopt(self.changed(leaves))

    @property
    def root(self) -> bytes:
        """Hash over all slots."""
        return self._nodes.get(1, _EMPTY[DEPTH])

    def leaf(self, slot: int) -> bytes:
        """Return the leaf in a slot, EMPTY_LEAF where there is none."""
        return self._nodes.get(MAX_SLOTS + slot, EMPTY_LEAF)

    def changed(self, leaves: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """Return what nodes become when these slots get these leaves; the tree itself stays as it is."""
        nodes = {MAX_SLOTS + slot: leaf for slot, leaf in leaves.items()}
        level = set(nodes)
        # This loop is a large part of what a save costs: 20 nodes for each leaf, as the tree is of fixed depth.
        changed, unchanged, sha256 = nodes.get, self._nodes.get, hashlib.sha256
        for empty in _EMPTY[:DEPTH]:
            level = {node >> 1 for node in level}
            for parent in level:
                left = 2 * parent
                pair = (changed(left) or unchanged(left, empty)) + (changed(left + 1) or unchanged(left + 1, empty))
                nodes[parent] = sha256(b"\x01" + pair).digest()
        return nodes

    def adopt(self, nodes: Mapping[int, bytes]) -> None:
        """Make what `changed` returned part of the tree."""
        for node, value in nodes.items():
            if value == _EMPTY[DEPTH + 1 - node.bit_length()]:
                self._nodes.pop(node, None)
            else:
                self._nodes[node] = value
