"""Meta-tuning in three lines."""

import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import constraints, files, schedules
from hypergrad.meta.ranges import between, entered, limits_of
from hypergrad.meta.trials import pattern_search, race, rounds_of
from hypergrad.meta.tuned import advice_on, still_moving
from hypergrad.meta.zeros import announce_zeros, zeros

STEPS = 40
CURVATURE = jnp.array([0.1, 1.0, 10.0])


def loss(params: Any, meta: Any, batch: Any) -> Any:
    return 0.5 * jnp.sum(CURVATURE * (params - 1.0) ** 2)


def trained_by_optax(transformation: Any) -> float:
    params = jnp.zeros(3)
    state = transformation.init(params)
    for _ in range(STEPS):
        updates, state = transformation.update(jax.grad(loss)(params, None, 0), state, params)
        params = optax.apply_updates(params, updates)
    return float(loss(params, None, 0))


@pytest.mark.parametrize(
    "optimizer", [pytest.param(hg.adam(), marks=pytest.mark.slow), hg.nesterov()], ids=lambda x: x.name
)
def test_the_tuned_optimizer_trains_better_in_optax(optimizer: Any) -> None:
    start = {"learning_rate": 2e-3}
    settings = {"steps": STEPS, "meta_steps": 10, "progress": False}
    tuned = hg.tune(loss, jnp.zeros(3), start, optimizer=optimizer, **settings)
    assert set(tuned.hypers) == set(optimizer.hypers)
    before = trained_by_optax(hg.as_optax(optimizer, start))
    after = trained_by_optax(tuned.optax())
    assert after < 1e-2 * before
    assert tuned.score < 1e-2 * tuned.trials[0]
    for name, (low, high) in optimizer.domains.items():
        assert name not in tuned.hypers or low <= tuned.hypers[name] < high


@pytest.mark.slow
@pytest.mark.quick("float32")
@pytest.mark.parametrize("precision", [jnp.float32, jnp.float64])
def test_needs_no_promotion_of_types(precision: Any) -> None:
    with jax.enable_x64(precision == jnp.float64):
        target = jnp.ones(3, precision)

        def distance(params: Any, meta: Any, batch: Any) -> Any:
            return jnp.sum((params - target) ** 2)

        def tuned() -> hg.Tuned:
            settings = {"steps": 4, "optimizer": hg.momentum(), "meta_steps": 2, "seeds": 2, "trials": 1}
            return hg.tune(
                distance, jnp.zeros(3, precision), {"learning_rate": 0.1}, progress=False, **settings
            )

        expected = tuned()
        with jax.numpy_dtype_promotion("strict"):
            found = tuned()
        np.testing.assert_array_equal(found.history.loss, expected.history.loss)
        jax.tree.map(np.testing.assert_array_equal, found.hypers, expected.hypers)
        assert found.score < found.trials[0]


def test_learns_schedules_by_leaf_and_an_optax_optimizer() -> None:
    """A schedule stays one, and so does a tree; what is not named stays as it was."""
    optimizer = hg.from_optax(optax.sgd, {"learning_rate": None, "momentum": 0.9}, hg.momentum().domains)
    tuned = hg.tune(
        loss,
        jnp.zeros(3),
        {"learning_rate": jnp.full(STEPS, 1e-3)},
        steps=STEPS,
        optimizer=optimizer,
        learn=["learning_rate"],
        meta_steps=20,
        trials=0,
        progress=False,
    )
    assert tuned.hypers["learning_rate"].shape == (STEPS,)
    assert float(jnp.std(tuned.hypers["learning_rate"])) > 0
    assert tuned.hypers["momentum"] == 0.9
    assert trained_by_optax(tuned.optax()) < trained_by_optax(optax.sgd(1e-3, momentum=0.9))


def test_draws_starts_and_batches_from_keys_and_validates_elsewhere() -> None:
    def start(key: Any) -> Any:
        return jax.random.normal(key, (3,))

    def batches(key: Any) -> Any:
        return 0.1 * jax.random.normal(key, (STEPS, 3))

    def noisy(params: Any, meta: Any, noise: Any) -> Any:
        return loss(params, None, None) + jnp.sum(noise * params) + meta

    tuned = hg.tune(
        noisy,
        start,
        {"learning_rate": 1e-3, "momentum": 0.5},
        jnp.float32(1.0),
        batches,
        steps=STEPS,
        optimizer=hg.momentum(),
        validation=lambda params: loss(params, None, None),
        seeds=2,
        meta_steps=5,
        trials=3,
        progress=False,
    )
    assert tuned.stopped == ""
    assert tuned.score < tuned.trials[0]
    assert np.ndim(tuned.hypers["learning_rate"]) == 0


def test_refuses_names_that_the_optimizer_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"tune\(.*have the names \['learning_rate'.*unknown: \['lr'\]"):
        hg.tune(loss, jnp.zeros(3), {"lr": 0.1}, steps=STEPS)
    with pytest.raises(ValueError, match=r"learn=\['lr'\], but \['lr'\] are none of"):
        hg.tune(loss, jnp.zeros(3), {"learning_rate": 0.1}, steps=STEPS, learn=["lr"])


def test_refuses_to_begin_nowhere() -> None:
    with pytest.raises(ValueError, match=r"tune\(.*missing: \['learning_rate'\]"):
        hg.tune(loss, jnp.zeros(3), {}, steps=STEPS)


def test_refuses_to_begin_at_the_end_of_a_domain() -> None:
    hypers = {"learning_rate": 0.1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"\['weight_decay'\] cannot be learned from \[0.0\]"):
        hg.tune(loss, jnp.zeros(3), hypers, steps=STEPS, optimizer=hg.adamw())


def test_announces_by_name_what_is_inside_of_a_sign() -> None:
    optimizer = hg.from_optax(optax.lion, {"learning_rate": None, "b1": 0.9, "weight_decay": 1e-3})
    with pytest.warns(
        hg.implicit.ZeroHypergradientWarning, match=r"in hypers\['b1'\] is exactly 0"
    ) as caught:
        tuned = hg.tune(
            loss,
            jnp.zeros(3),
            {"learning_rate": 1e-2},
            steps=10,
            optimizer=optimizer,
            meta_steps=3,
            trials=0,
            progress=False,
        )
    assert len(caught) == 1  # once, and not at every meta-step
    assert float(tuned.hypers["b1"]) == pytest.approx(0.9, rel=1e-6)
    assert float(tuned.hypers["learning_rate"]) != pytest.approx(1e-2, rel=1e-3)


def test_zeros_are_whole_leaves() -> None:
    hypergradient = {"a": np.zeros(3), "b": (np.array([0.0, 1e-30]), 0.0), "c": np.nan, "d": np.zeros(0)}
    assert zeros(hypergradient) == ["['a']", "['b'][1]"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        announce_zeros("tune", {"b": np.array([0.0, 1.0])})


@pytest.mark.parametrize(
    ("build", "hypers"),
    [(optax.sgd, {"learning_rate": 1e-3, "momentum": 0.5}), (optax.rprop, {"eta_plus": 1.001})],
    ids=["sgd", "rprop"],
)
def test_what_is_learned_of_optax_stays_in_its_usual_domain(build: Any, hypers: Any) -> None:
    """Meta-steps that would carry plain numbers far outside."""
    optimizer = hg.from_optax(build, {"learning_rate": 1e-3} | dict.fromkeys(hypers))
    tuned = hg.tune(
        loss,
        jnp.zeros(3),
        hypers,
        steps=10,
        optimizer=optimizer,
        learn=list(hypers),
        validation=lambda w: -loss(w, None, None),  # the worse, the better: rates shrink
        meta_steps=5,
        meta_optimizer=optax.sgd(1e4),
        trials=0,
        progress=False,
    )
    for name in hypers:
        low, high = {"learning_rate": (0, np.inf), "momentum": (0, 1), "eta_plus": (1, np.inf)}[name]
        assert low < float(tuned.hypers[name]) < high
        assert float(tuned.hypers[name]) != hypers[name]


def test_domains_of_the_user_win() -> None:
    names: dict[str, Any] = {"learning_rate": None, "b1": 0.9, "alpha": 1.0}
    optimizer = hg.from_optax(
        lambda learning_rate, b1, alpha: optax.adam(alpha * learning_rate, b1=b1),
        names,
        {"b1": (-1.0, 0.5)},
    )
    assert optimizer.domains == {"learning_rate": (0.0, np.inf), "b1": (-1.0, 0.5)}
    settings: dict[str, Any] = {"steps": 3, "optimizer": optimizer, "trials": 0, "progress": False}
    with pytest.raises(ValueError, match=r"hypers\['b1'\].*it must lie in \[-1, 0.5\)"):
        hg.tune(loss, jnp.zeros(3), {"learning_rate": 0.1}, learn=["learning_rate"], **settings)


@pytest.mark.parametrize(("domain", "start"), [((1.0, np.inf), 1.2), ((-np.inf, -0.5), -0.7)])
def test_half_lines_that_do_not_begin_at_zero(domain: Any, start: float) -> None:
    optimizer = hg.from_optax(optax.sgd, {"learning_rate": None}, {"learning_rate": domain})
    constraint = between(*optimizer.domains["learning_rate"])
    raw = constraint.to_raw(jnp.float32(start))
    assert float(constraint.to_constrained(raw)) == pytest.approx(start, rel=1e-6)
    ends = constraint.to_constrained(jnp.array([-1e4, -50.0, 50.0]))
    assert all(domain[0] < float(x) < domain[1] for x in ends)
    h = 1e-2
    slope = (constraint.to_constrained(raw + h) - constraint.to_constrained(raw - h)) / (2 * h)
    assert float(jax.grad(constraint.to_constrained)(raw)) == pytest.approx(float(slope), rel=1e-3)


# ---- what optax does not name


def test_a_name_without_a_domain_is_refused() -> None:
    optimizer = hg.from_optax(lambda lr_factor: optax.sgd(lr_factor), {"lr_factor": 0.1})
    with pytest.raises(
        ValueError,
        match=r"\['lr_factor'\] have no domain.*domains=\{'lr_factor': \(0\.0, math\.inf\)\} .*learn=\[\]",
    ):
        hg.tune(loss, jnp.zeros(3), {}, steps=3, optimizer=optimizer)


@pytest.mark.parametrize(
    ("build", "hypers"),
    [
        (optax.lion, {"learning_rate": 1e-4}),
        (optax.nadamw, {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999}),
        (optax.adan, {"learning_rate": 1e-2, "b1": 0.98, "b2": 0.92}),
    ],
    ids=["lion", "nadamw", "adan"],
)
@pytest.mark.quick("lion")
def test_optax_optimizers_are_tuned_inside_their_domains(build: Any, hypers: Any) -> None:
    """Also in optax itself the result is better by far than the start, whatever the last meta-step did."""
    optimizer = hg.from_optax(build, dict.fromkeys(hypers))
    settings = {"steps": STEPS, "optimizer": optimizer, "meta_steps": 10, "progress": False}
    tuned = hg.tune(loss, jnp.zeros(3), hypers, **settings)
    for name in hypers:
        low, high = optimizer.domains[name]
        assert low < float(tuned.hypers[name]) < high
    assert tuned.score == min(tuned.scores.values()) < 0.05 * tuned.trials[0]
    assert trained_by_optax(tuned.optax()) < 0.05 * trained_by_optax(build(**hypers))


# ---- schedules


def ranges(schedule: Any, steps: int = STEPS) -> Any:
    return limits_of(entered(schedule, steps), (0.0, np.inf), 0.25, steps)


def test_schedules_are_learned_in_every_parameter_that_has_a_range() -> None:
    found = ranges(schedules.WarmupCosine(0.0, 0.1, 4, STEPS))
    assert (found.init_value, found.end_value) == (None, None)  # at the end of their range
    assert found.peak_value.name == "positive"
    assert found.warmup_steps.domain == f"0.0 < x < {(4 + STEPS) / 2}"
    assert found.decay_steps.domain == f"{(4 + STEPS) / 2} < x < {2 * STEPS}"
    assert ranges(schedules.PiecewiseLinear([0, 5], [0.1, 0.2])).positions.name == "ascending"
    assert ranges(schedules.Triangular(0.1, 0.2, 8)).cycle_steps.domain == f"1.0 < x < {2 * STEPS}"
    cycle = ranges(schedules.OneCycle(STEPS, 0.1))
    assert {limit.name for limit in (cycle.div_factor, cycle.peak_value)} == {"positive"}
    high, low = (
        cycle.pct_start.to_constrained(jnp.float32(9)),
        cycle.pct_final.to_constrained(jnp.float32(-9)),
    )
    assert 0.57 < high < 0.575 < low < 0.58


def test_an_optax_schedule_is_learned_at_every_step_and_ours_in_its_parameters() -> None:
    rates = {
        "a": optax.warmup_cosine_decay_schedule(0.0, 0.02, 5, STEPS),
        "b": schedules.WarmupCosine(0.0, 0.02, 5.5, 30.0),
    }

    def both(params: Any, meta: Any, batch: Any) -> Any:
        return loss(params["a"], meta, batch) + loss(params["b"], meta, batch)

    tuned = hg.tune(
        both,
        {"a": jnp.zeros(3), "b": jnp.zeros(3)},
        {"learning_rate": rates},
        steps=STEPS,
        optimizer=hg.momentum(),
        adjoint=hg.Stored(),
        meta_steps=3,
        trials=0,
        progress=False,
    )
    assert tuned.score < tuned.scores[0]
    by_step, by_parameter = tuned.hypers["learning_rate"]["a"], tuned.hypers["learning_rate"]["b"]
    start = tuned.start["learning_rate"]["a"].values
    assert isinstance(by_step, schedules.PerStep) and by_step.values.shape == (STEPS,)
    np.testing.assert_allclose(start[1:], [rates["a"](k) for k in range(1, STEPS)], rtol=1e-5)
    assert start[0] == pytest.approx(1e-3 * 0.02)  # in place of 0
    assert np.all(np.asarray(by_step.values) != np.asarray(start))
    assert (by_parameter.init_value, by_parameter.end_value) == (0, 0)
    assert by_parameter.warmup_steps != 5.5 and by_parameter.decay_steps != 30.0
    assert trees_equal(pickle.loads(pickle.dumps(tuned)).hypers, tuned.hypers)
    assert tuned.optax().init({"a": jnp.zeros(3), "b": jnp.zeros(3)}) is not None


def trees_equal(one: Any, other: Any) -> bool:
    same = jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return same and all(np.array_equal(a, b) for a, b in pairs)


# ---- trials


def test_trials_find_the_best_start_of_a_pattern_and_keep_a_good_one() -> None:
    tried: list[Any] = []

    def score(shifts: Any) -> float:
        tried.append(shifts)
        return (shifts.get("rate", 0.0) - 2 * np.log(10)) ** 2 + (shifts.get("b1", 0.0) + 1.5) ** 2

    shifts, scores = pattern_search(score, rounds_of({"b1": "share", "rate": "rate"}), 12)
    assert shifts == {"rate": pytest.approx(2 * np.log(10)), "b1": -1.5}
    assert len(tried) == len(scores) == 13 and tried[0] == {}
    assert pattern_search(lambda x: sum(map(abs, x.values())), rounds_of({"rate": "rate"}), 5)[0] == {}


def test_trials_go_down_from_a_start_that_diverges() -> None:
    shifts, scores = pattern_search(
        lambda x: np.inf if x.get("rate", 0.0) > -5 else 1.0, rounds_of({"rate": "rate"}), 6
    )
    assert shifts["rate"] == pytest.approx(-3 * np.log(10)) and scores[0] == np.inf
    assert pattern_search(lambda x: np.inf, rounds_of({"rate": "rate"}), 6)[0] == {}


@pytest.mark.parametrize(("trials", "keys"), [(16, 6), (2, 2), (5, 9)])
def test_a_race_spends_no_more_than_it_may_and_ends_with_all_keys(trials: int, keys: int) -> None:
    asked: list[tuple[tuple[float, ...], int]] = []

    def score(shifts: Any, key: int) -> float:
        asked.append((tuple(shifts.values()), key))
        return abs(shifts.get("rate", 0.0) - 2) + abs(shifts.get("b1", 0.0) + 1) + 0.1 * key

    shifts, scores = race(score, {"rate": "rate", "b1": "share"}, trials, keys)
    assert len(asked) == len(set(asked)) <= trials * keys + keys  # the start takes all keys too
    for place in (), tuple(shifts.values()):
        assert sorted(key for at, key in asked if at == place) == list(range(keys))
    assert scores[0] == pytest.approx(3 + 0.05 * (keys - 1)) and min(scores) <= scores[0]


def test_a_race_is_won_in_spite_of_noise_and_failures() -> None:
    rng = np.random.default_rng(0)
    noise = {key: rng.normal(size=1000) for key in range(6)}

    def score(shifts: Any, key: int) -> float:
        rate, share = shifts.get("rate", 0.0), shifts.get("b1", 0.0)
        if rate > 3:
            return np.inf
        return (rate + 3) ** 2 + (share - 2) ** 2 + noise[key][int(100 * abs(rate + share))]

    shifts, _ = race(score, {"rate": "rate", "b1": "share"}, 16, 6)
    assert abs(shifts["rate"] + 3) < 1.5 and abs(shifts["b1"] - 2) < 1.5
    assert race(lambda shifts, key: np.inf, {"rate": "rate", "b1": "share"}, 16, 6)[0] == {}


def test_a_few_constants_of_random_runs_race() -> None:
    random = {"params": lambda key: 0.1 * jax.random.normal(key, (3,)), "trials": 4, "meta_steps": 1}
    assert len(small(**random).trials) == 12
    assert len(small(**random, learn=["learning_rate"]).trials) == 5
    assert len(small(**random, hypers={"learning_rate": np.full(9, 1e-3)}, steps=9).trials) == 5
    assert len(small(**random | {"trials": 3}).trials) == 4


def test_zeros_at_a_perfect_start_that_trials_found_are_not_announced() -> None:
    """There a hypergradient is rounding; warnings are errors here."""
    half = lambda w, meta, step: 0.5 * jnp.sum((w - 1) ** 2)  # noqa: E731
    tuned = small(hypers={"learning_rate": 0.1}, optimizer=hg.sgd(), loss=half, trials=1)
    assert tuned.score < 1e-10 < 0.1 < tuned.trials[0]  # one step of a rate of 1 arrives


# ---- the result


def small(**changes: Any) -> hg.Tuned:
    given = {"loss": loss, "params": jnp.zeros(3), "hypers": {"learning_rate": 1e-3}, "steps": 5}
    quick = {"optimizer": hg.momentum(), "adjoint": hg.Stored(), "meta_steps": 6, "trials": 0}
    quick |= {"progress": False}
    return hg.tune(**(given | quick | changes))


def test_the_best_values_are_returned_and_not_the_last() -> None:
    tuned = small(meta_optimizer=optax.sgd(3.0), hypers={"learning_rate": 0.1}, learn=["learning_rate"])
    assert list(tuned.scores) == list(range(7))
    assert tuned.score == min(tuned.scores.values()) < tuned.scores[6]
    np.testing.assert_array_equal(tuned.history.loss, list(tuned.scores.values())[:6])
    again = hg.train(loss, jnp.zeros(3), tuned.hypers, steps=5).losses[-1]
    assert float(again) == pytest.approx(tuned.score, rel=1e-5)


def test_what_still_moves_and_hardly_learns_is_said() -> None:
    tuned = small(hypers={"learning_rate": 1e-6})
    assert set(tuned.moving) == {"learning_rate", "momentum"}
    assert tuned.moving["learning_rate"][0] < tuned.moving["learning_rate"][1]
    assert tuned.advice.startswith("the inner training hardly learns: its loss goes from 5.55 to 5.55 in 5")
    text = str(tuned)
    assert repr(tuned) == text and len(text.splitlines()) == 5 and max(map(len, text.splitlines())) < 130
    assert text.startswith("Tuned momentum(): score 5.55 at the start, ")
    assert "still moving: learning_rate (" in text and "raise learning_rate or steps" in text


def test_chaos_is_said() -> None:
    def rippled(w: Any) -> Any:
        return loss(w, None, 0) + 0.01 * jnp.sin(1e7 * jnp.sum(w))

    start = {"hypers": {"learning_rate": 0.1}, "learn": ["learning_rate"], "trials": 4}
    tuned = small(validation=rippled, meta_optimizer=optax.sgd(1e-9), **start)
    assert tuned.advice.startswith("training is chaotic: hypergradients have norms about ")
    assert tuned.advice in str(tuned)
    assert small(validation=lambda w: loss(w, None, 0), **start).advice == ""


def test_what_has_come_to_rest_is_not_called_moving() -> None:
    shake = np.exp(0.3 * (-1.0) ** np.arange(20))
    path = {"still": np.ones(20), "shaken": shake, "growing": np.exp(np.arange(20) / 10)}
    assert set(still_moving(path, dict.fromkeys(path, constraints.positive))) == {"growing"}
    assert advice_on((-1.0, -2.0), 9) == "" != advice_on((-2.0, -2.01), 9)


def test_a_result_is_saved_and_loaded(tmp_path: Path) -> None:
    wrapped = hg.from_optax(optax.sgd, {"learning_rate": None, "momentum": 0.9})
    cosine = schedules.WarmupCosine(0.01, 0.1, 2.0, 5.0)
    for k, changes in enumerate([{}, {"optimizer": wrapped, "hypers": {"learning_rate": cosine}}]):
        tuned = small(meta_steps=1, **changes)
        tuned.save(tmp_path / f"{k}.npz")
        loaded = hg.load_tuned(tmp_path / f"{k}.npz")
        copied = pickle.loads(pickle.dumps(tuned))
        for other in (loaded, copied):
            assert trees_equal(other.hypers, tuned.hypers) and trees_equal(other.start, tuned.start)
            assert str(other) == str(tuned) and other.scores == tuned.scores
            assert other.optimizer.domains == tuned.optimizer.domains
            assert trained_by_optax(other.optax()) == trained_by_optax(tuned.optax())


def test_a_file_that_does_not_say_its_optimizer_is_given_it(tmp_path: Path) -> None:
    path = tmp_path / "tuned.npz"
    optimizer = hg.from_optax(lambda learning_rate: optax.sgd(learning_rate), {"learning_rate": None})
    tuned = small(optimizer=optimizer, meta_steps=0)
    tuned.save(path)
    with pytest.raises(ValueError, match=r"load_tuned\('.*'\): .*from_optax\(<lambda>\), is made; give"):
        hg.load_tuned(path)
    assert hg.load_tuned(path, optimizer).optimizer is optimizer
    with pytest.raises(ValueError, match=r"optimizer=adam\(\)\): the file is of from_optax"):
        hg.load_tuned(path, hg.adam())
    with pytest.raises(TypeError, match="holds a Named, which a file cannot name; use pickle"):
        tuned._replace(hypers={"learning_rate": Named(1.0)}).save(path)
    files.save(path, {"a": np.ones(1)})
    with pytest.raises(ValueError, match=r"was not written by Tuned\.save"):
        hg.load_tuned(path)


class Named(NamedTuple):
    value: float


def test_resuming_begins_where_the_trials_ended(tmp_path: Path, capsys: Any) -> None:
    settings: dict[str, Any] = {"trials": 4, "checkpoint": tmp_path / "run", "progress": True}
    first = small(meta_steps=2, **settings)
    assert "for trials of where to begin" in capsys.readouterr().err
    whole = small(meta_steps=5, trials=4)
    resumed = small(meta_steps=5, **settings)
    assert "trials" not in capsys.readouterr().err
    np.testing.assert_array_equal(resumed.trials, whole.trials)
    np.testing.assert_array_equal(first.trials, whole.trials)
    assert resumed.scores == whole.scores and trees_equal(resumed.hypers, whole.hypers)
    with pytest.raises(ValueError, match="it holds another run"):
        small(meta_steps=5, **(settings | {"trials": 3}))


def test_refuses_a_number_of_trials_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"tune\(.*trials must be a whole number of at least 0"):
        small(trials=-1)


# ---- against what tuning was without trials and with Adam of one rate

SPREAD = jnp.logspace(-3, 1, 20)


def ill(w: Any, meta: Any, batch: Any) -> Any:
    return jnp.sum(SPREAD * (w - 1.0) ** 2)


def compared(**given: Any) -> tuple[hg.Tuned, hg.Tuned]:
    given |= {"meta_steps": 10, "adjoint": hg.Checkpointed(), "progress": False}
    return hg.tune(**given), hg.tune(**given, trials=0, meta_optimizer=optax.adam(0.1))


@pytest.mark.parametrize(
    ("inner", "start"), [(loss, jnp.zeros(3)), (ill, jnp.zeros(20))], ids=["narrow", "ill"]
)
@pytest.mark.quick("ill")
def test_tuning_a_quadratic_is_far_better_than_by_adam_alone(inner: Any, start: Any) -> None:
    settings = {"hypers": {"learning_rate": 1e-3}, "steps": 40, "optimizer": hg.momentum()}
    now, before = compared(loss=inner, params=start, **settings)
    assert now.score < 0.1 * before.score


@pytest.mark.slow
def test_tuning_a_network_is_far_better_than_by_adam_alone() -> None:
    """Judged with initial weights and batches that neither has seen."""
    digits = hg.data.digits()
    images, labels = jnp.asarray(digits.train_images.reshape(-1, 64)), jnp.asarray(digits.train_labels)
    init, apply = hg.nets.mlp((64, 24, 10))

    def batches(key: Any) -> Any:
        return jax.random.randint(key, (40, 50), 0, len(images))

    def inner(w: Any, meta: Any, rows: Any) -> Any:
        return hg.nets.cross_entropy(apply(w, images[rows]), labels[rows])

    given = {"loss": inner, "params": init, "batches": batches, "steps": 40, "optimizer": hg.momentum()}
    now, before = compared(hypers={"learning_rate": 1e-2}, **given)

    def judged(tuned: hg.Tuned) -> float:
        def one(key: Any) -> Any:
            rows = batches(key)
            trained = hg.train(inner, init(key), tuned.hypers, None, rows, steps=40, adjoint=hg.Stored())
            return jnp.mean(trained.losses[-4:])

        return float(np.mean([jax.jit(one)(jax.random.key(1000 + k)) for k in range(8)]))

    assert judged(now) < 0.5 * judged(before)
