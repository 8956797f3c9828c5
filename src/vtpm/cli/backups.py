"""Commands on backups: export, and import of a backup or of an swtpm's state.

The state directory of an swtpm is read here, with the rights of whoever asks; the manager has none to it.
"""

from __future__ import annotations

import base64
from pathlib import Path
from uuid import UUID

import click

from vtpm.cli.files import MAX_SECRET_BYTES, NewFile, read_bytes, read_text
from vtpm.cli.output import Output, print_json, print_line, printable, progress
from vtpm.cli.session import Session, confirm, json_option, name_argument, pass_session, yes_option
from vtpm.errors import UsageError
from vtpm.wire.api import ExportVtpm, ImportBackup, ImportSwtpm, Vtpm

_MAX_BACKUP_BYTES = 7 * 1024 * 1024
"""More than any backup has; the manager looks closer."""
_FILE = click.Path(path_type=Path)
_HEX, _BINARY = "hex", "binary"
_PBKDF2, _SHA512 = "pbkdf2", "sha512"


@click.command()
@name_argument
@click.option("--output", type=_FILE, required=True, metavar="FILE", help="A new file for the backup.")
@click.option("--recovery-key", type=_FILE, metavar="FILE", help="Holds the public recovery key that it is sealed to.")
@click.option("--passphrase-file", type=_FILE, metavar="FILE", help="Holds the passphrase that it is sealed to.")
@yes_option
@json_option
@pass_session
def export(
    session: Session, name: str, output: Path, recovery_key: Path | None, passphrase_file: Path | None, yes: bool
) -> None:
    """Write the stopped vTPM NAME into an encrypted backup.

    Sealed to this host's recovery key, unless another key or a passphrase is named.
    """
    if recovery_key is not None and passphrase_file is not None:
        raise UsageError("a backup is sealed to a recovery key or to a passphrase: give one of them")
    to = ExportVtpm(
        None if recovery_key is None else read_text("public recovery key", recovery_key),
        None if passphrase_file is None else read_text("passphrase", passphrase_file),
    )
    with session.connect() as manager:
        if not yes:
            confirm(
                f"Whoever has this file and what opens it has the TPM of {manager.show(name).name}. Export it?",
                refusal=f"{name} is not exported",
            )
        # Made before anything is exported, for what cannot be kept would only be noted in the audit log.
        with NewFile(output) as file, progress(f"Exporting {name}", session.output):
            made = manager.export(name, to)
            file.fill(base64.b64decode(made.backup))
    if session.output is Output.JSON:
        print_json(
            {
                "name": made.name,
                "uuid": made.uuid,
                "epoch": made.epoch,
                "exported_at": made.exported_at,
                "sealed_to": made.sealed_to,
                "file": str(output),
            }
        )
        return
    opener = f"recovery key {made.sealed_to}" if made.sealed_to else "the passphrase"
    print_line(f"{made.name} exported to {output}, uuid {made.uuid}, epoch {made.epoch}; it opens with {opener}")


@click.command("import")
@click.argument("file", type=_FILE, required=False)
@click.option("--name", help="The vTPM's name; by default that in the backup.")
@click.option("--recovery-key-file", type=_FILE, metavar="FILE", help="Holds the recovery key that opens the backup.")
@click.option("--passphrase-file", type=_FILE, metavar="FILE", help="Holds the passphrase of the backup, or of swtpm.")
@click.option("--original-is-dead", is_flag=True, help="Your word that what was backed up runs nowhere, nor ever will.")
@click.option("--from-swtpm", type=_FILE, metavar="DIR", help="Take over the state directory of an swtpm instead.")
@click.option("--key-file", type=_FILE, metavar="FILE", help="Holds the key that swtpm was given.")
@click.option("--key-format", type=click.Choice([_HEX, _BINARY]), help=f"How it stands there.  [default: {_HEX}]")
@click.option(
    "--kdf", type=click.Choice([_PBKDF2, _SHA512]), help=f"How swtpm stretched the passphrase.  [default: {_PBKDF2}]"
)
@click.option("--vm-uuid", type=click.UUID, help="The VM that the vTPM of an swtpm belongs to.")
@yes_option
@json_option
@pass_session
def import_vtpm(
    session: Session,
    file: Path | None,
    name: str | None,
    recovery_key_file: Path | None,
    passphrase_file: Path | None,
    original_is_dead: bool,
    from_swtpm: Path | None,
    key_file: Path | None,
    key_format: str | None,
    kdf: str | None,
    vm_uuid: UUID | None,
    yes: bool,
) -> None:
    """Make a vTPM of the backup FILE, or of the state directory of an swtpm.

    A backup keeps its uuid and goes on in a new epoch. An swtpm's state goes into a new vTPM; its directory is not
    changed, and must never be used by an swtpm again.
    """
    if (file is None) == (from_swtpm is None):
        raise UsageError("one thing is imported: the FILE of a backup, or the directory of --from-swtpm")
    if file is not None:
        _refuse("a backup", {"--key-file": key_file, "--key-format": key_format, "--kdf": kdf, "--vm-uuid": vm_uuid})
        vtpm = _import_backup(session, file, name, recovery_key_file, passphrase_file, original_is_dead, yes)
    else:
        assert from_swtpm is not None
        _refuse("an swtpm", {"--recovery-key-file": recovery_key_file, "--original-is-dead": original_is_dead or None})
        wanted = _read_swtpm(from_swtpm, name, key_file, key_format, passphrase_file, kdf, vm_uuid)
        vtpm = _import_swtpm(session, from_swtpm, wanted, yes)
    if session.output is Output.JSON:
        print_json(vtpm)
    else:
        print_line(f"{vtpm.name} imported, {vtpm.state}: TPM {vtpm.tpm_version}, uuid {vtpm.uuid}, epoch {vtpm.epoch}")


def _import_backup(
    session: Session,
    file: Path,
    name: str | None,
    recovery_key_file: Path | None,
    passphrase_file: Path | None,
    original_is_dead: bool,
    yes: bool,
) -> Vtpm:
    if (recovery_key_file is None) == (passphrase_file is None):
        raise UsageError("give --recovery-key-file or --passphrase-file, whichever opens the backup")
    if not original_is_dead:
        raise UsageError(
            "a backup is imported only when its original is dead: else there are two of one TPM",
            next_step="See that the original runs nowhere and never will, then say --original-is-dead",
        )
    wanted = ImportBackup(
        base64.b64encode(read_bytes("backup", file, _MAX_BACKUP_BYTES)).decode("ascii"),
        original_is_dead,
        name,
        None if recovery_key_file is None else read_text("recovery key", recovery_key_file),
        None if passphrase_file is None else read_text("passphrase", passphrase_file),
    )
    if not yes:
        confirm(
            "What its guest did after the backup is lost, and an original that still lives makes two of one TPM. "
            "Import it?",
            refusal=f"{file} is not imported",
        )
    with session.connect() as manager, progress(f"Importing {file}", session.output):
        return manager.import_backup(wanted)


def _read_swtpm(
    directory: Path,
    name: str | None,
    key_file: Path | None,
    key_format: str | None,
    passphrase_file: Path | None,
    kdf: str | None,
    vm_uuid: UUID | None,
) -> ImportSwtpm:
    from vtpm.tpm.types import StateKind
    from vtpm.vault.swtpm_blob import MAX_PASSPHRASE_BYTES, Kdf, KeyFormat, SwtpmKey
    from vtpm.vault.swtpm_state import read_state

    if name is None:
        raise UsageError("the vTPM that is made of an swtpm needs a name", next_step="Give --name")
    if key_file is not None and passphrase_file is not None:
        raise UsageError("swtpm has a key or a passphrase: give one of them")
    if (key_format and key_file is None) or (kdf and passphrase_file is None):
        raise UsageError("--key-format belongs to --key-file, and --kdf to --passphrase-file")
    key = None
    if key_file is not None:
        key = SwtpmKey.from_key_file(read_bytes("key", key_file, MAX_SECRET_BYTES), KeyFormat(key_format or _HEX))
    if passphrase_file is not None:
        # All bytes of it, a line break at its end too: so does swtpm.
        passphrase = read_bytes("passphrase", passphrase_file, MAX_PASSPHRASE_BYTES)
        key = SwtpmKey.from_passphrase(passphrase, Kdf(kdf or _PBKDF2))
    found = read_state(directory, key)
    permanent, savestate = (
        base64.b64encode(found.states.get(kind, b"")).decode("ascii")
        for kind in (StateKind.PERMANENT, StateKind.SAVESTATE)
    )
    return ImportSwtpm(name, found.tpm_version, permanent, savestate, vm_uuid, printable(str(directory.absolute())))


def _import_swtpm(session: Session, directory: Path, wanted: ImportSwtpm, yes: bool) -> Vtpm:
    if not yes:
        confirm(
            f"An swtpm that runs on {directory} again makes two of one TPM. Take it over?",
            refusal=f"{directory} is not taken over",
        )
    with session.connect() as manager, progress(f"Importing {directory}", session.output):
        return manager.import_swtpm(wanted)


def _refuse(what: str, options: dict[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise UsageError(f"{option} is of no use to import {what}")
