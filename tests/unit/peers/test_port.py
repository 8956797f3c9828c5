"""The address where peers come."""

from __future__ import annotations

import pytest

from tests.unit.peers.hosts import listening
from vtpm.errors import UnavailableError, UsageError
from vtpm.peers.port import listen


def free_port() -> int:
    with listening() as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    "address", ["", "x", ":1", "a:", "a:0", "a:65536", "a:-1", "a:1x", "a:١", "a:+1", "a: 1", "a:" + "1" * 5000]
)
def test_address_is_refused_when_it_is_of_another_form(address: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        listen(address)


@pytest.mark.parametrize("host", ["x" * 70, "a..b", "192.0.2.1"], ids=["long", "odd", "not of this host"])
def test_address_is_refused_when_it_is_none_of_this_host(host: str) -> None:
    with pytest.raises(UnavailableError, match="cannot be listened on"):
        listen(f"{host}:{free_port()}")


def test_address_is_refused_when_somebody_has_the_port() -> None:
    with listening() as taken, pytest.raises(UnavailableError, match="in use"):
        listen(f"127.0.0.1:{taken.getsockname()[1]}")
