"""Looks at the real services while they run: who they are, what they may do, and what can be seen of them."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.host import BIN, SERVICES, Host

HARDENED = ("manager", "keeper", "embedded-tpm")
"""All services but the launcher, which has privileges over the host and no key."""
ORDINARY_UID = 65534


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        for name in ("one", "two"):
            host.cli("create", name)
            host.cli("start", name, "--startup", "clear")
        yield host


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


def _pids(host: Host) -> dict[str, int]:
    found = {service: host.pid(service) for service in SERVICES}
    assert all(found.values()), found
    return {service: pid for service, pid in found.items() if pid is not None}


@pytest.mark.parametrize("service", HARDENED)
def test_service_that_holds_secrets_has_no_privilege_when_it_runs(host: Host, service: str) -> None:
    pid = _pids(host)[service]
    status = _status(pid)
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()
    assert status["Groups"] == ""
    assert status["NoNewPrivs"] == "1"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    (core,) = (line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core file" in line)
    assert core.split()[4:6] == ["0", "0"]
    # What a process that is not dumpable shows: /proc/PID belongs to root, and no one of its user can trace it.
    assert Path(f"/proc/{pid}/stat").stat().st_uid == 0


def test_every_process_has_a_user_of_its_own_when_root_started_them(host: Host) -> None:
    pids = _pids(host)
    with host.client() as client:
        instances = [vtpm.pid for vtpm in client.list()]
    uids = [_status(pid)["Uid"].split()[0] for pid in (pids["manager"], pids["keeper"], *instances) if pid]
    assert len(set(uids)) == len(uids) == 4
    assert _status(pids["launcher"])["Uid"].split()[0] == "0"


def test_instance_reaches_nothing_when_it_runs_on_the_real_services(host: Host) -> None:
    with host.client() as client:
        pids = [vtpm.pid for vtpm in client.list()]
    for pid in pids:
        assert pid is not None
        status = _status(pid)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert all(int(status[kind], 16) == 0 for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
        assert os.listdir(f"/proc/{pid}/root") == []
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        kinds = {os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")}
        # As seen from its own, empty root.
        assert {kind for kind in kinds if kind.startswith("/")} <= {"/null", "/dev/null", "/memfd"}


def test_files_are_their_services_alone_when_looked_at(host: Host) -> None:
    for path in (host.state_dir / "vault", host.state_dir / "keeper", host.state_dir / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    pids = _pids(host)
    owner = int(_status(pids["manager"])["Uid"].split()[0])
    files = [path for path in (host.state_dir / "vault").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.stat().st_uid == owner
        assert not path.stat().st_mode & 0o077, path
    sockets = [path for path in (host.run_dir / "guests").iterdir() if path.is_socket()]
    assert len(sockets) == 4
    for path in sockets:
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (0o600, 0), path


def test_launcher_has_no_way_to_a_key_when_its_descriptors_are_looked_at(host: Host) -> None:
    launcher, keeper = _pids(host)["launcher"], host.run_dir
    # The peers' inodes of the keeper's connections are not among the launcher's sockets.
    table = subprocess.run(["ss", "-xnpH"], capture_output=True, text=True, check=True, timeout=30).stdout
    with_keeper = [line for line in table.splitlines() if str(keeper / "keeper") in line]
    assert not [line for line in with_keeper if f"pid={launcher}," in line]
    opened = {os.readlink(f"/proc/{launcher}/fd/{fd}") for fd in os.listdir(f"/proc/{launcher}/fd")}
    assert not {path for path in opened if str(host.state_dir / "vault") in path or "keeper" in path}


def test_no_secret_is_in_arguments_environment_or_log_when_vtpms_run(host: Host) -> None:
    for service, pid in _pids(host).items():
        seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        # A key is 32 bytes: in hex 64 digits, in base64 43 characters.
        assert not re.search(rb"[0-9a-fA-F]{64}|[0-9A-Za-z+]{43}=", seen), service
    for log in (host.log(), host.service_logs()):
        assert not re.search(r"[0-9a-fA-F]{64}|[0-9A-Za-z+]{43}=", log)


def test_second_manager_is_refused_when_one_runs_in_the_directory(host: Host) -> None:
    done = subprocess.run(
        [BIN / "vtpm-managerd", "--config", host.config, "--run-dir", host.run_dir, "--state-dir", host.state_dir],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert str(host.run_dir) in done.stderr
    assert "Traceback" not in done.stderr
    with host.client() as client:
        assert {vtpm.state for vtpm in client.list()} == {"running"}


_ASK = """
import json, sys, http.client, socket
sock = socket.socket(socket.AF_UNIX); sock.settimeout(30); sock.connect(sys.argv[1])
http_ = http.client.HTTPConnection("vtpm"); http_.sock = sock
answers = []
for method, path, body in json.loads(sys.argv[2]):
    http_.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    reply = http_.getresponse(); text = reply.read()
    answers.append([reply.status, json.loads(text) if text else None])
print(json.dumps(answers))
"""


def _as_ordinary(host: Host, requests: list[list[str | None]]) -> list[list[object]]:
    done = subprocess.run(
        [os.path.realpath(sys._base_executable), "-I", "-c", _ASK, host.socket, json.dumps(requests)],
        user=ORDINARY_UID,
        group=ORDINARY_UID,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd="/",
    )
    answers: list[list[object]] = json.loads(done.stdout)
    return answers


def test_others_vtpms_do_not_exist_when_an_ordinary_user_asks(host: Host) -> None:
    answers = _as_ordinary(
        host,
        [
            ["GET", "/v1/vtpms", None],
            ["GET", "/v1/vtpms/one", None],
            ["GET", "/v1/vtpms/none", None],
            ["POST", "/v1/vtpms/one/stop", None],
            ["POST", "/v1/vtpms/one/start", None],
            ["DELETE", "/v1/vtpms/one", None],
            ["POST", "/v1/vtpms", '{"name": "mine"}'],
            ["POST", "/v1/shutdown", None],
            ["GET", "/v1/events", None],
            ["POST", "/v1/vtpms/one/export", None],
            ["POST", "/v1/vtpms/none/export", None],
        ],
    )
    assert [status for status, _ in answers] == [200, 404, 404, 404, 404, 404, 403, 403, 200, 403, 403]
    assert answers[0][1] == answers[8][1] == []
    assert answers[9] == answers[10]
    # Nothing tells a vTPM of another's from none.
    assert str(answers[1][1]).replace("'one'", "") == str(answers[2][1]).replace("'none'", "")
    with host.client() as client:
        assert client.show("one").state == "running"


def test_import_is_refused_before_its_body_is_read_when_an_ordinary_user_asks(host: Host) -> None:
    body = json.dumps({"backup": "A" * 100_000, "original_is_dead": True, "passphrase": "correct horse"})
    answers = _as_ordinary(
        host,
        [["POST", "/v1/import", "{"], ["POST", "/v1/import/swtpm", "{"], ["POST", "/v1/import", body]],
    )
    assert [status for status, _ in answers] == [403, 403, 403]
    with host.client() as client:
        assert {vtpm.name for vtpm in client.list()} == {"one", "two"}


BAD_REQUESTS = {
    "unknown route": ("GET", "/v1/nothing", b"", 404),
    "wrong method": ("PUT", "/v1/vtpms", b"", 405),
    "no JSON": ("POST", "/v1/vtpms", b"{", 400),
    "another type": ("POST", "/v1/vtpms", b'{"name": 5}', 400),
    "a list": ("POST", "/v1/vtpms", b"[]", 400),
    "no name": ("POST", "/v1/vtpms", b"{}", 400),
    "a path": ("POST", "/v1/vtpms", b'{"name": "../x"}', 400),
    "another version": ("POST", "/v1/vtpms", b'{"name": "x", "tpm_version": "3.0"}', 400),
    "a body too large": ("POST", "/v1/vtpms", b" " * 20000, 400),
    "an import too large": ("POST", "/v1/import", b" " * (10 * 1024 * 1024 + 1), 400),
    "an import of nothing": ("POST", "/v1/import", b"{}", 400),
    "an import as a number": ("POST", "/v1/import", b'{"backup": 1, "original_is_dead": true}', 400),
    "a state too large": (
        "POST",
        "/v1/import/swtpm",
        b'{"name": "x", "tpm_version": "2.0", "permanent": "' + b"AAAA" * (700 * 1024) + b'"}',
        400,
    ),
    "a state of nothing": ("POST", "/v1/import/swtpm", b'{"name": "x", "tpm_version": "2.0", "permanent": ""}', 400),
    "a source too long": (
        "POST",
        "/v1/import/swtpm",
        b'{"name": "x", "tpm_version": "2.0", "permanent": "AAAA", "source": "' + b"/" * 4097 + b'"}',
        400,
    ),
    "an export too large": ("POST", "/v1/vtpms/one/export", b" " * 20000, 400),
    "deep nesting": ("POST", "/v1/vtpms", b"[" * 16000, 400),
    "a negative id": ("GET", "/v1/events?after=-1", b"", 400),
    "a wait too long": ("GET", "/v1/events?wait_s=1e9", b"", 400),
}


@pytest.fixture
def raw(host: Host) -> Iterator[httpx.Client]:
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(host.socket)), base_url="http://vtpm", trust_env=False, timeout=30
    ) as raw:
        yield raw


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_error_is_json_when_a_request_is_bad(
    raw: httpx.Client, method: str, path: str, body: bytes, status: int
) -> None:
    answer = raw.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert {"code", "message", "next_step"} == set(answer.json())
    assert "Traceback" not in answer.text


def test_error_is_json_when_a_body_comes_in_chunks(raw: httpx.Client) -> None:
    answer = raw.post("/v1/vtpms", content=iter([b'{"name": "x"}']))
    assert (answer.status_code, answer.json()["code"]) == (400, "usage")


def test_openapi_document_names_every_route_when_asked_for(raw: httpx.Client) -> None:
    document = raw.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {(path, method) for path, operations in document["paths"].items() for method in operations} == {
        ("/v1/status", "get"),
        ("/v1/certificate", "get"),
        ("/v1/migrations", "get"),
        ("/v1/peers", "get"),
        ("/v1/platform", "get"),
        ("/v1/platform/certificate", "post"),
        ("/v1/platform/enrolment", "post"),
        ("/v1/platform/evidence", "post"),
        ("/v1/platform/policy", "get"),
        ("/v1/peers", "post"),
        ("/v1/peers/{name}", "delete"),
        ("/v1/vtpms/{name}/adopt", "post"),
        ("/v1/vtpms/{name}/migrate", "post"),
        ("/v1/vtpms/{name}/migrate/abort", "post"),
        ("/v1/vtpms/{name}/migrate/arrived", "post"),
        ("/v1/vtpms/{name}/receive", "post"),
        ("/v1/vtpms/{name}/migrate/discard", "post"),
        ("/v1/vtpms", "get"),
        ("/v1/vtpms", "post"),
        ("/v1/vtpms/{name}", "get"),
        ("/v1/vtpms/{name}", "delete"),
        ("/v1/vtpms/{name}/start", "post"),
        ("/v1/vtpms/{name}/stop", "post"),
        ("/v1/vtpms/{name}/export", "post"),
        ("/v1/import", "post"),
        ("/v1/import/swtpm", "post"),
        ("/v1/events", "get"),
        ("/v1/policy", "get"),
        ("/v1/policy", "post"),
        ("/v1/policy/{label}", "delete"),
        ("/v1/images", "get"),
        ("/v1/images", "post"),
        ("/v1/images/retire", "post"),
        ("/v1/launches", "get"),
        ("/v1/recovery-key", "post"),
        ("/v1/recovery-key/confirm", "post"),
        ("/v1/recover", "post"),
        ("/v1/shutdown", "post"),
    }


def test_api_goes_on_when_a_client_sends_garbage(host: Host) -> None:
    for garbage in (b"\0" * 100000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100000, b"\r\n" * 10):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(host.socket))
            try:
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                continue
    with host.client() as client:
        assert client.show("one").state == "running"
