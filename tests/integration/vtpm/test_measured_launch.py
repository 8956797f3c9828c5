"""What runs vTPMs is measured into the platform TPM before it starts, and only what the host allows runs at all."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.host import Host, kill_process
from tests.support.installation import Installation
from tests.support.swtpm import SwtpmPlatform
from vtpm.client.manager_client import ManagerClient
from vtpm.errors import AccessDeniedError, ConflictError, StateError
from vtpm.tpm.hash_algorithms import HashAlgorithm
from vtpm.tpm.launch_log import Launch, decode, encode
from vtpm.wire.api import LifeState

pytestmark = pytest.mark.timeout(180)
PCR = 12
MODULE = "vtpm.instance.outbox"
"""Of what an instance runs, and no service."""


def log_path(host: Host) -> Path:
    return host.run_dir / "launches" / "event_log"


def replayed(host: Host) -> str:
    """What Debian's tpm2_eventlog makes of the log."""
    done = subprocess.run(["tpm2_eventlog", log_path(host)], capture_output=True, text=True, timeout=30, check=True)
    found = re.search(rf"^    {PCR} *: 0x([0-9a-f]+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return found[1]


def launches(client: ManagerClient) -> list[tuple[str, str]]:
    return [(entry.kind, entry.measurement) for entry in client.launches().entries]


def test_pcr_is_what_tpm2_eventlog_replays_and_two_starts_extend_it_once(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        for name in ("web1", "web2"):
            client.create(name)
        measurement = client.start("web1").measurement
        assert client.start("web2").measurement == measurement
        assert launches(client) == [("process", measurement)]
        assert (client.launches().replays, client.launches().doubt) == (True, "")
        (image,) = client.images()
        assert (image.measurement, image.state, image.vtpms) == (measurement, "allowed", ["web1", "web2"])
        assert image.engine_version
        for end in (lambda: host.kill("manager"), lambda: (host.kill("keeper"), host.stop_manager()), host.shut_down):
            end()
            host.start()
            if client.show("web1").state is LifeState.STOPPED:
                client.start("web1")
        assert [event.kind for event in client.all_events()].count("image_allowed") == 1
        shown = json.loads(host.cli("policy", "launches", "--json").stdout)
        assert shown["replays"] and shown["value"] == replayed(host)
        host.shut_down()
        assert platform.pcr(PCR).hex() == replayed(host)
        platform.reboot()
        host.start()
        client.start("web1")
        assert launches(client) == [("process", measurement)]
        host.shut_down()
        assert platform.pcr(PCR).hex() == replayed(host)


def test_same_code_measures_into_the_embedded_tpm_and_tells_what_else_was_extended() -> None:
    with Host() as host, host.client() as client:
        client.create("web")
        client.start("web")
        assert (client.launches().replays, client.launches().value) == (True, replayed(host))


def test_pcr_is_extended_by_the_next_start_when_the_keeper_was_killed_after_the_log(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        client.create("web")
        measurement = client.start("web").measurement
        client.stop("web")
        host.shut_down()
        # As a keeper leaves it that is killed before it extends the PCR: one entry more.
        log = decode(log_path(host).read_bytes(), HashAlgorithm.SHA256, PCR)
        pending = log.followed_by(Launch("process", "ab" * 32))
        log_path(host).write_bytes(encode(pending))
        host.start()
        assert (client.launches().replays, client.launches().doubt) == (False, "")
        client.start("web")
        assert launches(client) == [("process", measurement), ("process", "ab" * 32)]
        assert client.launches().replays
        host.shut_down()
        assert platform.pcr(PCR).hex() == replayed(host) == pending.value.hex()


def test_a_log_that_is_gone_forged_or_not_all_is_told(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti) as host, host.client() as client:
        client.create("web")
        client.start("web")
        good = log_path(host).read_bytes()
        log = decode(good, HashAlgorithm.SHA256, PCR)
        for forged, words in (
            (None, "there is no log of this boot"),
            (b"no log", "damaged or forged"),
            (encode(log.followed_by(Launch("qemu", "ab" * 32)).followed_by(log.entries[0])), "does not hold"),
            (good.replace(b"process", b"qemuqem"), "damaged or forged"),
        ):
            log_path(host).unlink(missing_ok=True)
            if forged is not None:
                log_path(host).write_bytes(forged)
            assert words in client.launches().doubt
            assert words in host.cli("policy", "launches").stderr
        log_path(host).write_bytes(good)
        client.stop("web")
        host.shut_down()
        platform.extend(PCR, "somebody else")
        host.start()
        assert not client.launches().replays
        client.start("web")
        entries = client.launches().entries
        assert [bool(entry.held) for entry in entries] == [False, True, False]
        assert "something else extended PCR 12" in client.launches().doubt
        host.shut_down()
        assert platform.pcr(PCR).hex() == decode(log_path(host).read_bytes(), HashAlgorithm.SHA256, PCR).value.hex()


def test_changed_vtpmd_gets_no_state_until_it_is_allowed_and_replaces_none_that_runs(
    platform: SwtpmPlatform, installed: Installation
) -> None:
    with Host(platform.tcti, programs=installed.programs) as host, host.client() as client:
        for name in ("web", "other"):
            client.create(name)
        first = client.start("web")
        before = installed.module(MODULE).read_text()
        installed.change(MODULE)
        with pytest.raises(AccessDeniedError, match="is new, and not allowed") as refused:
            client.start("other")
        found = re.search(r"allow-image ([0-9a-f]{64})", refused.value.next_step)
        assert found is not None and found[1] != first.measurement
        assert launches(client) == [("process", first.measurement)]
        # What runs is not replaced by it either.
        assert first.pid is not None
        kill_process(first.pid)
        ended = next(event for event in client.follow_events() if event.kind == "instance_ended")
        assert client.show("web").state is LifeState.STOPPED
        assert "no successor" in ended.detail["how"] and found[1] in ended.detail["how"]
        shown = host.cli("policy", "allow-image", found[1], "--label", "next")
        assert f"process image {found[1]} (next) is allowed" in shown.stdout
        assert client.start("web").measurement == found[1]
        assert launches(client) == [("process", first.measurement), ("process", found[1])]
        assert client.launches().replays
        with pytest.raises(ConflictError, match="runs web"):
            client.retire_image(found[1])
        assert host.cli("policy", "retire-image", first.measurement, "--yes").returncode == 0
        client.stop("web")
        installed.module(MODULE).write_text(before)
        with pytest.raises(AccessDeniedError, match="is retired"):
            client.start("web")


def test_running_vtpm_is_taken_up_again_when_the_software_on_disk_is_another_by_now(
    platform: SwtpmPlatform, installed: Installation
) -> None:
    with Host(platform.tcti, programs=installed.programs) as host, host.client() as client:
        client.create("web")
        first = client.start("web")
        installed.change(MODULE)
        host.kill("manager")
        host.start()
        shown = client.show("web")
        assert (shown.state, shown.pid, shown.measurement) == (LifeState.RUNNING, first.pid, first.measurement)


def test_vtpms_do_not_start_when_the_root_key_is_sealed_under_the_pcr(platform: SwtpmPlatform) -> None:
    with Host(platform.tcti, settings='pcrs = "sha256:0,12"\nlaunch_pcr = 14\n', keep=True) as host:
        host.shut_down()
        host.config.write_text(host.config.read_text().replace("pcrs = ", "# ").replace("launch_pcr = 14", ""))
        host.start()
        with host.client() as client:
            client.create("web")
            with pytest.raises((ConflictError, StateError), match=r"PCR 12: the root key is sealed under sha256:0,12"):
                client.start("web")
