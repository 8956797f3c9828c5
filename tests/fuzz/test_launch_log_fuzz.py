"""Whatever a log of launches says, it is read as it was written, or refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from vtpm.errors import ProtocolError
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Gap, Launch, LaunchLog, decode, encode

BANK = HashAlgorithm.SHA256
DIGEST = st.binary(min_size=32, max_size=32)
LAUNCH = st.builds(
    Launch,
    st.from_regex(r"[a-z][a-z0-9-]{0,15}", fullmatch=True),
    DIGEST.map(bytes.hex),
)
LOG = st.builds(
    lambda reset_count, start, entries: LaunchLog(BANK, 12, reset_count, start, tuple(entries)),
    st.integers(0, 2**32 - 1),
    DIGEST,
    st.lists(st.one_of(LAUNCH, DIGEST.map(Gap)), max_size=6),
)


@effort.codec
@given(LOG)
def test_log_of_launches_comes_back_when_read(log: LaunchLog) -> None:
    assert decode(encode(log), BANK, 12) == log


@effort.codec
@given(spoiled(LOG.map(encode)))
def test_spoiled_log_of_launches_is_refused_or_is_another_whole_one(data: bytes) -> None:
    try:
        log = decode(data, BANK, 12)
    except ProtocolError:
        return
    for entry in log.entries:
        assert isinstance(entry, Launch) or len(entry.held) == 32
    assert len(log.start) == len(log.value) == 32
    # Of the Spec ID event some fields mean nothing here; the events have one form only.
    written = b"".join(encode(log).partition(log.start)[2:]) if log.entries else b""
    assert data.endswith(written[-32:])
