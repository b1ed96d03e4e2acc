"""Poisson sampling against the binomial, the cap, and micro-batches as a property. Fixed keys; false-alarm rate 1e-6 for a fresh one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from discreet.dp import sampling
from discreet.keys import Stream

FALSE_ALARM = 1e-6


def stream(number: int = 1) -> Stream:
    return Stream(number.to_bytes(32, "little"))


def test_positions_are_sorted_unique_and_replayed() -> None:
    drawn = sampling.poisson(1000, 0.2, stream())
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, drawn.unique())
    assert torch.equal(drawn, sampling.poisson(1000, 0.2, stream()))


def test_inclusion_is_binomial_and_batch_sizes_vary_as_poisson_sampling_does() -> None:
    """A shuffling sampler has the right mean and no variance (PITFALLS 1)."""
    steps, units, probability = 2000, 200, 0.05
    key = stream()
    draws = [sampling.poisson(units, probability, key.fork("step", step)) for step in range(steps)]
    sizes = torch.tensor([float(len(drawn)) for drawn in draws])
    expected = units * probability * (1 - probability)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], steps - 1) / (steps - 1)
    assert low * expected < float(sizes.var()) < high * expected
    counts = torch.bincount(torch.cat(draws), minlength=units)
    for count in counts.tolist():
        assert stats.binomtest(count, steps, probability).pvalue > FALSE_ALARM / units


def test_two_units_are_included_independently() -> None:
    key, steps = stream(), 3000
    both = sum(len(sampling.poisson(2, 0.3, key.fork(step))) == 2 for step in range(steps))
    assert stats.binomtest(both, steps, 0.09).pvalue > FALSE_ALARM


def test_empty_and_certain() -> None:
    assert sampling.poisson(10, 0.0, stream()).tolist() == []
    assert sampling.poisson(10, 1.0, stream()).tolist() == list(range(10))
    assert sampling.poisson(0, 0.5, stream()).tolist() == []


@pytest.mark.parametrize("probability", [-1e-9, 1.5, math.nan])
def test_bad_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        sampling.poisson(10, probability, stream())


def test_capped_keeps_a_fair_choice() -> None:
    positions, trials = torch.tensor([40, 7, 19, 3]), 4000
    kept = torch.cat([sampling.capped(positions, 2, stream().fork(trial)) for trial in range(trials)])
    for position in positions.tolist():
        assert stats.binomtest(int((kept == position).sum()), trials, 0.5).pvalue > FALSE_ALARM
    assert sampling.capped(positions, 2, stream()).tolist() == sorted(sampling.capped(positions, 2, stream()).tolist())


def test_capped_leaves_small_units_whole() -> None:
    assert sampling.capped(torch.tensor([5, 2]), 2, stream()).tolist() == [2, 5]
    with pytest.raises(ValueError, match="cap=0"):
        sampling.capped(torch.tensor([5]), 0, stream())


@given(
    lengths=st.lists(st.lists(st.integers(1, 90), max_size=4), max_size=40),
    budget=st.integers(1, 400),
)
def test_micro_batches_hold_every_unit_once_within_the_budget(lengths: list[list[int]], budget: int) -> None:
    groups = sampling.micro_batches(lengths, budget)
    assert sorted(unit for group in groups for unit in group) == [unit for unit, of_unit in enumerate(lengths) if of_unit]
    for group in groups:
        padded = sum(len(lengths[unit]) for unit in group) * max(max(lengths[unit]) for unit in group)
        assert padded <= budget or len(group) == 1


@given(lengths=st.lists(st.integers(2, 512), max_size=60))
def test_micro_batches_of_single_documents_leave_little_padding(lengths: list[int]) -> None:
    for group in sampling.micro_batches([[length] for length in lengths], 2048):
        tokens = sum(lengths[unit] for unit in group)
        assert len(group) * max(lengths[unit] for unit in group) - tokens <= max(8, tokens / 32)


def test_micro_batches_are_sorted_by_length() -> None:
    assert sampling.micro_batches([[50], [10], [49], [11]], 100) == [[1, 3], [2, 0]]
    assert sampling.micro_batches([], 100) == []
    with pytest.raises(ValueError, match="token_budget=0"):
        sampling.micro_batches([[1]], 0)
