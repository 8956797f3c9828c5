"""Statistics of the benchmark: percentiles and comparisons of interleaved blocks."""

from __future__ import annotations

import pytest
from bench.commands import nv_write
from bench.figures import compare, percentile


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (50, 50), (99, 99), (100, 100)])
def test_percentile_is_the_nearest_rank_when_values_are_unordered(percent: int, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), percent) == expected


def test_percentile_is_the_value_when_there_is_one() -> None:
    assert percentile([7.0], 99) == 7.0


def test_compare_gives_medians_and_per_block_spread_when_blocks_differ() -> None:
    result = compare("X", [[1e-6, 1e-6], [3e-6, 3e-6]], [[2e-6, 2e-6], [4e-6, 4e-6]])
    assert result.round_trips == 4
    assert result.ours_median_us == pytest.approx(2)
    assert result.peer_median_us == pytest.approx(3)
    assert result.ratio == pytest.approx(2 / 3)
    assert (result.ratio_least, result.ratio_most) == pytest.approx((0.5, 0.75))


def test_compare_refuses_when_blocks_do_not_pair() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare("X", [[1.0], [1.0]], [[1.0]])


def test_compare_refuses_when_there_are_no_blocks() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        compare("X", [], [])


def test_nv_write_gives_its_size_and_other_bytes_when_the_counter_moves() -> None:
    first, second = nv_write(1), nv_write(2)
    assert int.from_bytes(first[2:6], "big") == len(first)
    assert first != second
