"""The experiment on leaving out half of the examples."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from experiments import leave_out as experiment
from hypergrad import nets

TINY = replace(experiment.PERCEPTRON, examples=32, start_steps=2, steps=3)
CONFIG = experiment.Config(hidden=4, targets=3, resamples=200)


def test_adamw_with_epsilon_under_the_root_is_that_of_optax() -> None:
    curvature, hypers = jnp.array([1.0, 1e-3, 1e-5]), {"learning_rate": 0.1, "eps_root": 1e-6}
    loss = lambda w, meta, step: 0.5 * jnp.sum(curvature * w**2)  # noqa: E731
    ours = hg.train(
        loss, jnp.ones(3), hypers, steps=4, optimizer=experiment.adamw(), adjoint=hg.Stored()
    ).params
    optimizer = optax.adamw(0.1, eps=0.0, eps_root=1e-6, weight_decay=0.01)
    theirs: Any = jnp.ones(3)
    state = optimizer.init(theirs)
    for _ in range(4):
        update, state = optimizer.update(curvature * theirs, state, theirs)
        theirs = theirs + update
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_without_dropout_the_networks_are_those_of_the_library() -> None:
    key = jax.random.key(0)
    init, apply = nets.transformer(11, 6, width=8, depth=1, heads=2)
    w, tokens = init(key), jax.random.randint(key, (3, 6), 0, 11)
    found = jax.jit(partial(experiment.transformer, 2))(w, tokens, 0.0, key)
    np.testing.assert_allclose(found, jax.jit(apply)(w, tokens), atol=1e-5)
    init, apply = nets.mlp((5, 4, 3))
    w, inputs = init(key), jax.random.normal(key, (2, 5))
    np.testing.assert_allclose(experiment.perceptron(w, inputs, 0.0, key), apply(w, inputs), atol=1e-6)


def test_dropout_keeps_the_mean() -> None:
    x = experiment.dropped(jnp.ones(20_000), 0.25, jax.random.key(0))
    assert float(jnp.mean(x == 0)) == pytest.approx(0.25, abs=0.01)
    assert float(jnp.mean(x)) == pytest.approx(1.0, abs=0.02)


def test_masks_are_those_of_the_key_and_weights_of_zero_leave_out() -> None:
    t = experiment.task(CONFIG, TINY)
    final = jax.jit(experiment.outer(CONFIG, TINY, t, 8, hg.Stored()))
    key, other = jax.random.split(jax.random.key(0))
    value = lambda c, rate, key: float(final(c, jnp.float32(1e-8), jnp.float32(rate), key))  # noqa: E731
    ones = jnp.ones(32)
    assert value(ones, 0.5, key) == value(ones, 0.5, key) != value(ones, 0.5, other)
    assert value(ones, 0.0, key) == value(ones, 0.0, other)
    rows = hg.data.minibatches(jax.random.key(CONFIG.seed + 2), 32, 8, 3)
    never = np.setdiff1d(np.arange(32), rows)
    assert len(never) == 8 and value(ones.at[never].set(0), 0.0, key) == value(ones, 0.0, key)
    assert value(ones.at[rows[0]].set(0), 0.0, key) != value(ones, 0.0, key)


def test_verdicts_are_counted() -> None:
    def made(correlation: float, verdict: str) -> experiment.Outcome:
        rest = (np.zeros(1), np.zeros(1), (0.0, 0.0, 0.0))
        return experiment.Outcome(
            "made", 1, "new masks", 1e-8, verdict, 0.5, 6, "", 0.1, correlation, 0, 1, *rest
        )

    found = [
        made(*x) for x in [(0.95, "trusted"), (0.91, "NOT TRUSTED"), (0.5, "trusted"), (0.1, "trusted")]
    ]
    found += [made(-0.3, "NOT TRUSTED"), made(0.0, "cannot tell")]
    counts = experiment.judged(found)
    assert counts == {
        "settings": 6, "fail": 3, "fail and flagged": 1, "fail and passed": 1,
        "work": 2, "work and passed": 1, "work and flagged": 1, "between and passed": 1,
    }  # fmt: skip


def test_the_bootstrap_has_about_the_width_of_fisher() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = 0.7 * x + np.sqrt(1 - 0.7**2) * rng.normal(size=50)
    low, high = experiment.bootstrap(CONFIG, x, y)
    z = np.arctanh(experiment.rank_correlation(x, y))
    expected = np.tanh([z - 1.96 / np.sqrt(47), z + 1.96 / np.sqrt(47)])
    assert np.array([low, high]) == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
def test_the_command_foretells_runs_with_a_large_epsilon(tmp_path: Path) -> None:
    found = experiment.command(["--fast", "--output", str(tmp_path)])
    smooth = [x for x in found if x.eps_root == 1e-6]
    assert len(found) == 6 and min(x.correlation for x in smooth) > 0.7
    assert all(x.verdict == "trusted" for x in smooth)
    record = json.loads((tmp_path / "leave_out.json").read_text())
    assert record["judged"] == experiment.judged(found)
    assert (tmp_path / "leave_out.png").stat().st_size > 10_000
