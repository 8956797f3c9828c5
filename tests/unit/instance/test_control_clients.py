"""Clients of the control channel that come and go while their requests are carried out."""

from __future__ import annotations

import pytest

from tests.support.vtpmd import Vtpmd
from vtpm.instance.control import CAPABILITIES
from vtpm.wire.emulator import Command, Init, Plain, decode_reply, encode_request
from vtpm.wire.manager_link import LinkPower, PowerChanged

AHEAD = b"".join(
    encode_request(request)
    for request in (Plain(Command.GET_CAPABILITY), Plain(Command.STOP), Init(0), Plain(Command.STOP), Init(0))
)


def _check_next_client(vtpmd: Vtpmd) -> None:
    """Connect until it is not refused any more, for the one before is not known to be gone at once; then ask."""
    while True:
        with vtpmd.connect("control") as control:
            control.sendall(encode_request(Plain(Command.GET_CAPABILITY)))
            answer = control.recv(64)
            assert answer, vtpmd.log_lines()
            capability = decode_reply(Command.GET_CAPABILITY, answer)
            if capability.result != 0:
                continue
            assert capability.fields["capabilities"] == CAPABILITIES
            control.sendall(encode_request(Plain(Command.GET_CONFIG)))
            assert decode_reply(Command.GET_CONFIG, control.recv(64)).fields == {"flags": 0}
            return


@pytest.mark.timeout(60)
def test_next_client_has_its_own_answers_when_one_sent_ahead_and_hung_up(vtpmd: Vtpmd) -> None:
    for _ in range(20):
        with vtpmd.connect("control") as gone:
            gone.sendall(AHEAD)
        _check_next_client(vtpmd)
    assert vtpmd.process.poll() is None, vtpmd.log_lines()


@pytest.mark.timeout(60)
def test_init_is_carried_out_when_its_client_hangs_up_before_the_answer(vtpmd: Vtpmd) -> None:
    with vtpmd.connect("control") as gone:
        gone.sendall(encode_request(Init(0)))
    vtpmd.manager.wait_for(PowerChanged, lambda told: told.power is LinkPower.ON)
    _check_next_client(vtpmd)
