"""A guest that uses its TPM without pause, and can tell afterwards that no command was lost, doubled or refused."""

from __future__ import annotations

import re
from hashlib import sha256

from tests.support.guest.channel import Deadline
from tests.support.guest.guest import Guest

LIMIT_S = 60.0
BEAT = """
(
    n=0
    while [ ! -e /tmp/stop ]; do
        tpm2_pcrextend 16:sha256=$(printf %064x $n) 2>> /tmp/beat.errors || echo "extend $n" >> /tmp/beat.errors
        n=$((n + 1))
        echo $n > /tmp/beat.count
    done
    touch /tmp/beat.over
) > /dev/null 2>&1 < /dev/null &
"""
"""Extends PCR 16 with 0, 1, 2, ... without pause, and notes each failure."""


def begin_beat(guest: Guest) -> None:
    """Have the guest begin, and wait until it has."""
    guest.check(BEAT)
    deadline = Deadline(LIMIT_S)
    while guest.run("test $(cat /tmp/beat.count) -gt 2").status:
        assert deadline.remaining_s(), "the guest's TPM does not begin"


def beats(guest: Guest) -> int:
    """Return how often the guest has extended its PCR so far."""
    return int(guest.check("cat /tmp/beat.count"))


def check_beats(guest: Guest) -> None:
    """End the beat; the PCR holds just what was extended, and no command failed."""
    before = beats(guest)
    deadline = Deadline(LIMIT_S)
    while beats(guest) < before + 3:
        assert deadline.remaining_s(), "the guest's TPM does not go on"
    guest.check("touch /tmp/stop; while [ ! -e /tmp/beat.over ]; do sleep 0.1; done", timeout_s=LIMIT_S)
    assert guest.check("cat /tmp/beat.errors") == ""
    expected = bytes(32)
    for number in range(beats(guest)):
        expected = sha256(expected + number.to_bytes(32, "big")).digest()
    held = re.search(r"16\s*: 0x([0-9A-F]{64})", guest.check("tpm2_pcrread sha256:16"))
    assert held is not None
    assert bytes.fromhex(held[1]) == expected
