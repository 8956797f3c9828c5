"""A vTPM that lives in a virtual machine goes to another host, and into a process there. All is emulated."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import Host
from tests.support.image.building import build_vtpmd
from tests.support.two_hosts import Peers, known_to_each_other
from vtpm.tpm.types import Startup

INDEX = "0x1500001"
VALUE = b"kept"


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    build_vtpmd(tmp_path)
    images = f'vm_accelerator = "tcg"\nvm_images = "{tmp_path / "images"}"\nnew_images = "allow"\n'
    with tempfile.TemporaryDirectory(prefix="vtpm-two-") as folder, known_to_each_other(Path(folder), images) as made:
        yield made


def tool(tcti: str, *words: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run([words[0], "-T", tcti, *words[1:]], input=stdin, capture_output=True, timeout=60, check=True)
    return done.stdout


def read(host: Host) -> bytes:
    with host.client() as client:
        value = tool(client.start("web1", Startup.CLEAR).tcti, "tpm2_nvread", "-s", str(len(VALUE)), INDEX)
        client.stop("web1")
    return value


@pytest.mark.timeout(300)
def test_vtpm_in_a_machine_moves_and_lives_in_a_process_there_and_in_a_machine_again(peers: Peers) -> None:
    a, b = peers.hosts["host-a"], peers.hosts["host-b"]
    with a.client() as client:
        a.cli("create", "web1", "--domain", "qemu")
        tcti = client.start("web1", Startup.CLEAR).tcti
        tool(tcti, "tpm2_nvdefine", "-s", str(len(VALUE)), INDEX)
        tool(tcti, "tpm2_nvwrite", "-i", "-", INDEX, stdin=VALUE)
        client.stop("web1")
    # Its machine is among what was launched here, which the other host has to allow.
    peers.agree()
    a.cli("migrate", "web1", "--to", "host-b", "--domain", "process")
    with b.client() as client:
        assert client.show("web1").domain == "process"
    assert read(b) == VALUE
    b.cli("migrate", "web1", "--to", "host-a", "--domain", "qemu")
    with a.client() as client:
        assert client.show("web1").domain == "qemu"
    assert read(a) == VALUE
