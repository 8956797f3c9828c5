"""The data link's peer is asked for by one thread while another closes the link."""

from __future__ import annotations

import socket

from vtpm.guest_link.data_link import DataLink


def test_peer_is_gone_when_the_link_was_closed_meanwhile() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        link = DataLink(ours)
        assert not link.peer_gone()
        link.close()
        assert link.peer_gone()
