"""QEMU's command line: what it says of the TPM and the VM's uuid, and the same with a vTPM added. Pure; for cli/run.py.

QEMU takes options with one dash or two, their argument always as the next word, properties separated by commas, and a
comma inside a value doubled. Source: QEMU 7.2, vl.c, util/keyval.c, hw/smbios/smbios.c (type 1 sets the VM's uuid).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from uuid import UUID

from vtpm.errors import UsageError
from vtpm.tpm.types import TpmVersion
from vtpm.wire.api import Vtpm

CHARDEV_ID = "vtpm-chr0"
TPMDEV_ID = "vtpm0"

_X86_DEVICES = {TpmVersion.V2_0: "tpm-crb", TpmVersion.V1_2: "tpm-tis"}
_PROGRAM = re.compile(r"qemu-system-(?P<architecture>[a-z0-9_]+)")
_X86 = frozenset({"x86_64", "i386"})
_SPAPR = frozenset({"ppc64", "ppc64le"})


def check_command(command: Sequence[str], vtpm: Vtpm) -> None:
    """Refuse a command to which `vtpm` cannot be added. Nothing needs to run for this.

    Args:
        command: program and arguments.
    Raises:
        UsageError: it has a TPM of its own, a TPM device with no back-end, or another VM's uuid.
    """
    if any(True for _ in _arguments(command, "tpmdev")):
        raise UsageError(
            "the command has a TPM already: -tpmdev",
            next_step="Leave -tpmdev and its -chardev out: vtpm run adds them",
        )
    for model, backend in _tpm_devices(command):
        if backend != TPMDEV_ID:
            raise UsageError(
                f"the command's -device {model} uses tpmdev={backend or '(none)'}",
                next_step=f"Write tpmdev={TPMDEV_ID}, which is what vtpm run adds, or leave -device {model} out",
            )
    if vtpm.vm_uuid is None:
        return
    for text in _vm_uuids(command):
        if _uuid(text) != vtpm.vm_uuid:
            raise UsageError(
                f"{vtpm.name} belongs to the VM {vtpm.vm_uuid}, the command is for the VM {text}",
                next_step="Use that VM's own vTPM, or leave -uuid out: vtpm run adds it",
            )


def build_command(command: Sequence[str], vtpm: Vtpm) -> list[str]:
    """Return the command with the vTPM's back-end, device and VM uuid added at its end.

    Args:
        command: program and arguments.
        vtpm: running, so with a control socket.
    Raises:
        UsageError: as check_command.
    """
    check_command(command, vtpm)
    added = [
        *("-chardev", f"socket,id={CHARDEV_ID},path={escape_value(vtpm.control_socket)}"),
        *("-tpmdev", f"emulator,id={TPMDEV_ID},chardev={CHARDEV_ID}"),
    ]
    if not list(_tpm_devices(command)):
        added += ["-device", f"{device_model(command[0], vtpm.tpm_version)},tpmdev={TPMDEV_ID}"]
    if vtpm.vm_uuid is not None and not list(_vm_uuids(command)):
        added += ["-uuid", str(vtpm.vm_uuid)]
    return [*command, *added]


def device_model(program: str, tpm_version: TpmVersion) -> str:
    """Return the TPM device of the machine that `program` emulates; an unknown program is taken to be x86."""
    match = _PROGRAM.fullmatch(PurePath(program).name)
    architecture = match["architecture"] if match else "x86_64"
    if architecture in _X86:
        return _X86_DEVICES[tpm_version]
    return "tpm-spapr" if architecture in _SPAPR else "tpm-tis-device"


def detaches(command: Sequence[str]) -> bool:
    """Return whether the command comes back while its QEMU goes on: -daemonize."""
    return any(word in ("-daemonize", "--daemonize") for word in command[1:])


def escape_value(text: str) -> str:
    """Return a value as QEMU's option parser wants it: commas doubled."""
    return text.replace(",", ",,")


def _arguments(command: Sequence[str], option: str) -> Iterator[str]:
    # Taken word by word, without knowing which options have an argument: an argument that looks like one of these
    # options is refused rather than an option overlooked.
    names = (f"-{option}", f"--{option}")
    for index in range(1, len(command)):
        if command[index] in names:
            yield command[index + 1] if index + 1 < len(command) else ""


def _properties(argument: str) -> tuple[str, dict[str, str]]:
    # QEMU itself refuses what is malformed here; what is not seen here is not added to.
    if argument.startswith("{"):
        try:
            members = json.loads(argument)
        except (ValueError, RecursionError):
            return "", {}
        properties = {str(key): str(value) for key, value in members.items()}
    else:
        # Split at single commas alone; an escaped comma is two.
        parts = [part.replace(",,", ",") for part in re.findall(r"(?:[^,]|,,)+", argument)]
        pairs = (part.partition("=") for part in parts)
        properties = {key: value for key, separator, value in pairs if separator}
        if parts and "=" not in parts[0]:
            properties["driver"] = parts[0]
    return properties.get("driver", ""), properties


def _tpm_devices(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument in _arguments(command, "device"):
        model, properties = _properties(argument)
        if model.startswith("tpm-"):
            yield model, properties.get("tpmdev", "")


def _vm_uuids(command: Sequence[str]) -> Iterator[str]:
    yield from _arguments(command, "uuid")
    for argument in _arguments(command, "smbios"):
        _, properties = _properties(argument)
        if properties.get("type") == "1" and "uuid" in properties:
            yield properties["uuid"]


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
