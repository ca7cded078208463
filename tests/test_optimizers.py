"""Every optimizer: its derivatives by every adjoint, its recursion, its limits and its bits."""

import copy
import dataclasses
import functools
import inspect
import pickle
import re
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import hypergrad as hg
from hypergrad import exact, nets
from hypergrad.optimizers import by_name, domains
from hypergrad.optimizers.adam_family import weight
from hypergrad.program import Optimizer, Scale
from tests.problems import (
    OPTIMIZERS,
    RANGES,
    RATES,
    REVERSIBLE,
    admissible,
    assert_agrees_with_finite_differences,
    classification,
    relative_error,
)


def waves(w: Any, meta: Any, step: Any) -> Any:
    """A loss of a tree, with gradients of all sizes and signs."""
    return sum(jnp.sum(jnp.cos(3 * x + step) + 0.3 * x**2) for x in jax.tree.leaves(w))


def start(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


SHAPES = {"matrix": (4, 3), "vector": (3,), "kernel": (2, 2, 3)}


# Derivatives.


COSTLY = {
    "adamw",
    "heavy_ball",
    "rmsprop_momentum",
    "adagrad_momentum",
    "radam",
    "lamb",
    "lars",
    "shampoo",
    "nadam",
    "adamax",
    "amsgrad",
    "rmsprop_momentum(centered=True)",
}
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name in COSTLY else []) for name in OPTIMIZERS]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", EACH)
@pytest.mark.usefixtures("x64")
def test_derivatives_in_everything(optimizer: str) -> None:
    """By every adjoint, against `Stored`, and `Stored` against finite differences.

    The gradients of the first input's weights are exactly 0, so that a root has no derivative there.
    """
    objective, everything = classification(optimizer, sizes=(6, 3))
    expected = jax.jit(jax.grad(lambda e: objective(e, hg.Stored())))(everything)
    for adjoint in admissible(optimizer):
        found = jax.jit(jax.grad(lambda e, a=adjoint: objective(e, a)))(everything)
        errors = relative_error(found, expected)
        assert max(errors.values()) < 1e-9, (adjoint, errors)

    smooth = classification(optimizer, sizes=(6, 3), rounded=False).objective
    value = jax.jit(lambda e: smooth(e, hg.Stored()))
    assert_agrees_with_finite_differences(value, everything, expected)

    # In the first input itself the objective bends within ε; its derivative at 0 is that of tiny steps.
    data, direction = everything["meta"]["data"], np.random.default_rng(2).normal(size=40)

    def along(h: float) -> float:
        return float(
            value({**everything, "meta": {**everything["meta"], "data": data.at[:, 0].set(h * direction)}})
        )

    found = float(jnp.vdot(expected["meta"]["data"][:, 0], direction))
    assert found == pytest.approx((along(1e-6) - along(-1e-6)) / 2e-6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.quick("adam")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_types_in_float32(optimizer: str) -> None:
    objective, everything = classification(optimizer, jnp.float32, sizes=(6, 3))
    for adjoint in admissible(optimizer):
        shapes = jax.eval_shape(jax.grad(lambda e, a=adjoint: objective(e, a)), everything)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))


# The recursions.


def scheduled(optimizer: str) -> dict[str, Any]:
    """Every hyperparameter as a schedule."""
    rng = np.random.default_rng(3)
    ranges = RANGES | {"learning_rate": (0.5 * RATES[optimizer], RATES[optimizer])}
    return {name: jnp.asarray(rng.uniform(*ranges[name], 50)) for name in OPTIMIZERS[optimizer].hypers}


def trained(optimizer: Optimizer, hypers: Any, steps: int = 50, **arguments: Any) -> Any:
    result = hg.train(
        waves, start(), hypers, steps=steps, optimizer=optimizer, adjoint=hg.Stored(), **arguments
    )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(result))
    return result.params


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    errors = relative_error(found, expected)
    moved = relative_error(start(), expected)
    assert max(errors.values()) < tolerance and min(moved.values()) > 1e-2, (errors, moved)


def fixed(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    return lambda **hypers: function(**hypers, **arguments)


IN_OPTAX: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    # with hyperparameters that make the conventions one
    "nesterov": (fixed(optax.sgd, nesterov=True), {}),
    "adagrad": (fixed(optax.adagrad, initial_accumulator_value=0.0), {}),
    "adadelta": (optax.adadelta, {}),
    "rmsprop": (optax.rmsprop, {}),
    "rmsprop(centered=True)": (fixed(optax.rmsprop, centered=True), {}),
    "rmsprop_momentum": (optax.rmsprop, {}),
    "rmsprop_momentum(centered=True)": (fixed(optax.rmsprop, centered=True), {}),
    "adam": (optax.adam, {}),
    "adamw": (optax.adamw, {}),
    "adamax": (optax.adamax, {"eps": jnp.zeros(50)}),
    "radam": (fixed(optax.radam, threshold=4.0), {}),
    "lamb": (optax.lamb, {}),
    "lars": (optax.lars, {"learning_rate": jnp.full(50, 0.5), "weight_decay": jnp.zeros(50)}),
    "sm3": (lambda eps, **hypers: optax.sm3(**hypers), {"eps": jnp.full(50, 1e-8)}),
}


@pytest.mark.parametrize("optimizer", IN_OPTAX)
@pytest.mark.usefixtures("x64")
def test_is_optax(optimizer: str) -> None:
    make, changed = IN_OPTAX[optimizer]
    hypers = scheduled(optimizer) | changed

    def step(carry: Any, inputs: Any) -> Any:
        w, state = carry
        t, h = inputs
        transformation = make(**h)
        updates, state = transformation.update(jax.grad(waves)(w, None, t), state, w)
        return (optax.apply_updates(w, updates), state), None

    init = make(**jax.tree.map(lambda x: x[0], hypers)).init(start())
    (expected, _), _ = jax.lax.scan(step, (start(), init), (jnp.arange(50), hypers))
    assert_same(trained(OPTIMIZERS[optimizer], hypers), expected)


Arrays = dict[str, np.ndarray]


def reference(name: str, s: Arrays, w: Any, g: Any, h: Any, n: int) -> Any:
    """The recursions that optax has not, or otherwise: a step of one leaf, and its variables in place."""
    if name in {"nadam", "amsgrad", "adamax"}:
        m = s["m"] = h.b1 * s.get("m", 0 * g) + (1 - h.b1) * g
        v = s["v"] = h.b2 * s.get("v", 0 * g) + (1 - h.b2) * g**2
        if name == "nadam":
            m = h.b1 * m + (1 - h.b1) * g
        if name == "amsgrad":
            v = s["largest"] = np.maximum(s.get("largest", 0 * g), v)
        size = np.sqrt(v / (1 - h.b2**n))
        if name == "adamax":
            size = s["u"] = np.maximum(h.b2 * s.get("u", 0 * g), abs(g))
        return w - h.learning_rate * m / (1 - h.b1**n) / (size + h.eps)
    if name == "adagrad_momentum":
        s["squares"] = s.get("squares", 0 * g) + g**2
        change = h.learning_rate * g / np.sqrt(s["squares"] + h.eps)
        s["velocity"] = h.momentum * s.get("velocity", 0 * g) + change
        return w - s["velocity"]
    if name == "lars":
        norm = np.linalg.norm
        trust = h.trust_coefficient * norm(w) / (norm(g) + h.weight_decay * norm(w))
        change = trust * (g + h.weight_decay * w)
    else:
        assert name == "shampoo"
        G = g.reshape(-1, g.shape[-1]) if g.ndim > 1 else g[:, None]
        s["L"], s["R"] = s.get("L", 0) + G @ G.T, s.get("R", 0) + G.T @ G

        def power(A: Any, p: float) -> Any:
            eigenvalues, Q = np.linalg.eigh(A + h.eps * np.eye(len(A)))
            return (Q * eigenvalues**p) @ Q.T

        both = power(s["L"], -0.25) @ G @ power(s["R"], -0.25) if g.ndim > 1 else power(s["L"], -0.5) @ G
        change = both.reshape(g.shape)
    s["velocity"] = h.momentum * s.get("velocity", 0 * g) + change
    return w - h.learning_rate * s["velocity"]


@pytest.mark.parametrize("optimizer", ["adagrad_momentum", "adamax", "nadam", "amsgrad", "lars", "shampoo"])
@pytest.mark.usefixtures("x64")
def test_is_its_recursion(optimizer: str) -> None:
    hypers = scheduled(optimizer)
    expected: Arrays = {}
    for leaf, x in start().items():
        w, state = np.asarray(x), dict[str, np.ndarray]()
        for t in range(50):
            gradient = -3 * np.sin(3 * w + t) + 0.6 * w
            h = SimpleNamespace(**{name: float(values[t]) for name, values in hypers.items()})
            w = reference(optimizer, state, w, gradient, h, t + 1)
        expected[leaf] = w
    assert_same(trained(OPTIMIZERS[optimizer], hypers), expected)


@pytest.mark.usefixtures("x64")
def test_a_leaf_of_no_axes_is_a_vector_of_one_element() -> None:
    for name in ("shampoo", "sm3", "lars", "lamb"):
        ends = [
            hg.train(
                waves, w, scheduled(name), steps=50, optimizer=OPTIMIZERS[name], adjoint=hg.Stored()
            ).params
            for w in (jnp.asarray(0.7), jnp.asarray([0.7]))
        ]
        assert ends[0].shape == () and float(ends[0]) == pytest.approx(float(ends[1][0]), rel=1e-12)


def test_trust_ratio_is_one_where_a_norm_is_zero() -> None:
    for optimizer in (hg.lars(), hg.lamb()):

        def run(w: Any, loss: Any, optimizer: Any = optimizer) -> Any:
            hypers = {"learning_rate": 0.25}
            return hg.train(loss, w, hypers, steps=1, optimizer=optimizer, adjoint=hg.Stored()).params

        np.testing.assert_allclose(run(jnp.zeros(2), lambda w, m, t: jnp.sum(w)), [-0.25, -0.25], rtol=1e-5)
        np.testing.assert_allclose(run(jnp.ones(2), lambda w, m, t: jnp.sum(0 * w)), [1.0, 1.0])


# Inclusion: with a large ε an adaptive method is the one that it adapts.


def average(rate: float, momentum: float, eps: float) -> Any:
    """The rate by which Adam with a large ε is heavy ball."""
    return eps * rate * (1 - momentum ** np.arange(1, 51)) / (1 - momentum)


def root(rate: float, momentum: float, eps: float) -> float:
    """The same where ε stands inside a root."""
    return float(rate * np.sqrt(eps))


LIMITS: dict[str, tuple[Optimizer, Callable[..., Any], str]] = {
    "adam": (hg.heavy_ball(), average, "b1"),
    "adamw": (hg.heavy_ball(), average, "b1"),
    "adamax": (hg.heavy_ball(), average, "b1"),
    "amsgrad": (hg.heavy_ball(), average, "b1"),
    "nadam": (hg.nesterov(), average, "b1"),
    "rmsprop_momentum": (hg.heavy_ball(), root, "momentum"),
    "rmsprop_momentum(centered=True)": (hg.heavy_ball(), root, "momentum"),
    "adagrad_momentum": (hg.heavy_ball(), root, "momentum"),
    "shampoo": (hg.heavy_ball(), root, "momentum"),
    "sm3": (hg.momentum(), root, "momentum"),
    "rmsprop": (hg.sgd(), root, ""),
    "adagrad": (hg.sgd(), root, ""),
}


@pytest.mark.quick("adam", "rmsprop_momentum(centered=True)", "shampoo", "sm3")
@pytest.mark.parametrize("optimizer", LIMITS)
@pytest.mark.usefixtures("x64")
def test_contains_what_it_adapts(optimizer: str) -> None:
    """The difference falls with 1 / ε."""
    contained, rate, name = LIMITS[optimizer]
    momentum = {name: 0.8} if name else {}
    expected = trained(contained, {"learning_rate": 0.02} | ({"momentum": 0.8} if name else {}))
    errors = []
    for eps in (1e6, 1e8):
        hypers: dict[str, Any] = {"learning_rate": rate(0.02, 0.8, eps), "eps": eps, **momentum}
        if optimizer == "adamw":
            hypers["weight_decay"] = 0.0
        found = relative_error(trained(OPTIMIZERS[optimizer], hypers), expected)
        errors.append(max(found.values()))
    assert errors[0] < 1e-3
    assert errors[1] == pytest.approx(1e-2 * errors[0], rel=0.05)


@pytest.mark.usefixtures("x64")
def test_adamw_without_decay_is_adam() -> None:
    hypers = scheduled("adam")
    assert_same(trained(hg.adamw(), hypers | {"weight_decay": 0.0}), trained(hg.adam(), hypers), 1e-15)


# What reversal costs, and what cannot be reversed.

log = np.log2
BITS: dict[str, Callable[[Any], float]] = {  # per parameter and step
    "momentum": lambda h: -log(h.momentum),
    "heavy_ball": lambda h: -log(h.momentum),
    "adagrad_momentum": lambda h: -log(h.momentum),
    "rmsprop_momentum": lambda h: -log(h.momentum) - log(h.decay),
    "rmsprop_momentum(centered=True)": lambda h: -log(h.momentum) - 2 * log(h.decay),
    "adam": lambda h: -log(h.b1) - log(h.b2),
    "adamw": lambda h: -log(h.b1) - log(h.b2) - log(1 - h.learning_rate * h.weight_decay),
    "radam": lambda h: -log(h.b1) - log(h.b2),
    "lamb": lambda h: -log(h.b1) - log(h.b2),  # without what its decay costs
    "lars": lambda h: -log(h.momentum),
    "shampoo": lambda h: -log(h.momentum),
}


def test_bits_of_every_reversible_optimizer() -> None:
    """By the defaults; the docstrings say the same."""
    assert set(BITS) == set(REVERSIBLE)
    for name, bits in BITS.items():
        h = SimpleNamespace(**OPTIMIZERS[name].hypers | {"learning_rate": 1e-3})
        scales = [m for m in OPTIMIZERS[name].moves(h, jnp.int32(0)) if isinstance(m, Scale)]
        known = [m.numerator(jnp.asarray(m.factor)) for m in scales if not callable(m.factor)]
        cost = sum(float(exact.cost(n)) for n in known) / exact.BIT
        assert cost == pytest.approx(bits(h), abs=len(known) * exact.ROUNDING + 1e-6)
        if "adam" in name:
            assert cost == pytest.approx(0.154, abs=1e-3)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - set(REVERSIBLE)))
def test_refuses_to_reverse_what_cannot_be(optimizer: str) -> None:
    name = re.escape(OPTIMIZERS[optimizer].name)
    with pytest.raises(
        hg.ReversalError, match=rf"optimizer={name}.*: {name} overwrites '.*Checkpointed\(\)"
    ):
        hg.train(waves, jnp.ones(3), {"learning_rate": 0.1}, steps=2, optimizer=OPTIMIZERS[optimizer])


def test_refuses_an_eps_by_weight_on_a_diagonal() -> None:
    hypers = {"learning_rate": 0.1, "eps": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match=r"shampoo\(\): eps has shape \[3\].*one number per leaf"):
        hg.train(waves, jnp.ones(3), hypers, steps=2, optimizer=hg.shampoo())


# Numerics.


def test_decay_below_the_rounding_error_of_one() -> None:
    """``1 - αλ`` in float32 would be wrong by a fifth of ``αλ``."""
    hypers = {"learning_rate": 1e-3, "weight_decay": 1e-4}
    loss = lambda w, meta, step: jnp.sum(0 * w)  # noqa: E731
    end = hg.train(loss, jnp.ones(2), hypers, steps=2000, optimizer=hg.adamw()).params
    np.testing.assert_allclose(1 - end, 2e-4, rtol=2e-3)
    rng = np.random.default_rng(0)
    for a, b in np.float32(10 ** rng.uniform(-6, -0.2, (100, 2))):
        nearest = round((1 - Fraction(float(a)) * Fraction(float(b))) * exact.BASE)
        assert int(exact.complement(a, b)) == nearest
    assert int(exact.complement(1.0, 1.0)) == 0  # which `admissible` refuses


def test_weight_of_an_average_in_float32() -> None:
    for decay in np.float32([0.0, 0.1, 0.3, 0.9, 0.999, 0.99999]):
        for n in (1, 2, 5, 1000):
            expected = float(1 - Fraction(float(decay)) ** n)
            assert float(weight(decay, jnp.int32(n))) == pytest.approx(expected, rel=1e-6)
            slope = float(-n * Fraction(float(decay)) ** (n - 1))
            found = jax.grad(weight)(decay, jnp.int32(n))
            assert float(found) == pytest.approx(slope, rel=1e-4, abs=1e-30)


# Long runs.


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_ten_thousand_steps_return_to_the_start_bit_for_bit(optimizer: str) -> None:
    """784-50-50-50-10 in float32, the betas varying by step.  `Reversible` itself compares every bit."""
    steps, rng = 10_000, np.random.default_rng(0)
    init, apply = nets.mlp([784, 50, 50, 50, 10])
    params = init(jax.random.key(0))
    images = jnp.asarray(rng.normal(size=(1000, 784)), jnp.float32).at[:, :100].set(0)
    labels = jnp.asarray(rng.integers(0, 10, 1000), jnp.int32)
    rows = jnp.asarray(rng.integers(0, 1000, (steps, 50)), jnp.int32)

    def outer(hypers: Any, images: Any, labels: Any) -> Any:
        loss = lambda w, images, rows: nets.cross_entropy(apply(w, images[rows]), labels[rows])  # noqa: E731
        return hg.train(
            loss, params, hypers, images, rows, steps=steps, optimizer=OPTIMIZERS[optimizer]
        ).losses[-1]

    hypers = {
        "learning_rate": jnp.asarray(rng.uniform(1e-4, 1e-3, steps), jnp.float32),
        "b1": jnp.asarray(rng.uniform(0.8, 0.95, steps), jnp.float32),
        "b2": jnp.asarray(rng.uniform(0.99, 0.999, steps), jnp.float32),
        "eps": jnp.float32(1e-6),
    }
    if optimizer == "adamw":
        hypers["weight_decay"] = jnp.asarray(rng.uniform(0, 0.1, steps), jnp.float32)
    found = jax.block_until_ready(jax.jit(jax.grad(outer))(hypers, images, labels))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))


MADE = [
    hg.adam(),
    hg.rmsprop(centered=True),
    hg.clip(hg.muon(ns_steps=3)),
    hg.with_average(hg.prodigy(safeguard_warmup=True)),
    hg.from_optax(optax.adan, {"learning_rate": None, "b1": 0.98}),
]


@pytest.mark.parametrize("optimizer", MADE, ids=lambda x: x.name)
def test_an_optimizer_can_be_pickled(optimizer: Any) -> None:
    again = pickle.loads(pickle.dumps(optimizer))
    assert (again.name, again.hypers, again.domains) == (
        optimizer.name,
        optimizer.hypers,
        optimizer.domains,
    )
    assert again.reversible == optimizer.reversible
    assert jax.tree.structure(copy.deepcopy(optimizer).variables) == jax.tree.structure(optimizer.variables)


def test_a_name_that_makes_no_optimizer_or_another_one_does_not_stand_for_it() -> None:
    own = dataclasses.replace(hg.adam(), moves=lambda h, t: [])
    assert by_name.says_how_it_is_made(hg.adam()) and not by_name.says_how_it_is_made(own)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(own)
    for name in ("exit()", "adam", "1 + 1", "adam(", "adam(rate=1)", "partition({'a': adam()})"):
        with pytest.raises(ValueError, match=r"does not say how|is not the name"):
            by_name.optimizer_of(name)


# ---- domains by name


@pytest.mark.parametrize("module", [optax, optax.contrib], ids=["optax", "contrib"])
def test_defaults_of_optax_lie_in_the_domains_of_their_names(module: Any) -> None:
    found = 0
    for build in vars(module).values():
        if not inspect.isfunction(build) or build.__name__.startswith("_"):
            continue
        defaults = {
            name: each.default
            for name, each in inspect.signature(build).parameters.items()
            if isinstance(each.default, float)
        }
        if "GradientTransformation" not in str(inspect.signature(build).return_annotation):
            continue
        for name, (low, high) in domains.usual_domains(build, defaults).items():
            assert low <= defaults[name] <= high, (build.__name__, name)
            found += 1
    assert found > 30


def test_names_of_a_function_of_ones_own_say_less() -> None:
    build = functools.partial(optax.contrib.muon, ns_steps=3)
    assert hg.from_optax(build, {"learning_rate": None, "beta": 0.95}).domains["beta"] == (0.0, 1.0)
    own = hg.from_optax(lambda learning_rate, beta: optax.sgd(learning_rate * beta), {"beta": 0.9})
    assert own.domains == {}
