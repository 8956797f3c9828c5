"""vTPMs that move with their guests: both sides of it, as instances' links and the manager's services ask for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from vtpm.errors import VtpmError
from vtpm.manager.arrivals import Arrivals
from vtpm.manager.conversations import Conversations, Parties
from vtpm.manager.departures import Departures
from vtpm.manager.service import ManagerService
from vtpm.tpm.types import InstanceId, StateKind, VtpmId
from vtpm.vault.records import VtpmRecord
from vtpm.vault.rules import FROZEN

_log = logging.getLogger("vtpm.manager")


class GuestMoves:
    """LiveMoves; see the module.

    Args:
        vtpms: whose vTPMs these are.
        talk: with peers; its `settled` is set here.
        parties: whom this host knows.
    """

    def __init__(self, vtpms: ManagerService, talk: Conversations, parties: Parties) -> None:
        self._vtpms = vtpms
        self.departures = Departures(vtpms, talk, parties)
        self.arrivals = Arrivals(vtpms, talk, parties)
        talk.settled = self.settled

    async def depart(self, vtpm_id: VtpmId, instance_id: InstanceId, volatile: bytes) -> bytes:
        """See LiveMoves."""
        return await self.departures.depart(vtpm_id, instance_id, volatile)

    async def take_back(self, vtpm_id: VtpmId) -> None:
        """See LiveMoves."""
        await self.departures.take_back(vtpm_id)

    async def arrive(self, vtpm_id: VtpmId, sealed: bytes) -> Mapping[StateKind, bytes]:
        """See LiveMoves."""
        return await self.arrivals.arrive(vtpm_id, sealed)

    def wanted(self, vtpm_id: VtpmId) -> None:
        """See LiveMoves."""
        self.arrivals.wanted(vtpm_id)

    def expects(self, vtpm_id: VtpmId) -> bool:
        """See LiveMoves."""
        return self.arrivals.expects(vtpm_id)

    async def ended(self, vtpm_id: VtpmId, instance_id: InstanceId, how: str) -> None:
        """See LiveMoves."""
        await self.arrivals.ended(vtpm_id, instance_id, how)

    async def all_ended(self, how: str) -> None:
        """See LiveMoves."""
        await self.arrivals.all_ended(how)

    def settled(self, vtpm_id: VtpmId) -> None:
        """Another right may be held of the vTPM by now."""
        self._vtpms.look_again(vtpm_id)
        self.departures.settled(vtpm_id)
        self.arrivals.settled(vtpm_id)

    async def take_up(self) -> None:
        """See LiveMoves."""
        # At the same time: one that hangs is not to keep the others' guests waiting.
        await asyncio.gather(*(self._take_up(record) for record in self._vtpms.left_passing()))
        for vtpm_id, running in list(self._vtpms.running.items()):
            if running.link.wanted:
                # It was released to a manager that had no time to say so, and asked before this was here.
                self.wanted(vtpm_id)

    async def _take_up(self, record: VtpmRecord) -> None:
        try:
            if record.lifecycle == FROZEN:
                await self._vtpms.take_up_frozen(record)
                await self.departures.take_up(record.id)
            else:
                await self.arrivals.take_up(record)
        except VtpmError as error:
            _log.error("%s: its instance, which was to go on with its guest, is ended: %s", record.name, error)

    def close(self) -> None:
        """Let go of what is under way."""
        self.departures.close()
        self.arrivals.close()
