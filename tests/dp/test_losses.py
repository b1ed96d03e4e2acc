"""The quick epsilon against the accountant's, which shares no line with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from discreet.dp import losses
from discreet.dp.accounting import pld_epsilon
from discreet.dp.mechanism import event_of

ROWS = [
    (0.01, 1.0, 10_000, 1e-5),
    (1024 / 60_000, 0.6, 176, 1e-6),
    (0.3, 4.0, 300, 1e-4),
    (0.001, 0.8, 1, 1e-6),
    (0.9, 20.0, 50, 1e-7),
    (1e-4, 2.0, 1000, 1e-3),
]


@pytest.mark.parametrize(("probability", "noise", "steps", "delta"), ROWS)
def test_it_is_what_the_accountant_says(probability: float, noise: float, steps: int, delta: float) -> None:
    found = losses.epsilon(sampling_probability=probability, noise_multiplier=noise, steps=steps, delta=delta, grid=1e-4)
    expected = pld_epsilon(event_of(sampling_probability=probability, noise_multiplier=noise, steps=steps), delta=delta, grid=1e-4)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_coarser_grid_only_overstates() -> None:
    figures = {"sampling_probability": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-5}
    fine, coarse = (losses.epsilon(**figures, grid=grid) for grid in (1e-4, 1e-2))
    assert fine is not None
    assert coarse is not None
    assert fine < coarse < 1.2 * fine


@pytest.mark.parametrize(
    "changed", [{"sampling_probability": 1.0}, {"noise_multiplier": 0.01}, {"noise_multiplier": float("nan")}, {"delta": 1e-12}, {"steps": 0}]
)
def test_what_it_cannot_do_it_leaves_to_the_accountant(changed: dict[str, float]) -> None:
    figures = {"sampling_probability": 0.01, "noise_multiplier": 1.0, "steps": 10, "delta": 1e-5, **changed}
    assert losses.epsilon(**figures, grid=1e-4) is None


def test_the_heavy_libraries_stay_out() -> None:
    script = (
        "import sys; sys.argv = ['discreet', 'privacy', 'epsilon', '--sampling-probability', '0.01', '--noise-multiplier', '1', '--steps', '10000', '--delta', '1e-5']\n"
        "from discreet.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "loaded = {'scipy', 'dp_accounting', 'torch', 'riskcal', 'transformers'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "epsilon = 6.18" in done.stdout
