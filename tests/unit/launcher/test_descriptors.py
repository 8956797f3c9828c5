"""The number of instances follows from the limit of open files."""

from __future__ import annotations

import resource

import pytest

from vtpm.launcher.descriptors import PER_INSTANCE, RESERVED, instances_for, raise_limit
from vtpm.wire.launcher import MAX_INSTANCES


@pytest.mark.parametrize(
    ("limit", "instances"),
    [
        (0, 0),
        (RESERVED + PER_INSTANCE - 1, 0),
        (RESERVED + PER_INSTANCE, 1),
        (1024, 76),
        (1_048_576, MAX_INSTANCES),
        (resource.RLIM_INFINITY, MAX_INSTANCES),
    ],
)
def test_instances_fit_the_limit(limit: int, instances: int) -> None:
    assert instances_for(limit) == instances


def test_the_soft_limit_becomes_the_hard_one_when_it_is_raised() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        assert raise_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
