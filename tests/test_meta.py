import io
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import constraints, files, meta
from hypergrad._base import progress
from hypergrad.constraints import real
from hypergrad.meta.lbfgsb import LBFGSB
from hypergrad.meta.runs import HypergradientExplosion, SeedFailure

TARGET = {"momentum": np.float32(0.75), "rate": np.array([0.5, 2.0, 1.0], np.float32)}
START = {"momentum": np.float32(0.5), "rate": np.ones(3, np.float32)}
CONSTRAINTS = {"momentum": constraints.unit, "rate": constraints.positive}


def quadratic(hypers, key):
    return sum(
        jnp.sum((leaf - goal) ** 2) for leaf, goal in zip(jax.tree.leaves(hypers), jax.tree.leaves(TARGET))
    )


def noisy(hypers, key):
    return quadratic(hypers, key) + jnp.sum(hypers["rate"] * jax.random.normal(key, (3,)))


def rosenbrock(x, key):
    noise = 0.1 * jax.random.normal(key, x.shape)
    loss = jnp.mean(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2) + jnp.mean(noise * x)
    return loss, {"x": x, "key": key}


def run(objective, hypers, **settings):
    return meta.optimize(objective, hypers, **({"progress": False} | settings))


def assert_same(ours, theirs):
    """Same trees, same bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("optimizer", "steps"), [(optax.adam(0.05), 300), (LBFGSB(), 50)])
def test_a_quadratic_is_optimised_to_its_known_optimum(optimizer, steps):
    best = run(quadratic, START, optimizer=optimizer, steps=steps, constraints=CONSTRAINTS)
    for ours, goal in zip(jax.tree.leaves(best.hypers), jax.tree.leaves(TARGET)):
        np.testing.assert_allclose(ours, goal, atol=2e-3)
    assert best.history.loss[0] == pytest.approx(1.3125)
    assert best.history.loss[-1] < 1e-5
    assert best.history.aux is None
    assert_same(best.hypers, constraints.constrain(CONSTRAINTS, best.raw))


def test_the_default_is_adam_with_004():
    best = run(quadratic, START, steps=1)
    np.testing.assert_allclose(best.hypers["momentum"], 0.54, rtol=1e-6)
    np.testing.assert_allclose(best.hypers["rate"], [0.96, 1.04, 1.0], rtol=1e-6)
    assert best.stopped == ""


@pytest.mark.quick("adam-float64", "lbfgsb-float32")
@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", [None, LBFGSB()], ids=["adam", "lbfgsb"])
def test_needs_no_promotion_of_types(optimizer, precision):
    def objective(hypers, key):
        return jnp.sum((hypers["rate"] - 2) ** 2) + (hypers["momentum"] - 0.75) ** 2

    with jax.enable_x64(precision is np.float64):
        start = jax.tree.map(precision, START)
        settings = {"optimizer": optimizer, "steps": 3, "constraints": CONSTRAINTS, "seeds": 2}
        expected = run(objective, start, **settings)
        with jax.numpy_dtype_promotion("strict"):
            found = run(objective, start, **settings)
        assert_same(found, expected)
    assert found.hypers["rate"].dtype == precision


def test_the_first_step_is_the_one_computed_by_hand():
    best = run(quadratic, START, optimizer=optax.sgd(0.1), steps=1, constraints=constraints.positive)
    gradient = 2 * (1 - TARGET["rate"])  # d rate / d raw = rate = 1 here
    np.testing.assert_allclose(best.raw["rate"], -0.1 * gradient, rtol=1e-6)
    momentum = 0.5 * 2 * (0.5 - 0.75)
    norm = np.sqrt(momentum**2 + np.sum(gradient**2))
    np.testing.assert_allclose(best.history.gradient_norm, [norm], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adam(0.04), LBFGSB()])
def test_the_objective_is_traced_and_compiled_once(optimizer):
    traces = []

    def objective(hypers, key):
        traces.append(key)
        return noisy(hypers, key)

    best = run(objective, START, optimizer=optimizer, steps=7, seeds=2, constraints=CONSTRAINTS)
    assert len(best.history.loss) >= 7
    assert len(traces) == 1


@pytest.mark.parametrize(("seeds", "key"), [(1, np.asarray(jax.random.PRNGKey(5))), (4, jax.random.key(5))])
def test_the_loss_is_the_mean_over_seeds(seeds, key):
    still, by_hand = optax.sgd(0.0), jax.jit(noisy)

    def mean(key):
        return np.mean([by_hand(START, one) for one in jax.random.split(key, seeds)])

    fresh = run(noisy, START, optimizer=still, steps=3, key=key, seeds=seeds).history
    expected = [mean(jax.random.fold_in(key, iteration)) for iteration in range(3)]
    np.testing.assert_allclose(fresh.loss, expected, rtol=1e-5)

    for optimizer, resample in ((still, False), (LBFGSB(), True)):
        held = run(
            noisy,
            START,
            optimizer=optimizer,
            steps=2,
            key=key,
            seeds=seeds,
            resample=resample,
        ).history
        np.testing.assert_allclose(held.loss[0], mean(key), rtol=1e-5)
        assert optimizer is not still or held.loss[0] == held.loss[1]


def test_the_gradient_is_the_mean_over_seeds():
    best = run(noisy, START, optimizer=optax.sgd(1.0), steps=1, seeds=3, resample=False)
    keys = jax.random.split(jax.random.key(0), 3)
    gradients = [jax.jit(jax.grad(noisy))(START, key) for key in keys]
    for name in START:
        expected = START[name] - np.mean([gradient[name] for gradient in gradients], axis=0)
        np.testing.assert_allclose(best.raw[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("seeds", "optimizer"), [(1, LBFGSB()), (3, optax.adam(0.01))])
def test_aux_is_stacked_over_iterations_and_seeds(seeds, optimizer):
    start = jnp.full(4, 0.5)
    history = run(rosenbrock, start, optimizer=optimizer, steps=2, seeds=seeds, has_aux=True).history
    rows = len(history.loss)
    assert rows >= 2
    assert history.aux["x"].shape == (rows, seeds, 4)
    assert history.aux["key"].shape == (rows, seeds, 2)  # keys come as their data
    assert_same(history.aux["x"][0, -1], np.full(4, 0.5, np.float32))


def test_no_steps_return_the_start_and_an_empty_history():
    for optimizer in (optax.adam(0.04), LBFGSB()):
        best = run(rosenbrock, jnp.ones(3), optimizer=optimizer, steps=0, has_aux=True)
        assert_same(best.hypers, np.ones(3, np.float32))
        assert best.history.loss.shape == (0,)
        assert best.history.aux["x"].shape == (0, 1, 3)
        assert best.stopped == ""


@pytest.mark.parametrize("optimizer", [optax.sgd(0.01), LBFGSB()])
def test_dtypes_and_structure_are_kept(optimizer):
    hypers = {"a": [jnp.ones(2, jnp.bfloat16), jnp.ones((), jnp.float16)], "b": 2.0}

    def objective(hypers, key):
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(hypers))

    best = run(objective, hypers, optimizer=optimizer, steps=3)
    assert [leaf.dtype for leaf in jax.tree.leaves(best.hypers)] == ["bfloat16", "float16", "f4"]
    assert jax.tree.structure(best.hypers) == jax.tree.structure(hypers)
    assert best.history.loss[-1] < best.history.loss[0]


def test_lbfgsb_keeps_to_its_bounds_and_says_why_it_stopped():
    bounds = ({"momentum": -math.inf, "rate": np.float32([-9, -9, -9])}, 1.5)
    best = run(quadratic, START, optimizer=LBFGSB(bounds=bounds))
    np.testing.assert_allclose(best.hypers["rate"], [0.5, 1.5, 1.0], atol=1e-4)
    assert best.stopped.startswith("L-BFGS-B stopped after ")
    assert "CONVERGENCE" in best.stopped
    assert run(quadratic, START, optimizer=LBFGSB(), steps=1).stopped == ""


def test_the_optimizer_is_given_the_loss():
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(0.5, patience=1))
    best = run(lambda hypers, key: hypers * 1e-30 + 1.0, 1.0, optimizer=plateau, steps=3)
    np.testing.assert_array_equal(best.history.loss, np.ones(3))


def test_progress_is_on_stderr_only(capfd):
    run(quadratic, START, steps=2, progress=True)
    run(quadratic, START, optimizer=LBFGSB(), steps=2, progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    assert "gradient" in shown.err
    assert "evaluation" in shown.err
    run(quadratic, START, steps=2, progress=False)
    assert capfd.readouterr() == ("", "")


# Stopping when the hypergradient explodes.


def test_a_loss_that_is_not_finite_stops_before_the_update():
    with pytest.warns(HypergradientExplosion, match="iteration 3: the objective gave the loss nan"):
        best = run(lambda x, key: jnp.sqrt(x), 1.0, optimizer=optax.sgd(0.7), steps=9)
    assert best.stopped.startswith("optimize stopped at iteration 3")
    assert "training has become chaotic (its learning rate" in best.stopped
    assert "smaller meta step" in best.stopped
    assert np.isnan(best.history.loss).tolist() == [False, False, False, True]
    np.testing.assert_allclose(best.hypers, best.history.loss[2] ** 2, rtol=1e-6)


def test_a_gradient_that_is_not_finite_stops_with_the_start():
    with pytest.warns(HypergradientExplosion, match="iteration 0: .* hypergradient of norm inf"):
        best = run(lambda x, key: jnp.sqrt(x), 0.0)
    assert float(best.hypers) == 0.0
    assert "No meta-step has been made" in best.stopped
    assert "chaotic" not in best.stopped


def cliff(x, key):
    return jnp.where(x < 0.5, 1e6 * x, x)


def test_a_gradient_far_above_the_median_stops():
    with pytest.warns(HypergradientExplosion, match=r"norm 1e\+06, 1e\+06 times the median 1 of"):
        best = run(cliff, 1.0, optimizer=optax.sgd(0.2), steps=9)
    assert len(best.history.loss) == 4
    assert float(best.hypers) == pytest.approx(0.6)
    allowed = run(cliff, 1.0, optimizer=optax.sgd(0.2), steps=9, explosion=math.inf)
    assert len(allowed.history.loss) == 9


def test_lbfgsb_stops_at_its_last_accepted_values():
    def objective(x, key):
        return jnp.where(x > 1.5, jnp.nan, (x - 3) ** 2)

    with pytest.warns(HypergradientExplosion, match="at evaluation 1: .* loss nan"):
        best = run(objective, 1.0, optimizer=LBFGSB())
    assert float(best.hypers) == 1.0
    assert np.isnan(best.history.loss).tolist() == [False, True]


def failing(error):
    def check(x):
        if x < 0.7:
            raise error
        return x

    def objective(x, key):
        frozen = jax.lax.stop_gradient(x)
        return x + 0 * jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), frozen)

    return objective


@pytest.mark.parametrize("optimizer", [optax.sgd(0.2), LBFGSB()])
def test_errors_of_the_computation_stop_with_the_last_good_values(optimizer):
    objective = failing(ArithmeticError("the reversal lost bits"))
    with pytest.warns(HypergradientExplosion, match="ArithmeticError: the reversal lost bits"):
        best = run(objective, 1.0, optimizer=optimizer)
    assert float(best.hypers) >= 0.7
    assert np.isfinite(best.history.loss).all()
    assert "chaotic" not in best.stopped


@pytest.mark.parametrize("optimizer", [optax.sgd(0.2), LBFGSB()])
@pytest.mark.parametrize("error", [hg.ReversalError("impure: it is withheld"), ArithmeticError("broken")])
def test_an_error_before_the_first_step_is_raised_as_it_is(optimizer, error):
    with pytest.raises(type(error), match=str(error)) as found:
        run(failing(error), 0.5, optimizer=optimizer)
    assert type(found.value) is type(error)


def test_an_error_that_is_not_arithmetic_is_raised_with_all_steps_saved(tmp_path):
    path = tmp_path / "run.npz"
    settings = {"optimizer": optax.sgd(0.2), "checkpoint": path, "checkpoint_every": 50}
    with pytest.raises(ValueError, match="the callback is wrong"):
        run(failing(ValueError("the callback is wrong")), 1.0, **settings)
    assert files.load(path)[1]["rows"] == 2


def test_running_out_of_memory_is_not_an_explosion():
    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"ran out of memory at iteration 0: RESOURCE_EXHAUSTED.*fewer seeds",
    ):
        run(failing(RuntimeError("RESOURCE_EXHAUSTED: pretended")), 0.0)
    with pytest.raises(MemoryError, match="ran out of memory at iteration 2: of the machine"):
        run(failing(MemoryError("of the machine")), 1.0, optimizer=optax.sgd(0.2))


def test_debugging_nans_changes_nothing():
    settings = {"optimizer": optax.sgd(0.7), "steps": 9}
    with pytest.warns(HypergradientExplosion, match="iteration 3: the objective gave the loss nan"):
        plain = run(lambda x, key: jnp.sqrt(x), 1.0, **settings)
    with jax.debug_nans(True), pytest.warns(HypergradientExplosion, match="the loss nan"):
        assert_same(run(lambda x, key: jnp.sqrt(x), 1.0, **settings)[:3], plain[:3])


# Seeds that fail alone.


def fragile(x, key):
    """`(x - c)²` with a random c, and without a number for three seeds in ten."""
    chance, centre = jax.random.uniform(key, (2,))
    return jnp.where(chance < 0.3, jnp.nan, 1.0) * (x - centre) ** 2


def test_a_seed_that_fails_is_named_and_the_others_are_averaged_over():
    with pytest.warns(SeedFailure) as announced:
        best = run(fragile, 0.0, optimizer=optax.sgd(0.1), seeds=5, steps=8)
    x, losses, failed = 0.0, [], []
    for iteration in range(8):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), iteration), 5)
        chance, centre = np.array([jax.random.uniform(key, (2,)) for key in keys], np.float64).T
        failed.append(chance < 0.3)
        losses.append(np.mean((x - centre[~failed[-1]]) ** 2))
        x -= 0.1 * np.mean(2 * (x - centre[~failed[-1]]))
    np.testing.assert_array_equal(best.history.failed, failed)
    np.testing.assert_allclose(best.history.loss, losses, rtol=1e-5)
    np.testing.assert_allclose(best.hypers, x, rtol=1e-5)
    assert best.stopped == ""
    bad = [i for i, row in enumerate(failed) if row.any()]
    assert len(announced) == min(3, len(bad)) == 3
    for warning, iteration in zip(announced, bad):
        assert warning.filename == __file__
        named = ", ".join(f"seed {seed} gave the loss nan" for seed in np.flatnonzero(failed[iteration]))
        left = 5 - np.sum(failed[iteration])
        said = (
            f"optimize at iteration {iteration}: {named}; the average is over the other {left} of 5 seeds"
        )
        assert str(warning.message).startswith(said)
    assert str(announced[-1].message).endswith("counted in history.failed")


def test_a_gradient_of_one_seed_that_explodes_is_left_out():
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), i), 3) for i in range(6)]
    bad = np.asarray(jax.random.key_data(keys[4][1]))

    def objective(x, key):
        return x * jnp.where(jnp.all(jax.random.key_data(key) == bad), 1e9, 1.0)

    with pytest.warns(SeedFailure, match=r"iteration 4: seed 1 gave a hypergradient of norm 1e\+09"):
        best = run(objective, 1.0, optimizer=optax.sgd(0.1), seeds=3, steps=6)
    np.testing.assert_allclose(best.hypers, 0.4, rtol=1e-5)
    assert np.argwhere(best.history.failed).tolist() == [[4, 1]]
    with pytest.warns(HypergradientExplosion, match="3e"):  # one seed: nothing to average over
        alone = run(lambda x, key: jnp.where(x < 0.5, 3e8 * x, x), 1.0, optimizer=optax.sgd(0.1), steps=9)
    assert not alone.history.failed.any()


def test_when_no_seed_is_left_the_run_stops_and_names_them():
    with pytest.warns(HypergradientExplosion, match="seed 0 gave the loss nan, seed 1 gave the loss nan"):
        best = run(lambda x, key: jnp.sqrt(x), 1.0, optimizer=optax.sgd(0.7), seeds=2, steps=9)
    assert not best.history.failed.any()
    np.testing.assert_allclose(best.hypers, best.history.loss[2] ** 2, rtol=1e-6)


def test_lbfgsb_does_not_compare_averages_over_different_seeds():
    with pytest.warns(HypergradientExplosion, match=r"gave the loss nan; seed \d gave the loss nan"):
        best = run(fragile, 0.0, optimizer=LBFGSB(), seeds=8)
    assert float(best.hypers) == 0.0


# Checkpoints.

OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "stateless": optax.sgd(1e-3),
    "noise": optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(3)), optax.adam(0.01, mu_dtype=jnp.bfloat16)
    ),
    "injected": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.01, 0.0, 9)),
    "lbfgsb": LBFGSB(),
}


def long_run(name, **settings):
    start = jnp.linspace(-1.0, 2.0, 10)
    common = {"optimizer": OPTIMIZERS[name], "seeds": 2, "has_aux": True}
    return run(rosenbrock, start, **(common | settings))


@pytest.mark.quick("noise-4", "injected-1", "lbfgsb-4")
@pytest.mark.parametrize(
    ("name", "every"),
    [("stateless", 4), ("noise", 4), ("injected", 1), ("lbfgsb", 4)],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, name, every):
    saving = {"checkpoint": tmp_path / "run.npz", "checkpoint_every": every}
    for steps in (3, 10, 10):
        best = long_run(name, steps=steps, **saving)
    assert_same(best, long_run(name, steps=10))
    assert os.listdir(tmp_path) == ["run.npz"]


def test_lbfgsb_replays_without_evaluating(tmp_path):
    computed = []

    def objective(x, key):
        jax.debug.callback(computed.append, x[0])
        return rosenbrock(x, key)[0]

    settings = {"optimizer": LBFGSB(), "checkpoint": tmp_path / "run.npz"}
    whole = run(objective, jnp.zeros(4), steps=8, **settings)
    again = run(objective, jnp.zeros(4), steps=8, **settings)
    shorter = run(objective, jnp.zeros(4), steps=5, **settings)
    jax.effects_barrier()
    assert len(computed) == len(whole.history.loss)
    assert_same(again, whole)
    assert_same(shorter, run(objective, jnp.zeros(4), steps=5, optimizer=LBFGSB()))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.2), LBFGSB()])
def test_a_stopped_run_stops_again_when_resumed(tmp_path, optimizer):
    results = []
    for _ in range(2):
        with pytest.warns(HypergradientExplosion):
            settings = {"checkpoint": tmp_path / "run.npz", "checkpoint_every": 50}
            results.append(run(failing(ArithmeticError("lost")), 1.0, optimizer=optimizer, **settings))
    assert (tmp_path / "run.npz").exists()
    assert_same(results[0][:3], results[1][:3])
    assert results[0].stopped == results[1].stopped


def test_an_interrupt_loses_at_most_the_unsaved_steps(tmp_path, monkeypatch):
    save, calls = files.save, []

    def interrupted(*arguments, **metadata):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(save(*arguments, **metadata))

    monkeypatch.setattr(files, "save", interrupted)
    settings = {"steps": 12, "checkpoint": tmp_path / "run.npz", "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        long_run("adam", **settings)
    assert files.load(tmp_path / "run.npz")[1]["rows"] == 6
    monkeypatch.undo()
    assert_same(long_run("adam", **settings), long_run("adam", steps=12))


def stopping(arm, stop):
    """An objective from whose compiled code `stop` is called below 0.7, while a file is there."""

    def check(x):
        if x < 0.7 and arm.exists():
            stop()
        return x

    def objective(x, key):
        frozen = jax.lax.stop_gradient(x)
        return x**2 + 0 * jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), frozen)

    return objective


def control_c():
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.2)  # until it is noticed


def raises():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "optimizer"), [(control_c, "adam"), (raises, "adam"), (raises, "lbfgsb")])
def test_an_interrupt_in_compiled_code_stops_and_says_how_to_go_on(tmp_path, stop, optimizer, request):
    # A process that was started in the background ignores them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    arm, path = tmp_path / "arm", tmp_path / "run.npz"
    arm.touch()
    optimizer = {"adam": optax.adam(0.1), "lbfgsb": LBFGSB()}[optimizer]
    settings = {"optimizer": optimizer, "steps": 8}
    saying = r"optimize was interrupted at \w+ [1-9]; '.*run.npz' holds \d \w+; the same call goes on"
    with pytest.raises(KeyboardInterrupt, match=saying):
        run(stopping(arm, stop), 1.0, checkpoint=path, checkpoint_every=50, **settings)
    with pytest.raises(KeyboardInterrupt, match=r"nothing of it is kept; with checkpoint=\.\.\."):
        run(stopping(arm, stop), 1.0, **settings)
    reached = files.load(path)[1]["rows"]
    arm.unlink()
    resumed = run(stopping(arm, stop), 1.0, checkpoint=path, **settings)
    whole = run(stopping(arm, stop), 1.0, **settings)
    assert_same(resumed, whole)
    assert 1 <= reached < len(whole.history.loss)
    assert sorted(os.listdir(tmp_path)) == ["run.npz"]


KILLED = {"noise": 100, "lbfgsb": 60}


@pytest.mark.quick("noise")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(tmp_path, name):
    path = tmp_path / "run.npz"
    root = Path(hg.__file__).resolve().parent.parent
    little = str(jax.config.read("jax_disable_most_optimizations"))
    victim = subprocess.Popen(
        [sys.executable, __file__, name, os.fspath(path), little],
        env=os.environ | {"PYTHONPATH": os.fspath(root)},
    )
    try:
        while not path.exists():
            assert victim.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.8))
    finally:
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    reached = files.load(path)[1]["rows"]
    whole = long_run(name, steps=KILLED[name])
    assert 1 <= reached < len(whole.history.loss)
    assert_same(long_run(name, steps=KILLED[name], checkpoint=path), whole)


# What is refused.


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    settings = {"checkpoint": tmp_path / "run.npz", "steps": 2}
    long_run("adam", **settings)
    refused = r"optimize\(checkpoint='.*run.npz'\): it holds another run \("
    for change, message in (
        ({"seeds": 3}, "seeds there: 2; here: 3"),
        ({"key": jax.random.key(1)}, r"key there: .* \[0, 0\]; here: .* \[0, 1\]"),
        ({"resample": False}, "resample there: True; here: False"),
        ({"constraints": constraints.interval(-9, 9)}, r"constraints there: real; here: interval\("),
        ({"optimizer": optax.adam(0.02)}, r"optimizer \(digest\) there"),
        ({"optimizer": optax.adam(0.01, b1=0.8)}, r"optimizer \(digest\) there"),
        ({"select": jnp.sum}, r"select \(digest\) there: None; here: "),
        ({"about": {"data": "other"}}, "data there: None; here: other"),
        ({"explosion": 99.0}, "explosion there: 10000.0; here: 99.0"),
        ({"optimizer": optax.sgd(0.1)}, r"optimizer state there: .*\.mu .*; here: \)"),
        ({"optimizer": LBFGSB()}, "optimizer there: None; here: LBFGSB"),
    ):
        with pytest.raises(ValueError, match=refused + ".*" + message):
            long_run("adam", **(settings | change))
    with pytest.raises(ValueError, match="starting values"):
        run(rosenbrock, jnp.zeros(10), seeds=2, has_aux=True, optimizer=optax.adam(0.01), **settings)
    with pytest.raises(ValueError, match="hypers there"):
        run(rosenbrock, jnp.zeros(9), seeds=2, has_aux=True, optimizer=optax.adam(0.01), **settings)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), LBFGSB()])
def test_a_checkpoint_of_another_objective_is_refused(tmp_path, optimizer):
    settings = {"checkpoint": tmp_path / "run.npz", "steps": 2, "optimizer": optimizer}

    def objective(factor, target):
        return lambda x, key: factor * jnp.sum((x - target) ** 2)

    first = run(objective(1.0, np.ones(3)), jnp.zeros(3), **settings)
    assert_same(run(objective(1.0, np.ones(3)), jnp.zeros(3), **settings), first)
    with pytest.raises(ValueError, match=r"it holds another run \(objective \(digest\) there"):
        run(objective(2.0, np.ones(3)), jnp.zeros(3), **settings)
    with pytest.raises(ValueError, match=r"it holds another run \(data of the objective \(digest\) there"):
        run(objective(1.0, np.full(3, 2.0)), jnp.zeros(3), **settings)


def test_what_other_versions_wrote_is_said_to_be(tmp_path):
    path = tmp_path / "run.npz"
    run(quadratic, START, steps=1, checkpoint=path)
    arrays, metadata = files.load(path)
    metadata["versions"]["jax"] = "0.0.1"
    files.save(path, arrays, **metadata)
    run(quadratic, START, steps=1, checkpoint=path)
    with pytest.raises(ValueError, match=r"perhaps because \{.*'jax': '0.0.1'.*wrote it"):
        run(noisy, START, steps=1, checkpoint=path)


def test_a_run_that_a_lower_limit_would_have_stopped_is_refused(tmp_path):
    settings = {"checkpoint": tmp_path / "run.npz", "optimizer": optax.sgd(0.2), "steps": 6}
    whole = run(cliff, 1.0, explosion=math.inf, **settings)
    assert_same(run(cliff, 1.0, explosion=1e7, **settings), whole)
    with pytest.raises(ValueError, match=r"optimize\(explosion=100, .*would have stopped at iteration 3, "):
        run(cliff, 1.0, explosion=100.0, **settings)


def test_more_steps_give_the_numbers_of_as_many_at_once(tmp_path):
    def asked(steps, **saving):
        return run(
            noisy,
            START,
            optimizer=optax.adam(0.1),
            steps=steps,
            select=lambda h: jnp.abs(h["momentum"] - 0.6),
            select_every=4,
            **saving,
        )

    for steps in (3, 6, 7, 15):  # what 6 and 7 look at in the end, 15 at once would not
        best = asked(steps, checkpoint=tmp_path / "run.npz", checkpoint_every=2)
    whole = asked(15)
    assert list(whole.scores) == [0, 4, 8, 12, 15]
    assert best.scores == whole.scores
    assert_same(best[:3], whole[:3])


def test_a_checkpoint_with_a_part_missing_is_named(tmp_path):
    path = tmp_path / "run.npz"
    run(quadratic, START, steps=2, checkpoint=path)
    arrays, metadata = files.load(path)
    for missing in arrays:
        files.save(path, {k: x for k, x in arrays.items() if k != missing}, **metadata)
        with pytest.raises(ValueError, match=r"optimize\(checkpoint='.*run.npz'\): the file is damaged"):
            run(quadratic, START, steps=2, checkpoint=path)
    for rows in (3, "2", None):
        files.save(path, arrays, **(metadata | {"rows": rows}))
        with pytest.raises(ValueError, match="the file is damaged"):
            run(quadratic, START, steps=2, checkpoint=path)


def test_two_runs_do_not_share_a_checkpoint(tmp_path):
    path = tmp_path / "run.npz"
    with (
        files.locked(path, "other()"),
        pytest.raises(
            BlockingIOError, match=r"optimize\(checkpoint='.*run.npz'\): another process .*works"
        ),
    ):
        run(quadratic, START, steps=1, checkpoint=path)
    run(quadratic, START, steps=1, checkpoint=path)


def untouchable(hypers, key):
    pytest.fail("work was started")


def test_a_checkpoint_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"optimize\(checkpoint='.*'\): it is a folder; give the name of a"
    ):
        run(untouchable, START, checkpoint=tmp_path)
    with pytest.raises(TypeError, match=r"optimize\(checkpoint=3\): not a path"):
        run(untouchable, START, checkpoint=3)
    opened = os.open

    def refused(path, *rest):
        if os.fspath(path).startswith(os.fspath(tmp_path)):
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(PermissionError, match=r"optimize\(checkpoint='.*run.npz'\): its folder cannot be"):
        run(untouchable, START, checkpoint=tmp_path / "run.npz")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    settings = {"checkpoint": path, "checkpoint_every": 2}
    run(quadratic, START, steps=2, **settings)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*run.npz', .*No space left.*is as it was"):
        run(quadratic, START, steps=9, **settings)
    monkeypatch.undo()
    assert files.load(path)[1]["rows"] == 2
    assert_same(run(quadratic, START, steps=9, **settings), run(quadratic, START, steps=9))


def test_a_checkpoint_with_more_steps_is_refused(tmp_path):
    long_run("adam", checkpoint=tmp_path / "run.npz", steps=3)
    with pytest.raises(ValueError, match=r"optimize\(steps=2, checkpoint=.*has made 3 steps alre"):
        long_run("adam", checkpoint=tmp_path / "run.npz", steps=2)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"optimize\(checkpoint=.*cannot resume from it, load\("):
        run(quadratic, START, checkpoint=path)
    files.save(path, np.ones(3))
    with pytest.raises(ValueError, match="it holds another run"):
        run(quadratic, START, checkpoint=path)
    assert_same(files.load(path)[0], np.ones(3))


def test_a_journal_that_scipy_does_not_follow_is_refused(tmp_path):
    path = tmp_path / "run.npz"
    long_run("lbfgsb", checkpoint=path, steps=5)
    arrays, metadata = files.load(path)
    arrays["rows.point"][3, 0] += 1e-9
    files.save(path, arrays, **metadata)
    with pytest.raises(ValueError, match="replaying its evaluation 3, SciPy asks for other val"):
        long_run("lbfgsb", checkpoint=path, steps=5)


def test_a_checkpoint_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimize\(checkpoint=.*its folder does not exist"):
        run(quadratic, START, checkpoint=tmp_path / "missing" / "run.npz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, r"optimize\(steps=-1\): steps must be a whole number, at least 0"),
        ({"steps": 2.5}, r"optimize\(steps=2.5\): steps must be a whole number"),
        ({"seeds": 0}, r"optimize\(seeds=0\): seeds must be a whole number, at least 1"),
        ({"checkpoint_every": 0}, r"optimize\(checkpoint_every=0\): .* at least 1"),
        ({"about": {"seeds": "3"}}, r"optimize\(about=...\): \['seeds'\] are names of what every"),
        ({"explosion": 1.0}, r"optimize\(explosion=1.0\): .*above 1; use math.inf"),
        ({"explosion": math.nan}, r"optimize\(explosion=nan\)"),
        ({"optimizer": optax.adam}, r"optimize\(optimizer=<function adam.*not an optax optimizer"),
        ({"key": 3}, r"optimize\(key=3\): not one PRNG key; use jax.random.key\(0\)"),
        ({"key": jax.random.split(jax.random.key(0))}, r"(?s)optimize\(key=.*: not one PRNG key"),
        (
            {"constraints": constraints.interval(0.6, 3.0)},
            r"optimize\(hypers, constraints=...\): \['momentum'\] holds 0.5, outside the domain of",
        ),
        (
            {"constraints": {"momentum": constraints.unit}},
            r"optimize\(hypers, constraints=...\): not a prefix of the tree of values",
        ),
        (
            {"optimizer": LBFGSB(bounds=(0.0, 0.5))},
            r"optimize\(optimizer=LBFGSB\(bounds=...\)\): entry 1 starts at the raw value 1, outs",
        ),
        (
            {"optimizer": LBFGSB(bounds=({"rat": 0.0}, 1.0))},
            r"optimize\(optimizer=LBFGSB\(bounds=.*'rat'.*not \(low, high\), each a number or a",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    def untouched(hypers, key):
        if not settings.keys() & {"optimizer", "about"}:
            pytest.fail("work was started")
        return quadratic(hypers, key)

    with pytest.raises((TypeError, ValueError), match=message):
        run(untouched, START, **settings)


@pytest.mark.parametrize(
    ("hypers", "message"),
    [
        ({}, r"optimize\(hypers=\{\}\): there is nothing to optimize"),
        (3, r"optimize\(hypers\): the value has dtype int32, which has no gradient"),
        (
            {"rate": 0.5, "steps": [np.arange(2)]},
            r"optimize\(hypers\): \['steps'\]\[0\] has dtype int.*close over it in the objective",
        ),
    ],
)
def test_hypers_without_gradients_are_refused(hypers, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(quadratic, hypers)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda x, key: jnp.stack([x, x]), r"it is of dtype float32 and shape \(2,\); reduce it"),
        (lambda x, key: jnp.int32(1), r"it is of dtype int32 and shape \(\)"),
        (lambda x, key: (x, x), r"it is a tuple; .*pass has_aux=True"),
        (lambda x, key: None, r"it is a NoneType"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_objectives_that_return_no_scalar_are_refused(objective, message, seeds):
    with pytest.raises(TypeError, match=r"optimize\(objective\): the loss .*" + message):
        run(objective, 1.0, seeds=seeds)


def test_an_objective_without_its_aux_is_refused():
    with pytest.raises(TypeError, match=r"has_aux=True\): .*it returned of dtype float32 and sh"):
        run(lambda x, key: x, 1.0, has_aux=True)


def test_select_returns_the_best_values_and_not_the_last(tmp_path):
    def run(steps, checkpoint=None):
        return meta.optimize(
            lambda hypers, key: (hypers - 1.0) ** 2,
            jnp.float32(0.0),
            optimizer=optax.sgd(0.1),
            steps=steps,
            select=lambda hypers: jnp.abs(hypers - 0.5),  # passed on the way to 1
            select_every=1,
            checkpoint=checkpoint,
            progress=False,
        )

    whole = run(20)
    passed = 1 - 0.8 ** np.arange(21)
    assert list(whole.scores) == list(range(21))
    np.testing.assert_allclose(list(whole.scores.values()), abs(passed - 0.5), atol=1e-6)
    np.testing.assert_allclose(whole.hypers, passed[np.argmin(abs(passed - 0.5))], rtol=1e-5)
    run(7, tmp_path / "run")
    resumed = run(20, tmp_path / "run")
    assert resumed.scores == whole.scores
    assert resumed.hypers == whole.hypers


def test_a_score_that_cannot_be_computed_never_wins():
    def select(hypers):
        def check(x):
            if x > 0.3:
                raise hg.ReversalError("train(): diverged")
            return -x

        return jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), hypers)

    def run(start, steps):
        return meta.optimize(
            lambda hypers, key: (hypers - 1.0) ** 2,
            jnp.float32(start),
            optimizer=optax.sgd(0.1),
            steps=steps,
            select=select,
            select_every=1,
            progress=False,
        )

    best = run(0.0, 2)
    np.testing.assert_allclose(best.hypers, 0.2, rtol=1e-6)
    assert np.isnan(best.scores[2])
    with pytest.raises(hg.ReversalError, match=r"train\(\): diverged"):
        run(0.5, 2)


def test_a_score_that_is_no_number_never_wins():
    best = meta.optimize(
        lambda hypers, key: (hypers - 1.0) ** 2,
        jnp.float32(0.0),
        optimizer=optax.sgd(0.1),
        steps=4,
        select=lambda hypers: jnp.where(hypers > 0.3, jnp.nan, -hypers),
        select_every=1,
        progress=False,
    )
    np.testing.assert_allclose(best.hypers, 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"select": lambda h: h, "optimizer": meta.LBFGSB()}, ValueError, "not looked at one by one"),
        ({"select": lambda h: h, "select_every": 0}, ValueError, "select_every=0"),
        ({"select": lambda h: jnp.ones(2) * h}, TypeError, "must return one number"),
    ],
)
def test_bad_selections_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        meta.optimize(lambda h, key: h**2, jnp.float32(0.5), progress=False, **settings)


# ---- callbacks


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), LBFGSB()], ids=["adam", "lbfgsb"])
def test_a_callback_is_told_of_every_new_iteration_in_plain_numbers(tmp_path, optimizer):
    told = []
    settings = {"optimizer": optimizer, "constraints": CONSTRAINTS, "checkpoint": tmp_path / "run.npz"}
    first = run(quadratic, START, steps=2, callback=told.append, **settings)
    count = len(first.history.loss)
    assert [step.iteration for step in told] == list(range(count))
    assert [step.loss for step in told] == first.history.loss.tolist()
    assert [step.gradient_norm for step in told] == first.history.gradient_norm.tolist()
    assert told[0].hypers["momentum"] == pytest.approx(0.5) and type(told[0].hypers["momentum"]) is float
    assert isinstance(told[0].hypers["rate"], np.ndarray) and told[0].seconds > 0
    later = []
    whole = run(quadratic, START, steps=4, callback=later.append, **settings)
    assert [step.iteration for step in later] == list(range(count, len(whole.history.loss)))
    for step in told + later:
        assert float(quadratic(step.hypers, None)) == pytest.approx(step.loss, rel=1e-4)


def test_what_a_callback_raises_ends_the_run_with_everything_saved(tmp_path):
    path = tmp_path / "run.npz"

    def callback(step):
        if step.iteration == 3:
            assert files.load(path)[1]["rows"] == 3  # the last one is not due yet
            raise RuntimeError("the tracker is down")

    settings = {"steps": 9, "checkpoint": path, "checkpoint_every": 3}
    with pytest.raises(RuntimeError, match="the tracker is down"):
        run(quadratic, START, callback=callback, **settings)
    assert files.load(path)[1]["rows"] == 4
    assert_same(run(quadratic, START, **settings), run(quadratic, START, steps=9))


def test_a_callback_writes_for_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    with tensorboard.SummaryWriter(tmp_path) as writer:

        def callback(step):
            writer.add_scalar("loss", step.loss, step.iteration)
            writer.add_scalars("hypers", {"momentum": step.hypers["momentum"]}, step.iteration)
            writer.add_histogram("rate", step.hypers["rate"], step.iteration)

        run(quadratic, START, steps=3, callback=callback)
    assert all(file.stat().st_size > 200 for file in tmp_path.glob("events*")) and list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of the tracker's own
def test_a_callback_writes_for_mlflow(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tmp_path.as_uri())
    tracked = client.create_run(client.create_experiment("tuning")).info.run_id
    best = run(
        quadratic,
        START,
        steps=3,
        callback=lambda step: client.log_metric(tracked, "loss", step.loss, step=step.iteration),
    )
    read = client.get_metric_history(tracked, "loss")
    assert [metric.step for metric in read] == [0, 1, 2]
    np.testing.assert_allclose([metric.value for metric in read], best.history.loss)


def test_a_callback_that_takes_something_else_is_refused():
    with pytest.raises(
        TypeError, match=r"optimize: callback is called as callback\(step\), and takes \(\)"
    ):
        run(untouchable, START, callback=lambda: None)


# ---- retries, the loss as the score, and signs


def test_a_meta_step_over_a_cliff_is_halved():
    def objective(x, key):
        return jnp.where(x > 2.0, jnp.nan, (x - 1.9) ** 2)

    settings = {"optimizer": optax.sgd(2.0), "steps": 3}
    with pytest.warns(HypergradientExplosion, match="iteration 1: .* the loss nan"):
        run(objective, 1.0, **settings)
    best = run(objective, 1.0, retries=2, **settings)  # to 4.6, 2.8, 1.9
    np.testing.assert_allclose(best.history.loss[:2], [0.81, 0.0], atol=1e-6)
    assert best.stopped == ""
    with pytest.warns(HypergradientExplosion, match="iteration 1"):
        assert float(run(objective, 1.0, retries=1, **settings).hypers) == 1.0


def test_halved_meta_steps_are_the_same_after_resuming(tmp_path):
    settings = {"optimizer": optax.sgd(0.2), "retries": 3}
    saved = {"checkpoint": tmp_path / "run.npz"}
    objective = failing(ArithmeticError("lost"))
    with pytest.warns(HypergradientExplosion):
        whole = run(objective, 1.0, steps=20, **settings)
    run(objective, 1.0, steps=2, **settings, **saved)
    with pytest.warns(HypergradientExplosion):
        assert_same(run(objective, 1.0, steps=20, **settings, **saved)[:3], whole[:3])
    assert 0.7 <= float(whole.hypers) < 0.72
    with pytest.raises(ValueError, match="retries there: 3; here: None"):
        run(objective, 1.0, steps=20, **(settings | {"retries": 0}), **saved)


def test_the_loss_itself_can_choose_the_result(tmp_path):
    settings = {"optimizer": optax.sgd(1.05), "select": "loss"}  # it swings further every time
    best = run(lambda x, key: (x - 1.0) ** 2, 0.0, steps=5, **settings)
    passed = 1.0 - (-1.1) ** np.arange(6.0)
    np.testing.assert_allclose(list(best.scores.values()), (passed - 1.0) ** 2, rtol=1e-4)
    assert list(best.scores) == list(range(6)) and len(best.history.loss) == 5
    assert float(best.hypers) == 0.0
    run(lambda x, key: (x - 1.0) ** 2, 0.0, steps=2, checkpoint=tmp_path / "run", **settings)
    again = run(lambda x, key: (x - 1.0) ** 2, 0.0, steps=5, checkpoint=tmp_path / "run", **settings)
    assert again.scores == best.scores and again.hypers == best.hypers
    assert run(quadratic, START, steps=0, select="loss").scores == {}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"retries": -1},
            ValueError,
            r"retries=-1\): retries must be a whole number, at least 0",
        ),
        ({"retries": 1, "optimizer": LBFGSB()}, ValueError, r"optimize\(retries=1, .*the line searches"),
        (
            {"select": "los"},
            TypeError,
            r"optimize\(select='los'\): neither a .*nor the word 'loss'",
        ),
    ],
)
def test_bad_retries_and_scores_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        run(untouchable, START, **settings)


@pytest.mark.parametrize("optimizer", [optax.sgd(1.0), LBFGSB()], ids=["sgd", "lbfgsb"])
def test_a_rate_that_becomes_negative_is_named_once(optimizer):
    hypers = {"adamw.learning_rate": (0.1, np.float32([0.1, 0.2])), "shift": 0.5}

    def objective(hypers, key):
        return sum(jnp.sum((x + 1.0) ** 2) for x in jax.tree.leaves(hypers))

    with pytest.warns(meta.NegativeWarning) as announced:
        run(objective, hypers, optimizer=optimizer, steps=4)
    assert len(announced) == 1 and announced[0].filename == __file__
    assert re.match(
        r"optimize: 'adamw.learning_rate' has become negative \(-\d.*constraints=\{'adamw.learning_rate': ",
        str(announced[0].message),
    )
    run(objective, {"shift": 0.5}, steps=40)
    run(
        objective,
        hypers,
        steps=40,
        constraints={"adamw.learning_rate": constraints.positive, "shift": real},
    )
    run(objective, {"lr": -0.5}, steps=2)  # began there


def test_warnings_point_at_the_line_that_calls():
    with pytest.warns(hg.implicit.ZeroHypergradientWarning) as announced:
        run(lambda x, key: 0.0 * x, 1.0, steps=1)
    assert announced[0].filename == __file__


# ---- rates that adapt


def test_every_coordinate_finds_its_rate():
    """Of sensitivities ten thousandfold apart, the minima are reached in fewer steps than by Adam."""
    scales = jnp.array([1.0, 1e-2, 1e-4])

    def objective(x, key):
        return jnp.sum(scales * (x - jnp.array([1.0, 3.0, 9.0])) ** 2)

    def distance(optimizer):
        found = run(objective, jnp.zeros(3), optimizer=optimizer, steps=40).hypers
        return np.max(abs(np.asarray(found) - [1, 3, 9]))

    assert distance(meta.delta_bar_delta()) < 0.2
    assert distance(optax.adam(0.1)) > 2.0


def test_a_jump_of_the_loss_leads_back_to_the_best_values():
    optimizer = meta.delta_bar_delta(0.5)
    raw, state = jnp.zeros(2), optimizer.init(jnp.zeros(2))
    for loss in (3.0, 2.9, 2.8):
        step, state = optimizer.update(jnp.array([1.0, -1.0]), state, raw, value=jnp.float32(loss))
        best, raw = raw, raw + step
    before = state.rate
    step, state = optimizer.update(jnp.array([1e9, 0.0]), state, raw, value=jnp.float32(1e6))
    np.testing.assert_allclose(raw + step, best, rtol=1e-6)
    np.testing.assert_allclose(state.rate, before / 2)
    assert float(state.last) == pytest.approx(2.8) and float(jnp.max(state.square)) < 2


# ---- what is printed


def test_results_print_in_a_few_words():
    best = run(quadratic, START, steps=2, select="loss")
    assert str(best).splitlines() == [
        "Optimized: 2 hypergradients, loss 1.312 to 1.177, best score 1.052",
        f"  momentum: {best.hypers['momentum']:.4g}",
        f"  rate: {min(best.hypers['rate']):.4g} to {max(best.hypers['rate']):.4g}",
    ]
    assert repr(best) == str(best)
    assert str(run(quadratic, START, steps=0)).startswith("Optimized: 0 hypergradients\n")


def test_results_can_be_pickled():
    best = run(quadratic, START, steps=2, select="loss")
    again = pickle.loads(pickle.dumps(best))
    assert_same(again[:3], best[:3])
    assert again.scores == best.scores


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_and_a_file_has_lines(monkeypatch):
    shown = []
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        run(quadratic, START, steps=3, progress=True)
        shown.append(stream.getvalue())
    said = "optimize: compiling the objective and its hypergradient ...\n"
    assert all(text.startswith(said) for text in shown)
    assert "\r" in shown[0] and "3/3" in shown[0] and "loss" in shown[0]
    assert "\r" not in shown[1]
    assert re.fullmatch(
        r"optimize: 3/3 iterations, 0:\d\d, loss [\d.]+, gradient [\d.]+", shown[1].splitlines()[1]
    )
    assert len(shown[1].splitlines()) == 2


def test_a_long_run_writes_a_line_every_so_often(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("work") as bar:
        bar.begin(100, "step", initial=20)
        for _ in range(30):
            now[0] += 1.0
            bar.advance("going")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 30/100 steps, 0:10, 1:10 left, going"
    assert lines == [line for line in lines if line.startswith("work: ")] and len(lines) == 3


if __name__ == "__main__":  # the run that is killed
    from tests import conftest as conftest  # it compiles as the run that goes on

    jax.config.update("jax_disable_most_optimizations", sys.argv[3] == "True")
    # Slow writes, so that the kill often falls into one.
    os.fsync = lambda descriptor: time.sleep(0.04)
    long_run(sys.argv[1], steps=KILLED[sys.argv[1]], checkpoint=sys.argv[2])
    sys.exit("not killed in time")
