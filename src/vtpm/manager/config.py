"""The manager's settings: command line over TOML file over defaults that work. Pure but for reading."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vtpm.errors import UsageError
from vtpm.vault.anchor import AnchorPolicy
from vtpm.wire.paths import default_run_dir, default_state_dir

UID_BASE = 0x76740000
"""Of the host whose state is in its usual place; decision record 5."""
UID_SPACING = 2048
UID_BLOCKS = 1024
MANAGER_UID_OFFSET = 1
KEEPER_UID_OFFSET = 2
INSTANCE_UID_OFFSET = 0x100


@dataclass(frozen=True)
class Config:
    """Settings of a host.

    Args:
        state_dir: what must last.
        run_dir: sockets.
        platform_tpm: "embedded", or a tpm2-tss TCTI such as "device:/dev/tpmrm0".
        pcrs: PCRs that the root key is sealed under, at the first start.
        zero_pcrs: "refuse" or "warn": what to do with a hardware TPM whose PCRs are all zero at set-up.
        fence_pcr: PCR, one of `pcrs`, that is extended once the root key is open; 0 for no fence.
        anchor: "each-commit", "interval", or "auto": the first for the embedded TPM, the second for hardware's wear.
        anchor_interval_s: seconds that an answered change waits for its anchor at most, in interval mode.
        uid_base: see decision record 5; used when started by root; 0 for what follows from state_dir.
        admin_uids: who, besides root, may see and do everything.
        create_gids: members of these groups (as their primary group) may have vTPMs of their own.
    """

    state_dir: Path
    run_dir: Path
    platform_tpm: str = "embedded"
    pcrs: str = "sha256:0,2,4,7"
    zero_pcrs: str = "refuse"
    fence_pcr: int = 0
    anchor: str = "auto"
    anchor_interval_s: int = 60
    uid_base: int = 0
    admin_uids: tuple[int, ...] = ()
    create_gids: tuple[int, ...] = ()

    @property
    def anchor_policy(self) -> AnchorPolicy:
        """When changes are anchored in the platform TPM."""
        embedded = self.platform_tpm == "embedded"
        each = self.anchor == "each-commit" or (self.anchor == "auto" and embedded)
        return AnchorPolicy(None if each else float(self.anchor_interval_s))


_CHOICES = {"zero_pcrs": ("refuse", "warn"), "anchor": ("auto", "each-commit", "interval")}


def default_uid_base(state_dir: Path) -> int:
    """Return the first user id of a host by the place of its state, so that two hosts on a machine have their own."""
    if state_dir == default_state_dir(0, {}):
        return UID_BASE
    place = int.from_bytes(hashlib.sha256(os.fsencode(state_dir)).digest()[:4], "big")
    return UID_BASE + UID_SPACING * (1 + place % (UID_BLOCKS - 1))


def is_default_uid_base(base: int) -> bool:
    """Whether `default_uid_base` gives this for some place: a state that was moved keeps its user ids."""
    return base in range(UID_BASE, UID_BASE + UID_SPACING * UID_BLOCKS, UID_SPACING)


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Put the settings together.

    Args:
        path: TOML file, or None for none.
        overrides: settings from the command line; None means not given.
    Raises:
        UsageError: the file cannot be read, or a setting is unknown or of the wrong type; the message names it.
    """
    uid = os.geteuid()
    given = _read(path) if path is not None else {}
    given |= {name: value for name, value in overrides.items() if value is not None}
    if "state_dir" not in given:
        given["state_dir"] = default_state_dir(uid, os.environ)
    if "run_dir" not in given:
        given["run_dir"] = default_run_dir(uid, os.environ)
    given |= {name: given[name].absolute() for name in ("state_dir", "run_dir")}
    return Config(**given)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} is not TOML: {error}") from error
    kinds = {field.name: str(field.type) for field in fields(Config)}
    return {name: _setting(path, name, value, kinds.get(name)) for name, value in content.items()}


def _setting(path: Path, name: str, value: object, kind: str | None) -> object:
    if kind is None:
        raise UsageError(f"the configuration {path} has the unknown setting {name}")
    if kind == "Path" and isinstance(value, str):
        return Path(value)
    if kind == "str" and isinstance(value, str) and value in _CHOICES.get(name, (value,)):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31 - 2**17:
        return value
    if kind.startswith("tuple") and isinstance(value, list) and all(type(entry) is int for entry in value):
        return tuple(value)
    raise UsageError(f"the configuration {path} has a value for {name} that is not of the form {kind}")
