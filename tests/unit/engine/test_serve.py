"""The engine's own loop over a link: what it answers alone, and that it hands back whatever it cannot."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.unit.engine import commands as c
from tests.unit.engine.conftest import State
from tests.unit.engine.isolated import in_process
from tests.unit.engine.memory import powered
from vtpm.engine.engine import Engine, Origin, ServeEnd
from vtpm.errors import EngineError, UsageError
from vtpm.tpm.lockout import GET_LOCKOUT, parse_lockout
from vtpm.tpm.return_codes import Rc20, is_auth_fail_20
from vtpm.tpm.types import Locality, TpmVersion

LIMIT_S = 10.0
NV_INDEX = 0x01800BE0


class Link:
    """A client's end, the engine's end and the wake-up of one served link."""

    def __init__(self) -> None:
        self.client, self.ours = socket.socketpair()
        self.client.settimeout(LIMIT_S)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    def ask(self, command: bytes) -> bytes:
        self.client.sendall(command)
        return self.client.recv(8192)

    def stop(self) -> None:
        os.eventfd_write(self.wake, 1)


@contextmanager
def _link() -> Iterator[Link]:
    link = Link()
    with link.client, link.ours:
        yield link
    os.close(link.wake)


def _started(state: State) -> Engine:
    engine, _ = powered(TpmVersion.V2_0, state)
    assert c.code_of(engine.process(c.startup())) == 0
    return engine


def _answers_alone(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        asked: list[bytes] = []

        def client() -> None:
            asked.extend(link.ask(c.get_random(16)) for _ in range(50))
            link.stop()

        thread = threading.Thread(target=client)
        thread.start()
        served = engine.serve(link.ours.fileno(), link.wake)
        thread.join(LIMIT_S)
        assert served.end is ServeEnd.WOKEN
        assert served.data == b""
        assert served.last == (bytes.fromhex("0000017b"), bytes(4))
        assert {c.code_of(response) for response in asked} == {0}
        assert len(set(asked)) == 50


def test_commands_that_change_nothing_are_answered_when_served(new_20: State) -> None:
    in_process(_answers_alone, new_20)


def _hands_back_input(state: State) -> None:
    engine = _started(state)
    whole = c.get_random(8)
    prefixed = bytes.fromhex("00000008 00") + len(whole).to_bytes(4, "big") + whole
    for came in (whole[:9], whole + whole, whole + b"!", prefixed, bytes(4), b"\xff" * 4160):
        with _link() as link:
            link.client.sendall(came)
            served = engine.serve(link.ours.fileno(), link.wake)
            assert served == (ServeEnd.INPUT, came, None)
    with _link() as link:
        link.client.close()
        assert engine.serve(link.ours.fileno(), link.wake) == (ServeEnd.INPUT, b"", None)


def test_input_is_handed_back_untouched_when_it_is_not_one_whole_plain_command(new_20: State) -> None:
    in_process(_hands_back_input, new_20)


def _hands_back_stored(state: State) -> None:
    engine, store = powered(TpmVersion.V2_0, state)
    assert c.code_of(engine.process(c.startup())) == 0
    with _link() as link:
        link.client.sendall(c.nv_define(NV_INDEX, 8))
        before = len(store.calls)
        served = engine.serve(link.ours.fileno(), link.wake)
        assert len(store.calls) > before
        assert served.end is ServeEnd.RESPONSE
        assert c.code_of(served.data) == 0
        assert served.last == (bytes.fromhex("0000012a"), bytes(4))
        # The caller sees to the answer, so that nothing is answered that was not looked after.
        link.client.setblocking(False)
        with pytest.raises(BlockingIOError):
            link.client.recv(1)
        store.failure = OSError("no space")
        link.client.setblocking(True)
        link.client.sendall(c.nv_write(NV_INDEX, bytes(range(8))))
        served = engine.serve(link.ours.fileno(), link.wake)
        assert served.end is ServeEnd.RESPONSE
        assert c.code_of(served.data) == Rc20.TPM_RC_FAILURE
        assert engine.store_error is store.failure


def test_response_is_handed_back_unsent_when_the_command_changed_state(new_20: State) -> None:
    in_process(_hands_back_stored, new_20)


def _hands_back_lockout(state: State) -> None:
    engine = _started(state)
    password = b"right"
    assert c.code_of(engine.process(c.da_define(NV_INDEX, password))) == 0
    # The first use in a boot is noted in NV, and the command to be sent again.
    assert c.code_of(engine.process(c.da_write(NV_INDEX, password, bytes(8)))) == Rc20.TPM_RC_RETRY
    while not parse_lockout(engine.process(GET_LOCKOUT)).locked:
        assert is_auth_fail_20(c.code_of(engine.process(c.da_read(NV_INDEX, b"wrong"))))
    with _link() as link:
        link.client.sendall(c.da_read(NV_INDEX, password))
        served = engine.serve(link.ours.fileno(), link.wake)
        assert served.end is ServeEnd.RESPONSE
        assert c.code_of(served.data) == Rc20.TPM_RC_LOCKOUT
        assert served.last == (bytes.fromhex("0000014e"), bytes.fromhex("00000921"))
        link.client.setblocking(False)
        with pytest.raises(BlockingIOError):
            link.client.recv(1)


def test_response_is_handed_back_unsent_when_the_tpm_is_locked(new_20: State) -> None:
    in_process(_hands_back_lockout, new_20)


def _takes_locality(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        codes: list[int] = []

        def client() -> None:
            for locality in (0, 2, 0):
                engine.set_default_locality(Locality(locality))
                codes.append(c.code_of(link.ask(c.pcr_reset(20))))
            link.stop()

        thread = threading.Thread(target=client)
        thread.start()
        assert engine.serve(link.ours.fileno(), link.wake).end is ServeEnd.WOKEN
        thread.join(LIMIT_S)
        assert codes == [Rc20.TPM_RC_LOCALITY, 0, Rc20.TPM_RC_LOCALITY]
    for wrong in (-1, 5):
        with pytest.raises(UsageError, match="locality"):
            engine.set_default_locality(Locality(wrong))


def test_default_locality_holds_from_the_next_command_when_another_thread_sets_it(new_20: State) -> None:
    in_process(_takes_locality, new_20)


def _keeps_rest(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        filled = 0
        for piece in (bytes(1000), bytes(1)):
            with suppress(BlockingIOError):
                while True:
                    filled += link.ours.send(piece, socket.MSG_DONTWAIT)
        link.client.sendall(c.get_random(48))
        served = engine.serve(link.ours.fileno(), link.wake)
        assert served.end is ServeEnd.RESPONSE
        assert c.code_of(served.data) == 0
        while filled:
            filled -= len(link.client.recv(filled))
        link.client.setblocking(False)
        with pytest.raises(BlockingIOError):
            link.client.recv(1)


def test_response_is_handed_back_when_the_peer_does_not_read(new_20: State) -> None:
    in_process(_keeps_rest, new_20)


def _needs_power(state: State) -> None:
    engine, _ = powered(TpmVersion.V2_0, state)
    with _link() as link:
        link.client.sendall(c.startup() + c.startup())
        assert engine.serve(link.ours.fileno(), link.wake).end is ServeEnd.INPUT
        link.stop()
        link.client.sendall(c.startup())
        # A wake-up goes first, so that a job never waits behind a client that asks without pause.
        assert engine.serve(link.ours.fileno(), link.wake) == (ServeEnd.WOKEN, b"", None)
        engine.power_off()
        with pytest.raises(EngineError, match="powered off"):
            engine.serve(link.ours.fileno(), link.wake)


def test_serving_is_refused_when_the_tpm_is_off_and_yields_when_it_is_woken(new_20: State) -> None:
    in_process(_needs_power, new_20)


def _keeps_last(state: State) -> None:
    engine = _started(state)
    with _link() as link:

        def client() -> None:
            link.client.sendall(c.get_random(16))
            poller = select.poll()
            poller.register(link.client, select.POLLIN)
            assert poller.poll(LIMIT_S * 1000)
            # With the response unread: the other end is told ECONNRESET.
            link.client.close()

        thread = threading.Thread(target=client)
        thread.start()
        served = engine.serve(link.ours.fileno(), link.wake)
        thread.join(LIMIT_S)
        assert served == (ServeEnd.INPUT, b"", (bytes.fromhex("0000017b"), bytes(4)))
        assert link.ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_last_command_is_told_when_the_peer_hangs_up_without_reading_its_response(new_20: State) -> None:
    in_process(_keeps_last, new_20)


def _ends_link(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        for descriptor in (1 << 20, link.wake):
            # No such descriptor, and no socket; something to read, so that poll returns.
            os.eventfd_write(link.wake, 1)
            quiet = os.eventfd(0, os.EFD_NONBLOCK)
            assert engine.serve(descriptor, quiet) == (ServeEnd.INPUT, b"", None)
            os.close(quiet)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Fewer than poll is given, which then fails.
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, most))
        assert engine.serve(link.ours.fileno(), link.wake) == (ServeEnd.INPUT, b"", None)


def test_link_is_over_and_nothing_spins_when_it_cannot_be_waited_for(new_20: State) -> None:
    in_process(_ends_link, new_20)


def _is_interrupted(state: State) -> None:
    engine = _started(state)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    with _link() as link:
        answers: list[bytes] = []
        serving = threading.get_ident()

        def client() -> None:
            for _ in range(100):
                signal.pthread_kill(serving, signal.SIGUSR1)
                answers.append(link.ask(c.get_random(8)))
            link.stop()

        thread = threading.Thread(target=client)
        thread.start()
        assert engine.serve(link.ours.fileno(), link.wake).end is ServeEnd.WOKEN
        thread.join(LIMIT_S)
        assert [len(answer) for answer in answers] == [20] * 100


def test_commands_are_answered_when_signals_come_meanwhile(new_20: State) -> None:
    in_process(_is_interrupted, new_20)


def _hands_back_power_commands(state: State) -> None:
    engine, _ = powered(TpmVersion.V2_0, state)
    shutdown = bytes.fromhex("8001 0000000c 00000145 0000")
    with _link() as link:
        for command in (c.startup(), c.da_lock_reset(), c.da_parameters(3, 1000, 1000), shutdown, c.startup()):
            engine.power_off()
            engine.power_on(state, origin=Origin.SAVED)
            if command != c.startup():
                assert c.code_of(engine.process(c.startup())) == 0
            link.client.sendall(command)
            served = engine.serve(link.ours.fileno(), link.wake)
            assert (served.end, c.code_of(served.data)) == (ServeEnd.RESPONSE, 0), command.hex()


def test_response_is_handed_back_when_power_or_lockout_may_have_changed(new_20: State) -> None:
    in_process(_hands_back_power_commands, new_20)


def _leaks_no_descriptor(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        before = len(os.listdir("/proc/self/fd"))
        answers = []

        def client() -> None:
            for _ in range(20):
                read, write = os.pipe()
                socket.send_fds(link.client, [c.get_random(8)], [read, write])
                os.close(read)
                os.close(write)
                answers.append(link.client.recv(8192))
            link.stop()

        thread = threading.Thread(target=client)
        thread.start()
        assert engine.serve(link.ours.fileno(), link.wake).end is ServeEnd.WOKEN
        thread.join(LIMIT_S)
        assert [len(answer) for answer in answers] == [20] * 20
        assert len(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_is_kept_when_a_client_sends_some_with_its_commands(new_20: State) -> None:
    in_process(_leaks_no_descriptor, new_20)


def _is_forked(state: State) -> None:
    engine = _started(state)
    with _link() as link:
        child = os.fork()
        if child == 0:
            try:
                engine.serve(link.ours.fileno(), link.wake)
            except EngineError:
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_serving_is_refused_when_the_process_is_a_fork_of_the_one_that_runs_the_tpm(new_20: State) -> None:
    in_process(_is_forked, new_20)
