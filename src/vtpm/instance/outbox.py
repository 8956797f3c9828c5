"""What waits to be sent over the manager link, bounded however long no manager reads. Pure; ManagerChannel locks it.

Of facts (power, client, lockout) only the last is of use, so a newer one takes the place of one that has not begun to
leave. Notes are causes for a log: a few wait, the rest is counted. A question that was given up leaves nothing behind.
What is left are answers to the manager's own requests, which a manager that does not read does not make.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vtpm.wire.framing import encode_frame
from vtpm.wire.manager_link import ClientChanged, LockoutChanged, Note, PowerChanged, ToManager, Wanted, encode_message

MAX_NOTES = 32
_FACTS = (PowerChanged, ClientChanged, LockoutChanged, Wanted)


@dataclass
class _Waiting:
    message: ToManager
    left: memoryview = field(repr=False)
    begun: bool = False


class Outbox:
    """See the module."""

    def __init__(self) -> None:
        self._waiting: deque[_Waiting] = deque()
        self._dropped_notes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, message: ToManager) -> None:
        """Have a message sent after those that wait, and in place of those that it makes needless."""
        if isinstance(message, Note) and self._notes() >= MAX_NOTES:
            self._dropped_notes += 1
            return
        if isinstance(message, _FACTS):
            self._drop(lambda other: type(other) is type(message))
        self._append(message)

    def ask(self, messages: Iterable[ToManager]) -> None:
        """Have the messages of one question sent."""
        for message in messages:
            self._append(message)

    def give_up(self, messages: Iterable[ToManager]) -> None:
        """Drop what has not begun to leave of a question."""
        unwanted = {id(message) for message in messages}
        self._drop(lambda other: id(other) in unwanted)

    def clear(self) -> None:
        """Drop all that has not begun to leave; a frame that has must end, or its rest would swallow the next."""
        self._drop(lambda _: True)

    @property
    def head(self) -> memoryview:
        """The bytes to send next. Only when there are some."""
        return self._waiting[0].left

    def heads(self, most: int) -> list[memoryview]:
        """The bytes to send next, of up to so many messages."""
        return [one.left for one in itertools.islice(self._waiting, most)]

    def sent(self, count: int) -> None:
        """Say that this many bytes of `head`, or of `heads` together, have left."""
        while count:
            first = self._waiting[0]
            first.begun = True
            part = min(count, len(first.left))
            first.left = first.left[part:]
            count -= part
            if not first.left:
                self._waiting.popleft()
        if self._dropped_notes and not self._notes():
            self._append(Note(f"{self._dropped_notes} more notes were dropped, for no manager read them"))
            self._dropped_notes = 0

    def _notes(self) -> int:
        return sum(isinstance(one.message, Note) for one in self._waiting)

    def _append(self, message: ToManager) -> None:
        self._waiting.append(_Waiting(message, memoryview(encode_frame(encode_message(message)))))

    def _drop(self, is_needless: Callable[[ToManager], bool]) -> None:
        self._waiting = deque(one for one in self._waiting if one.begun or not is_needless(one.message))
