"""Blocking calls in threads of their own, and questions that many share."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vtpm.errors import StateError, UnavailableError
from vtpm.wire.call_threads import CallThreads, SharedCall

pytestmark = pytest.mark.timeout(30)


def test_other_calls_are_made_when_all_threads_hang() -> None:
    async def run() -> None:
        hung, stuck = CallThreads("hung", 2), threading.Event()
        waiting = [asyncio.ensure_future(hung.run(stuck.wait, 20)) for _ in range(64)]
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1
            assert await asyncio.wait_for(CallThreads("others", 1).run(lambda *, a: a, a=2), 5) == 2
        finally:
            stuck.set()
            await asyncio.gather(*waiting)
            hung.close()

    asyncio.run(run())


def test_one_question_is_asked_when_many_come_while_it_hangs() -> None:
    async def run() -> None:
        asked, answer = [], asyncio.get_running_loop().create_future()

        async def ask() -> int:
            asked.append(1)
            return await asyncio.shield(answer)

        shared = SharedCall(ask, "the TPM")
        for _ in range(3):
            with pytest.raises(UnavailableError, match=r"the TPM does not answer within 0\.01 s"):
                await shared.within(0.01)
        late = [asyncio.ensure_future(shared.within(20)) for _ in range(3)]
        await asyncio.sleep(0)
        answer.set_result(7)
        assert await asyncio.gather(*late) == [7, 7, 7]
        assert len(asked) == 1
        assert await shared.within(20) == 7
        assert len(asked) == 2

    asyncio.run(run())


def test_whoever_asks_hears_why_when_asking_fails() -> None:
    async def run() -> None:
        async def ask() -> int:
            raise StateError("it is locked")

        shared = SharedCall(ask, "the TPM")
        for _ in range(2):
            with pytest.raises(StateError, match="it is locked"):
                await shared.within(20)

    asyncio.run(run())
