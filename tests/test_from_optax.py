"""Optimizers of optax, and their hypergradients, against plain optax in a `lax.scan` under `jax.grad`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import hypergrad as hg
from hypergrad.optimizers.safe_roots import finite

STEPS = 5
START = {"a": np.array([1.0, -2.0, 0.5])}
BOTH = {**START, "b": np.array([[0.3, -0.7], [0.2, 0.9]])}
MASK = {"a": np.array([1.0, 1.0, 0.0]), "b": np.array([[1.0, 2.0], [0.0, 1.0]])}
RATE = {"learning_rate": 0.05}
ADAM = {**RATE, "b1": 0.8, "b2": 0.9, "eps": 1e-3}


def loss(w: Any, meta: Any, step: Any) -> Any:
    """In one coordinate of each array the gradient is 0."""
    wavy = jnp.sum(MASK["a"] * (jnp.cos(2 * w["a"]) + 0.1 * w["a"] ** 4)) + 4
    if "b" not in w:
        return wavy
    return wavy + 3 * jnp.sum(MASK["b"] * w["b"] ** 2) + 0.3 * w["a"][0] * w["b"][0, 0] * w["b"][1, 1]


def outer(w: Any) -> Any:
    return sum(jnp.sum(x**3 + x) for x in jax.tree.leaves(w))


def by_us(build: Any, hypers: Any, adjoint: Any = None, start: Any = START) -> Any:
    free = dict.fromkeys(hypers, (-np.inf, np.inf))
    optimizer = hg.from_optax(build, dict.fromkeys(hypers), free)
    adjoint = hg.Stored() if adjoint is None else adjoint
    start = jax.tree.map(jnp.asarray, start)
    trained = hg.train(loss, start, hypers, steps=STEPS, optimizer=optimizer, adjoint=adjoint)
    return outer(trained.params)


def by_optax(
    build: Any,
    hypers: Any,
    names: Any = ("value", "grad", "value_fn", "obj_fn"),
    start: Any = START,
) -> Any:
    """Hypers are numbers; an update of optax's own, in its own loop."""
    transformation = optax.with_extra_args_support(build(**hypers))
    start = jax.tree.map(jnp.asarray, start)

    def of(w: Any, obj_fn: Any = None) -> Any:
        return loss(w, None, 0)

    def step(carry: Any, _: Any) -> Any:
        w, state = carry
        value, gradient = jax.value_and_grad(of)(w)
        there = {"value": value, "grad": gradient, "value_fn": of, "obj_fn": of}
        there["grad_fn"] = lambda w, i: jax.grad(of)(w)
        updates, new = transformation.update(gradient, state, w, **{name: there[name] for name in names})
        new = jax.tree.map(lambda x, old: jnp.asarray(x, jnp.result_type(old)), new, state)
        return (optax.apply_updates(w, updates), new), None

    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), transformation.init(start))
    (w, _), _ = jax.lax.scan(step, (start, state), None, length=STEPS)
    return outer(w)


def differences(function: Any, hypers: Any) -> Any:
    """Central differences of the fourth order."""
    found = {}
    for name, x in hypers.items():
        h = 1e-3 * abs(float(x))
        values = [float(function({**hypers, name: x + k * h})) for k in (2, 1, -1, -2)]
        found[name] = (-values[0] + 8 * values[1] - 8 * values[2] + values[3]) / (12 * h)
    return found


def betas(build: Any) -> Any:
    return lambda b1, b2, **others: build(betas=(b1, b2), **others)


def multi_steps(learning_rate: Any, b1: Any) -> Any:
    adam = optax.adam(learning_rate, b1=b1)
    return optax.MultiSteps(adam, 2, accumulator_dtype=np.float64)


def if_finite(learning_rate: Any, b1: Any) -> Any:
    return optax.apply_if_finite(optax.adam(learning_rate, b1=b1), 2)


def clipped(learning_rate: Any, max_norm: Any) -> Any:
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(learning_rate))


def plateau(learning_rate: Any) -> Any:
    return optax.chain(optax.sgd(learning_rate), contrib.reduce_on_plateau(0.3, patience=1, rtol=0.5))


def mechanized(learning_rate: Any, s_init: Any) -> Any:
    return contrib.mechanize(optax.sgd(learning_rate), s_init=s_init)


def partitioned(learning_rate: Any, second: Any) -> Any:
    parts = {"x": optax.adam(learning_rate), "y": optax.sgd(second)}
    return optax.partition(parts, {"a": "x", "b": "y"})


def masked(learning_rate: Any, b1: Any) -> Any:
    return optax.masked(optax.adam(learning_rate, b1=b1), {"a": True, "b": False})


def sharp(learning_rate: Any, rho: Any, opaque_mode: bool) -> Any:
    uphill = optax.chain(contrib.normalize(), optax.sgd(rho))
    return contrib.sam(optax.sgd(learning_rate), uphill, opaque_mode=opaque_mode)


def trusting(learning_rate: Any, trust_coefficient: Any) -> Any:
    return optax.chain(
        optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), optax.sgd(learning_rate)
    )


QUICK = {
    "adagrad": (optax.adagrad, {**RATE, "initial_accumulator_value": 0.2, "eps": 1e-3}),
    "rprop": (optax.rprop, {**RATE, "eta_plus": 1.3}),
    "inject": (optax.inject_hyperparams(optax.sgd), {**RATE, "momentum": 0.8}),
    "multi_steps": (multi_steps, {**RATE, "b1": 0.8}),
    "apply_if_finite": (if_finite, {**RATE, "b1": 0.8}),
    "radam": (partial(optax.radam, b1=0.8, threshold=4.2), {**RATE, "b2": 0.9}),
    "polyak_sgd": (optax.polyak_sgd, {"max_learning_rate": 9.0, "scaling": 1.0, "f_min": 0.1}),
}
SLOW = {
    "acprop": (contrib.acprop, {**ADAM, "eps_root": 1e-3, "weight_decay": 0.1}),
    "adabelief": (optax.adabelief, {**ADAM, "eps_root": 1e-3}),
    "adadelta": (optax.adadelta, {"learning_rate": 1.0, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.01}),
    "adafactor": (optax.adafactor, {**RATE, "decay_rate": 0.7, "weight_decay_rate": 0.01, "eps": 1e-3}),
    "adam": (optax.adam, ADAM),
    "adamax": (optax.adamax, ADAM),
    "adamaxw": (optax.adamaxw, {**ADAM, "weight_decay": 0.1}),
    "adamw": (optax.adamw, {**ADAM, "weight_decay": 0.1}),
    "adan": (optax.adan, {**ADAM, "b3": 0.9}),
    "ademamix": (contrib.ademamix, {**ADAM, "b3": 0.99, "alpha": 2.0, "weight_decay": 0.1}),
    "adopt": (contrib.adopt, ADAM),
    "amsgrad": (optax.amsgrad, ADAM),
    "clipped": (clipped, {**RATE, "max_norm": 0.5}),
    "cocob": (contrib.cocob, {"learning_rate": 1.0, "alpha": 100.0, "weight_decay": 0.01}),
    "dadapt_adamw": (betas(contrib.dadapt_adamw), {**ADAM, "learning_rate": 1.0, "estim_lr0": 1e-2}),
    "dog": (partial(contrib.dog, init_step=("distance", 1e-2)), {"learning_rate": 0.9, "eps": 1e-3}),
    "dowg": (contrib.dowg, {"learning_rate": 0.9, "init_estim_sq_dist": 1e-2, "eps": 1e-3}),
    "fromage": (optax.fromage, {**RATE, "min_norm": 1e-2}),
    "inject_adam": (optax.inject_hyperparams(optax.adam), ADAM),
    "lamb": (optax.lamb, {**ADAM, "weight_decay": 0.1}),
    "lars": (optax.lars, {**RATE, "weight_decay": 0.1, "trust_coefficient": 0.1, "momentum": 0.8}),
    "lbfgs": (partial(optax.lbfgs, linesearch=None, memory_size=2), RATE),
    "lion": (optax.lion, {**RATE, "b1": 0.8, "weight_decay": 0.1}),
    "madgrad": (contrib.madgrad, {**RATE, "momentum": 0.8, "eps": 1e-3, "weight_decay": 0.1}),
    "masked": (masked, {**RATE, "b1": 0.8}),
    "mechanize": (mechanized, {**RATE, "s_init": 1e-2}),
    "momo": (contrib.momo, {"learning_rate": 0.1, "beta": 0.8, "lower_bound": 0.1, "weight_decay": 0.1}),
    "momo_adam": (contrib.momo_adam, {**ADAM, "lower_bound": 0.1}),
    "muon": (contrib.muon, {**RATE, "beta": 0.9, "eps": 1e-3, "adam_b1": 0.8, "weight_decay": 0.1}),
    "nadam": (optax.nadam, ADAM),
    "nadamw": (optax.nadamw, {**ADAM, "weight_decay": 0.1}),
    "noisy_sgd": (partial(optax.noisy_sgd, key=0), {**RATE, "eta": 0.01, "gamma": 0.5}),
    "novograd": (optax.novograd, {**ADAM, "weight_decay": 0.1}),
    "optimistic_adam": (optax.optimistic_adam_v2, {**ADAM, "alpha": 0.9, "beta": 0.8}),
    "optimistic_gradient_descent": (
        optax.optimistic_gradient_descent,
        {**RATE, "alpha": 0.9, "beta": 0.8},
    ),
    "partition": (partitioned, {**RATE, "second": 0.02}),
    "plateau": (plateau, RATE),
    "prodigy": (betas(contrib.prodigy), {**ADAM, "learning_rate": 0.9, "estim_lr0": 1e-2}),
    "rmsprop": (optax.rmsprop, {**RATE, "decay": 0.8, "eps": 1e-3, "initial_scale": 0.1}),
    "rmsprop_centered": (
        partial(optax.rmsprop, centered=True, bias_correction=True),
        {**RATE, "decay": 0.8, "eps": 1e-3},
    ),
    "sam": (partial(sharp, opaque_mode=False), {**RATE, "rho": 0.05}),
    "sam_opaque": (partial(sharp, opaque_mode=True), {**RATE, "rho": 0.05}),
    "schedule_free_adamw": (contrib.schedule_free_adamw, {**ADAM, "learning_rate": 0.1}),
    "schedule_free_sgd": (contrib.schedule_free_sgd, {"learning_rate": 0.1, "b1": 0.8}),
    "sgd": (optax.sgd, {**RATE, "momentum": 0.8}),
    "sign_sgd": (optax.sign_sgd, RATE),
    "signum": (optax.signum, {**RATE, "beta": 0.8}),
    "simplified_ademamix": (contrib.simplified_ademamix, {**ADAM, "alpha": 0.5}),
    "sm3": (optax.sm3, {**RATE, "momentum": 0.8}),
    "sophia": (partial(contrib.sophia, update_interval=2), {**RATE, "b1": 0.8, "b2": 0.9, "gamma": 0.1}),
    "trust_ratio": (trusting, {**RATE, "trust_coefficient": 0.1}),
    "yogi": (optax.yogi, ADAM),
}
# Of which the hypergradient is exactly 0: inside of a sign, in a branch never taken, or below a bound.
FLAT = {
    "amsgrad": {"b2"},  # its largest second moment is the first
    "adopt": {"eps"},
    "fromage": {"min_norm"},
    "lion": {"b1"},
    "momo_adam": {"lower_bound"},
    "polyak_sgd": {"max_learning_rate"},
    "signum": {"beta"},
    "sophia": {"b1", "b2", "gamma"},  # clipped to a sign
}


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("x64")
def test_value_and_hypergradient_are_those_of_optax(name: str) -> None:
    build, given = (QUICK | SLOW)[name]
    hypers = {key: jnp.asarray(x, jnp.float64) for key, x in given.items()}
    names = ("grad_fn",) if name.startswith("sam") else ("value", "grad", "value_fn", "obj_fn")
    start = START if name in QUICK else BOTH
    theirs = jax.jit(jax.value_and_grad(lambda h: by_optax(build, h, names, start)))
    value, gradient = theirs(hypers)
    found, hypergradient = jax.jit(jax.value_and_grad(lambda h: by_us(build, h, start=start)))(hypers)
    assert float(found) == pytest.approx(float(value), rel=1e-10)
    nan = [key for key, x in gradient.items() if not np.isfinite(x)]
    by_differences = (
        differences(lambda h: theirs(h)[0], {key: hypers[key] for key in hypers}) if nan else {}
    )
    for key, x in hypergradient.items():
        expected, tolerance = (by_differences[key], 1e-6) if key in nan else (float(gradient[key]), 1e-8)
        assert float(x) == pytest.approx(expected, rel=tolerance, abs=1e-7), key
        assert (float(x) == 0) == (key in FLAT.get(name, set())), key


@pytest.mark.usefixtures("x64")
def test_the_state_begins_with_the_first_hyperparameters_in_every_adjoint() -> None:
    rates = jnp.linspace(0.05, 0.01, STEPS)
    expected = jax.jit(jax.grad(lambda rate: by_optax(optax.rprop, {"learning_rate": rate})))(0.05)
    assert abs(float(expected)) > 1
    for adjoint in (hg.Checkpointed(), hg.Forward()):
        found = jax.jit(jax.grad(lambda rates, a=adjoint: by_us(optax.rprop, {"learning_rate": rates}, a)))(
            rates
        )
        np.testing.assert_allclose(found, [float(expected), *[0.0] * (STEPS - 1)], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_injected_hyperparameters_follow_a_schedule() -> None:
    """Also where they are injected under other names, inside of something else, and beside another."""

    def build(rate: Any) -> Any:
        inner = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
        return optax.chain(optax.clip(1e6), optax.MultiSteps(inner, 1, accumulator_dtype=np.float64))

    rates = jnp.linspace(0.05, 0.01, STEPS)

    def theirs(rates: Any) -> Any:
        return by_optax(optax.sgd, {"learning_rate": hg.schedules.PerStep(rates)})

    expected, gradient = jax.jit(jax.value_and_grad(theirs))(rates)
    found, hypergradient = jax.jit(jax.value_and_grad(lambda rates: by_us(build, {"rate": rates})))(rates)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(hypergradient, gradient, rtol=1e-9)
    assert np.abs(gradient).min() > 1e-3


def test_a_state_that_is_given_is_where_a_run_begins() -> None:
    optimizer = hg.from_optax(optax.rprop, {"learning_rate": None})
    options: dict[str, Any] = {"optimizer": optimizer, "adjoint": hg.Stored()}
    start = jax.tree.map(jnp.float32, START)
    whole = hg.train(loss, start, RATE, steps=6, **options)
    half = hg.train(loss, start, RATE, steps=3, **options)
    rest = hg.train(loss, half.params, {"learning_rate": 7.0}, steps=3, state=half.state, **options)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(rest.params)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ---- what looks at the loss


def searching(learning_rate: Any) -> Any:
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    return optax.chain(optax.sgd(learning_rate), search)


@pytest.mark.usefixtures("x64")
def test_a_line_search_over_given_steps_is_differentiated_in_reverse_too() -> None:
    """The step it finds is one of a few, whose slope is 0; what it is multiplied with has another."""
    hypers = {"learning_rate": jnp.asarray(0.9)}
    value = jax.jit(lambda h: by_optax(searching, h))
    expected = differences(value, hypers)["learning_rate"]
    for adjoint in (hg.Forward(), hg.Stored()):
        found, gradient = jax.jit(jax.value_and_grad(lambda h, a=adjoint: by_us(searching, h, a)))(hypers)
        assert float(found) == pytest.approx(float(value(hypers)), rel=1e-12)
        assert float(gradient["learning_rate"]) == pytest.approx(expected, rel=1e-5)


def halving(learning_rate: Any) -> Any:
    """Halves the steps, so often that they are short."""

    def update(gradient: Any, state: Any, params: Any = None, **_: Any) -> Any:
        def shorter(rate: Any) -> Any:
            return rate / 2

        rate = jax.lax.while_loop(
            lambda rate: rate * optax.tree.norm(gradient) > 0.5, shorter, learning_rate
        )
        return optax.tree.scale(-rate, gradient), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.usefixtures("x64")
def test_a_loop_of_unknown_length_is_differentiated_forwards_and_refused_in_reverse() -> None:
    hypers = {"learning_rate": jnp.asarray(0.9)}
    value = jax.jit(lambda h: by_optax(halving, h))
    found, gradient = jax.jit(jax.value_and_grad(lambda h: by_us(halving, h, hg.Forward())))(hypers)
    assert float(found) == pytest.approx(float(value(hypers)), rel=1e-12)
    expected = differences(value, hypers)["learning_rate"]
    assert float(gradient["learning_rate"]) == pytest.approx(expected, rel=1e-7)
    with pytest.raises(ValueError, match=r"from_optax\(halving\): it searches .* use adjoint=Forward\(\)"):
        jax.grad(lambda h: by_us(halving, h))(hypers)


@pytest.mark.usefixtures("x64")
def test_refuses_what_must_be_known_before_the_run() -> None:
    def build(learning_rate: Any, factor: Any) -> Any:
        return optax.chain(optax.sgd(learning_rate), contrib.reduce_on_plateau(factor))

    with pytest.raises(
        TypeError, match=r"from_optax\(build\): build must know one of \[.*'factor'.*partial"
    ):
        jax.grad(lambda h: by_us(build, h))({"learning_rate": 0.1, "factor": 0.5})


@pytest.mark.usefixtures("x64")
def test_refuses_an_update_that_needs_what_a_run_does_not_have() -> None:
    def update(gradient: Any, state: Any, params: Any = None, *, labels: Any, **_: Any) -> Any:
        return gradient, state

    build = lambda: optax.GradientTransformationExtraArgs(lambda w: (), update)  # noqa: E731
    with pytest.raises(TypeError, match=r"missing 1 required .*'labels'; there is only \['value', 'grad'"):
        by_us(build, {})


@pytest.mark.usefixtures("x64")
def test_other_type_errors_of_an_update_are_left_as_they_are() -> None:
    def update(gradient: Any, state: Any, params: Any = None, **_: Any) -> Any:
        raise TypeError("of the user's own")

    build = lambda: optax.GradientTransformationExtraArgs(lambda w: (), update)  # noqa: E731
    with pytest.raises(TypeError, match=r"^of the user's own"):
        by_us(build, {})


# ---- derivatives that stay finite


def length(x: Any) -> Any:
    return jnp.sqrt(jnp.sum(x * x))


def guarded(x: Any) -> Any:
    """In the branch that is not taken: a root and a logarithm of a negative number, and 0 / 0."""
    y = -jnp.sum(x * x) - 1
    return jnp.where(y > 0, jnp.sqrt(y) + jnp.log(y) + (y / (y - y)) * y, 2 * y)


ENTERED = {
    "plain": length,
    "jit": jax.jit(length),
    "cond": lambda x: jax.lax.cond(x[0] < 1, length, jnp.sum, x),
    "switch": lambda x: jax.lax.switch(jnp.int32(1), [jnp.sum, length, jnp.max], x),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + length(x), length(y)), 0.0, jnp.stack([x, x]))[0],
    "fori": lambda x: jax.lax.fori_loop(0, 2, lambda i, c: c + length(x), 0.0),
    "checkpoint": jax.checkpoint(length),
    "nested": jax.jit(lambda x: jax.lax.cond(x[0] < 1, jax.checkpoint(length), jnp.sum, x)),
    "vmap": lambda x: jnp.sum(jax.vmap(lambda y: jax.lax.cond(y < 1, jnp.abs, jnp.sqrt, y * y))(x)),
    "power": lambda x: jnp.sum(x * x) ** 0.5,
}


@pytest.mark.parametrize("name", ENTERED)
def test_roots_are_found_wherever_they_are(name: str) -> None:
    function = ENTERED[name]
    safe = finite(function, name)

    @jax.jit
    def everything(zero: Any, x: Any) -> Any:
        at_zero = jax.grad(safe)(zero), jax.jacfwd(safe)(zero)
        return at_zero, jax.value_and_grad(safe)(x), jax.value_and_grad(function)(x)

    at_zero, found, expected = everything(jnp.zeros(2), jnp.array([0.3, -0.4]))
    np.testing.assert_array_equal(at_zero, 0)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_while_loop_is_entered_forwards() -> None:
    def function(x: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + length(x)), (0, 0.0))[1]

    safe = finite(function, "loop")
    np.testing.assert_array_equal(jax.jacfwd(safe)(jnp.zeros(2)), 0)
    x = jnp.array([0.3, -0.4])
    np.testing.assert_allclose(jax.jacfwd(safe)(x), 2 * x / 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^loop: it searches in a loop of unknown length"):
        jax.grad(safe)(x)


def test_the_branch_that_is_not_taken_says_nothing() -> None:
    x = jnp.array([0.3, -0.4])
    assert np.isnan(jax.grad(guarded)(x)).all()
    np.testing.assert_allclose(jax.grad(finite(guarded, "guarded"))(x), -4 * x, rtol=1e-6)


def test_rules_of_their_own_are_kept() -> None:
    @jax.custom_jvp
    def ramp(x: Any) -> Any:
        return jnp.sqrt(x * x)

    ramp.defjvp(lambda primals, tangents: (ramp(*primals), 7 * tangents[0]))

    @jax.custom_vjp
    def slope(x: Any) -> Any:
        return jnp.sqrt(x * x)

    slope.defvjp(lambda x: (slope(x), None), lambda _, cotangent: (5 * cotangent,))
    assert float(jax.grad(finite(ramp, ""))(0.0)) == 7
    assert float(jax.grad(finite(slope, ""))(0.0)) == 5


def test_values_are_not_changed_even_where_they_are_not_finite() -> None:
    functions = [jnp.sqrt, jnp.log, lambda x: 1 / x, lambda x: x**-0.5]
    points = jnp.array([-1.0, 0.0, 2.0, jnp.inf, jnp.nan])
    for function in functions:
        np.testing.assert_array_equal(finite(function, "")(points), function(points))


def test_quotients_by_small_numbers_do_not_overflow() -> None:
    """JAX would square the denominator: 1e-25 squared is 0 in float32."""
    slope = jax.grad(finite(lambda y: jnp.float32(1e-25) / y, ""))(jnp.float32(1e-25))
    assert float(slope) == pytest.approx(-1e25, rel=1e-5)


# ---- handed back to optax


def in_optax(transformation: Any, steps: int = STEPS, **more: Any) -> Any:
    w = jax.tree.map(jnp.float32, BOTH)

    @jax.jit
    def step(w: Any, state: Any) -> Any:
        gradient = jax.grad(lambda w: loss(w, None, 0))(w)
        updates, state = transformation.update(gradient, state, w, **more)
        return optax.apply_updates(w, updates), state

    state = transformation.init(w)
    for _ in range(steps):
        w, state = step(w, state)
    return w


def assert_alike(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


TUNED = {"learning_rate": np.linspace(0.1, 0.02, STEPS, dtype=np.float32), "b1": 0.8}


def test_a_tuned_optimizer_in_a_chain_of_optaxs() -> None:
    rate = hg.schedules.PerStep(TUNED["learning_rate"])
    expected = in_optax(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.8)))
    untold = {"history": None, "start": TUNED, "trials": None}
    tuned = hg.Tuned(TUNED, hg.adam(), stopped="", steps=STEPS, scores={}, moving={}, advice="", **untold)
    assert_alike(in_optax(optax.chain(optax.clip_by_global_norm(1.0), tuned.optax())), expected)
    wrapped = hg.from_optax(optax.adam, {"learning_rate": None, "b1": 0.9})
    chain = optax.chain(optax.clip_by_global_norm(1.0), hg.as_optax(wrapped, TUNED))
    assert_alike(in_optax(chain), expected)


@pytest.mark.parametrize("mask", [{"a": True, "b": False}, {"a": False, "b": False}], ids=["some", "all"])
def test_a_tuned_optimizer_behind_a_mask(mask: Any) -> None:
    rate = hg.schedules.PerStep(TUNED["learning_rate"])
    expected = in_optax(optax.masked(optax.adam(rate, b1=0.8), mask))
    assert_alike(in_optax(optax.masked(hg.as_optax(hg.adam(), TUNED), mask)), expected)
    by_layer = {**TUNED, "learning_rate": {"a": TUNED["learning_rate"], "b": 0.5}}
    assert_alike(in_optax(optax.masked(hg.as_optax(hg.adam(), by_layer), mask)), expected)
    wrapped = hg.from_optax(optax.adam, {"learning_rate": None, "b1": 0.9})
    assert_alike(in_optax(optax.masked(hg.as_optax(wrapped, TUNED), mask)), expected)


def test_what_begins_with_hyperparameters_begins_with_them_in_optax_too() -> None:
    optimizer = hg.from_optax(optax.rprop, {"learning_rate": None})
    transformation = hg.as_optax(optimizer, {"learning_rate": np.array([0.05, 0.5], np.float32)})
    assert_alike(in_optax(transformation), in_optax(optax.rprop(0.05)))


def test_what_looks_at_the_loss_must_be_given_it_in_optax() -> None:
    optimizer = hg.from_optax(optax.polyak_sgd, {"max_learning_rate": 1.0, "f_min": 0.0})
    transformation = hg.as_optax(optimizer, {"f_min": 0.1, "max_learning_rate": 0.1})
    plain = optax.polyak_sgd(0.1, f_min=0.1)
    expected = in_optax(plain, steps=1, value=jnp.float32(loss(BOTH, None, 0)))
    assert_alike(in_optax(transformation, steps=1, value=jnp.float32(loss(BOTH, None, 0))), expected)
    assert_alike(in_optax(transformation, steps=1, value_fn=lambda w: loss(w, None, 0)), expected)
    with pytest.raises(TypeError, match=r"from_optax\(polyak_sgd\): .*'value'.*update\(.*value=\.\.\."):
        in_optax(transformation, steps=1)
