"""peer: what its commands ask of the manager, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.cli.conftest import Cli
from tests.unit.client.canned_manager import CERTIFICATE, PEER, CannedManager


def test_peer_is_named_with_the_certificate_that_was_carried(cli: Cli, manager: CannedManager, tmp_path: Path) -> None:
    path = tmp_path / "b.pem"
    path.write_text(CERTIFICATE)
    ended = cli("peer", "add", "host-c", "--url", "https://c:1", "--certificate", str(path))
    assert (ended.status, ended.out) == (0, f"host-c at https://c:1 is a peer; its certificate is {PEER.fingerprint}\n")
    assert manager.asked[0].body["name"] == "host-c"
    assert manager.asked[0].body["certificate"].strip() == CERTIFICATE.strip()
    missing = cli("peer", "add", "host-c", "--url", "https://c:1", "--certificate", str(tmp_path / "none"))
    assert (missing.status, len(manager.asked)) == (2, 1)


def test_peers_are_listed_and_removed(cli: Cli, manager: CannedManager) -> None:
    assert cli("peer", "list").out.splitlines()[1].split() == ["host-b", PEER.url, PEER.fingerprint]
    assert json.loads(cli("peer", "list", "--json").out)[0]["name"] == "host-b"
    assert cli("peer", "remove", "host-b").out == "host-b is no peer any more\n"
    assert json.loads(cli("peer", "remove", "a/b", "--json").out) == {"removed": "a/b"}
    assert manager.methods()[2:] == ["DELETE /v1/peers/host-b", "DELETE /v1/peers/a%2Fb"]


def test_own_certificate_is_printed_as_it_is(cli: Cli) -> None:
    assert cli("peer", "certificate").out == CERTIFICATE
    assert json.loads(cli("peer", "certificate", "--json").out) == {"certificate": CERTIFICATE}
