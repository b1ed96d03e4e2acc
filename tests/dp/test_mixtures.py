"""The quick distribution of a Gaussian on a random number of contributions is the library's."""

from __future__ import annotations

import pytest
from dp_accounting.pld import privacy_loss_distribution as library
from scipy import stats

from discreet.dp import mixtures


@pytest.mark.parametrize(("noise", "cap", "probability", "steps"), [(1.0, 2, 0.016, 25), (3.0, 5, 0.2, 100), (0.7, 3, 0.5, 3), (2.0, 1, 1.0, 5)])
def test_it_is_the_librarys_distribution(noise: float, cap: int, probability: float, steps: int) -> None:
    chances = [float(chance) for chance in stats.binom.pmf(range(cap + 1), cap, probability)]
    sensitivities = [float(number) for number in range(cap + 1)]
    mine = mixtures.loss_distribution(noise, sensitivities, chances, grid=1e-2).self_compose(steps)
    theirs = library.from_mixture_gaussian_mechanism(noise, sensitivities, chances, value_discretization_interval=1e-2).self_compose(steps)
    for delta in (1e-3, 1e-6, 1e-9):
        assert mine.get_epsilon_for_delta(delta) == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-6)
    for epsilon in (0.0, 0.5, 2.0):
        assert mine.get_delta_for_epsilon(epsilon) == pytest.approx(theirs.get_delta_for_epsilon(epsilon), abs=1e-10)


def test_one_contribution_is_poisson_sampling() -> None:
    mine = mixtures.loss_distribution(1.0, [0.0, 1.0], [0.99, 0.01], grid=1e-3).self_compose(1000)
    theirs = library.from_gaussian_mechanism(1.0, sampling_prob=0.01, value_discretization_interval=1e-3).self_compose(1000)
    assert mine.get_epsilon_for_delta(1e-5) == pytest.approx(theirs.get_epsilon_for_delta(1e-5), abs=1e-6)
