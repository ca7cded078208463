"""The experiment on tuning ε: coordinates, searches, verdicts, and resuming."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from experiments import epsilon as experiment
from experiments.epsilon import CONTESTANTS, METHODS, TUNED_EPS, Config, Outcome, Tried
from hypergrad import data

TINY = Config(
    (experiment.Workload("digits", "MLP", 3, 16, 200, 50, 50),),
    ("Adam", "Adam, ε"),
    first_runs=2,
    meta_steps=2,
    hypergradient_cost=2,
    judged_on=2,
)


def coordinates(name: str, hypers: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `experiment.hypers`, written once more from the table in its head."""
    method = METHODS[name.removesuffix(TUNED_EPS)]
    rate, point = hypers["learning_rate"], {}
    if name.endswith(TUNED_EPS):
        point["eps"] = hypers["eps"] ** method.eps_power
        rate = rate / point["eps"]
    if method.momentum is not None:
        point["momentum"] = hypers[method.momentum]
        rate = rate / (1 - point["momentum"]) if method.sums else rate
    return {"rate": rate, **point}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_coordinates_are_a_bijection(name: str) -> None:
    points = experiment.quasi_random(name, 5, seed=1)
    hypers = experiment.hypers(name, points)
    method = METHODS[name.removesuffix(TUNED_EPS)]
    optimizer = method.optimizer()
    assert set(hypers) <= set(optimizer.hypers)
    if method.eps_power is not None and "eps" not in points:
        np.testing.assert_allclose(hypers["eps"], optimizer.hypers["eps"], rtol=1e-6)
    back = coordinates(name, hypers)
    assert set(back) == set(points)
    for key, x in points.items():
        np.testing.assert_allclose(back[key], x, rtol=1e-4)


def test_eps_inside_the_root_is_in_units_of_the_gradient() -> None:
    # At the first step from v = 0, RMSProp moves by α g / √((1-ρ) g² + ε): with ε̃ = √ε far above g by r g,
    # whatever ε̃ is.
    for eps in (1e2, 1e4):
        point = {"rate": jnp.float32(0.5), "momentum": jnp.float32(0.5), "eps": jnp.float32(eps)}
        trained = hg.train(
            lambda w, meta, step: jnp.sum(w),
            jnp.zeros(1),
            experiment.hypers("RMSProp, ε", point),
            steps=1,
            optimizer=hg.rmsprop_momentum(),
        )
        assert float(trained.params[0]) == pytest.approx(-0.5 * (1 - 0.5), rel=1e-3)


def test_chained_hypergradient_equals_the_direct_one() -> None:
    def trained(hypers: dict[str, jax.Array], start: jax.Array) -> jax.Array:
        end = hg.train(
            lambda w, meta, step: jnp.sum(jnp.array([1.0, 0.1]) * w**2),
            start,
            hypers,
            steps=4,
            optimizer=hg.adam(),
            adjoint=hg.Stored(),
        )
        return jnp.sum(end.params**2)

    both = jax.jit(jax.value_and_grad(trained))
    compiled = experiment.Compiled(*[None] * 5, both)._replace(tuning=jnp.ones(2))
    raw = {"rate": jnp.float32(0.5), "eps": jnp.float32(-1.0), "momentum": jnp.float32(1.5)}
    loss, gradient, point = experiment.chained("Adam, ε", raw, compiled)

    def direct(raw: dict[str, jax.Array]) -> jax.Array:
        eps, b1 = jnp.exp(raw["eps"]), 0.25 + 0.75 * jax.nn.sigmoid(raw["momentum"])
        return trained({"learning_rate": jnp.exp(raw["rate"]) * eps, "b1": b1, "eps": eps}, jnp.ones(2))

    wanted_loss, wanted = jax.jit(jax.value_and_grad(direct))(raw)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert float(point["eps"]) == pytest.approx(np.exp(-1.0))
    for name in raw:
        assert abs(wanted[name]) > 1e-3
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-3)


def test_a_contained_optimizer_is_inherited_as_itself() -> None:
    """Momentum as Adam with a large ε, and Adam with its default one."""
    momentum = experiment.hypers("Momentum", {"rate": np.float32(0.3), "momentum": np.float32(0.8)})
    adam = experiment.hypers("Adam", {"rate": np.float32(1e-3), "momentum": np.float32(0.7)})
    points = experiment.inherited("Adam, ε", {"Adam": adam, "Momentum": momentum, "SGD": momentum})
    back = experiment.hypers("Adam, ε", points)  # in the order of PAIRS
    np.testing.assert_allclose(back["eps"], [1.0, 1e-8], rtol=1e-4)
    np.testing.assert_allclose(back["b1"], [0.8, 0.7], rtol=1e-5)
    np.testing.assert_allclose(back["learning_rate"], [0.3, 1e-3], rtol=1e-4)
    assert len(experiment.inherited("SGD", {"Adam": adam})["rate"]) == 0


def test_verdict() -> None:
    special = np.array([0.1, 0.2, 0.3, 0.4])
    noise = np.array([1.0, -1.0, 1.0, -1.0])  # standard error 1/√3
    for shift, worse, better in ((1.2, True, False), (1.1, False, False), (-1.1, False, False),
                                 (-1.2, False, True)):  # fmt: skip
        found = experiment.verdict(special, special + shift + noise)
        assert found.difference == pytest.approx(shift)
        assert found.standard_error == pytest.approx(1 / np.sqrt(3))
        assert (found.worse, found.better) == (worse, better)
    same = experiment.verdict(special, special)
    assert not same.worse and not same.better


def test_quasi_random_points_lie_in_their_ranges_and_a_longer_search_begins_like_a_shorter_one() -> None:
    few, many = (experiment.quasi_random("NAdam, ε", n, seed=0) for n in (16, 128))
    for name, (low, high) in {
        "rate": experiment.RATE["tuned eps"],
        "eps": experiment.EPS,
        "momentum": tuple(1 - x for x in experiment.FALL[::-1]),
    }.items():
        np.testing.assert_array_equal(few[name], many[name][:16])
        assert np.all((low * 0.999 <= many[name]) & (many[name] <= high * 1.001))
        scale = np.log(1 - many[name] if name == "momentum" else many[name])
        share = np.mean(scale < scale.min() + (scale.max() - scale.min()) / 2)
        assert share == pytest.approx(0.5, abs=0.05)  # log-uniform


def test_a_diverged_run_loses() -> None:
    s = experiment.setting(TINY.workloads[0], None)
    params = jax.vmap(s.init)(jax.random.split(jax.random.key(0), 2))
    params = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    losses, errors = experiment.judge(s)(params, s.test)
    assert losses[0] == np.inf and errors[0] == pytest.approx(experiment.CHANCE)
    assert np.isfinite(losses[1]) and 0 <= errors[1] <= 1
    assert Tried({"rate": np.array([1.0, 2.0])}, losses).best() == {"rate": 2.0}


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function that remembers what it made, for the keys in its last argument, if it has keys."""
    made: dict[Any, Any] = {}

    def remembered(*args: Any) -> Any:
        kind = (
            np.asarray(jax.random.key_data(args[-1])).tobytes() if isinstance(args[-1], jax.Array) else None
        )
        if kind not in made:
            made[kind] = make(*args)
        return made[kind]

    return remembered


@pytest.mark.slow
def test_resumes_to_the_same_results_with_the_stated_number_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[int] = []
    search, cell = experiment.search, experiment.cell

    def counting_search(*args: Any) -> Tried:
        tried = search(*args)
        counted.append(len(tried.losses))
        return tried

    def killed(config: Config, name: str, *others: Any) -> dict[str, Outcome]:
        if name == "Adam, ε":
            raise KeyboardInterrupt
        return cell(config, name, *others)

    monkeypatch.setattr(experiment, "search", counting_search)
    for make in (
        experiment.judge,
        experiment.starts,
        experiment.trainings,
        experiment.hypergradient,
    ):  # compiling takes longer than the runs
        monkeypatch.setattr(experiment, make.__name__, once(make))
    monkeypatch.setattr(experiment, "cell", killed)
    checkpoint = str(tmp_path / "cells.npz")
    with pytest.raises(KeyboardInterrupt):
        experiment.compare(TINY, checkpoint=checkpoint)
    monkeypatch.setattr(experiment, "cell", cell)
    resumed = experiment.main(TINY, checkpoint=checkpoint, output=str(tmp_path))
    assert counted == [TINY.longer_runs] * 2  # nothing was done twice
    whole = experiment.compare(TINY)

    place = "digits MLP"
    assert list(resumed["cells"][place]) == ["Adam", "Adam, ε"]
    for tuner, outcome in whole[place]["Adam, ε"].items():
        again = resumed["cells"][place]["Adam, ε"][tuner]
        for one, other in zip(jax.tree.leaves(outcome[:-1]), jax.tree.leaves(again[:-1])):
            np.testing.assert_array_equal(one, other)
        runs = {"hypergradients": 5, "search": 5, "longer search": 7}[tuner]  # one is inherited
        assert outcome.tuning_losses.shape == (runs,)
        assert outcome.test_error.shape == (2,)
    descended, searched = (whole[place]["Adam, ε"][k].tuning_losses for k in ("hypergradients", "search"))
    np.testing.assert_array_equal(descended[:2], searched[:2])  # the tuners begin with the same runs, ...
    np.testing.assert_allclose(descended[3], descended[:3].min(), rtol=1e-4)  # from whose best one descends
    # What Adam found counts for Adam with ε too.
    adam = whole[place]["Adam"]["search"].tuning_losses.min()
    np.testing.assert_allclose(searched[4], adam, rtol=1e-4)
    taken = experiment.compare(TINY, checkpoint=checkpoint)  # from the file
    for one, other in zip(jax.tree.leaves(taken), jax.tree.leaves(resumed["cells"])):
        np.testing.assert_array_equal(one, other)

    record = json.loads((tmp_path / "epsilon.json").read_text())
    written = record["results"][place]["Adam"]["search"]["test_error"]
    assert written == resumed["cells"][place]["Adam"]["search"].test_error.tolist()
    assert [v["special"] for v in record["verdicts"]] == ["Adam"] * 3
    for v in record["verdicts"]:
        special, general = (record["results"][place][name][v["tuner"]] for name in ("Adam", "Adam, ε"))
        assert v["found_less"] == (min(general["tuning_losses"]) > min(special["tuning_losses"]))
        assert v["difference"] == pytest.approx(
            np.mean(general["test_error"]) - np.mean(special["test_error"])
        )
    assert (tmp_path / "epsilon.png").stat().st_size > 10_000
    assert "digits MLP" in capsys.readouterr().out


def test_refuses_a_checkpoint_of_another_configuration(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "cells.npz")
    hg.files.save(checkpoint, {"x": np.zeros(1)}, config={})
    with pytest.raises(ValueError, match="results of another configuration; give another file"):
        experiment.compare(TINY, checkpoint=checkpoint)


def test_leaves_out_data_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = experiment.Workload("fashion-mnist", "MLP", 3, 16, 200, 50, 50)
    assert experiment.compare(replace(TINY, workloads=(workload,)), str(tmp_path)) == {}
    assert "fashion-mnist MLP: left out" in capsys.readouterr().out
    with pytest.raises(data.DataError):
        experiment.setting(workload, str(tmp_path))
