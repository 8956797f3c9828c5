"""One example and a Hypothesis strategy for every message of the launcher's port, for unit tests and fuzzing."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vtpm.wire import launcher_port as lp
from vtpm.wire.launcher_port import Direction
from vtpm.wire.packet_stream import MAX_FDS

SESSION = bytes(range(8))
_BOTH: dict[str, Any] = {
    "packet": lp.Packet(0, 0, b'{"id":1}'),
    "links": lp.Packet(7, MAX_FDS, b"\xc0\xdb"),
    "data": lp.Data(lp.MAX_LINK, bytes(lp.CHUNK_BYTES)),
    "taken": lp.Taken(1, lp.WINDOW_BYTES),
    "close": lp.Close(2),
}
EXAMPLES: dict[Direction, dict[str, Any]] = {
    Direction.TO_LAUNCHER: {"hello": lp.Hello(SESSION), **_BOTH},
    Direction.TO_MANAGER: {"ready": lp.Ready(SESSION), "ended": lp.Ended(), **_BOTH},
}

_link = st.integers(1, lp.MAX_LINK)
_session = st.binary(min_size=lp.SESSION_BYTES, max_size=lp.SESSION_BYTES)
_both = st.one_of(
    st.builds(lp.Packet, st.integers(0, 2**32 - 1), st.integers(0, MAX_FDS), st.binary(min_size=1, max_size=300)),
    st.builds(lp.Data, _link, st.binary(min_size=1, max_size=300)),
    st.builds(lp.Taken, _link, st.integers(1, lp.WINDOW_BYTES)),
    st.builds(lp.Close, _link),
)
messages = {
    Direction.TO_LAUNCHER: st.one_of(st.builds(lp.Hello, _session), _both),
    Direction.TO_MANAGER: st.one_of(st.builds(lp.Ready, _session), st.just(lp.Ended()), _both),
}
