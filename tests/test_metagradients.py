"""The experiment with the metagradients of all training examples."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error

from experiments import metagradients as experiment
from experiments.data_weights import examples

SMALL = experiment.Config(data="digits", hidden=3, steps=5, batch_size=50, curvature_examples=50)


@pytest.mark.slow
def test_influence_with_much_damping_is_an_inner_product() -> None:
    e, _ = examples(SMALL, None)
    e = e._replace(images=e.images[:20], labels=e.labels[:20])
    init, apply = experiment.network(SMALL, e)
    w, damping = init(jax.random.key(0)), 1e4
    found = experiment.influence(SMALL, e, w, damping)
    of = lambda x, y: jax.jacobian(lambda w: experiment.losses(apply, w, x, y))(w)  # noqa: E731
    mean = jax.tree.map(lambda x: x.mean(0), of(e.clean_images, e.clean_labels))
    products = jax.tree.map(lambda x, y: jnp.tensordot(x, y, y.ndim), of(e.images, e.labels), mean)
    expected = -sum(jax.tree.leaves(products)) / damping / 20
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
