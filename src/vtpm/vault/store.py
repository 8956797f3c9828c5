"""What any store of the vault must do: a few typed operations, each one durable transaction.

The Protocol only; implementations stand beside it. A store is used by one thread at a time (the committer's).
No operation may return before what it did survives power loss, and none may leave half of it behind.

Errors common to all operations:
    StoreError: nothing is acknowledged; it may or may not have become durable. Retry after `reopen`.
    StateError: what is stored is damaged, or forbids what was asked; kept as evidence, a retry is useless.
    NotFoundError: no such vTPM.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Protocol

from vtpm.errors import VtpmError
from vtpm.tpm.types import InstanceId, VtpmId
from vtpm.vault.holding import Holding, KnownVtpm
from vtpm.vault.launch_policy import LaunchImage
from vtpm.vault.records import Event, SaveAck, SavedState, SaveMark, SaveRequest, VtpmRecord
from vtpm.vault.root_record import AnchorValue

SaveOutcome = SaveAck | VtpmError
"""What became of one save of a group: durable, or refused for a reason of its own."""

MAX_EVENTS_LISTED = 1000
MAX_EVENTS_SEARCHED = 10_000
"""A search of the audit log goes no further back, so that it never holds up those who save."""


class Store(Protocol):
    """Durable registry, sealed state and audit log of one host.

    Operations that take an `event` append it to the audit log in the same transaction. Each that changes anything
    writes a root record for the new content in the same transaction (vtpm.vault.root_record); what is refused or fails
    leaves the record as it was.
    """

    @property
    def value(self) -> AnchorValue:
        """What stands for the present content, to be anchored."""
        ...

    @property
    def found_anchor(self) -> AnchorValue:
        """What was anchored when the store was opened, and accepted by it."""
        ...

    @property
    def prompt_version(self) -> int:
        """The last version since opening that must be anchored before it counts, 0 if there was none.

        So are creation, deletion, binding and its end, permits and their use, other wrapped keys, the taking of
        volatile state, the launch policy, and holdings. Saves and words of the life cycle may wait.
        """
        ...

    @property
    def transactions(self) -> int:
        """How many changing operations were begun since opening, whether they then changed anything or not."""
        ...

    def set_ancestors(self, base: AnchorValue, attempted: AnchorValue) -> None:
        """Say what the platform TPM has (`base`), and what it may have by now, for the records to come."""
        ...

    def reopen(self) -> None:
        """Drop whatever connection there is and make a fresh one, after a StoreError.

        Raises:
            StoreError: the store still cannot be reached; this may be called again.
            StateError: what is there now is damaged or is not this store.
        """
        ...

    def close(self) -> None:
        """Let go of the store. Nothing else may be called afterwards; a second close does nothing."""
        ...

    def create_vtpm(
        self,
        record: VtpmRecord,
        states: Sequence[SavedState] = (),
        *,
        event: Event | None = None,
        max_owned: int | None = None,
    ) -> None:
        """Add a vTPM without an instance: with an OPEN permit and state version 0, or with its first state.

        Args:
            states: what it begins with, PERMANENT among them and no VOLATILE; its permit is CONSUMED then.
            max_owned: how many vTPMs its owner may have with it; None for any number.
        Raises:
            UsageError: the name is not a valid one, or another field is out of its bounds.
            ConflictError: the name or the id is taken, or the owner has as many as that.
        """
        ...

    def get_vtpm(self, vtpm_id: VtpmId) -> VtpmRecord:
        """Return one vTPM's current record."""
        ...

    def find_vtpm(self, name: str) -> VtpmRecord:
        """Return the current record of the vTPM of this name."""
        ...

    def list_vtpms(
        self, *, owner_uid: int | None = None, after: str = "", limit: int | None = None
    ) -> Sequence[VtpmRecord]:
        """Return vTPMs by name.

        Args:
            owner_uid: of this owner alone.
            after: a name; those up to it are left out.
            limit: how many at most. None for all is for a manager that has nothing else to do.
        """
        ...

    def count_vtpms(self) -> Mapping[int, int]:
        """Return how many vTPMs each owner has, by uid; owners that have none are left out."""
        ...

    def owned_by(self, owner_uid: int, vtpm_ids: Collection[VtpmId]) -> Set[VtpmId]:
        """Return which of these vTPMs, at most MAX_EVENTS_LISTED, are this owner's."""
        ...

    def set_lifecycle(
        self, vtpm_id: VtpmId, lifecycle: str, *, expected: str | None = None, event: Event | None = None
    ) -> None:
        """Record the manager's word for the vTPM's state.

        Args:
            expected: if given, the word that must stand there now.
        Raises:
            ConflictError: another word stands there.
        """
        ...

    def set_wrapped_key(
        self, vtpm_id: VtpmId, wrapped_key: bytes, *, expected: bytes | None, event: Event | None = None
    ) -> None:
        """Replace the wrapped key, which must be `expected` (None: none yet) until now.

        Raises:
            ConflictError: another wrapped key stands there.
        """
        ...

    def delete_vtpm(self, vtpm_id: VtpmId, *, event: Event | None = None) -> None:
        """Destroy the vTPM's wrapped key, saved state and record. Its audit events stay.

        After a StoreError it may be gone already, and trying again then says NotFoundError.

        Raises:
            ConflictError: an instance is bound, or it is on its way from or to another host.
        """
        ...

    def holding(self, vtpm_id: VtpmId) -> KnownVtpm:
        """Return what this host holds of a vTPM, whether it has ever been here or not; see vtpm.vault.holding."""
        ...

    def list_holdings(self) -> Sequence[KnownVtpm]:
        """Return what is held of all vTPMs that have moved or are moving, by uuid."""
        ...

    def record_move(
        self,
        vtpm_id: VtpmId,
        before: Holding,
        after: Holding,
        *,
        arriving: tuple[VtpmRecord, Sequence[SavedState]] | None = None,
        event: Event | None = None,
    ) -> None:
        """Change a vTPM's holding, with all that belongs to the change, in one transaction.

        FROZEN: of a stopped vTPM, or of one whose instance stays bound; nothing of that is taken any more. HELD: it is
        stopped, under the holding's epoch. INERT: it is registered with its state. MOVED and ABSENT: its row, wrapped
        key and state are destroyed.

        Args:
            before: what is held until now.
            arriving: record (lifecycle "inert") and sealed states with INERT; volatile ones may be among them.
        Raises:
            ConflictError: something else is held by now, there is no such change, the vTPM runs, or its name is taken.
            UsageError: a field is out of its bounds, or record, states and holding do not fit one another.
        """
        ...

    def bind_instance(
        self,
        vtpm_id: VtpmId,
        instance_id: InstanceId,
        *,
        replaces: InstanceId | None = None,
        event: Event | None = None,
    ) -> None:
        """Make this the one instance whose loads and saves are accepted; it must load before it saves.

        Binding it again does nothing.

        Args:
            replaces: the instance bound until now, which the caller knows to be dead.
        Raises:
            ConflictError: an instance other than these is bound.
        """
        ...

    def unbind_instance(self, vtpm_id: VtpmId, instance_id: InstanceId, *, event: Event | None = None) -> None:
        """Take the binding back, so that nothing of this instance is accepted any more. Again does nothing.

        Raises:
            ConflictError: another instance is bound.
        """
        ...

    def issue_permit(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> bytes:
        """Return the permit to manufacture, durably issued; the same one each time until it is consumed.

        Args:
            engine_version: of the instance's engine, noted in the record.
        Returns:
            PERMIT_BYTES bytes.
        Raises:
            ConflictError: the instance is not the bound one.
            StateError: a state was committed once, so this vTPM is never manufactured again.
        """
        ...

    def read_state(self, vtpm_id: VtpmId) -> Sequence[SavedState]:
        """Return all saved state, by kind, and change nothing."""
        ...

    def load_state(self, vtpm_id: VtpmId, instance_id: InstanceId, engine_version: int) -> Sequence[SavedState]:
        """Hand all saved state to the bound instance, by kind. VOLATILE is taken: it is deleted here.

        Args:
            engine_version: of the instance's engine, noted in the record.
        Raises:
            ConflictError: the instance is not the bound one.
            StateError: permanent state is missing although one was committed.
        """
        ...

    def commit_saves(self, batch: Sequence[SaveRequest]) -> Sequence[SaveOutcome]:
        """Commit the saves of many vTPMs in one durable transaction, in order.

        Each is checked against the current record and stands or falls alone:
        a save equal to the instance's last (sequence number and digest) is acknowledged without effect;
        a permanent save removes VOLATILE state, which it makes out of date;
        the first permanent save must carry the issued permit and consumes it, all later ones must carry none.

        Returns:
            One outcome per save, in order. Refusals: NotFoundError; ConflictError (instance not bound);
            ProtocolError (sequence number or digest out of order, saved before loaded, permanent state
            deleted, out of bounds); StateError (epoch, version, permit).
        Raises:
            StoreError: the transaction as a whole is not acknowledged. Tried again, a save that did become
                durable is found to be a replay.
        """
        ...

    def last_save(self, vtpm_id: VtpmId) -> SaveMark | None:
        """Return the bound instance's last committed save, or None."""
        ...

    def list_images(self) -> Sequence[LaunchImage]:
        """Return the launch policy: the images that are known to this host, by kind and measurement."""
        ...

    def put_image(self, image: LaunchImage, *, event: Event | None = None) -> None:
        """Put an image into the launch policy, or in the place of what it has under this kind and measurement.

        Raises:
            UsageError: a field is out of its bounds.
            ConflictError: there are MAX_IMAGES.
        """
        ...

    def append_event(self, event: Event) -> int:
        """Append to the audit log and return the event's id."""
        ...

    def list_events(self, after_id: int = 0, limit: int = 100) -> Sequence[Event]:
        """Return at most `limit` (1 to 1000) events with ids above `after_id`, oldest first."""
        ...

    def last_event(self, vtpm_id: VtpmId, kind: str) -> Event | None:
        """Return the newest event of one kind about one vTPM among the last MAX_EVENTS_SEARCHED, or None."""
        ...
