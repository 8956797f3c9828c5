"""State files of swtpm: what it writes is read; whatever else is read is refused cleanly, or was never protected."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import effort
from tests.fuzz.mutations import spoiled
from tests.unit.vault import swtpm_files as files
from vtpm.errors import StateError, UsageError
from vtpm.tpm.types import StateKind, TpmVersion
from vtpm.vault.swtpm_blob import KeyFormat, SwtpmKey, open_blob
from vtpm.vault.swtpm_state import read_state

KEYS = {size: bytes(range(size)) for size in (16, 32)}
RAW = {size: SwtpmKey.from_key_file(key, KeyFormat.BINARY) for size, key in KEYS.items()}
_size = st.sampled_from([16, 32])
# libtpms' state begins with a small u16, and is longer than swtpm's header.
_state = st.binary(min_size=9, max_size=200).map(lambda rest: b"\x00\x03" + rest)


@st.composite
def encrypted(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """State, file and size of the key."""
    state, size = draw(_state), draw(_size)
    iv = draw(st.sampled_from([b"", KEYS[size][::-1]]))
    return state, files.encrypted(state, KEYS[size], iv), size


_blocks = st.lists(
    st.builds(files.block, st.integers(0, 9), st.binary(max_size=40)) | st.binary(max_size=12), max_size=5
).map(b"".join)
_anything = st.one_of(
    st.binary(max_size=100),
    st.builds(files.headed, _blocks, st.integers(0, 0x1F), st.integers(0, 3), st.integers(0, 3)),
    spoiled(_state.map(files.plain)),
    spoiled(encrypted().map(lambda drawn: drawn[1])),
    spoiled(_state.map(lambda state: files.headless(state, KEYS[16]))),
)


@effort.codec
@given(encrypted())
def test_state_comes_out_when_encrypted_as_swtpm_does(drawn: tuple[bytes, bytes, int]) -> None:
    state, content, size = drawn
    assert open_blob("f", content, RAW[size]) == state
    with pytest.raises(StateError):
        open_blob("f", content, RAW[48 - size])
    with pytest.raises(UsageError):
        open_blob("f", content, None)


@effort.codec
@given(_state)
def test_state_comes_out_when_plain_or_headless(state: bytes) -> None:
    assert open_blob("f", files.plain(state), None) == state
    assert open_blob("f", files.headless(state), None) == state
    assert open_blob("f", files.headless(state, KEYS[16]), RAW[16]) == state


@effort.codec
@given(encrypted(), st.data())
def test_only_the_state_comes_out_when_an_encrypted_file_is_spoiled(
    drawn: tuple[bytes, bytes, int], data: st.DataObject
) -> None:
    state, content, size = drawn
    spoilt = data.draw(spoiled(st.just(content)))
    # Spoiled where nothing depends on it, or back to what it was.
    with suppress(StateError, UsageError):
        assert open_blob("f", spoilt, RAW[size]) == state


@effort.codec
@given(_anything, st.sampled_from([None, RAW[16], RAW[32]]))
def test_refused_cleanly_or_no_larger_than_the_file_when_it_is_anything(content: bytes, key: SwtpmKey | None) -> None:
    try:
        state = open_blob("f", content, key)
    except (StateError, UsageError):
        return
    assert 1 <= len(state) <= len(content)


@effort.codec
@given(st.binary(max_size=80) | st.from_regex(rb"(0x)?[0-9a-f]{30,66}\s?.{0,4}", fullmatch=True))
def test_key_file_is_taken_or_refused_cleanly_when_it_is_anything(content: bytes) -> None:
    for key_format in KeyFormat:
        try:
            key = SwtpmKey.from_key_file(content, key_format)
        except UsageError:
            continue
        assert [size for size in KEYS if key.of_size(size)] in ([16], [32])


_names = st.sampled_from(
    [f"{prefix}.{kind}" for prefix in ("tpm-00", "tpm2-00") for kind in ("permall", "volatilestate", "savestate")]
    + [".lock", "tpm2-00.permall.bak"]
)
_entries = st.one_of(
    st.tuples(st.just("file"), _state.map(files.plain)),
    st.tuples(st.just("file"), _anything),
    st.tuples(st.sampled_from(["folder", "link", "pipe"]), st.just(b"")),
)


@effort.codec
@given(st.dictionaries(_names, _entries, max_size=4), st.sampled_from([None, RAW[16]]))
def test_directory_is_read_or_refused_when_it_holds_anything(
    entries: dict[str, tuple[str, bytes]], key: SwtpmKey | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, content) in entries.items():
            path = Path(folder, name)
            match kind:
                case "file":
                    path.write_bytes(content)
                case "folder":
                    path.mkdir()
                case "link":
                    path.symlink_to("/etc/passwd")
                case _:
                    os.mkfifo(path)
        try:
            state = read_state(Path(folder), key)
        except (StateError, UsageError):
            return
        # What was read is there as files, and is of one TPM.
        prefix = "tpm2-00." if state.tpm_version is TpmVersion.V2_0 else "tpm-00."
        read = [name for name in entries if name.startswith(prefix) and not name.endswith(".bak")]
        assert len(state.states) == len(read)
        assert {entries[name][0] for name in read} == {"file"}
        assert StateKind.PERMANENT in state.states
