"""User ids for hosts under test: several may run at once on one machine, beside one that is in use."""

from __future__ import annotations

import secrets

_FIRST = 0x10000000
_BLOCK = 0x800
"""Holds all user ids of a host; see decision record 5."""
_BLOCKS = 0xC0000


def own_uid_base() -> int:
    """Return a `uid_base` that no other host has, in all likelihood: one of 786,432 blocks, below the default's."""
    return _FIRST + secrets.randbelow(_BLOCKS) * _BLOCK
