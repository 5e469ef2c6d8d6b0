"""The order of an epoch: every sample once, no trace of how it is made, and no more work for more samples."""

from __future__ import annotations

import math
import tracemalloc
from functools import cache

import numpy as np
import pytest
from scipy import stats

from dali_views.plan import order

LEAST = 1e-3  # of a p-value; seeds are fixed, so that a test which holds once holds always


def whole(length: int, seed: int = 0, epoch: int = 0) -> order.Rows:
    """All samples in the order of an epoch."""
    return order.rows(np.arange(length), length, seed, epoch)


@cache
def many(length: int) -> order.Rows:
    """The orders of 800 epochs of unlike seeds, shape (800, length)."""
    return np.stack([whole(length, seed, epoch) for seed in range(200) for epoch in range(4)])


def lengths() -> list[int]:
    """All up to 300, and 700 up to a hundred thousand, the small ones more often."""
    drawn = np.exp(np.random.default_rng(0).uniform(np.log(301), np.log(100_000), 698)).astype(int)
    return [*range(1, 301), *drawn.tolist(), 99_999, 100_000]


def test_every_sample_has_one_place_for_a_thousand_lengths():
    assert len(lengths()) == 1000
    for number, length in enumerate(lengths()):
        assert (np.bincount(whole(length, seed=number), minlength=length) == 1).all(), length


def test_a_row_does_not_depend_on_which_others_are_asked_for():
    everything = whole(10_007)
    some = np.random.default_rng(0).integers(0, 10_007, 500)
    assert np.array_equal(order.rows(some, 10_007, 0, 0), everything[some])
    assert order.rows(some[:1], 10_007, 0, 0) == everything[some[0]]
    assert order.rows(some[:0], 10_007, 0, 0).shape == (0,)


@pytest.mark.parametrize("length", [10**8, 10**9, 10**12 + 39])
def test_rows_of_a_huge_epoch_are_distinct_and_even_and_take_the_memory_of_a_batch(length):
    positions = np.random.default_rng(0).choice(10**8, 20_000, replace=False) * (length // 10**8)
    order.rows(positions, length, 3, 1)
    tracemalloc.start()
    rows = order.rows(positions, length, 3, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * positions.nbytes
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < length
    assert stats.kstest(rows / length, "uniform").pvalue > LEAST
    # Neighbours too, although they begin on the same line of the grid.
    assert stats.kstest(order.rows(np.arange(20_000), length, 3, 1) / length, "uniform").pvalue > LEAST


@pytest.mark.parametrize("length", [4, 5])
def test_all_permutations_of_a_few_samples_are_equally_frequent(length):
    found = np.unique(many(length), axis=0, return_counts=True)[1]
    missing = math.factorial(length) - len(found)
    assert stats.chisquare([*found, *[0] * missing]).pvalue > LEAST


@pytest.mark.parametrize("length", [7, 12])
def test_every_sample_is_equally_frequent_at_every_position(length):
    orders = many(length)
    table = np.stack([np.bincount(column, minlength=length) for column in orders.T])
    expected = len(orders) / length
    # Lines and columns of the table have fixed sums.
    square = ((table - expected) ** 2 / expected).sum() * (length - 1) / length
    assert stats.chi2.sf(square, (length - 1) ** 2) > LEAST


@pytest.mark.parametrize("length", [9, 25])
def test_even_and_odd_permutations_are_equally_frequent(length):
    signs = np.linalg.det(np.eye(length)[many(length)])
    assert abs(signs.mean()) < 4 / math.sqrt(len(signs))


@pytest.mark.parametrize(("seeds", "epochs"), [(1, 0), (0, 1), (-2, 10**6)])
def test_orders_of_other_epochs_and_seeds_agree_at_one_position_on_average(seeds, epochs):
    pairs = [(whole(500, s, s % 3), whole(500, s + seeds, s % 3 + epochs)) for s in range(300)]
    alike = np.array([(one == other).sum() for one, other in pairs])
    law = stats.poisson(1)  # as chance has it for how often two permutations agree
    expected = len(alike) * np.array([*law.pmf(range(4)), law.sf(3)])
    assert stats.chisquare(np.bincount(np.minimum(alike, 4)), expected).pvalue > LEAST


@pytest.mark.parametrize("width", [256, pytest.param(1000, marks=pytest.mark.slow)])
def test_rows_near_each_other_on_the_grid_are_unrelated(width):
    length = width * width
    rows = whole(length, seed=5)
    for lag in (1, 2, width - 1, width, width + 1, 2 * width):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 4 / width
        steps = (rows[lag:] - rows[:-lag]) % length
        assert stats.chisquare(np.bincount(steps // width, minlength=width)).pvalue > LEAST
        # As many steps occur as boxes that have a ball in them when there are as many balls.
        assert abs(len(np.unique(steps)) / length - (1 - math.exp(-1))) < 0.01


def test_fourteen_samples_are_divided_as_the_module_draws():
    slices = [[order.rank_slice(p, 14, 8, rank, 4).tolist() for rank in range(4)] for p in (0, 8)]
    assert slices == [[[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10], [11, 12], [13]]]
    assert [order.steps(14, 8, drop_last) for drop_last in (False, True)] == [2, 1]


@pytest.mark.parametrize("length", [1, 2, 7, 40, 41])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_a_global_batch_out_evenly_and_fill_up_from_the_beginning(length, world):
    for batch in (1, 4):
        for step in range(order.steps(length, batch * world, drop_last=False)):
            begin = step * batch * world
            shares = [order.rank_slice(begin, length, batch * world, rank, world) for rank in range(world)]
            sizes = [len(share) for share in shares]
            assert min(sizes) >= 1
            assert max(sizes) <= min(batch, min(sizes) + 1)
            joined = np.concatenate(shares).tolist()
            rest = list(range(begin, min(begin + batch * world, length)))
            again = [p % length for p in range(world - len(rest))]
            assert joined == rest + again
