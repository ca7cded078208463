"""Mistakes are refused where they are made: a test for each message, and what must go through."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import schedules
from hypergrad._base.errors import DomainError
from hypergrad.program import Optimizer, Scale, Shift, Variable

START = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
HYPERS = {"learning_rate": 0.1, "momentum": 0.5}
ADJOINTS = [hg.Reversible(), hg.Checkpointed(), hg.Stored(), hg.Forward()]


def square(w: Any, meta: Any, batch: Any) -> Any:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w))


def train(**changes: Any) -> hg.Trained:
    return hg.train(**({"loss": square, "params": START, "hypers": HYPERS, "steps": 4} | changes))


def plan(**changes: Any) -> hg.Plan:
    given = {"loss": square, "params": START, "hypers": HYPERS, "steps": 4, "budget": 1e9}
    return hg.plan(**(given | changes))


def tune(**changes: Any) -> hg.Tuned:
    given = {"loss": square, "params": START, "hypers": {"learning_rate": 0.1}, "steps": 4}
    return hg.tune(**(given | {"meta_steps": 1, "trials": 0, "progress": False} | changes))


class Scalar(NamedTuple):
    """A tree of one number that can be called, as a module can."""

    value: Any

    def __call__(self, x: Any) -> Any:
        return self.value * x


class Loader:
    """No array, as a data loader is none."""


# The optimizer and the adjoint, of every function that takes them.

NO_OPTIMIZER = {
    "an optax transformation": (
        optax.adam(0.1),
        r"optimizer=<GradientTransformation\w*>.* is an optax transformation, .*hypergrad\.from_optax\(",
    ),
    "a maker of ours": (
        hg.adam,
        r"optimizer=adam.* is the function adam, .*add brackets, optimizer=adam\(\)",
    ),
    "a maker of optax": (optax.lion, r"optimizer=lion.*: pass hypergrad\.from_optax\(optax\.lion, "),
    "a string": (
        "adam",
        r"optimizer='adam'\): optimizer is the string 'adam'\. Pass .*hypergrad\.adam\(\)",
    ),
    "a number": (0.1, r"optimizer=<float>\): optimizer is a float\. Pass one of this library's"),
    "a class": (Loader, r"optimizer=Loader\): optimizer is the class Loader\. Pass one of this library's"),
}


@pytest.mark.parametrize("function", [train, tune, plan])
@pytest.mark.parametrize("case", NO_OPTIMIZER)
def test_what_is_no_optimizer(function: Callable[..., Any], case: str) -> None:
    optimizer, message = NO_OPTIMIZER[case]
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(steps=4, {message}"):
        function(optimizer=optimizer)


NO_ADJOINT = {
    "a class": (
        hg.Reversible,
        r"adjoint=Reversible\): adjoint is the class Reversible, .*brackets, adjoint=Reversible\(\)",
    ),
    "a string": ("reversible", r"adjoint='reversible'\): adjoint is .*; pass hypergrad\.Reversible\(\)"),
    "a number": (3, r"adjoint=<int>\): adjoint is an int; pass hypergrad\.Reversible\(\)"),
}


@pytest.mark.parametrize("function", [train, tune])
@pytest.mark.parametrize("case", NO_ADJOINT)
def test_what_is_no_adjoint(function: Callable[..., Any], case: str) -> None:
    adjoint, message = NO_ADJOINT[case]
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(steps=4, optimizer=\w+\(\), {message}"):
        function(adjoint=adjoint)


def test_a_class_of_adjoints_in_another_adjoint() -> None:
    with pytest.raises(TypeError, match=r"^Truncated\(steps=2\): .*brackets, adjoint=Checkpointed\(\)"):
        hg.Truncated(2, adjoint=hg.Checkpointed)  # type: ignore[arg-type]


# What else `train` is given.

TRAIN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a loss of two arguments": (
        {"loss": lambda w, batch: jnp.sum(w["a"])},
        TypeError,
        r"loss is called as loss\(params, meta, batch\), and takes \(w, batch\) .*lambda params, meta,",
    ),
    "a loss that is no function": (
        {"loss": jnp.ones(3)},
        TypeError,
        r"loss is an ArrayImpl; it must be a function, loss\(params, meta, batch\)",
    ),
    "a watch of two arguments": (
        {"watch": lambda step, w: w},
        TypeError,
        r"watch is called as watch\(snapshot\), and takes \(step, w\)",
    ),
    "a loss with more beside it": (
        {"loss": lambda w, m, b: (square(w, m, b), w)},
        ValueError,
        r"must return one scalar, and returned a tuple; return the loss alone.* watch=",
    ),
    "a loss of nothing": (
        {"loss": lambda w, m, b: None},
        ValueError,
        r"must return one scalar, and returned None; return the loss alone",
    ),
    "a loss of many numbers": (
        {"loss": lambda w, m, b: w["b"]},
        ValueError,
        r"must return one scalar, and returned float32\[3\]; reduce it, by jnp\.mean or jnp\.sum",
    ),
    "a loss of integers": (
        {"loss": lambda w, m, b: jnp.int32(1)},
        TypeError,
        r"must return a float, and returned int32\[\], which has no gradient",
    ),
    "a string in meta": (
        {"meta": {"mode": "fast", "scale": 1.0}},
        TypeError,
        r"meta\['mode'\] is the string 'fast', not an array\. Pass arrays.* it may close over",
    ),
    "a function in meta": (
        {"meta": [1.0, jnp.tanh]},
        TypeError,
        r"meta\[1\] is the function tanh, not an array\. Pass arrays.* it may close over",
    ),
    "an integer in meta that is too large": ({"meta": 2**40}, TypeError, r"meta is 1099511627776 \(.*\)"),
    "an object for batches": (
        {"batches": Loader()},
        TypeError,
        r"batches is a Loader, not an array\. .*stack those of a loader, jnp\.stack\(",
    ),
    "a generator for batches": (
        {"batches": iter([])},
        TypeError,
        r"batches is a list_iterator, not an arr.*stack",
    ),
    "no batches": ({"batches": {}}, ValueError, r"batches is a dict with no arrays in it; pass None"),
    "batches of nothing": (
        {"batches": {"x": np.ones((4, 0, 2))}},
        ValueError,
        r"batches\['x'\] has shape \[4, 0, 2\], so the batch of a step is empty.*give every step",
    ),
    "batches without steps": ({"batches": np.ones((0, 2))}, ValueError, r"shape \[0, 2\].*length steps=4"),
    "empty parameters": (
        {"params": {"a": jnp.ones((0, 3))}},
        ValueError,
        r"params has no arrays in it, or only empty ones, so there is nothing to train",
    ),
    "a function for parameters": (
        {"params": lambda key: START},
        TypeError,
        r"params is the function <lambda>, not a tree of arrays; pass what it returns, such as init\(",
    ),
    "an object for parameters": (
        {"params": Loader()},
        TypeError,
        r"params is a Loader, not an array\. Of a tree pass",
    ),
    "a string among parameters": (
        {"params": START | {"name": "mine"}},
        TypeError,
        r"params\['name'\] is the string 'mine', not an array",
    ),
    "a whole number among parameters": (
        {"params": START | {"count": 3}},
        TypeError,
        r"params\['count'\] is int32, which has no gradient; .* Of a tree pass",
    ),
    "NaN in parameters": (
        {"params": START | {"b": jnp.array([1.0, np.nan, 1.0])}},
        ValueError,
        r"params\['b'\] has NaN or infinity in it at the start.*look at how it was made",
    ),
    "infinity in parameters": (
        {"params": np.array([1.0, np.inf], np.float32)},
        ValueError,
        r"params has NaN or infinity in it at the start",
    ),
    "NaN in the state": (
        {"state": {"velocity": jax.tree.map(lambda x: np.nan * x, START)}},
        ValueError,
        r"state\['velocity'\] has NaN or infinity in it at the start",
    ),
    "a state that is no dictionary": (
        {"state": START["a"]},
        TypeError,
        r"state is an ArrayImpl; it must be a dictionary .*\['velocity'\]",
    ),
    "a string in the state": (
        {"state": {"velocity": START | {"a": "fast"}}},
        TypeError,
        r"state\['velocity'\]\['a'\] is the string 'fast', not an array",
    ),
    "a hyperparameter of None": (
        {"hypers": HYPERS | {"momentum": None}},
        ValueError,
        r"hypers\['momentum'\] is None; give it a number, or leave it out",
    ),
    "a hyperparameter that is NaN": (
        {"hypers": HYPERS | {"momentum": np.nan}},
        ValueError,
        r"hypers\['momentum'\] for params\['a'\] is nan; it must lie in \[0, 1\)",
    ),
    "a schedule that is a list": (
        {"hypers": HYPERS | {"learning_rate": [0.1] * 4}},
        ValueError,
        r"hypers\['learning_rate'\] must be .* and is a list \(a schedule is an array, jnp\.array\(",
    ),
    "a schedule of a class of one's own": (
        {"hypers": HYPERS | {"learning_rate": Scalar(0.1)}},
        ValueError,
        r"hypers\['learning_rate'\] must be .*is a Scalar \(.* lambda count: schedule\(count\)\)",
    ),
    "an object for a hyperparameter": (
        {"hypers": HYPERS | {"momentum": Loader()}},
        ValueError,
        r"hypers\['momentum'\] for params\['a'\] is object; it must be a real number",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_train(case: str) -> None:
    changes, error, message = TRAIN[case]
    with pytest.raises(error, match=message) as raised:
        train(**changes)
    assert type(raised.value) is error
    quoted = "train(steps=4, optimizer=momentum(), adjoint=Reversible(bits=(), radix=(), segments=1)): "
    assert str(raised.value).startswith(quoted)


def test_none_is_no_string() -> None:
    stored = {"adjoint": hg.Stored()}
    assert train(meta={"penalty": None, "scale": 1.0}, **stored).losses.shape == (4,)
    assert train(meta=[None, (), 1], batches=(None, np.ones((4, 2))), **stored).losses.shape == (4,)


def test_known_start_is_looked_at_also_under_jit_and_an_unknown_one_is_not() -> None:
    broken = {"a": jnp.full((2, 3), np.nan), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"params\['a'\] has NaN"):
        jax.jit(lambda rate: train(params=broken, hypers={"learning_rate": rate}).losses)(0.1)
    with pytest.raises(ValueError, match=r"params\['a'\] has NaN"):
        jax.grad(lambda params: square(train(params=params).params, None, None))(broken)
    unknown = jax.jit(lambda params: train(params=params, adjoint=hg.Stored()).losses)(broken)
    assert np.isnan(unknown).all()


# Keywords of the other functions.

KEYWORDS: dict[str, tuple[Callable[[], Any], str]] = {
    "steps of train": (lambda: train(steps=2.5), r"^train\(steps=2\.5, .*steps must be a whole number"),
    "steps of tune": (lambda: tune(steps=2.5), r"^tune\(steps=2\.5, .*steps must be a whole number"),
    "steps of plan": (lambda: plan(steps=2.5), r"^plan\(steps=2\.5, .*steps must be a whole number"),
    "steps of values": (
        lambda: schedules.values(schedules.Constant(0.1), 2.5),  # type: ignore[arg-type]
        r"^values\(steps=2\.5\): .*a whole number",
    ),
    "budget in words": (
        lambda: plan(budget="1GB"),
        r"^plan\(.*budget='1GB'\): .*number of bytes, such as 1e9",
    ),
    "negative budget": (lambda: plan(budget=-1), r"^plan\(.*budget=-1\): .*number of bytes"),
    "wrt as a string": (lambda: plan(wrt="meta"), r"wrt='meta' must be some of .* in a tuple"),
    "segments of Reversible": (
        lambda: hg.Reversible(segments=2.5),  # type: ignore[arg-type]
        r"^Reversible\(segments=2\.5\): .*at least one segment, and a whole number",
    ),
    "radix": (lambda: hg.Reversible(radix=50), r"^Reversible\(radix=50\): .*radix=\{\"params\": 40\}"),  # type: ignore[arg-type]
    "part of a radix": (
        lambda: hg.Reversible(radix={"params": 40.5}),  # type: ignore[dict-item]
        r"^Reversible\(radix=\{'params': 40\.5\}\): .*whole numbers",
    ),
    "bits": (lambda: hg.Reversible(bits="few"), r"^Reversible\(bits='few'\): .*bits=\{\"params\": 0\.2\}"),  # type: ignore[arg-type]
    "part of bits": (lambda: hg.Reversible(bits={"mu": "few"}), r"^Reversible\(.*must lie in \(0, 7\]"),  # type: ignore[dict-item]
    "segments of Checkpointed": (
        lambda: hg.Checkpointed(segments="a"),  # type: ignore[arg-type]
        r"^Checkpointed\(segments='a'\): .*at least one segment, and a whole number of them, or None",
    ),
    "steps of Truncated": (lambda: hg.Truncated(2.5), r"^Truncated\(steps=2\.5\): .*whole number"),  # type: ignore[arg-type]
    "limit of Forward": (lambda: hg.Forward(limit=0.5), r"^Forward\(limit=0\.5\): .*whole number"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", KEYWORDS)
def test_keywords(case: str) -> None:
    call, message = KEYWORDS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_functions_of_tune_are_called_with_what_they_take() -> None:
    with pytest.raises(
        TypeError, match=r"^tune\(.*validation is called as validation\(params\), and takes"
    ):
        tune(validation=lambda params, meta: 0.0)
    with pytest.raises(TypeError, match=r"^tune\(.*params is called as params\(key\), and takes \(\)"):
        tune(params=lambda: START)
    with pytest.raises(TypeError, match=r"^tune\(.*batches is called as batches\(key\), and takes \(\)"):
        tune(batches=lambda: np.ones((4, 2)))


# Hyperparameters outside their domain.


def end(rate: Any, adjoint: Any) -> Any:
    return square(train(hypers={"learning_rate": rate}, adjoint=adjoint).params, None, None)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_domains_hold_in_grad_before_any_work(adjoint: Any) -> None:
    message = r"hypers\['learning_rate'\] for params\['a'\] is -0\.1.*; it must lie in \[0, inf\)"
    with pytest.raises(ValueError, match=message):
        jax.grad(end)(-0.1, adjoint)
    with pytest.raises(ValueError, match=r"hypers\['eps'\] for params\['a'\] is -1\.0; it must lie in"):
        jax.grad(lambda eps: outer_adam(eps, adjoint))(-1.0)


def outer_adam(eps: Any, adjoint: Any) -> Any:
    hypers = {"learning_rate": 0.1, "eps": eps}
    return square(train(hypers=hypers, optimizer=hg.adam(), adjoint=adjoint).params, None, None)


TRACED: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "jit": lambda f: jax.jit(f),
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "scan": lambda f: lambda x: jax.lax.map(f, jnp.stack([jnp.abs(x), x])),
}
LANES: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "vmap": lambda f: jax.vmap(f),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f)),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(f))),
}


@pytest.mark.parametrize("how", TRACED)
def test_domains_hold_where_values_are_traced(how: str) -> None:
    """And change nothing inside: against the run by hand, and its finite differences in float64."""
    function = TRACED[how](lambda rate: end(rate, hg.Checkpointed()))
    for wrong in (-0.1, np.nan):
        outside_is_refused(function, jnp.float32(wrong), wrong)
    np.testing.assert_allclose(function(jnp.float32(0.1)), by_hand(how), rtol=1e-3)


@pytest.mark.parametrize("how", LANES)
def test_domains_hold_lane_by_lane(how: str) -> None:
    """A run outside is NaN and named, and the one next to it is right; an error where both are outside."""
    function = LANES[how](lambda rate: end(rate, hg.Checkpointed()))
    for wrong in (-0.1, np.nan):
        named = rf"run \[1\] of \[2\] under vmap: .*hypers\['learning_rate'\] has {wrong} in it; it must"
        with pytest.warns(hg.LaneWarning, match=named):
            inside, outside = function(jnp.array([0.1, wrong], jnp.float32))
        assert np.isnan(outside)
        np.testing.assert_allclose(inside, by_hand(how), rtol=1e-3)
        outside_is_refused(function, jnp.full(2, wrong, jnp.float32), wrong)


def outside_is_refused(function: Callable[[Any], Any], x: Any, wrong: float) -> None:
    with pytest.raises(Exception, match=rf"hypers\['learning_rate'\] has {wrong} in it; it must lie") as e:
        jax.block_until_ready(function(x))
    assert DomainError.__name__ in str(e.value) and "hypergrad.constraints" in str(e.value)


def by_hand(how: str) -> float:
    """The value at a rate of 0.1, or its slope by finite differences in float64."""
    h = 1e-3
    with jax.enable_x64(True):
        start = jax.tree.map(lambda x: x.astype(jnp.float64), START)
        value, slope = parabola(0.1, start), (parabola(0.1 + h, start) - parabola(0.1 - h, start)) / (2 * h)
    return slope if "grad" in how else value


def parabola(rate: float, start: Any) -> float:
    """The same run by hand: momentum 0.9 on ``Σ w²``."""
    w = jax.tree.leaves(start)
    v = [0 * x for x in w]
    for _ in range(4):
        v = [0.9 * b - 0.1 * 2 * a for a, b in zip(w, v)]
        w = [a + rate * b for a, b in zip(w, v)]
    return float(sum(jnp.sum(x**2) for x in w))


@pytest.mark.slow
def test_the_look_at_domains_is_not_differentiated() -> None:
    """Forwards, backwards, and forwards over backwards, under jit: as outside of it."""
    rates = jnp.array([0.1, 0.2, 0.3, 0.1])
    forward = lambda rates: end(rates, hg.Forward())  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.jacfwd(forward))(rates), jax.jacfwd(forward)(rates), rtol=1e-6)
    stored = lambda rates: end(rates, hg.Stored())  # noqa: E731
    hessian = jax.jit(lambda rates: jax.jvp(jax.grad(stored), (rates,), (jnp.ones(4),))[1])(rates)
    with jax.enable_x64(True):
        there = jnp.asarray(rates, jnp.float64)
        start = jax.tree.map(lambda x: x.astype(jnp.float64), START)

        def plain(rates: Any) -> Any:
            def step(carry: Any, rate: Any) -> Any:
                w, v = carry
                v = jax.tree.map(lambda a, b: 0.9 * b - 0.1 * 2 * a, w, v)
                return (jax.tree.map(lambda a, b: a + rate * b, w, v), v), None

            (w, _), _ = jax.lax.scan(step, (start, jax.tree.map(jnp.zeros_like, start)), rates)
            return square(w, None, None)

        expected = jax.hessian(plain)(there) @ jnp.ones(4)
    np.testing.assert_allclose(hessian, expected, rtol=1e-4)


def test_one_callback_for_all_domains_and_one_scalar_for_each() -> None:
    def outer(rates: Any, momentum: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": momentum}
        return square(train(hypers=hypers, adjoint=hg.Stored()).params, None, None)

    rates = {"a": jnp.full(4, 0.1), "b": jnp.full((4, 3), 0.1)}
    program = jax.make_jaxpr(outer)(rates, jnp.float32(0.5))
    callbacks = [e for e in program.jaxpr.eqns if e.primitive.name == "call_everywhere"]
    assert [[v.aval.shape for v in e.invars] for e in callbacks] == [[(), ()]]
    rates["b"] = rates["b"].at[2, 1].set(-3.0)
    with pytest.raises(Exception, match=r"hypers\['learning_rate'\] has -3 in it"):
        jax.block_until_ready(jax.jit(outer)(rates, 0.5))
    with pytest.raises(Exception, match=r"hypers\['momentum'\] has 1 in it; it must lie in \[0, 1\)"):
        jax.block_until_ready(jax.jit(outer)(0.1, 1.0))


def test_what_is_known_costs_no_callback() -> None:
    program = jax.make_jaxpr(lambda params: train(params=params, adjoint=hg.Stored()).losses)(START)
    assert "call_everywhere" not in str(program)


# A strict session.


@pytest.mark.quick("optax.adam")
@pytest.mark.parametrize(
    ("optimizer", "adjoint", "precision"),
    [
        (hg.momentum(), hg.Reversible(), jnp.float32),
        (hg.adam(), hg.Reversible(), jnp.float64),
        (hg.adam(), hg.Stored(), jnp.float32),
        (hg.radam(), hg.Stored(), jnp.float64),
        (hg.momentum(), hg.Forward(), jnp.float64),
        (hg.momentum(), hg.Truncated(3, hg.Reversible(segments=2)), jnp.float32),
        (hg.from_optax(optax.adam, {"learning_rate": None}), hg.Checkpointed(), jnp.float32),
    ],
    ids=[
        "momentum, float32",
        "adam, float64",
        "adam, stored",
        "radam, stored",
        "momentum, forward",
        "momentum, truncated",
        "optax.adam",
    ],
)
def test_types_need_no_promotion(optimizer: Any, adjoint: Any, precision: Any) -> None:
    """Rates of Python and schedules; against finite differences of the same run in a lenient session."""

    def outer(rate: Any) -> Any:
        w = jnp.linspace(0.5, 1.0, 2, dtype=precision)
        settings = {"steps": 3, "optimizer": optimizer, "adjoint": adjoint}
        return jnp.sum(hg.train(square, w, {"learning_rate": rate}, **settings).params ** 2)

    with jax.enable_x64(precision == jnp.float64):
        h = 1e-3
        slope = (outer(0.1 + h) - outer(0.1 - h)) / (2 * h)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            one = jax.grad(outer)(0.1)
            many = jax.grad(outer)(jnp.full(3, 0.1, precision))
        np.testing.assert_allclose(one, slope, rtol=2e-3)
        np.testing.assert_allclose(jnp.sum(many), one, rtol=1e-5)


def test_two_types_under_strict_promotion() -> None:
    message = (
        r"hypers\['learning_rate'\] for params\['a'\] is float64, and the leaf float32.*pass it as float32"
    )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), pytest.raises(TypeError, match=message):
        train(params={"a": jnp.ones(2, jnp.float32)}, hypers={"learning_rate": jnp.full(4, 0.1)})


def test_a_class_that_is_lost_when_data_are_split() -> None:
    labels = np.array([0] * 19 + [1])
    network = hg.nets.mlp((4, 2))
    lost = [k for k in range(8) if _held_out(k, 20, 5, 19)]
    assert lost
    with pytest.raises(
        ValueError, match=r"^distill\(.*validation=5: .* no example of class 1: .*Hold out fewer"
    ):
        settings = {"validation": 5, "key": jax.random.key(lost[0]), "progress": False}
        hg.distill(network, np.eye(20, 4, dtype=np.float32), labels, **settings)


def _held_out(seed: int, examples: int, validation: int, which: int) -> bool:
    """Whether `distill` holds an example out, by the order in which it shuffles."""
    _, key, _ = jax.random.split(jax.random.key(seed), 3)
    return which in np.asarray(jax.random.permutation(key, examples))[-validation:]


# Trees that can be called.


class Affine(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x: Any) -> Any:
        return x @ self.weight + self.bias


X, Y = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2), np.ones(6, np.float32)


def fit(module: Any, meta: Any, step: Any) -> Any:
    return jnp.mean((module(X) - Y) ** 2)


def fit_tuple(params: Any, meta: Any, step: Any) -> Any:
    return fit(Affine(*params), meta, step)


WEIGHTS = (jnp.array([0.5, -0.5]), jnp.float32(0.25))


def test_a_callable_module_is_a_tree_of_parameters_and_of_rates() -> None:
    def outer(module: Any, rates: Any, loss: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": 0.5}
        return hg.train(loss, module, hypers, steps=5, adjoint=hg.Stored()).losses[-1]

    rates = (jnp.float32(0.1), jnp.linspace(0.1, 0.2, 5))
    found = jax.grad(outer, (0, 1))(Affine(*WEIGHTS), Affine(*rates), fit)
    expected = jax.grad(outer, (0, 1))(WEIGHTS, rates, fit_tuple)
    assert all(isinstance(x, Affine) for x in found)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-6)

    # and both are those of a plain loop
    w, v, all_rates = list(WEIGHTS), [0.0 * x for x in WEIGHTS], (np.full(5, 0.1), rates[1])
    for t in range(4):
        g = jax.grad(fit_tuple)(tuple(w), None, t)
        v = [0.5 * b - 0.5 * a for a, b in zip(g, v)]
        w = [a + r[t] * b for a, r, b in zip(w, all_rates, v)]
    last = outer(Affine(*WEIGHTS), Affine(*rates), fit)
    np.testing.assert_allclose(last, fit_tuple(tuple(w), None, 4), rtol=1e-5)


def test_a_callable_module_can_be_tuned() -> None:
    rates = {"learning_rate": Affine(jnp.float32(0.1), jnp.float32(0.2))}
    settings = {"learn": ["learning_rate"], "meta_steps": 3, "adjoint": hg.Stored()}
    tuned = tune(loss=fit, params=Affine(*WEIGHTS), hypers=rates, **settings)
    assert isinstance(tuned.hypers["learning_rate"], Affine)
    assert tuned.history.loss[-1] < tuned.history.loss[0]
    with pytest.raises(TypeError, match=r"^tune\(.*batches is called as batches\(key\), and takes \(\)"):
        tune(loss=fit, params=Affine(*WEIGHTS), hypers=rates, batches=lambda: None, **settings)


def test_only_arrays_are_trained_of_a_tree() -> None:
    loss = lambda w, meta, step: jnp.sum(w["a"] ** 2)  # noqa: E731
    for other, what in (
        ("name", "the string 'name', not an array"),
        (jnp.arange(2), "int32, which has no"),
    ):
        with pytest.raises(TypeError, match=rf"params\['b'\] is {what}.* belongs in meta, in model_state"):
            hg.train(loss, {"a": jnp.ones(2), "b": other}, HYPERS, steps=4)


def test_schedules_are_ours_and_functions_and_nothing_else() -> None:
    given = {"a": lambda count: 0.5 * count, "b": schedules.Constant(0.5), "c": Scalar(0.5), "d": 0.5}
    found = schedules.values(given, 2)
    np.testing.assert_array_equal(found["a"], [0.0, 0.5])
    np.testing.assert_array_equal(found["b"], [0.5, 0.5])
    assert found["c"] == Scalar(0.5) and found["d"] == 0.5
    partial = jax.tree_util.Partial(lambda slope, count: slope * count, 0.5)
    np.testing.assert_array_equal(schedules.values(partial, 2), [0.0, 0.5])


def test_every_class_of_schedules_counts_as_one() -> None:
    classes = [x for x in vars(schedules).values() if isinstance(x, type) and hasattr(x, "_fields")]
    assert schedules.Constant in classes
    assert all(issubclass(each, schedules.Schedule) for each in classes)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimizer_that_closes_over_a_traced_value(adjoint: Any, compiled: bool) -> None:
    """It is differentiated right, or refused by name."""

    def made(gain: Any) -> Optimizer:
        def moves(h: Any, t: Any) -> list[Any]:
            return [
                Scale("velocity", jnp.float32(0.5)),
                Shift("velocity", lambda s: -gain * s.gradient),
                Shift("params", lambda s: h.learning_rate * s.velocity),
            ]

        variables = {"velocity": Variable()}
        return Optimizer(name="own", moves=moves, variables=variables, hypers={"learning_rate": None})

    def outer(gain: Any) -> Any:
        loss = lambda w, meta, step: jnp.sum(w**2) / 2  # noqa: E731
        hypers = {"learning_rate": 0.1}
        given = {"steps": 2, "optimizer": made(gain), "adjoint": adjoint}
        return jnp.sum(hg.train(loss, jnp.ones(2), hypers, **given).params)

    gradient = jax.jit(jax.grad(outer)) if compiled else jax.grad(outer)
    if isinstance(adjoint, hg.Checkpointed | hg.Stored):
        # w = 1 - 2.5 r g + (r g)**2, of two numbers
        np.testing.assert_allclose(gradient(2.0), 2 * (-0.25 + 2 * 0.1**2 * 2.0), rtol=1e-5)
    elif compiled:  # JAX finds it before anything of ours runs
        with pytest.raises(jax.errors.UnexpectedTracerError):
            gradient(2.0)
    else:
        with pytest.raises(TypeError, match=r"closes over a value that is being traced.*make it a hyper"):
            gradient(2.0)
