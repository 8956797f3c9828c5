"""Who may do what, by the caller's uid and gid as the kernel says. Pure; the manager's alone."""

from __future__ import annotations

from dataclasses import dataclass

from vtpm.errors import AccessDeniedError, NotFoundError
from vtpm.vault.records import VtpmRecord


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        uid, gid: of the peer's process when it connected.
        is_admin: root, the manager's own user, or one that the configuration names: sees and does everything.
        may_create: whether it may have vTPMs of its own.
        max_vtpms: how many, unless it is an administrator.
    """

    uid: int
    gid: int
    is_admin: bool
    may_create: bool = False
    max_vtpms: int = 0

    def require_admin(self, what: str) -> None:
        """Raise AccessDeniedError unless the caller is an administrator."""
        if not self.is_admin:
            raise AccessDeniedError(f"uid {self.uid} may not {what}", next_step="Ask as root")


def may_create(caller: Caller) -> None:
    """Raise AccessDeniedError unless the caller may have vTPMs."""
    if not (caller.is_admin or caller.may_create):
        raise AccessDeniedError(
            f"uid {caller.uid} may not create vTPMs on this host",
            next_step="Ask as root, or have create_gids in the configuration name one of your groups",
        )


def sees(caller: Caller, record: VtpmRecord) -> bool:
    """Whether a vTPM is the caller's to see."""
    return caller.is_admin or caller.uid == record.owner_uid


def require_owner(caller: Caller, record: VtpmRecord) -> None:
    """Raise NotFoundError unless the vTPM is the caller's: to others it does not exist."""
    if not sees(caller, record):
        # Word for word what the store says of a name that nobody has: the answer must not tell the two apart.
        raise NotFoundError(f"there is no vTPM {record.name!r}")
