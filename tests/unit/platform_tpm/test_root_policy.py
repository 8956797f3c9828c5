"""Policy digests and the rules of allowed PCR sets, as pure code."""

from __future__ import annotations

import hashlib

import pytest

from vtpm.errors import ConflictError, NotFoundError, PlatformTpmError, UsageError
from vtpm.platform_tpm.fence import FENCE_LABEL, check_fence_covers, check_fence_pcr, fence_digest, is_fenced
from vtpm.platform_tpm.pcrs import DEFAULT_PCRS, PcrBank, PcrSelection, predict_pcr
from vtpm.platform_tpm.root_policy import (
    MAX_SETS,
    PcrSet,
    ZeroPcrs,
    approved,
    authorize_nv_digest,
    branches,
    checked,
    refuse_zeros,
    signed_digest,
    with_set,
    without_set,
)

# Made with tpm2-tools 5.4 in a trial session of swtpm 0.7.1, not by this code:
# tpm2_policypcr -l sha256:0,2,4,7 over all-zero PCRs; tpm2_policyor of twice that; of that and 32 bytes 0x11.
ZERO_PCRS = bytes.fromhex("4f04c837291ac05d8c8fceb5d03ac530d3189c1dd24dc744f2145cf71eaa9cf6")
OR_OF_ONE = bytes.fromhex("237ab058e8e16f178e006e706dc51e549df055db35c08a7374963f5a5f8158a4")
OR_OF_TWO = bytes.fromhex("79106ce43f1e2ff8508d65e335f6f9cc6aebaba7a45b7aa33f80eebcbacef1c5")
# tpm2_policyauthorizenv after PolicyOR, with an index of this Name.
INDEX_NAME = bytes.fromhex("000b82ccf4b509f9a993b648c7c97fc79112f4eda0cdd7101644e16b9e76a663b177")
AUTHORIZED = bytes.fromhex("20e5ed48e0e53c9424ced6b1a1b603b28e8c39c352e5fe55c6856a64da8bce0f")
# tpm2_policysigned -q 706f6c696379 (the reference "policy") with a key of this Name.
KEY_NAME = bytes.fromhex("000bc76b371a6c4e5c9fd0b2a86e5411afa7e1ea45e1a4ce654059e391514f0b2ee7")
SIGNED = bytes.fromhex("79cc432427d6620b75c45f124102c324a3d8f5d427aee3932f1a720cfb077a65")


def pcr_set(label: str = "set-up", value: int = 1, selection: PcrSelection = DEFAULT_PCRS) -> PcrSet:
    return PcrSet(label, selection, (bytes([value]) * selection.bank.digest_bytes,) * len(selection.indexes))


def test_digests_are_the_tpms_when_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = pcr_set(value=0)
    assert zeros.digest == ZERO_PCRS
    assert approved((zeros,)) == b"\0\x0b" + OR_OF_ONE
    assert authorize_nv_digest(INDEX_NAME) == AUTHORIZED
    assert signed_digest(KEY_NAME, b"policy") == SIGNED
    other = pcr_set("other")
    monkeypatch.setattr(PcrSet, "digest", property(lambda one: ZERO_PCRS if one == zeros else b"\x11" * 32))
    assert approved((zeros, other)) == b"\0\x0b" + OR_OF_TWO


def test_lone_set_stands_twice_when_ored() -> None:
    assert branches((pcr_set(),)) == [pcr_set().digest] * 2
    two = (pcr_set(), pcr_set("other", 2))
    assert branches(two) == [one.digest for one in two]
    assert approved(two) != approved(two[::-1])


@pytest.mark.parametrize("label", ["", " x", "x" * 65, "a\n", "ä", "\x1b[31m", "-x"])
def test_set_is_refused_when_its_label_is_not_for_people(label: str) -> None:
    with pytest.raises(UsageError, match="no label"):
        pcr_set(label)


@pytest.mark.parametrize("values", [(), (b"1" * 32,) * 3, (b"1" * 32,) * 5, (b"1" * 48,) * 4])
def test_set_is_refused_when_values_do_not_fit(values: tuple[bytes, ...]) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        PcrSet("set-up", DEFAULT_PCRS, values)


def test_sets_grow_to_eight_and_shrink_to_one_when_changed() -> None:
    sets = (pcr_set("0", 0),)
    for number in range(1, MAX_SETS):
        sets = with_set(sets, pcr_set(str(number), number))
    with pytest.raises(ConflictError, match="9 sets"):
        with_set(sets, pcr_set("more", 99))
    for number in range(MAX_SETS - 1):
        sets = without_set(sets, str(number))
    with pytest.raises(ConflictError, match="the last"):
        without_set(sets, "7")
    with pytest.raises(NotFoundError):
        without_set(sets, "0")


def test_sets_are_refused_when_two_are_alike() -> None:
    with pytest.raises(ConflictError, match="another label"):
        checked((pcr_set(), pcr_set(value=2)))
    with pytest.raises(ConflictError, match="as 'set-up'"):
        checked((pcr_set(), pcr_set("other")))
    with pytest.raises(ConflictError, match="0 sets"):
        checked(())
    # Another selection with the same values is another boot.
    checked((pcr_set(), pcr_set("other", selection=PcrSelection.parse("sha256:0,2,4,8"))))


def test_zeros_are_refused_when_nothing_but_the_fence_was_measured() -> None:
    zeros = pcr_set(value=0)
    with pytest.raises(PlatformTpmError, match="all zero"):
        refuse_zeros(zeros, ZeroPcrs.REFUSE)
    refuse_zeros(zeros, ZeroPcrs.ALLOW)
    only_fence = PcrSet("set-up", DEFAULT_PCRS, (bytes(32), bytes(32), bytes(32), b"1" * 32))
    refuse_zeros(only_fence, ZeroPcrs.REFUSE)
    refuse_zeros(only_fence, ZeroPcrs.REFUSE, fence_pcr=4)
    with pytest.raises(PlatformTpmError, match="all zero"):
        refuse_zeros(only_fence, ZeroPcrs.REFUSE, fence_pcr=7)


def test_differing_names_the_pcrs_when_values_changed() -> None:
    now = pcr_set().by_index | {4: b"x" * 32, 7: b"y" * 32, 9: b"z" * 32}
    assert pcr_set().differing(now) == (4, 7)
    assert PcrSet.of("set-up", DEFAULT_PCRS, now).differing(now) == ()


@pytest.mark.parametrize("bank", PcrBank)
def test_prediction_is_the_hash_chain_when_several_digests_follow(bank: PcrBank) -> None:
    size = bank.digest_bytes
    first = hashlib.new(bank, bytes(size) + b"a" * size).digest()
    second = hashlib.new(bank, first + b"b" * size).digest()
    assert predict_pcr(bank, bytes(size), [b"a" * size, b"b" * size]) == second
    assert predict_pcr(bank, first, iter([])) == first
    for value, digests in ((b"", []), (bytes(size), [b"a"]), (bytes(size + 1), [])):
        with pytest.raises(UsageError):
            predict_pcr(bank, value, digests)


def test_fence_is_known_when_it_alone_differs() -> None:
    one = pcr_set()
    closed = predict_pcr(PcrBank.SHA256, one.by_index[7], [hashlib.sha256(FENCE_LABEL).digest()])
    assert fence_digest(PcrBank.SHA256) == hashlib.sha256(FENCE_LABEL).digest()
    assert is_fenced(one, one.by_index | {7: closed})
    assert not is_fenced(one, one.by_index | {7: b"x" * 32})
    assert not is_fenced(one, one.by_index | {7: closed, 4: b"x" * 32})
    assert not is_fenced(one, one.by_index)


def test_fence_is_refused_when_it_can_be_reset_or_is_not_in_every_set() -> None:
    assert [check_fence_pcr(index) for index in range(16)] == list(range(16))
    for index in (*range(16, 25), -1):
        with pytest.raises(UsageError):
            check_fence_pcr(index)
    with_fence = pcr_set("other", selection=PcrSelection.parse("sha256:0,12"))
    check_fence_covers(12, (with_fence,))
    with pytest.raises(UsageError, match="'set-up' does not have it"):
        check_fence_covers(12, (with_fence, pcr_set()))
