"""Two hosts under test, each with services and a platform TPM of its own, that have been made known to each other."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.swtpm import SwtpmPlatform, booted_platform

PLATFORM_POLICY = "platform-policy.toml"


@dataclass
class Peers:
    """The two, by the names under which they are enrolled.

    Args:
        ports: where each lets the other in, on the loopback address.
        folder: has what an operator carried between them.
    """

    hosts: dict[str, Host]
    platforms: dict[str, SwtpmPlatform]
    ports: dict[str, int]
    folder: Path

    def address(self, name: str) -> tuple[str, int]:
        """Return where a host lets others in."""
        return "127.0.0.1", self.ports[name]

    def agree(self) -> None:
        """Have each allow what the other is by now."""
        policies = {name: host.cli("platform", "policy").stdout for name, host in self.hosts.items()}
        for name in self.hosts:
            (other,) = self.hosts.keys() - {name}
            (self.folder / name / PLATFORM_POLICY).write_text(policies[other])

    def reach(self, name: str, other: str, port: int | None) -> None:
        """Have one host reach the other at a port; None: its own."""
        url = f"https://127.0.0.1:{port or self.ports[other]}"
        self.hosts[name].cli("peer", "add", other, "--url", url, "--certificate", str(self.folder / f"{other}.pem"))


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def known_to_each_other(
    folder: Path,
    settings: str = "",
    platform: Callable[[], contextlib.AbstractContextManager[SwtpmPlatform]] = booted_platform,
) -> Iterator[Peers]:
    """Start two hosts, enrol both with one authority, and name each to the other with a policy that both pass.

    Args:
        folder: for what an operator carries between them.
        settings: further lines of both hosts' configuration files.
        platform: makes the platform TPM of one.
    """
    authority = folder / "authority"
    # Services of other users read there what operators put there.
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        platforms = {name: stack.enter_context(platform()) for name in ("host-a", "host-b")}
        ports = {name: free_port() for name in platforms}
        hosts: dict[str, Host] = {}
        for name, platform in platforms.items():
            own = folder / name
            (own / "authorities").mkdir(mode=0o755, parents=True)
            own.chmod(0o755)
            own_settings = settings + (
                f'migration_address = "127.0.0.1:{ports[name]}"\nmigration_retry_s = 1\n'
                f'platform_policy = "{own / PLATFORM_POLICY}"\nauthorities = "{own / "authorities"}"\n'
            )
            hosts[name] = stack.enter_context(Host(platform.tcti, settings=own_settings))
        made = Peers(hosts, platforms, ports, folder)
        hosts["host-a"].cli("authority", "new", str(authority), "--name", "test")
        for name, host in hosts.items():
            enrol(host, name, authority, folder)
        introduce(made)
        yield made


def enrol(host: Host, name: str, authority: Path, folder: Path) -> None:
    """Have an authority certify a host's attestation key, by the words that an operator would use."""
    request, sealed = folder / f"{name}.request", folder / f"{name}.sealed"
    asked = json.loads(host.cli("platform", "enroll", "--name", name, "--out", str(request), "--json").stdout)
    words = ("--name", name, "--out", str(sealed), "--ek", asked["ek"])
    host.cli("authority", "certify", str(authority), str(request), *words)
    host.cli("platform", "enroll", "--certificate", str(sealed))


def introduce(peers: Peers) -> None:
    """Name each host to the other: where it is, its certificate, the authority, and what it must be."""
    for host in peers.hosts.values():
        # What runs vTPMs is allowed on a host, for good, once it has run one.
        for words in (("create", "first"), ("start", "first"), ("stop", "first"), ("delete", "first", "--yes")):
            host.cli(*words)
    peers.agree()
    for name, host in peers.hosts.items():
        certificate = peers.folder / f"{name}.pem"
        certificate.write_text(host.cli("peer", "certificate").stdout)
    for name in peers.hosts:
        (other,) = peers.hosts.keys() - {name}
        own = peers.folder / name
        (own / "authorities" / "test.pem").write_bytes((peers.folder / "authority" / "authority.pem").read_bytes())
        peers.reach(name, other, None)
