"""Two hosts under test, each with services and a platform TPM of its own, that have been made known to each other."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.host import Host
from tests.support.swtpm import SwtpmPlatform, booted_platform

PLATFORM_POLICY = "platform-policy.toml"


@dataclass
class Peers:
    """The two, by the names under which they are enrolled."""

    hosts: dict[str, Host]
    platforms: dict[str, SwtpmPlatform]

    @property
    def both(self) -> tuple[Host, Host]:
        """As they are named: host-a, host-b."""
        return self.hosts["host-a"], self.hosts["host-b"]


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def known_to_each_other(folder: Path) -> Iterator[Peers]:
    """Start two hosts, enrol both with one authority, and name each to the other with a policy that both pass.

    Args:
        folder: for what an operator carries between them.
    """
    authority = folder / "authority"
    with contextlib.ExitStack() as stack:
        platforms = {name: stack.enter_context(booted_platform()) for name in ("host-a", "host-b")}
        hosts: dict[str, Host] = {}
        for name, platform in platforms.items():
            own = folder / name
            own.mkdir(mode=0o755)
            (own / "authorities").mkdir(mode=0o755)
            settings = (
                f'migration_address = "127.0.0.1:{free_port()}"\n'
                f'platform_policy = "{own / PLATFORM_POLICY}"\nauthorities = "{own / "authorities"}"\n'
            )
            hosts[name] = stack.enter_context(Host(platform.tcti, settings=settings, folder=None))
        made = Peers(hosts, platforms)
        hosts["host-a"].cli("authority", "new", str(authority), "--name", "test")
        for name, host in hosts.items():
            enrol(host, name, authority, folder)
        introduce(made, folder)
        yield made


def enrol(host: Host, name: str, authority: Path, folder: Path) -> None:
    """Have an authority certify a host's attestation key, by the words that an operator would use."""
    request, sealed = folder / f"{name}.request", folder / f"{name}.sealed"
    asked = json.loads(host.cli("platform", "enroll", "--name", name, "--out", str(request), "--json").stdout)
    host.cli("authority", "certify", str(authority), str(request), "--out", str(sealed), "--ek", asked["ek"])
    host.cli("platform", "enroll", "--certificate", str(sealed))


def introduce(peers: Peers, folder: Path) -> None:
    """Name each host to the other: where it is, its certificate, the authority, and what it must be."""
    policies = {name: host.cli("platform", "policy").stdout for name, host in peers.hosts.items()}
    for name, host in peers.hosts.items():
        (other,) = peers.hosts.keys() - {name}
        own = folder / name
        (own / "authorities" / "test.pem").write_bytes((folder / "authority" / "authority.pem").read_bytes())
        (own / PLATFORM_POLICY).write_text(policies[other])
        certificate = folder / f"{other}.pem"
        certificate.write_text(peers.hosts[other].cli("peer", "certificate").stdout)
        (address,) = (
            line.partition(" = ")[2].strip('"')
            for line in peers.hosts[other].config.read_text().splitlines()
            if line.startswith("migration_address")
        )
        host.cli("peer", "add", other, "--url", f"https://{address}", "--certificate", str(certificate))
