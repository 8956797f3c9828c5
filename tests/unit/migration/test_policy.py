"""A platform policy is read exactly, or refused with what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtpm.errors import NotFoundError, UsageError
from vtpm.migration.policy import MAX_POLICY_BYTES, parse_policy, print_policy, read_policy
from vtpm.tpm.hash_algorithms import HashAlgorithm

A, B = "aa" * 32, "bb" * 32
WHOLE = f"""
bank = "sha256"
embedded = true
[pcrs]
0 = ["{A}", "{B}"]
7 = ["{B}"]
[services]
pcr = 14
allowed = ["{A}"]
[images]
pcr = 11
process = ["{A}"]
qemu-swtpm = []
"""


def test_all_is_there_when_a_policy_is_read(tmp_path: Path) -> None:
    path = tmp_path / "platforms.toml"
    path.write_text(WHOLE)
    policy = read_policy(path)
    assert policy.bank is HashAlgorithm.SHA256 and policy.embedded
    assert policy.pcrs == {0: {bytes.fromhex(A), bytes.fromhex(B)}, 7: {bytes.fromhex(B)}}
    assert (policy.services_pcr, policy.services) == (14, {bytes.fromhex(A)})
    assert (policy.images_pcr, policy.images) == (11, {"process": {A}, "qemu-swtpm": frozenset()})
    assert policy.quoted == (0, 7, 11, 14)


def test_policy_is_the_same_when_it_was_printed_and_read() -> None:
    for text in (WHOLE, f'bank = "sha384"\n[pcrs]\n0 = ["{A[:32] * 3}"]\n'):
        policy = parse_policy(text.encode())
        assert parse_policy(print_policy(policy).encode()) == policy


def test_nothing_is_allowed_when_a_policy_leaves_it_out() -> None:
    policy = parse_policy(f'[pcrs]\n0 = ["{A}"]\n'.encode())
    assert not policy.embedded and not policy.services and not policy.images and policy.quoted == (0, 12, 13)
    assert parse_policy(f'bank = "sha384"\n[pcrs]\n22 = ["{A}{"cc" * 16}"]\n'.encode()).quoted == (12, 13, 22)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names PCRs of the boot"),
        ("embedded = 1", "true or false"),
        ('bank = "sha1"', "neither sha256 nor sha384"),
        ("bank = 4", "neither sha256"),
        ("x = 1", "unknown settings: x"),
        ("pcrs = 1", "pcrs must be a table"),
        ("[pcrs]\n24 = []", "'24' is no PCR"),
        ("[pcrs]\n00 = []", "'00' is no PCR"),
        ("[pcrs]\n0 = []", "pcrs.0 allows no value at all"),
        ('[pcrs]\n0 = "aa"', "pcrs.0 must be a list"),
        (f'[pcrs]\n0 = ["{A}00"]', "pcrs.0 must be a list"),
        (f'[pcrs]\n0 = ["{"00" * 32}"]', "into which nothing was measured"),
        (f'bank = "sha384"\n[pcrs]\n0 = ["{A}"]', "pcrs.0 must be a list"),
        ('[services]\nallowed = ["AA"]', "services.allowed must be a list"),
        ("[services]\npcr = true", "'True' is no PCR"),
        ("[services]\npcr = 16", "'16' is no PCR from 1 to 15"),
        ("[images]\npcr = 23", "'23' is no PCR from 8 to 15"),
        ("[images]\npcr = 7", "'7' is no PCR from 8 to 15"),
        (f'[pcrs]\n16 = ["{A}"]', "PCR 16 proves nothing"),
        (f'[pcrs]\n23 = ["{A}"]', "PCR 23 proves nothing"),
        (f'[pcrs]\n17 = ["{"ff" * 32}"]', "into which nothing was measured"),
        ("[services]\nmore = 1", "services has unknown settings: more"),
        (f'[pcrs]\n13 = ["{A}"]', "none of those in pcrs"),
        (f'[pcrs]\n0 = ["{A}"]\n[images]\npcr = 13', "are two"),
        ("[images]\nQemu = []", "'Qemu' is no kind"),
        ("[images]\nqemu = [1]", "images.qemu must be a list"),
        ("x = = 1", "is not TOML"),
        ("x = " + "1" * 5000, "is not TOML"),
        ("\x00", "is not TOML"),
        ("#" * (MAX_POLICY_BYTES + 1), "at most"),
    ],
)
def test_refused_when_something_is_wrong_in_it(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_policy(text.encode())


def test_file_is_named_when_it_is_missing_or_wrong(tmp_path: Path) -> None:
    path = tmp_path / "platforms.toml"
    with pytest.raises(NotFoundError, match=str(path)):
        read_policy(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_policy(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=f"{path}: the platform policy is not TOML"):
        read_policy(path)
