"""The host's settings: command line over TOML file over defaults that work. Pure but for reading.

For the programs that are started by hand: the starter and the manager, which must agree on them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vtpm.errors import UsageError
from vtpm.wire.paths import SYSTEM_STATE_DIR, default_image_dir, default_run_dir, default_state_dir

SYSTEM_CONFIG_DIR = Path("/etc/vtpm")
UID_BASE = 0x76740000
"""Of the host whose state is in its usual place; decision record 5."""
UID_SPACING = 2048
UID_BLOCKS = 1024
MANAGER_UID_OFFSET = 1
KEEPER_UID_OFFSET = 2
INSTANCE_UID_OFFSET = 0x100
EMBEDDED = "embedded"
DEFAULT_PCRS = "sha256:0,2,4,7"
"""Firmware code, option ROMs, boot loader, Secure Boot state: TCG PC Client Platform Firmware Profile."""


@dataclass(frozen=True)
class Config:
    """Settings of a host.

    Args:
        state_dir: what must last.
        run_dir: sockets.
        platform_tpm: "embedded", or a tpm2-tss TCTI such as "device:/dev/tpmrm0".
        launcher_port: device of the virtio-serial port behind which the launcher is; empty: it runs here.
        pcrs: PCRs that the root key is sealed under, at the first start; empty: see `root_pcrs`.
        services_pcr: PCR of a hardware TPM that the services are measured into before they run; 0: they are not.
        launch_pcr: PCR that what is launched for vTPMs is measured into; none of `pcrs`.
        new_images: "allow" or "refuse": what to do with software for vTPMs that was never seen; or "auto": the first
            with the embedded TPM, the second with hardware.
        vm_images: folder of images for vTPMs in virtual machines of their own; see `vtpm image build`.
        vm_accelerator: "kvm", "tcg", or "auto": kvm where a machine really runs under it.
        vm_memory_mib: memory of each such machine.
        zero_pcrs: "refuse" or "warn": what to do with a hardware TPM whose PCRs are all zero at set-up.
        fence_pcr: PCR, one of `pcrs`, that is extended once the root key is open; 0 for no fence.
        anchor: "each-commit", "interval", or "auto": the first for the embedded TPM, the second for hardware's wear.
        anchor_interval_s: seconds that an answered change waits for its anchor at most, in interval mode.
        migration_address: HOST:PORT where vTPMs come from peers; empty: nobody is let in.
        migration_retry_s: seconds after which a peer is asked again about a move that is not decided.
        uid_base: see decision record 5; used when started by root; 0 for what follows from state_dir.
        admin_uids: who, besides root, may see and do everything.
        create_gids: members of these groups (as their primary group) may have vTPMs of their own.
        platform_policy: what hosts must be that vTPMs move to and come from; see docs/migration.md.
        authorities: folder of certificates, PEM, of those who are trusted to enrol such hosts' platforms.
        max_vtpms_per_user: how many one user who is no administrator may have.
    """

    state_dir: Path
    run_dir: Path
    vm_images: Path = SYSTEM_STATE_DIR / "images"
    platform_tpm: str = "embedded"
    launcher_port: str = ""
    pcrs: str = ""
    services_pcr: int = 13
    launch_pcr: int = 12
    new_images: str = "auto"
    vm_accelerator: str = "auto"
    vm_memory_mib: int = 96
    zero_pcrs: str = "refuse"
    fence_pcr: int = 0
    anchor: str = "auto"
    anchor_interval_s: int = 60
    migration_address: str = ""
    migration_retry_s: int = 15
    uid_base: int = 0
    admin_uids: tuple[int, ...] = ()
    create_gids: tuple[int, ...] = ()
    max_vtpms_per_user: int = 100
    platform_policy: Path = SYSTEM_CONFIG_DIR / "platform-policy.toml"
    authorities: Path = SYSTEM_CONFIG_DIR / "authorities"

    @property
    def measures(self) -> bool:
        """Whether the services are measured: not into the embedded TPM, which protects nothing."""
        return self.services_pcr != 0 and self.platform_tpm != EMBEDDED

    @property
    def allows_new_images(self) -> bool:
        """Whether software for vTPMs that was never seen is allowed by itself."""
        return self.new_images == "allow" or (self.new_images == "auto" and self.platform_tpm == EMBEDDED)

    @property
    def root_pcrs(self) -> str:
        """PCRs for a new root key: those that are set, or the firmware's, and the services' where they are measured."""
        return self.pcrs or (f"{DEFAULT_PCRS},{self.services_pcr}" if self.measures else DEFAULT_PCRS)

    @property
    def bank(self) -> str:
        """Bank of the PCRs, such as "sha256"."""
        return self.root_pcrs.partition(":")[0]


_CHOICES = {
    "zero_pcrs": ("refuse", "warn"),
    "anchor": ("auto", "each-commit", "interval"),
    "new_images": ("auto", "allow", "refuse"),
    "vm_accelerator": ("auto", "kvm", "tcg"),
}
_MAY_BE_ZERO = ("fence_pcr", "services_pcr")
_FOR_SYSTEMS = range(8, 16)
"""PCRs that operating systems extend and only a reset of the platform resets."""
_VM_MEMORY_MIB = range(96, 1025)
"""The image does not boot in less than 96."""
_OTHER_LAUNCH_PCR = "Set launch_pcr to 12 or 14, whichever nothing else uses"
_NEVER_RESET = range(1, 16)
"""PCRs that only a reset of the platform resets, but for the firmware's own.
Spec: TCG PC Client Platform TPM Profile, PCR attributes."""


def read_arguments(arguments: Sequence[str]) -> Config:
    """Read the command line of vtpm-managerd, and the file that it names.

    Raises:
        UsageError: as load_config.
    """
    parser = argparse.ArgumentParser(
        prog="vtpm-managerd", description="Manages the virtual TPMs of this host, in the foreground."
    )
    parser.add_argument("--config", type=Path, help="TOML file of settings")
    parser.add_argument("--state-dir", type=Path, help="what must last (root: /var/lib/vtpm)")
    parser.add_argument("--run-dir", type=Path, help="sockets (root: /run/vtpm)")
    parser.add_argument("--platform-tpm", help="embedded, or a TCTI such as device:/dev/tpmrm0")
    args = parser.parse_args(arguments)
    return load_config(
        args.config, {"state_dir": args.state_dir, "run_dir": args.run_dir, "platform_tpm": args.platform_tpm}
    )


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
    if "vm_images" not in given:
        given["vm_images"] = _default_images(uid, given["state_dir"])
    given |= {name: given[name].absolute() for name in ("state_dir", "run_dir", "vm_images")}
    given |= {name: given[name].absolute() for name in ("platform_policy", "authorities") if name in given}
    config = Config(**given)
    _check_memory(config)
    _check_services_pcr(config)
    _check_launch_pcr(config)
    return config


def _default_images(uid: int, state_dir: Path) -> Path:
    try:
        return default_image_dir(uid, os.environ)
    except UsageError:
        # A user without a home, whose state has a place all the same.
        return state_dir / "images"


def _check_memory(config: Config) -> None:
    if config.vm_memory_mib not in _VM_MEMORY_MIB:
        raise UsageError(
            f"vm_memory_mib cannot be {config.vm_memory_mib}: it is from {_VM_MEMORY_MIB[0]} to {_VM_MEMORY_MIB[-1]}",
            next_step="Leave it at 96: a vTPM uses no more",
        )


def _check_services_pcr(config: Config) -> None:
    index = config.services_pcr
    if index and index not in _NEVER_RESET:
        raise UsageError(
            f"services_pcr cannot be {index}: a PCR from 1 to 15 is reset by a reboot alone",
            next_step="Leave it at 13, or name one that nothing else extends while the host runs",
        )
    if config.measures and index == config.fence_pcr:
        raise UsageError(f"services_pcr and fence_pcr cannot both be {index}", next_step="Use 13 and 14")


def _check_launch_pcr(config: Config) -> None:
    index = config.launch_pcr
    if index not in _FOR_SYSTEMS:
        raise UsageError(
            f"launch_pcr cannot be {index}: PCRs 0 to 7 are the firmware's, and those from 16 on can be reset",
            next_step=_OTHER_LAUNCH_PCR,
        )
    sealed_under = {int(number) for number in config.root_pcrs.partition(":")[2].split(",") if number.isdecimal()}
    uses = {"fence_pcr": {config.fence_pcr}, "pcrs": sealed_under}
    if config.measures:
        uses["services_pcr"] = {config.services_pcr}
    for name, indexes in uses.items():
        if index in indexes:
            raise UsageError(
                f"launch_pcr cannot be {index}, which {name} has: each new image would lock the root key out",
                next_step=_OTHER_LAUNCH_PCR,
            )


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
    least = 0 if name in _MAY_BE_ZERO else 1
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31 - 2**17:
        return value
    if kind.startswith("tuple") and isinstance(value, list) and all(type(entry) is int for entry in value):
        return tuple(value)
    raise UsageError(f"the configuration {path} has a value for {name} that is not of the form {kind}")
