"""The experiment that learns how to train a small GPT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import transformer as experiment

SMALL = experiment.Config(width=8, depth=2, heads=2, length=6, characters=3_000, steps=15, knots=8)
POINT = {"learning_rate": 2e-3, "b1": 0.9, "b2": 0.95, "warmup": 0.2}


def test_text_is_the_same_every_time() -> None:
    text = experiment.library_text(3_000)
    assert len(text) == 3_000 and text == experiment.library_text(4_000)[:3_000]
    assert text.isascii() and len(set(text)) > 40


def test_windows_of_other_files_are_held_out() -> None:
    s = experiment.setting(SMALL)
    assert [len(part) for part in (s.train, s.held_out, s.test)] == [2399 // 6, 299 // 6, 299 // 6]
    np.testing.assert_array_equal(s.train[0, 6:], s.train[1, :1])  # a window's last is only foretold


def test_every_parameter_has_a_kind() -> None:
    params = jax.eval_shape(experiment.setting(SMALL).init, jax.random.key(0))
    kinds = experiment.kinds(params)
    assert jax.tree.structure(kinds) == jax.tree.structure(params)
    assert set(jax.tree.leaves(kinds)) == set(experiment.KINDS)
    sizes: dict[str, int] = {}
    for kind, leaf in zip(jax.tree.leaves(kinds), jax.tree.leaves(params)):
        sizes[kind] = sizes.get(kind, 0) + leaf.size
    block = 8 * 8
    assert sizes["attention"] == 2 * 4 * block and sizes["perceptron"] == 2 * 8 * block


def test_knots_are_met_and_constants_stay() -> None:
    learned = experiment.first_knots(SMALL, POINT)
    cosine = experiment.warmup_cosine(POINT, SMALL.steps)
    full = experiment.expanded(learned, SMALL.steps)
    for kind in experiment.KINDS:
        expected = jnp.maximum(
            cosine["learning_rate"][kind][::2], experiment.FLOOR * POINT["learning_rate"]
        )
        np.testing.assert_allclose(full["learning_rate"][kind][::2], expected, rtol=1e-5)
    for name in ("b1", "b2", "weight_decay", "eps"):
        np.testing.assert_allclose(full[name], cosine[name], rtol=1e-5)
    middle = experiment.between(jnp.array([1.0, 4.0]), 3)[1]
    assert float(middle) == pytest.approx(2.0)


def test_warmup_and_cosine() -> None:
    rates = experiment.warmup_cosine(POINT, 100)["learning_rate"]["attention"]
    assert float(rates[0]) == pytest.approx(2e-3 * 0.5 / 20, rel=1e-4)
    assert int(jnp.argmax(rates)) in (19, 20) and 0 < float(rates[-1]) < 1e-6


@pytest.mark.slow
def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It finds, learns, judges and writes; again, it reads what it has searched and learned."""
    arguments = ["--fast", "--checkpoints", str(tmp_path / "saved"), "--output", str(tmp_path)]
    found = experiment.command(arguments)
    assert (tmp_path / "transformer.png").exists() and (tmp_path / "transformer.npz").exists()
    assert all(np.isfinite(loss).all() and len(loss) == 2 for loss in found["loss"].values())
    assert "learned less it" in capsys.readouterr().out
    again = experiment.command(arguments)
    np.testing.assert_array_equal(again["loss"]["learned"], found["loss"]["learned"])
