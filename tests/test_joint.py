"""Small leaves that are moved alike are one leaf for the whole run."""

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.adjoints.joint import ROW, Joint, joined
from hypergrad.adjoints.run import Solution
from hypergrad.bundles import SMALL
from hypergrad.program import Optimizer, Scale, Shift, Variable

SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=2, max_size=6)


def bowl(w: Any, meta: Any, step: Any) -> jax.Array:
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(w))  # type: ignore[return-value]


def places_of(params: Any, hypers: Any, optimizer: Any) -> tuple[tuple[int, ...], ...]:
    """Which leaves are joined in a run."""
    given: list[Any] = []

    def spy(*arguments: Any) -> Solution:
        given.append(arguments)
        return hg.Checkpointed()(*arguments)

    hg.train(bowl, params, hypers, steps=3, optimizer=optimizer, adjoint=spy)
    return joined(*given[0]).places


# ---- laid end to end


@hypothesis.given(SHAPES)
@hypothesis.settings(max_examples=30, deadline=None)
def test_split_undoes_join(shapes: Sequence[tuple[int, ...]]) -> None:
    joint: Any = Joint(None, (tuple(range(len(shapes))),), tuple(shapes))  # type: ignore[arg-type]
    arrays = [jnp.arange(1.0, np.prod(shape, dtype=int) + 1).reshape(shape) for shape in shapes]
    (row,) = joint.join(arrays)
    padded = joint.padded_leaves([{"params": row}])[0]["params"]
    starts = joint.starts(jnp.asarray(True))
    for whole in (row, padded):
        for a, b in zip(joint.split([whole], starts), arrays, strict=True):
            np.testing.assert_array_equal(a, b)
    leaves = joint.leaves_of_rows(0)
    for i, x in enumerate(arrays):  # every row is of one leaf, whose last element fills it
        mine = padded[leaves == i]
        assert mine.shape == (-(-x.size // ROW), ROW)
        np.testing.assert_array_equal(mine.ravel()[x.size :], x.ravel()[-1])
        np.testing.assert_array_equal(row[leaves == i].ravel()[x.size :], 0)


# ---- which leaves


@pytest.mark.parametrize("make", ["momentum", "heavy_ball", "adam", "adamw", "lion", "signum"])
def test_leaves_that_are_moved_element_by_element_are_joined(make: str) -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(5), "c": jnp.ones(())}
    assert places_of(params, {"learning_rate": 0.1}, getattr(hg, make)()) == ((0, 1, 2),)


@pytest.mark.parametrize("make", ["lamb", "lars", "muon", "sgd"])
def test_others_are_not(make: str) -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((5, 2))}
    assert places_of(params, {"learning_rate": 0.1}, getattr(hg, make)()) == ((0,), (1,))


def test_only_what_is_alike_is_joined() -> None:
    f32 = {k: jnp.ones(3) for k in "abcd"}
    places = lambda params, **hypers: places_of(  # noqa: E731
        params, {"learning_rate": 0.1, **hypers}, hg.momentum()
    )
    assert places(f32) == ((0, 1, 2, 3),)
    assert places(f32, momentum={"a": 0.5, "b": 0.5, "c": 0.9, "d": 0.9}) == ((0,), (1,), (2,), (3,))
    # Rates are in no factor, and may differ.
    assert places(f32, learning_rate={"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.8}) == ((0, 1, 2, 3),)
    assert places(f32, learning_rate={"a": jnp.ones(3), "b": 0.6, "c": jnp.ones(3), "d": 0.8}) == (
        (0, 2), (1, 3),
    )  # fmt: skip
    assert places({"x": f32, "y": f32}, momentum={"x": 0.5, "y": 0.9}) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert places(f32, momentum={**dict.fromkeys("abc", 0.5), "d": jnp.full((1, 3), 0.5)})[-1] == (3,)
    assert places({**f32, "b": jnp.ones(SMALL)}) == ((0, 2, 3), (1,))
    assert places({k: jnp.ones(SMALL - 1) for k in range(20)}) == (tuple(range(16)), (16, 17, 18, 19))


def custom(amount: Callable[[Any, Any], Any]) -> Optimizer:
    """Momentum with another gradient."""
    return Optimizer(
        name="custom()",
        moves=lambda h, t: [
            Scale("velocity", 0.5),
            Shift("velocity", lambda s: amount(h, s)),
            Shift("params", lambda s: -h.learning_rate * s.velocity),
        ],
        variables={"velocity": Variable()},
        hypers={"learning_rate": None},
    )


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (lambda h, s: jnp.tanh(s.gradient) + jax.nn.relu(s.params), ((0, 1, 2, 3),)),
        (lambda h, s: s.gradient / jnp.sqrt(jnp.sum(s.gradient**2)), ((0,), (1,), (2,), (3,))),
        (lambda h, s: s.gradient - jnp.mean(s.gradient), ((0,), (1,), (2,), (3,))),
        (lambda h, s: jnp.cumsum(s.gradient.ravel()).reshape(s.gradient.shape), ((0,), (1,), (2,), (3,))),
        (lambda h, s: s.gradient * s.gradient.size, ((0,), (1,), (2,), (3,))),
        (lambda h, s: s.gradient * s.gradient.shape[0], ((0,), (1,), (2,), (3,))),
        # What is done to matrices differs from what is done to vectors, which joined would be matrices.
        (lambda h, s: s.gradient * (2 if s.gradient.ndim > 1 else 1), ((0, 1), (2,), (3,))),
        (lambda h, s: s.gradient + jnp.ones_like(s.gradient).at[0].set(2), ((0,), (1,), (2,), (3,))),
    ],
)
def test_what_looks_at_more_than_one_element_is_not_joined(amount: Any, expected: Any) -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 4)), "c": jnp.ones(5), "d": jnp.ones(6)}
    assert places_of(params, {"learning_rate": 0.1}, custom(amount)) == expected


def test_leaves_that_look_like_joint_ones_are_no_exception() -> None:
    """Of two rows with 32 elements, as the moves are tried out."""
    params = {k: jnp.ones((2, ROW)) for k in "abc"}
    by_rows = custom(lambda h, s: s.gradient * len(s.gradient))
    assert places_of(params, {"learning_rate": 0.1}, by_rows) == ((0,), (1,), (2,))


def test_numbers_in_the_moves_of_leaves_tell_them_apart() -> None:
    """Also those that live no longer than the moves."""
    params = {"a": jnp.ones(4), "b": jnp.ones(5), "c": jnp.ones(6), "d": jnp.ones(7)}
    optimizer = custom(lambda h, s: s.gradient * jnp.asarray(0.5 if s.gradient.size % 2 else 2.0))
    assert len(places_of(params, {"learning_rate": 0.1}, optimizer)) > 1


# ---- against JAX's own derivatives


def many(scale: Callable[[int], float], count: int = 12) -> tuple[Any, Callable[..., jax.Array]]:
    """Parameters in many leaves, and a loss whose gradients differ in size from leaf to leaf."""
    rng = np.random.default_rng(0)
    params = {
        f"{i:02}": jnp.asarray(rng.normal(size=[(3, 4), (7,), (), (2, 2, 5)][i % 4]), jnp.float32)
        for i in range(count)
    }
    targets = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}

    def loss(w: Any, meta: Any, step: Any) -> jax.Array:
        each = [jnp.sum(jnp.cos(meta * w[k] - targets[k])) * scale(i) for i, k in enumerate(w)]
        return jnp.sum(jnp.stack(each))

    return params, loss


def plain_adam(loss: Any, params: Any, h: Any, meta: Any, steps: int) -> Any:
    """Adam as papers write it, in ``jax.lax.scan``."""

    def step(carry: Any, t: Any) -> Any:
        w, mu, nu = carry
        g = jax.grad(loss)(w, meta, t)
        mu = jax.tree.map(lambda m, g: h["b1"] * m + (1 - h["b1"]) * g, mu, g)
        nu = jax.tree.map(lambda n, g: h["b2"] * n + (1 - h["b2"]) * g * g, nu, g)

        def new(w: Any, m: Any, n: Any) -> Any:
            m, n = m / (1 - h["b1"] ** (t + 1)), n / (1 - h["b2"] ** (t + 1))
            return w - h["learning_rate"][t] * m / (jnp.sqrt(n) + h["eps"])

        return (jax.tree.map(new, w, mu, nu), mu, nu), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (w, _, _), _ = jax.lax.scan(step, (params, zeros, zeros), jnp.arange(steps))
    return w


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("segments", [1, 4])
def test_gradients_of_all_sizes_in_one_run(segments: int, jit: bool) -> None:
    """From 1e-9 to 1e3, leaf by leaf: each is trained and differentiated as if it were alone."""
    params, loss = many(lambda i: 10.0 ** (i - 8))
    steps = 40
    hypers = {"learning_rate": jnp.full(steps, 0.02), "b1": 0.8, "b2": 0.95, "eps": 1e-14}

    def outer(hypers: Any, params: Any, meta: Any, run: Any) -> Any:
        return {k: jnp.sum(x**2) for k, x in run(hypers, params, meta).items()}

    def ours(hypers: Any, params: Any, meta: Any) -> Any:
        adjoint = hg.Reversible(segments=segments)
        return hg.train(
            loss, params, hypers, meta, steps=steps, optimizer=hg.adam(), adjoint=adjoint
        ).params

    def plain(hypers: Any, params: Any, meta: Any) -> Any:
        return plain_adam(loss, params, hypers, meta, steps)

    wrap = jax.jit if jit else lambda f: f
    total = lambda run: lambda *x: sum(outer(*x, run).values())  # noqa: E731
    found, expected = (wrap(jax.grad(total(run), (0, 1, 2)))(hypers, params, 1.3) for run in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.max(jnp.abs(b))))
    for a, b in zip(*(jax.tree.leaves(outer(hypers, params, 1.3, run)) for run in (ours, plain))):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("segments", [1, 3])
def test_leaves_may_differ_in_size_by_any_factor(segments: int) -> None:
    """Biases that begin at zero and move by 1e-25 beside weights that move by one."""
    params, loss = many(lambda i: 10.0 ** (3 * i - 32))
    params = {k: x * (i % 3 > 0) for i, (k, x) in enumerate(params.items())}
    steps, momentum = 60, 0.8

    def ours(rates: Any, params: Any) -> Any:
        hypers, adjoint = {"learning_rate": rates, "momentum": momentum}, hg.Reversible(segments=segments)
        return hg.train(loss, params, hypers, 1.0, steps=steps, adjoint=adjoint).params

    def plain(rates: Any, params: Any) -> Any:
        def step(carry: Any, rate: Any) -> Any:
            w, v = carry
            g = jax.grad(loss)(w, 1.0, 0)
            v = jax.tree.map(lambda v, g: momentum * v - (1 - momentum) * g, v, g)
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), None

        return jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), rates)[0][0]

    rates = jnp.full(steps, 0.3)
    ends = [jax.jit(run)(rates, params) for run in (ours, plain)]
    slopes = [
        jax.jit(jax.jacrev(lambda r, run=run: {k: jnp.sum(x) for k, x in run(r, params).items()}))(rates)
        for run in (ours, plain)
    ]
    for k, start in params.items():
        found, expected = (each[k] for each in slopes)
        np.testing.assert_allclose(
            found, expected, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(expected)))
        )
        if not start.any():
            np.testing.assert_allclose(ends[0][k], ends[1][k], rtol=1e-4)


@pytest.mark.parametrize("base", [1.0, 1e-3])
def test_leaves_may_lack_variables(base: float) -> None:
    """Groups of leaves with optimizers of their own, each of them joined, with gradients of all sizes."""
    params, loss = many(lambda i: base**i, 8)
    labels = {k: "adam" if i % 2 else "momentum" for i, k in enumerate(params)}
    optimizer = hg.partition({"adam": hg.adam(), "momentum": hg.momentum()}, labels)

    def outer(rate: Any, adjoint: Any) -> Any:
        hypers = {"adam.learning_rate": rate, "momentum.learning_rate": 2 * rate}
        trained = hg.train(loss, params, hypers, 1.0, steps=20, optimizer=optimizer, adjoint=adjoint)
        return bowl(trained.params, 0, 0)

    rates = jnp.full(20, 0.02)
    found, expected = (jax.grad(outer)(rates, a) for a in (hg.Reversible(), hg.Stored()))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_derivative() -> None:
    """An optimizer that is undefined at zero gradients, where none is zero."""
    params, loss = many(lambda i: 1.0)
    rates = jnp.full(20, 0.01)

    def outer(eps: Any, b2: Any, adjoint: Any) -> Any:
        hypers = {"learning_rate": rates, "eps": eps, "b2": b2}
        trained = hg.train(loss, params, hypers, 1.0, steps=20, optimizer=hg.adam(), adjoint=adjoint)
        return bowl(trained.params, 0, 0)

    # 1e-30 is lost beside any number that is not zero.
    found, expected = (jax.grad(outer, (0, 1))(1e-30, 0.9, a) for a in (hg.Reversible(), hg.Stored()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_what_is_watched_and_kept_is_by_the_users_leaves() -> None:
    params, loss = many(lambda i: 1.0)
    hypers = {"learning_rate": jnp.full(15, 0.02)}

    def outer(hypers: Any, adjoint: Any) -> Any:
        watch = lambda s: (bowl(s.gradient, 0, 0), bowl(s.params, 0, 0), bowl(s.state["mu"], 0, 0))  # noqa: E731
        trained = hg.train(
            loss, params, hypers, 1.0, steps=15, optimizer=hg.adam(), adjoint=adjoint, watch=watch
        )
        assert jax.tree.map(jnp.shape, trained.state["nu"]) == jax.tree.map(jnp.shape, params)
        return sum(jnp.sum(x) for x in trained.watched) + bowl(trained.state, 0, 0)

    with jax.enable_x64(True):
        found, expected = (jax.grad(outer)(hypers, a) for a in (hg.Reversible(), hg.Stored()))
    np.testing.assert_allclose(found["learning_rate"], expected["learning_rate"], rtol=1e-4)


def test_one_run_or_two_are_the_same_bits() -> None:
    params, loss = many(lambda i: 10.0 ** (i - 6))
    hypers = {"learning_rate": 0.02}
    run = lambda w, steps, state=None: hg.train(  # noqa: E731
        loss, w, hypers, 1.0, steps=steps, optimizer=hg.adamw(), state=state
    )
    whole, first = run(params, 30), run(params, 11)
    second = run(first.params, 19, first.state)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_transformed_gradient_is_that_of_all_leaves() -> None:
    params, loss = many(lambda i: 3.0)
    optimizer = hg.clip_by_global_norm(hg.momentum())

    def outer(norm: Any, adjoint: Any) -> Any:
        hypers = {"learning_rate": jnp.full(20, 0.05), "max_norm": norm}
        trained = hg.train(loss, params, hypers, 1.0, steps=20, optimizer=optimizer, adjoint=adjoint)
        return bowl(trained.params, 0, 0)

    found, expected = (jax.grad(outer)(2.0, a) for a in (hg.Reversible(), hg.Stored()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_derivative_that_is_no_number_is_named_by_the_users_leaf() -> None:
    def loss(w: Any, meta: Any, step: Any) -> jax.Array:
        # At 0 the gradient is 0, and its derivative infinite.
        return bowl(w["a"], 0, 0) + jnp.sum(jnp.abs(w["b"]) ** 1.5) + bowl(w["c"], 0, 0)

    params = {"a": jnp.ones(40), "b": jnp.zeros(3), "c": jnp.ones(2)}

    def outer(rate: Any) -> Any:
        trained = hg.train(loss, params, {"learning_rate": rate}, steps=5).params
        return sum(jnp.sum(x) for x in jax.tree.leaves(trained))

    with pytest.raises(hg.ReversalError, match=r"the derivative of step \d in params\['b'\] became NaN"):
        jax.grad(outer)(0.1)


def test_rates_by_leaf_have_derivatives_by_leaf() -> None:
    params, loss = many(lambda i: 1.0, 8)
    steps = 25
    rates = {k: jnp.full(steps, 0.01 * (i + 1)) for i, k in enumerate(params)}
    eps = {k: 1e-3 * (i + 1) for i, k in enumerate(params)}

    def outer(rates: Any, eps: Any, max_delta: Any, adjoint: Any) -> Any:
        hypers = {"learning_rate": rates, "eps": eps, "max_delta": max_delta}
        optimizer = hg.clip(hg.adam())
        trained = hg.train(loss, params, hypers, 1.0, steps=steps, optimizer=optimizer, adjoint=adjoint)
        return bowl(trained.params, 0, 0)

    bounds = dict.fromkeys(params, 0.3) | {"00": 1.0}
    found, expected = (
        jax.jit(jax.grad(lambda *x, a=a: outer(*x, a), (0, 1, 2)))(rates, eps, bounds)
        for a in (hg.Reversible(), hg.Stored())
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    hessian = lambda a: jax.jit(  # noqa: E731
        lambda r: jax.jvp(jax.grad(lambda r: outer(r, eps, bounds, a)), (r,), (r,))[1]
    )(rates)
    for a, b in zip(jax.tree.leaves(hessian(hg.Reversible())), jax.tree.leaves(hessian(hg.Stored()))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_hyperparameters_may_be_shared_otherwise_in_a_run_that_goes_on() -> None:
    params, loss = many(lambda i: 1.0, 4)
    adjoint = hg.Reversible()

    def both(rate: Any, first: Any, second: Any) -> Any:
        state: Any = hg.train(loss, params, {"learning_rate": rate, **first}, 1.0, steps=7, adjoint=adjoint)
        return bowl(
            hg.train(
                loss, state.params, {"learning_rate": rate, **second}, 1.0, steps=9, state=state.state
            ).params, 0, 0,
        )  # fmt: skip

    def by_leaf(x: float) -> Any:
        return dict.fromkeys(params, x) | {"00": x + 0.0}

    alone = jax.grad(both)(0.1, {"momentum": 0.9}, {"momentum": 0.9})
    rates = jax.grad(lambda r: both(dict.fromkeys(params, r), {"momentum": 0.9}, {"momentum": 0.9}))(0.1)
    joins = jax.grad(both)(0.1, {"momentum": by_leaf(0.9)}, {"momentum": 0.9})
    np.testing.assert_allclose([rates, joins], alone, rtol=1e-5)
    with pytest.raises(ValueError, match=r"which factors .* differ from leaf to leaf .* Leave them out"):
        both(0.1, {"momentum": 0.9}, {"momentum": by_leaf(0.9)})


def test_what_rounding_takes_is_named_by_the_users_leaf() -> None:
    size = jnp.array([1.0] * 39 + [1e-25])
    loss = lambda w, meta, step: bowl(w["a"], 0, 0) + jnp.sum(size * w["b"]) + jnp.sum(w["c"])  # noqa: E731
    params = {"a": jnp.ones(33), "b": jnp.zeros(40), "c": jnp.ones(2)}
    with pytest.raises(hg.ReversalError, match=r"a row of .*params\['b'\]: .* a leaf of their own"):
        hg.train(loss, params, {"learning_rate": 0.1}, steps=5)


# ---- what it is for


def test_a_program_hardly_grows_with_the_number_of_leaves() -> None:
    """By no more for every leaf than that of rematerialization."""

    def lines(count: int, adjoint: Any) -> int:
        params, loss = many(lambda i: 1.0, count)

        def outer(rates: Any) -> Any:
            hypers = {"learning_rate": rates}
            run = hg.train(loss, params, hypers, 1.0, steps=9, optimizer=hg.adam(), adjoint=adjoint)
            return bowl(run.params, 0, 0)

        return jax.jit(jax.grad(outer)).lower(jnp.full(9, 0.1)).as_text().count("\n")

    ours, remat = (lines(24, a) - lines(12, a) for a in (hg.Reversible(), hg.Checkpointed(segments=3)))
    assert 0 < ours <= remat, (ours, remat)
