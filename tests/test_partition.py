"""Parts of the parameters with optimizers of their own, against optax and plain JAX."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import curvature
from hypergrad.program import Optimizer, Variable

STEPS = 12
SHAPES = {"body": {"weights": (3, 2), "bias": (2,)}, "head": (2,)}
RANGES = {
    "learning_rate": (0.02, 0.05),
    "momentum": (0.5, 0.9),
    "beta": (0.5, 0.9),
    "b1": (0.5, 0.9),
    "b2": (0.8, 0.99),
    "eps": (1e-3, 1e-2),
    "weight_decay": (0.1, 0.5),
    "estim_lr_coef": (0.8, 1.2),
    "ema_decay": (0.5, 0.9),
    "max_delta": (0.1, 0.3),
    "max_norm": (0.3, 0.6),
}
BY_PART = {"body": "slow", "head": "quick"}


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: "matrices" if x.ndim == 2 else "others", params)


def start(dtype: Any = jnp.float64) -> Any:
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def loss(w: Any, meta: Any, step: Any) -> Any:
    """All parts act on each other; gradients of all signs."""
    hidden = jnp.tanh(w["body"]["weights"] + w["body"]["bias"][None])
    outputs = hidden @ w["head"]
    return jnp.sum(jnp.cos(outputs + step)) + meta * sum(jnp.sum(x**2) for x in jax.tree.leaves(w))


def judged(w: Any, losses: Any) -> Any:
    return sum(jnp.sum(jnp.sin(x) + x**2) for x in jax.tree.leaves(w)) + jnp.mean(losses)


class Case(NamedTuple):
    """A partition, and optax's from ``h[label].name``."""

    optimizer: Optimizer
    optax: Callable[[Any], optax.GradientTransformation]


def adamw(h: Any) -> Any:
    return optax.adamw(h.learning_rate, h.b1, h.b2, h.eps, weight_decay=h.weight_decay)


def heavy_ball(h: Any) -> Any:
    return optax.sgd(h.learning_rate, h.momentum)


def muon(h: Any) -> Any:
    return optax.contrib.muon(
        h.learning_rate, beta=h.beta, eps=h.eps, weight_decay=h.weight_decay, nesterov=False
    )


def lion(h: Any) -> Any:
    return optax.lion(h.learning_rate, h.b1, h.b2, weight_decay=h.weight_decay)


def prodigy(h: Any) -> Any:
    return optax.contrib.prodigy(
        h.learning_rate,
        (h.b1, h.b2),
        eps=h.eps,
        estim_lr0=1e-2,
        estim_lr_coef=h.estim_lr_coef,
        weight_decay=h.weight_decay,
    )


PARTS = (hg.partition({"slow": hg.heavy_ball(), "quick": hg.adamw()}, BY_PART), BY_PART)
SOME = {"body": {"weights": "kept", "bias": "summed"}, "head": "frozen"}
CASES = {
    "muon for matrices": Case(
        hg.partition({"matrices": hg.muon(), "others": hg.adamw()}, matrices),
        lambda h: optax.partition(
            {"matrices": muon(h["matrices"]), "others": adamw(h["others"])}, matrices
        ),
    ),
    "momentum and adamw": Case(
        PARTS[0],
        lambda h: optax.partition({"slow": heavy_ball(h["slow"]), "quick": adamw(h["quick"])}, BY_PART),
    ),
    "decay for matrices": Case(
        hg.partition({"matrices": hg.adamw(), "others": hg.adam()}, matrices),
        lambda h: optax.partition(
            {
                "matrices": adamw(h["matrices"]),
                "others": optax.adam(
                    *(getattr(h["others"], k) for k in ("learning_rate", "b1", "b2", "eps"))
                ),
            },
            matrices,
        ),
    ),
    "frozen": Case(
        hg.partition({"frozen": hg.frozen(), "kept": hg.lion(), "summed": hg.adam()}, SOME),
        lambda h: optax.partition(
            {
                "frozen": optax.set_to_zero(),
                "kept": lion(h["kept"]),
                "summed": optax.adam(
                    *(getattr(h["summed"], k) for k in ("learning_rate", "b1", "b2", "eps"))
                ),
            },
            SOME,
        ),
    ),
    "sums by label": Case(
        hg.partition({"slow": hg.prodigy(estim_lr0=1e-2), "quick": hg.prodigy(estim_lr0=1e-2)}, BY_PART),
        lambda h: optax.partition({"slow": prodigy(h["slow"]), "quick": prodigy(h["quick"])}, BY_PART),
    ),
    "clip": Case(
        hg.clip(PARTS[0]),
        lambda h: optax.chain(
            optax.clip(h[""].max_delta),
            optax.partition({"slow": heavy_ball(h["slow"]), "quick": adamw(h["quick"])}, BY_PART),
        ),
    ),
    "clip_by_global_norm": Case(
        hg.clip_by_global_norm(PARTS[0]),
        lambda h: optax.chain(
            optax.clip_by_global_norm(h[""].max_norm),
            optax.partition({"slow": heavy_ball(h["slow"]), "quick": adamw(h["quick"])}, BY_PART),
        ),
    ),
}


def schedules(optimizer: Optimizer, steps: int = STEPS, dtype: Any = jnp.float64) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ranges = RANGES | ({"learning_rate": (0.5, 1.0)} if "prodigy" in optimizer.name else {})
    return {
        name: jnp.asarray(rng.uniform(*ranges[name.rpartition(".")[2]], steps), dtype)
        for name in optimizer.hypers
    }


def everything(optimizer: Optimizer) -> dict[str, Any]:
    return {"params": start(), "hypers": schedules(optimizer), "meta": jnp.asarray(0.1)}


def by_label(h: dict[str, Any]) -> dict[str, Any]:
    """Of hyperparameters called ``label.name``; those without label stand under ''."""
    parts: dict[str, dict[str, Any]] = {}
    for name, x in h.items():
        label, _, plain = name.rpartition(".")
        parts.setdefault(label, {})[plain] = x
    return {label: SimpleNamespace(**each) for label, each in parts.items()}


def expected(case: Case) -> Callable[[Any], Any]:
    """A plain loop of optax, built anew at every step."""

    def run(e: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            (w, state), (t, h) = carry, x
            value, g = jax.value_and_grad(loss)(w, e["meta"], t)
            updates, state = case.optax(by_label(h)).update(g, state, w)
            return (optax.apply_updates(w, updates), state), value

        first = case.optax(by_label({name: x[0] for name, x in e["hypers"].items()}))
        init = (e["params"], first.init(e["params"]))
        (w, _), losses = jax.lax.scan(step, init, (jnp.arange(STEPS), e["hypers"]))
        return judged(w, losses), w

    return run


def trained(optimizer: Optimizer, adjoint: Any) -> Callable[[Any], Any]:
    def run(e: Any) -> Any:
        arguments = {"steps": STEPS, "optimizer": optimizer, "adjoint": adjoint}
        t = hg.train(loss, e["params"], e["hypers"], e["meta"], **arguments)
        return judged(t.params, t.losses), t.params

    return run


def differentiated(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return jax.jit(jax.value_and_grad(run, has_aux=True))


def assert_close(found: Any, right: Any, tolerance: float) -> None:
    for (path, b), a in zip(jax.tree_util.tree_flatten_with_path(right)[0], jax.tree.leaves(found)):
        error, size = float(jnp.linalg.norm(jnp.ravel(a - b))), float(jnp.linalg.norm(jnp.ravel(b)))
        assert error <= tolerance * size, (jax.tree_util.keystr(path), error, size)


QUICK = {"muon for matrices", "frozen"}  # the others take seconds to compile
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("x64")
def test_is_optax_with_its_derivatives(name: str) -> None:
    """Played back: the end and derivatives in the start, meta and every hyperparameter."""
    case = CASES[name]
    e = everything(case.optimizer)
    (_, end), gradient = differentiated(expected(case))(e)
    (_, found_end), found = differentiated(trained(case.optimizer, hg.Reversible(bits=3)))(e)
    assert_close(found_end, end, 1e-7)
    assert_close(found, gradient, 1e-6)
    none = {k for k, x in gradient["hypers"].items() if not x.any()}
    assert none <= {"kept.b1", "kept.b2", "slow.estim_lr_coef"}  # inside of a sign; or never the largest
    assert {k for k, x in found["hypers"].items() if not x.any()} == none


@pytest.mark.slow
@pytest.mark.parametrize(
    "adjoint", [hg.Reversible(bits=2, segments=3), hg.Checkpointed(), hg.Stored()], ids=repr
)
@pytest.mark.usefixtures("x64")
def test_by_other_adjoints(adjoint: Any) -> None:
    case = CASES["momentum and adamw"]
    e = everything(case.optimizer)
    (_, end), gradient = differentiated(expected(case))(e)
    (_, found_end), found = differentiated(trained(case.optimizer, adjoint))(e)
    assert_close(found_end, end, 1e-7)
    assert_close(found, gradient, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("x64")
def test_average_around_and_inside(inside: bool) -> None:
    """Around, it is of all leaves; inside, of those of the label."""
    w, hypers = start(), {"slow.learning_rate": 0.05, "slow.momentum": 0.8, "quick.learning_rate": 0.02}
    optimizer, name, variable = hg.with_average(PARTS[0]), "ema_decay", "average"
    if inside:
        optimizer = hg.partition({"slow": hg.with_average(hg.heavy_ball()), "quick": hg.adamw()}, BY_PART)
        name, variable = "slow.ema_decay", "slow.average"
    decay = jnp.asarray(0.7)

    def plain(decay: Any) -> Any:
        options = {"steps": STEPS, "optimizer": PARTS[0], "adjoint": hg.Stored()}
        path = hg.train(loss, w, hypers, 0.1, **options, watch=lambda s: s.params)
        after = jax.tree.map(lambda x, end: jnp.stack([*x[1:], end]), path.watched, path.params)
        shares = (1 - decay) * decay ** jnp.arange(STEPS)[::-1]
        average = jax.tree.map(
            lambda x, later: decay**STEPS * x + jnp.tensordot(shares, later, 1), w, after
        )
        return judged(average["body"], 0.0), average

    def found(decay: Any) -> Any:
        adjoint = hg.Reversible(bits=1)
        t = hg.train(
            loss, w, hypers | {name: decay}, 0.1, steps=STEPS, optimizer=optimizer, adjoint=adjoint
        )
        return judged(t.state[variable]["body"], 0.0), t.state[variable]

    (value, averages), slope = differentiated(plain)(decay)
    (found_value, state), found_slope = differentiated(found)(decay)
    np.testing.assert_allclose(found_value, value, rtol=1e-7)
    np.testing.assert_allclose(found_slope, slope, rtol=1e-6)
    assert_close(state["body"], averages["body"], 1e-7)
    if inside:
        assert state["head"].shape == (0,)
    else:
        assert_close(state, averages, 1e-7)


def test_frozen_parts_stay_and_their_hypergradient_passes_through() -> None:
    w = start(jnp.float32)
    square = lambda w, meta, step: sum(jnp.sum(x**2) for x in jax.tree.leaves(w))  # noqa: E731

    def outer(w: Any, adjoint: Any) -> Any:
        end = hg.train(square, w, {}, steps=3, optimizer=hg.frozen(), adjoint=adjoint).params
        return square(end, None, None), end

    for adjoint in (hg.Reversible(), hg.Checkpointed()):
        (_, end), gradient = differentiated(lambda w, adjoint=adjoint: outer(w, adjoint))(w)
        for x, same, g in zip(*map(jax.tree.leaves, (w, end, gradient))):
            np.testing.assert_array_equal(same, x)
            np.testing.assert_array_equal(g, 2 * x)


def bits(state: Any) -> Any:
    """A state but for how coarse its shifts were: each run looks at its first steps, not at all steps."""
    return state | {"exact": [(numbers, buffers) for numbers, buffers, _ in state["exact"]]}


@pytest.mark.slow
@pytest.mark.optimized
def test_goes_on_from_a_state_bit_for_bit() -> None:
    optimizer = CASES["muon for matrices"].optimizer
    w, hypers = start(jnp.float32), schedules(optimizer, 10, jnp.float32)

    def run(w: Any, hypers: Any, state: Any) -> Any:
        steps = len(hypers["matrices.beta"])
        return hg.train(loss, w, hypers, 0.1, steps=steps, optimizer=optimizer, state=state)

    go_on = jax.jit(run)
    whole = go_on(w, hypers, None)
    first = go_on(w, {k: x[:4] for k, x in hypers.items()}, None)
    second = go_on(first.params, {k: x[4:] for k, x in hypers.items()}, first.state)
    jax.tree.map(np.testing.assert_array_equal, second.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, bits(second.state), bits(whole.state))
    assert whole.state["matrices.mu"]["body"]["weights"].shape == (3, 2)
    assert whole.state["matrices.mu"]["body"]["bias"].shape == (0,)


@pytest.mark.slow
def test_many_steps_in_float32_are_played_back() -> None:
    """`Reversible` itself compares every bit; the hypergradient is the derivative of plain JAX's run."""
    steps, case = 300, CASES["muon for matrices"]
    hypers = schedules(case.optimizer, steps, jnp.float32)
    hypers = {k: x * (0.02 if k.endswith("learning_rate") else 1) for k, x in hypers.items()}
    w = start(jnp.float32)

    def outer(hypers: Any) -> Any:
        t = hg.train(loss, w, hypers, jnp.float32(2.0), steps=steps, optimizer=case.optimizer)
        return judged(t.params, t.losses)

    found = jax.grad(outer)(hypers)

    def right(scale: float, name: str) -> float:
        moved = {k: np.asarray(x, np.float64) * (scale if k == name else 1) for k, x in hypers.items()}

        def step(carry: Any, x: Any) -> Any:
            (w, state), (t, h) = carry, x
            value, g = jax.value_and_grad(loss)(w, 2.0, t)
            updates, state = case.optax(by_label(h)).update(g, state, w)
            return (optax.apply_updates(w, updates), state), value

        w = start()
        init = (w, case.optax(by_label({k: x[0] for k, x in moved.items()})).init(w))
        (w, _), losses = jax.lax.scan(step, init, (jnp.arange(steps), moved))
        return judged(w, losses)

    with jax.enable_x64(True):
        for name in ("matrices.learning_rate", "others.learning_rate", "others.weight_decay"):
            along = jax.jit(lambda scale, name=name: right(scale, name))
            difference = float(along(1 + 1e-4) - along(1 - 1e-4)) / 2e-4
            slope = float(np.vdot(found[name].astype(np.float64), hypers[name].astype(np.float64)))
            assert slope == pytest.approx(difference, rel=1e-2), name


@pytest.mark.parametrize("name", ["muon for matrices", "clip_by_global_norm"])
def test_as_an_optax_transformation(name: str) -> None:
    case = CASES[name]
    w, hypers = start(jnp.float32), schedules(case.optimizer, 1, jnp.float32)
    constants = {k: x[0] for k, x in hypers.items()}
    ours, theirs = hg.as_optax(case.optimizer, constants), case.optax(by_label(constants))
    assert ours.init(w).variables.keys() == case.optimizer.variables.keys()

    def end(transformation: Any) -> Any:
        def step(carry: Any, t: Any) -> Any:
            w, state = carry
            updates, state = transformation.update(jax.grad(loss)(w, 0.1, t), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, transformation.init(w)), jnp.arange(4))[0][0]

    assert_close(jax.jit(lambda: end(ours))(), jax.jit(lambda: end(theirs))(), 1e-4)


@pytest.mark.slow
def test_tuned_by_the_names_of_its_parts() -> None:
    """One step of gradient descent in the logarithm of a rate goes by the slope of finite differences."""
    w, optimizer = start(jnp.float32), PARTS[0]
    hypers = {"slow.learning_rate": 0.05, "quick.learning_rate": 0.02, "quick.eps": 1e-2}
    validation = lambda w: loss(w, 0.1, 3)  # noqa: E731
    rate = 10.0
    tuned = hg.tune(
        loss,
        w,
        hypers,
        0.1,
        steps=6,
        optimizer=optimizer,
        validation=validation,
        learn=["quick.learning_rate"],
        meta_steps=1,
        meta_optimizer=optax.sgd(rate),
        progress=False,
    )
    assert {k: v for k, v in tuned.hypers.items() if k in hypers and k != "quick.learning_rate"} == {
        "slow.learning_rate": 0.05,
        "quick.eps": 1e-2,
    }

    with jax.enable_x64(True):

        def end(scale: Any) -> Any:
            h = by_label(optimizer.hypers | hypers | {"quick.learning_rate": 0.02 * scale})
            transformation = CASES["momentum and adamw"].optax(h)

            def step(carry: Any, t: Any) -> Any:
                w, state = carry
                updates, state = transformation.update(jax.grad(loss)(w, 0.1, t), state, w)
                return (optax.apply_updates(w, updates), state), None

            wide = jax.tree.map(lambda x: x.astype(jnp.float64), w)
            init = (wide, transformation.init(wide))
            return validation(jax.lax.scan(step, init, jnp.arange(6))[0][0])

        at = jax.jit(end)
        slope = float(at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    made = float(np.log(tuned.hypers["quick.learning_rate"] / 0.02))
    assert abs(slope) > 1e-3
    assert made == pytest.approx(-rate * slope, rel=1e-3)


def test_hyperparameters_differ_by_leaf() -> None:
    """Those for leaves of other labels are not used; their hypergradient is 0."""
    w = start(jnp.float32)
    rates = jax.tree.map(lambda x: jnp.full((1, *x.shape), 0.01), w)
    hypers = {"slow.learning_rate": rates, "slow.momentum": 0.5, "quick.learning_rate": 0.01}

    def outer(hypers: Any) -> Any:
        arguments = {"steps": 3, "optimizer": PARTS[0], "adjoint": hg.Checkpointed()}
        return judged(hg.train(loss, w, hypers, 0.1, **arguments).params, 0.0)

    found = jax.grad(outer)(hypers)["slow.learning_rate"]
    assert all(not x.any() for x in jax.tree.leaves(found["head"]))
    assert all(x.all() for x in jax.tree.leaves(found["body"]))


WHOLE = hg.from_optax(optax.sgd, {"learning_rate": None})
OBSERVES = hg.sophia(hg.hutchinson(loss))
BLOCKS = hg.kfac(lambda w, meta, x, probes: (x @ w + probes, x), curvature.normal())


@pytest.mark.parametrize(
    ("optimizers", "error", "message"),
    [
        ({}, TypeError, r"partition\(\{\}, labels\): optimizers must be a dictionary by label, such as"),
        ([hg.adam()], TypeError, r"optimizers must be a dictionary by label"),
        ({"a.b": hg.adam()}, ValueError, r"partition\(\{'a\.b': adam\(\), .*'a\.b' is none"),
        ({1: hg.adam()}, ValueError, r"a label must be a name of letters.*1 is none"),
        ({"a": hg.adam}, TypeError, r"adam is no optimizer, which makes one: add brackets, adam\(\)"),
        ({"a": 3}, TypeError, r"'a': int.*int is no optimizer"),
        ({"a": WHOLE}, TypeError, r"from_optax\(sgd\) is no program of moves.*builds optax\.partition"),
        ({"a": hg.clip(hg.adam())}, ValueError, r"clip\(adam\(\)\) changes all gradients.*clip\(partition"),
        ({"a": OBSERVES}, ValueError, r"observes the whole network; use it for all parameters"),
        ({"a": BLOCKS}, ValueError, r"kfac.*(blocks of the whole|observes the whole) network"),
        ({"a": PARTS[0]}, ValueError, r"is a partition itself; name its optimizers in the outer one"),
    ],
)
def test_refuses_what_cannot_be_put_together(optimizers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        hg.partition(optimizers, BY_PART)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"body": "slow", "head": "quik"}, r"has optimizers for the labels \['quick', 'slow'\].*'quik'"),
        (
            {"body": "slow", "heads": "quick"},
            r"partition.*labels must be a tree of strings that is a prefix",
        ),
        ({"body": "slow", "head": 3}, r"has optimizers for the labels.*3"),
        (lambda w: ["slow"], r"labels must be a tree of strings.*are \['slow'\]"),
    ],
)
def test_refuses_labels_that_do_not_fit(labels: Any, message: str) -> None:
    optimizer = hg.partition({"slow": hg.heavy_ball(), "quick": hg.adamw()}, labels)
    hypers = {"slow.learning_rate": 0.1, "quick.learning_rate": 0.1}
    with pytest.raises(ValueError, match=message):
        hg.train(loss, start(jnp.float32), hypers, 0.1, steps=2, optimizer=optimizer)


def test_names_the_part_that_is_missing_or_outside_its_domain() -> None:
    w = start(jnp.float32)
    with pytest.raises(ValueError, match=r"missing: \['quick\.learning_rate'\]"):
        hg.train(loss, w, {"slow.learning_rate": 0.1}, 0.1, steps=2, optimizer=PARTS[0])
    hypers = {"slow.learning_rate": 0.1, "slow.momentum": 1.5, "quick.learning_rate": 0.1}
    with pytest.raises(ValueError, match=r"hypers\['slow\.momentum'\].*must lie in \[0, 1\)"):
        hg.train(loss, w, hypers, 0.1, steps=2, optimizer=PARTS[0])


def test_moves_of_a_part_are_refused_by_their_names() -> None:
    own = Optimizer(
        "own", lambda h, t: [hg.program.Shift("v", lambda s: s.v)], {"v": Variable()}, {"rate": None}
    )
    optimizer = hg.partition({"a": own, "b": hg.frozen()}, {"body": "a", "head": "b"})
    with pytest.raises(AttributeError, match=r"Shift\('a\.v', \.\.\.\) reads 'a\.v' itself"):
        hg.train(loss, start(jnp.float32), {"a.rate": 0.1}, 0.1, steps=2, optimizer=optimizer)
