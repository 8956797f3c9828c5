"""The services are measured into the platform TPM before they run, and the root key is sealed under what they are."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fault.writer import Writer, closing, data_socket
from tests.support.host import Host
from tests.support.installation import Installation
from tests.support.processes import run_as_other_user, short_directory
from tests.support.swtpm import SwtpmPlatform
from vtpm.client.manager_client import ManagerClient
from vtpm.confine.interpreter import ENVIRONMENT
from vtpm.errors import PlatformTpmError
from vtpm.measurement.closure import find_closure
from vtpm.measurement.record import Record, boot_dir, predict, read_record, write_record
from vtpm.starter.main import _ENVIRONMENT

pytestmark = pytest.mark.timeout(180)
ZERO = bytes(32)
LOCKED = "PCRs changed in bank sha256: 13"


def _record(host: Host) -> Record:
    record = read_record(boot_dir(host.run_dir))
    assert record is not None
    return record


def _power_off(host: Host) -> None:
    """End all services at once, as a host that loses its power does."""
    for service in ("manager", "keeper", "launcher"):
        host.kill(service)


def _write(writer: Writer) -> None:
    writer.start()
    writer.await_writes(3)
    assert writer.stop(), writer.error


def _refused(client: ManagerClient, words: str = LOCKED) -> None:
    with pytest.raises(PlatformTpmError, match=words):
        client.start("web")


def test_services_are_extended_once_in_a_boot_however_often_they_start(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        digest = _record(host).running
        client.create("web")
        status = client.status()
        assert status.measured is not None
        assert (status.measured.pcr, status.measured.measurement, status.measured.note) == (13, digest, "")
        assert status.platform is not None
        assert status.platform.pcrs == "sha256:0,2,4,7,13"
        assert f"{digest}, measured into PCR 13" in host.cli("status").stdout
        for end in (
            host.stop_manager,
            lambda: host.kill("manager"),
            lambda: (host.stop_manager(), host.kill("keeper")),
            lambda: (host.kill("keeper"), host.kill("manager"), host.kill("launcher")),
            host.shut_down,
        ):
            end()
            host.start()
            assert client.start("web").name == "web"
            client.stop("web")
        host.shut_down()
        assert platform.pcr(13) == predict("sha256", ZERO, (digest,))
        assert host.log().count("measured into PCR 13") == 1
        platform.reboot()
        host.start()
        client.start("web")
        client.stop("web")
        host.shut_down()
        assert platform.pcr(13) == predict("sha256", ZERO, (digest,))


def test_root_key_is_locked_after_a_reboot_when_a_module_changed_and_opens_when_that_was_allowed(
    platform: SwtpmPlatform, installed: Installation
) -> None:
    with Host(platform.tcti, programs=installed.programs) as host, host.client() as client:
        client.create("web")
        old = _record(host).running
        _power_off(host)

        # Somebody changed the services, and nobody allowed it.
        source = installed.module("vtpm.manager.lifecycle").read_bytes()
        installed.change("vtpm.manager.lifecycle")
        platform.reboot()
        host.start()
        _refused(client)
        assert _record(host).running == installed.measurement() != old
        _power_off(host)

        # As they were: at the next boot, since a PCR cannot be taken back in this one.
        installed.module("vtpm.manager.lifecycle").write_bytes(source)
        host.start()
        _refused(client)
        _power_off(host)
        platform.reboot()
        host.start()
        client.start("web")
        client.stop("web")

        # An upgrade: installed, allowed, and then booted.
        installed.change("vtpm.manager.lifecycle")
        predicted = json.loads(host.cli("policy", "predict", "--services", "--json").stdout)
        new = installed.measurement()
        assert predicted["13"] == predict("sha256", ZERO, (new,)).hex()
        host.cli("policy", "allow", "next", "--services")
        _power_off(host)
        platform.reboot()
        host.start()
        client.start("web")
        client.stop("web")
        host.cli("policy", "drop", "set-up")
        _power_off(host)

        # And back to the version before, which is allowed no more.
        installed.module("vtpm.manager.lifecycle").write_bytes(source)
        platform.reboot()
        host.start()
        _refused(client)


def test_upgraded_manager_is_measured_through_the_keeper_and_running_vtpms_lose_nothing(
    platform: SwtpmPlatform, installed: Installation
) -> None:
    with Host(platform.tcti, programs=installed.programs) as host, host.client() as client, ExitStack() as stack:
        client.create("web")
        writer = Writer(data_socket(client.start("web").tcti))
        stack.enter_context(closing([writer]))
        old = _record(host).running
        _write(writer)
        installed.change("vtpm.manager.lifecycle")
        host.stop_manager()
        host.start()
        _write(writer)
        writer.check()
        new = installed.measurement()
        assert _record(host).digests == (old, new)
        assert "other services than at the start of this boot" in host.log()
        assert "The services were upgraded in this boot" in host.cli("status").stdout
        # What they were once does not come back by starting it again.
        host.cli("policy", "allow", "after-reboot", "--services")
        client.stop("web")
        _power_off(host)
        assert platform.pcr(13) == predict("sha256", ZERO, (old, new))
        host.start()
        _refused(client)
        _power_off(host)
        platform.reboot()
        host.start()
        client.start("web")
        client.stop("web")


def test_root_key_is_locked_when_the_record_is_gone_or_forged_or_the_pcr_was_extended_by_another(
    platform: SwtpmPlatform,
) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        client.create("web")
        record = _record(host)
        folder = boot_dir(host.run_dir)

        def started(change) -> str:  # type: ignore[no-untyped-def]
            _power_off(host)
            platform.reboot()
            host.start()
            client.start("web")
            client.stop("web")
            _power_off(host)
            change()
            host.start()
            _refused(client)
            return host.cli("status").stdout

        status = started((folder / "record.json").unlink)
        assert "The services are not vouched for: the record of this boot is gone" in status
        forged = Record(
            **{**vars(record), "reset_count": record.reset_count + 2, "start": b"\1" * 32, "fingerprint": "0" * 64}
        )
        status = started(lambda: write_record(folder, forged))
        assert (
            "The services are not vouched for: PCR 13 held what the record of this boot does not account for" in status
        )
        refused = host.cli("policy", "predict", "--services", check=False)
        assert refused.returncode != 0
        status = started(lambda: platform.extend(13))
        assert "does not account for" in status
        assert "does not open in this boot" in host.log()
        started(lambda: (folder / "record.json").write_text("{}"))
        assert "is damaged" in host.log()


def test_second_start_changes_nothing_when_a_manager_serves(platform: SwtpmPlatform, installed: Installation) -> None:
    with Host(platform.tcti) as host:
        installed.change("vtpm.manager.lifecycle")
        again = subprocess.run(
            [
                installed.programs / "vtpm-managerd",
                *("--config", host.config, "--platform-tpm", host.platform_tpm),
                *("--state-dir", host.state_dir, "--run-dir", host.run_dir),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert again.returncode == 4, again.stderr
        record = _record(host)
        host.shut_down()
        assert platform.pcr(13) == predict("sha256", ZERO, (record.running,))


def test_planted_compiled_file_is_not_executed_when_the_services_are_measured(
    platform: SwtpmPlatform, installed: Installation
) -> None:
    with short_directory() as folder:
        folder.chmod(0o777)
        modules = ("vtpm.manager.lifecycle", "vtpm.keeper.custody", "vtpm.launcher.slot", "vtpm.instance.worker")
        before = installed.measurement()
        for name in modules:
            installed.plant(name, f"open('{folder}/{name}', 'a').close()")
        assert installed.measurement() == before

        def run(platform_tpm: str) -> set[str]:
            with Host(platform_tpm, programs=installed.programs) as host, host.client() as client:
                client.create("web")
                client.start("web")
            executed = {path.name for path in folder.iterdir()}
            for path in folder.iterdir():
                path.unlink()
            return executed

        assert run(platform.tcti) == set()
        # That it would be, otherwise: the services that are not measured take it.
        assert run("embedded") >= {"vtpm.manager.lifecycle", "vtpm.keeper.custody", "vtpm.launcher.slot"}


def test_nothing_in_the_environment_names_code_when_the_services_are_measured(platform: SwtpmPlatform) -> None:
    with short_directory() as folder:
        names = ("LD_LIBRARY_PATH", "GCONV_PATH", "OPENSSL_MODULES", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PATH_OTHER")
        given = [f"{name}={folder}" for name in names]
        given += [f"OPENSSL_CONF={folder}/openssl.cnf", "LANG=de_DE.ISO-8859-15", "TPM2TOOLS_TCTI=device"]
        with Host(platform.tcti, command_prefix=("env", *given)) as host:
            for service in ("manager", "keeper", "launcher"):
                words = Path(f"/proc/{host.pid(service)}/environ").read_text().rstrip("\0").split("\0")
                environment = dict(word.split("=", 1) for word in words)
                assert environment.keys() <= {*_ENVIRONMENT, *ENVIRONMENT, "PATH"}, service
                assert environment.items() >= ENVIRONMENT.items(), service
                assert environment.get("PATH", os.defpath) == os.defpath, service


def test_nothing_starts_unmeasured_when_the_tpm_is_away_and_what_was_measured_does(platform: SwtpmPlatform) -> None:
    platform.stop()
    host = Host(platform.tcti)
    try:
        with pytest.raises(AssertionError, match="the manager did not start"):
            host.start()
        assert not list(host.run_dir.glob("*.sock"))
        assert not host.state_dir.exists()
    finally:
        host.end()
    platform.reboot()
    with Host(platform.tcti) as host, host.client() as client:
        digest = _record(host).running
        client.create("web")
        _power_off(host)
        platform.stop()
        host.start()
        status = client.status()
        assert status.measured is not None
        assert (status.measured.measurement, status.measured.note) == (digest, "")
        assert "start without the platform TPM" in host.log()


def test_all_code_in_the_services_memory_is_in_the_closure(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        client.create("web")
        pids = [client.start("web").pid, *(host.pid(service) for service in ("manager", "keeper", "launcher"))]
        closure = {os.path.realpath(path) for path in find_closure().files.values()}
        for pid in pids:
            maps = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
            code = {entry[5] for entry in maps if "x" in entry[1] and len(entry) > 5 and entry[5].startswith("/")}
            assert any("python" in path for path in code)
            assert {os.path.realpath(path) for path in code} <= closure


def test_manager_may_not_extend_what_it_was_measured_into(platform: SwtpmPlatform) -> None:
    code = (
        "import sys; from pathlib import Path; from vtpm.errors import AccessDeniedError\n"
        "from vtpm.wire.keeper_client import KeeperClient\n"
        "client = KeeperClient(Path(sys.argv[1])); print(client.services_pcr().pcr)\n"
        "try: client.measure_services(bytes(32))\n"
        "except AccessDeniedError: print('refused')\n"
    )
    with Host(platform.tcti) as host:
        pid = host.pid("manager")
        manager_uid = Path(f"/proc/{pid}").stat().st_uid
        uid = int(
            next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Uid" in line).split()[1]
        )
        assert uid != 0 or manager_uid == os.geteuid()
        assert run_as_other_user(code, [str(host.run_dir)], uid).split() == ["13", "refused"]
        record = _record(host)
        host.shut_down()
        assert platform.pcr(13) == predict("sha256", ZERO, (record.running,))


def test_nothing_is_measured_when_the_platform_tpm_is_embedded() -> None:
    with Host() as host:
        assert not (host.run_dir / "services").exists()
        assert "not measured: the embedded TPM protects nothing" in host.cli("status").stdout


def test_nothing_is_measured_when_that_is_switched_off(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti, settings="services_pcr = 0\n") as host:
        status = host.cli("status").stdout
        assert "not measured: services_pcr is 0" in status
        assert "sha256:0,2,4,7\n" in status
        refused = host.cli("policy", "predict", "--services", check=False)
        assert "not measured" in refused.stderr
        host.shut_down()
        assert platform.pcr(13) == ZERO


def test_new_root_key_is_refused_when_nothing_but_vtpm_measured_the_boot(platform: SwtpmPlatform) -> None:
    platform.stop()
    platform.start()  # with no firmware
    host = Host(platform.tcti)
    try:
        with pytest.raises(AssertionError, match="are all zero"):
            host.start()
    finally:
        host.end()
