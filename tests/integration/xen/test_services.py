"""The services in dom0: under the machine's own TPM they start, and run confined vTPMs as on any other host."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.guest import swtpm_emulator
from tests.support.in_guest import TSS_GROUP, with_vtpm
from tests.support.xen import DOM0, XenHost

LOG = "/run/managerd.log"
START_TIMEOUT_S = 180
PROGRAMS = {
    "vtpm": "vtpm.cli.main",
    "vtpm-managerd": "vtpm.starter.main",
}
# The services compile themselves each time: they take no compiled files from where others might write.
pytestmark = pytest.mark.timeout(300)
SETUP = f"""
mkdir -p /var/lib/vtpm /run/vtpm
chgrp {TSS_GROUP} /dev/tpmrm0
chmod 660 /dev/tpmrm0
setsid vtpm-managerd --platform-tpm device:/dev/tpmrm0 > {LOG} 2>&1 &
echo $! > /run/managerd.pid
"""
READY = f"until grep -q 'ready: ' {LOG} || ! test -d /proc/$(cat /run/managerd.pid); do sleep 1; done; cat {LOG}"


def cli(host: XenHost, *arguments: str) -> Any:
    return json.loads(host.check(shlex.join(["vtpm", *arguments, "--json"]), START_TIMEOUT_S))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenHost]:
    folder = tmp_path_factory.mktemp("xen")
    spec = replace(DOM0, name="dom0-vtpm", setup=DOM0.setup + SETUP)
    with (
        swtpm_emulator(folder / "tpm") as tpm,
        XenHost(folder, dom0=with_vtpm(spec, PROGRAMS), tpm_control_socket=tpm) as host,
    ):
        assert "ready: " in host.check(READY, START_TIMEOUT_S)
        yield host


def test_root_key_is_sealed_when_dom0_has_the_machines_tpm(host: XenHost) -> None:
    platform = cli(host, "status")["platform"]
    assert platform["tcti"] == "device:/dev/tpmrm0"
    assert platform["protection"] == "sealed"


@pytest.mark.parametrize("version", ["2.0", "1.2"])
def test_vtpm_runs_confined_when_its_host_is_dom0(host: XenHost, version: str) -> None:
    name = f"tpm-{version}"
    cli(host, "create", name, "--tpm-version", version)
    started = cli(host, "start", name)
    assert (started["state"], started["tpm_version"]) == ("running", version)
    status = dict(line.split(":\t", 1) for line in host.check(f"cat /proc/{started['pid']}/status").splitlines())
    assert status["Seccomp"] == "2"
    assert int(status["CapBnd"], 16) == 0
    # A process id in a namespace of its own besides.
    assert status["NSpid"].split() == [str(started["pid"]), "1"]
