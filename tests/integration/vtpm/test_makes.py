"""A vTPM of another make through the whole host: kept like any other, and never opened by the wrong make.

Everything is emulated, so a machine takes seconds to boot.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host, wait_ended
from tests.support.image.building import build_vtpmd
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import ConflictError, ImageError, UsageError, VtpmError
from vtpm.image.manifest import MANIFEST, decode, encode
from vtpm.tpm.types import Make, Startup, TpmVersion
from vtpm.wire.api import DomainName, ExportVtpm, LifeState

pytestmark = pytest.mark.timeout(300)

INDEX = "0x1500001"
NAMES = {Make.LIBTPMS: "own1", Make.SWTPM: "foreign1"}
FOLDERS = {Make.LIBTPMS: "vtpmd", Make.SWTPM: "swtpm"}
REFUSAL = {Make.LIBTPMS: "not swtpm's: it was written by another make", Make.SWTPM: "libtpms refuses its state"}
"""What the other make's program says of its state."""
OTHER = {Make.LIBTPMS: Make.SWTPM, Make.SWTPM: Make.LIBTPMS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vm")
    for make in Make:
        build_vtpmd(place, make)
    return place / "images"


@pytest.fixture
def host(images: Path) -> Iterator[Host]:
    with Host(settings=f'vm_accelerator = "tcg"\nvm_images = "{images}"\n') as host:
        yield host


def tool(tcti: str, *words: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run([words[0], "-T", tcti, *words[1:]], input=stdin, capture_output=True, timeout=60, check=True)
    return done.stdout


def write(client: ManagerClient, name: str) -> None:
    tcti = client.start(name, Startup.CLEAR).tcti
    tool(tcti, "tpm2_nvdefine", "-s", "4", INDEX)
    tool(tcti, "tpm2_nvwrite", "-i", "-", INDEX, stdin=name[:4].encode())


def read(client: ManagerClient, name: str) -> bytes:
    return tool(client.start(name, Startup.CLEAR).tcti, "tpm2_nvread", "-s", "4", INDEX)


def kill(client: ManagerClient, name: str) -> None:
    """Kill a running vTPM's machine, and stop what comes in its place."""
    pid = client.show(name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert wait_ended(pid, 30)
    if client.show(name).state is not LifeState.STOPPED:
        client.stop(name, force=True)


def exchange(images: Path) -> None:
    """Put each make's images in the other's place."""
    own, foreign, aside = (images / name for name in ("vtpmd", "swtpm", "aside"))
    own.rename(aside)
    foreign.rename(own)
    aside.rename(foreign)


def disguise(images: Path, make: Make) -> None:
    """Have the image in a make's place say that it is of that make, which makes it another image."""
    (folder,) = (images / FOLDERS[make]).iterdir()
    manifest = decode((folder / MANIFEST).read_bytes())
    words = [word for word in manifest.command_line.split() if not word.startswith("vtpm.make=")]
    other = dataclasses.replace(manifest, command_line=" ".join([*words, f"vtpm.make={make}"]))
    (folder / MANIFEST).write_bytes(encode(other))
    folder.rename(folder.with_name(other.measurement))


def test_state_is_kept_and_opened_by_its_own_make_alone(images: Path, tmp_path: Path) -> None:
    here = tmp_path / "images"
    shutil.copytree(images, here)
    with Host(settings=f'vm_accelerator = "tcg"\nvm_images = "{here}"\n') as host, host.client() as client:
        for make, name in NAMES.items():
            host.cli("create", name, "--domain", "qemu", "--make", make)
            write(client, name)
            kill(client, name)
        versions = {name: client.show(name).version for name in NAMES.values()}
        exchange(here)
        for make, name in NAMES.items():
            with pytest.raises(ImageError, match=f"is of the make {OTHER[make]}; a vTPM of the make {make} does"):
                client.start(name)
            disguise(here, make)
            with pytest.raises(VtpmError, match=REFUSAL[make]):
                client.start(name)
            assert client.show(name).state is LifeState.STOPPED
        shutil.rmtree(here)
        shutil.copytree(images, here)
        assert {name: client.show(name).version for name in NAMES.values()} == versions
        for make, name in NAMES.items():
            assert read(client, name) == name[:4].encode()
            shown = json.loads(host.cli("show", name, "--json").stdout)
            assert (shown["state"], shown["domain"], shown["make"]) == ("running", "qemu", make)
            client.stop(name)


def test_what_another_make_does_not_offer_is_refused_by_name(host: Host) -> None:
    with host.client() as client:
        with pytest.raises(UsageError, match="process domains do not run vTPMs of the make swtpm"):
            client.create("foreign1", make=Make.SWTPM)
        with pytest.raises(UsageError, match=r"vTPMs of the make swtpm are TPM 2\.0"):
            client.create("foreign1", TpmVersion.V1_2, DomainName.QEMU, make=Make.SWTPM)
        client.create("own1", domain=DomainName.QEMU)
        client.create("foreign1", domain=DomainName.QEMU, make=Make.SWTPM)
        with pytest.raises(ConflictError, match="is of the make swtpm; a backup is imported as"):
            client.export("foreign1", ExportVtpm(passphrase="long enough to be taken"))
        assert [(vtpm.name, vtpm.make) for vtpm in client.list()] == [("foreign1", "swtpm"), ("own1", "libtpms")]
