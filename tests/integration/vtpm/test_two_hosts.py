"""Two hosts on one machine, each root with a state of its own and no set-up: they share no user id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.host import Host
from vtpm.config import UID_BASE, default_uid_base, is_default_uid_base

pytestmark = pytest.mark.timeout(120)


def _uids(host: Host) -> set[int]:
    """User ids of the host's services, but for the launcher's, and of its one instance."""
    with host.client() as client:
        client.create("web")
        pids = [client.start("web").pid, host.pid("manager"), host.pid("keeper")]
    return {int(Path(f"/proc/{pid}/status").read_text().split("Uid:\t")[1].split()[0]) for pid in pids}


def test_two_hosts_run_side_by_side_under_user_ids_of_their_own_when_nothing_is_set() -> None:
    assert os.geteuid() == 0, "an ordinary user's services all have that user's id"
    with Host(uid_base=None) as first, Host(uid_base=None) as second:
        mine, theirs = _uids(first), _uids(second)
        assert len(mine) == len(theirs) == 3
        assert not mine & theirs
        assert 0 not in mine | theirs


def test_state_keeps_its_user_ids_when_it_is_moved() -> None:
    with Host(uid_base=None) as host, host.client() as client:
        client.create("web")
        host.shut_down()
        owner = (host.state_dir / "vault").stat().st_uid
        host.state_dir = host.state_dir.rename(host.folder / "elsewhere")
        host.start()
        assert [vtpm.name for vtpm in client.list()] == ["web"]
        assert (host.state_dir / "vault").stat().st_uid == owner


def test_manager_is_refused_when_the_state_belongs_to_other_user_ids() -> None:
    with Host() as host:
        host.shut_down()
        host.config.write_text(f"uid_base = {UID_BASE}\n")
        with pytest.raises(AssertionError, match="Set uid_base to"):
            host.start()


def test_each_place_has_a_range_of_its_own_when_two_paths_differ() -> None:
    assert default_uid_base(Path("/var/lib/vtpm")) == UID_BASE
    bases = {default_uid_base(Path(f"/srv/host{number}")) for number in range(20)}
    assert len(bases) > 15
    assert UID_BASE not in bases
    assert all(is_default_uid_base(base) for base in bases)
    assert not is_default_uid_base(UID_BASE + 1)
    assert not is_default_uid_base(0)
