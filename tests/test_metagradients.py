"""The experiment with the metagradients of all training examples."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import metagradients as experiment
from experiments.common.workloads import NoisyLabels as Examples
from tests.problems import relative_error

TINY = experiment.Config(hidden=3, steps=4, batch_size=3)  # 12 draws, of 16 examples


def made_up() -> Examples:
    """Sixteen examples to train on and six clean ones, of five pixels."""
    images = [jax.random.normal(jax.random.key(k), (n, 5)) for k, n in enumerate((16, 6, 2))]
    return Examples(*(x for part in images for x in (part, jnp.arange(len(part)) % 10)))


@pytest.mark.slow
def test_metagradient_is_the_slope_of_the_run() -> None:
    e = made_up()
    _, apply = experiment.network(TINY, e)
    run = experiment.training(TINY, e)
    after = lambda c: jnp.mean(experiment.losses(apply, run(e, c), e.clean_images, e.clean_labels))  # noqa: E731
    slope, ones = jax.jit(jax.value_and_grad(after)), jnp.ones(16)
    _, metagradient = slope(ones)
    assert int(jnp.sum(metagradient == 0)) == 16 - TINY.steps * TINY.batch_size  # those never drawn
    step = 0.1 * jnp.sign(metagradient)
    change = float(slope(ones + step)[0] - slope(ones - step)[0]) / 2
    assert change == pytest.approx(float(jnp.vdot(metagradient, step)), rel=0.02)
    assert change > 1e-3


def test_influence_with_much_damping_is_an_inner_product() -> None:
    e = made_up()
    init, apply = experiment.network(TINY, e)
    w, damping = init(jax.random.key(0)), 1e4
    found = jax.jit(lambda w: experiment.influence(TINY, e, w, damping))(w)

    @jax.jit
    def of(x: jax.Array, y: jax.Array) -> Any:
        return jax.jacobian(lambda w: experiment.losses(apply, w, x, y))(w)

    mean = jax.tree.map(lambda x: x.mean(0), of(e.clean_images, e.clean_labels))
    products = jax.tree.map(lambda x, y: jnp.tensordot(x, y, y.ndim), of(e.images, e.labels), mean)
    expected = -sum(jax.tree.leaves(products)) / damping / 16
    assert max(relative_error(found, expected).values()) < 1e-2


@pytest.mark.slow
def test_metagradients_foretell_runs(tmp_path: Path) -> None:
    found = experiment.command(["--fast", "--output", str(tmp_path)])
    assert found.slope[0] == pytest.approx(found.slope[1], rel=0.1)
    assert np.corrcoef(found.actual, found.foretold["metagradient"])[0, 1] > 0.9
    assert found.learning[-1] < found.learning[0]
    record = json.loads((tmp_path / "metagradients_digits.json").read_text())
    assert record["area"] == found.area
    assert (tmp_path / "metagradients_digits.png").stat().st_size > 10_000
