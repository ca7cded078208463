"""Bilevel solvers: solutions and biased ends in closed form, directions, tables, counts, refusals."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax import Array

import hypergrad as hg
from hypergrad import bilevel

KEY = 3
ALPHA, GAMMA = 0.4, 0.15


class Quadratic(NamedTuple):
    """``f_i = ½ wᵀ H_i w - wᵀ (B_i θ + c_i)`` and ``g_j = ½ |w - t_j|² + wᵀ C θ + ½ |θ|²``.

    ``w`` is a dictionary of two arrays, and ``θ`` a pair.
    """

    H: Array
    B: Array
    c: Array
    t: Array
    C: Array

    def inner(self, w: Any, theta: Any, rows: Array) -> Array:
        w, theta, few = flat(w), flat(theta), jax.tree.map(lambda x: jnp.mean(x[rows], axis=0), self)
        return w @ few.H @ w / 2 - w @ (few.B @ theta + few.c)

    def outer(self, w: Any, theta: Any, rows: Array) -> Array:
        w, theta = flat(w), flat(theta)
        return (
            jnp.mean(jnp.sum((w[None] - self.t[rows]) ** 2, 1)) / 2 + w @ self.C @ theta + theta @ theta / 2
        )

    def problem(self, batch_size: int | None = None) -> bilevel.Problem:
        return bilevel.Problem(self.inner, self.outer, len(self.H), len(self.t), batch_size)

    def end(self, P: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Where ``∂f/∂w = 0`` and ``∂g/∂θ + Bᵀ P ∂g/∂w = 0``; the solution for ``P = H⁻¹``."""
        H, B, c, t, C = self.means()
        P = np.linalg.inv(H) if P is None else P
        system = np.block([[H, -B], [C.T + B.T @ P, np.eye(3) + B.T @ P @ C]])
        both = np.linalg.solve(system, np.concatenate([c, B.T @ P @ t]))
        return both[:4], both[4:]

    def penalised(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """The end of `f2sa` for a constant ``λ``, of ``z`` and ``θ``."""
        H, B, c, t, C = self.means()
        I, zero = np.eye(4), np.zeros((4, 4))  # noqa: E741
        system = np.block(
            [
                [H, zero, -B],
                [zero, H + I / penalty, C / penalty - B],
                [penalty * B.T, C.T - penalty * B.T, np.eye(3)],
            ]
        )
        found = np.linalg.solve(system, np.concatenate([c, c + t / penalty, np.zeros(3)]))
        return found[:4], found[8:]

    def means(self) -> tuple[np.ndarray, ...]:
        H, B, c, t = (np.asarray(x).mean(axis=0) for x in self[:4])
        return H, B, c, t, np.asarray(self.C)


def flat(tree: Any) -> Array:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def quadratic() -> Quadratic:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(12, 4))
    H = 0.6 * np.eye(4)[None] + a[:, :, None] * a[:, None, :] / 3
    B, c, t = (0.5 * rng.normal(size=shape) for shape in ((12, 4, 3), (12, 4), (8, 4)))
    return Quadratic(*map(jnp.asarray, (H, B, c, t, 0.1 * rng.normal(size=(4, 3)))))


def start() -> tuple[Any, Any]:
    return {"a": jnp.zeros(3), "b": jnp.zeros((1, 1))}, (jnp.ones(()), jnp.zeros(2))


def neumann(H: np.ndarray, terms: int) -> np.ndarray:
    """``α Σ_{k<terms} (I - α H)^k``."""
    return ALPHA * sum(np.linalg.matrix_power(np.eye(4) - ALPHA * H, k) for k in range(terms))


RATES: dict[str, Any] = {"rate": ALPHA, "hyper_rate": GAMMA}
UNBIASED = {
    "soba": (bilevel.soba(**RATES), None, 400),
    "soba, rates": (
        bilevel.soba(rate=lambda t: 0.4, hyper_rate=GAMMA, linear_rate=lambda t: 0.5),
        None,
        400,
    ),
    "amortized": (bilevel.amortized(**RATES, inner_steps=5, linear_steps=3), None, 200),
    "unrolled": (bilevel.unrolled(**RATES, inner_steps=100), None, 200),
    "restarted": (bilevel.unrolled(**RATES, inner_steps=100, restart=True), None, 200),
    "saba": (bilevel.saba(rate=0.1, hyper_rate=0.05), 4, 2500),
}
BIASED = {  # with what stands for the inverse of H
    "t1_t2": (bilevel.t1_t2(**RATES), lambda H: ALPHA * np.eye(4)),
    "darts": (bilevel.darts(**RATES), lambda H: ALPHA * np.eye(4)),
    "darts, ahead": (bilevel.darts(**RATES, lookahead=0.7), lambda H: 0.7 * np.eye(4)),
    "darts, order 1": (bilevel.darts(**RATES, order=1), lambda H: 0 * np.eye(4)),
    "truncated": (bilevel.truncated(**RATES, inner_steps=6, window=3), lambda H: neumann(H, 3)),
}


def solved(
    problem: bilevel.Problem, begin: Any, solver: bilevel.Solver, **settings: Any
) -> bilevel.Solution:
    run = partial(bilevel.solve, problem, solver=solver, key=jax.random.key(KEY), **settings)
    return jax.jit(run)(*begin)


def found(problem: bilevel.Problem, solver: bilevel.Solver, steps: int) -> bilevel.Solution:
    return solved(problem, start(), solver, steps=steps, every=steps)


def assert_at(solution: bilevel.Solution, params: np.ndarray, hypers: np.ndarray) -> None:
    np.testing.assert_allclose(flat(solution.params), params, atol=1e-8)
    np.testing.assert_allclose(flat(solution.hypers), hypers, atol=1e-8)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_solvers_reach_the_solution(x64: None, name: str) -> None:
    solver, batch_size, steps = UNBIASED[name]
    q = quadratic()
    assert_at(found(q.problem(batch_size), solver, steps), *q.end())


@pytest.mark.parametrize("name", BIASED)
def test_biased_solvers_reach_where_their_direction_is_zero(x64: None, name: str) -> None:
    solver, inverse = BIASED[name]
    q = quadratic()
    params, hypers = q.end(inverse(q.means()[0]))
    assert np.linalg.norm(hypers - q.end()[1]) > 1e-3
    assert_at(found(q.problem(), solver, 400), params, hypers)


def test_the_error_of_the_penalty_goes_like_one_over_it(x64: None) -> None:
    q = quadratic()
    distance = {}
    for penalty in (10.0, 100.0):
        solver = bilevel.f2sa(rate=ALPHA, hyper_rate=0.1, penalty=penalty, inner_steps=40)
        params, hypers = q.penalised(penalty)
        assert_at(found(q.problem(), solver, 300), params, hypers)
        distance[penalty] = np.linalg.norm(hypers - q.end()[1])
    assert 8 < distance[10.0] / distance[100.0] < 12
    growing = bilevel.f2sa(rate=ALPHA, hyper_rate=0.1, penalty=lambda count: 1.0 + count, inner_steps=40)
    last = found(q.problem(), growing, 1000)
    assert np.linalg.norm(flat(last.hypers) - q.end()[1]) < 0.2 * distance[100.0]


def ridge() -> tuple[Callable[..., bilevel.Problem], float]:
    """Ridge regression in the logarithm of its penalty, and the best one by its closed form."""
    rng = np.random.default_rng(1)
    X, X_outer = rng.normal(size=(30, 4)), rng.normal(size=(20, 4))
    weights = np.array([1.0, -1, 0.5, 0])
    y, y_outer = X @ weights + 2 * rng.normal(size=30), X_outer @ weights

    def inner(w: Array, theta: Array, rows: Array) -> Array:
        residual = jnp.asarray(X)[rows] @ w - jnp.asarray(y)[rows]
        return jnp.mean(residual**2) / 2 + jnp.exp(theta) * jnp.sum(w**2) / 2

    def outer(w: Array, theta: Array, rows: Array) -> Array:
        return jnp.mean((jnp.asarray(X_outer)[rows] @ w - jnp.asarray(y_outer)[rows]) ** 2) / 2

    def slope(theta: float) -> float:
        H = X.T @ X / 30 + np.exp(theta) * np.eye(4)
        w = np.linalg.solve(H, X.T @ y / 30)
        u = np.linalg.solve(H, X_outer.T @ (X_outer @ w - y_outer) / 20)
        return -np.exp(theta) * w @ u

    return partial(bilevel.Problem, inner, outer, 30, 20), scipy.optimize.brentq(slope, -4, 4, xtol=1e-13)


@pytest.mark.parametrize(("batch_size", "steps"), [(None, 2000), (10, 6000)])
def test_the_penalty_of_ridge_regression(x64: None, batch_size: int | None, steps: int) -> None:
    problem, best = ridge()
    solver = bilevel.saba if batch_size else bilevel.soba
    solver = solver(rate=0.2, hyper_rate=0.3)
    last = solved(problem(batch_size), (jnp.zeros(4), 0.0), solver, steps=steps, every=steps)
    np.testing.assert_allclose(last.hypers, best, atol=1e-8)


# ---- directions


class Logistic(NamedTuple):
    """A problem that is not quadratic, with a penalty for every weight."""

    X: Array
    y: Array

    def inner(self, w: Array, theta: Array, rows: Array) -> Array:
        logits = self.X[rows] @ (w - theta / 10)
        return jnp.mean(jnp.logaddexp(0, -self.y[rows] * logits)) + jnp.exp(theta) @ w**2

    def outer(self, w: Array, theta: Array, rows: Array) -> Array:
        logits = self.X[rows] @ (w + theta / 10)
        return jnp.mean(jnp.logaddexp(0, self.y[rows] * logits)) + jnp.vdot(theta, theta)

    def problem(self, batch_size: int | None = None) -> bilevel.Problem:
        return bilevel.Problem(self.inner, self.outer, len(self.X), len(self.X), batch_size)


def logistic() -> tuple[Logistic, bilevel.State]:
    rng = np.random.default_rng(2)
    data = Logistic(jnp.asarray(rng.normal(size=(20, 4))), jnp.asarray(np.sign(rng.normal(size=20))))
    w, theta = (jnp.asarray(rng.normal(size=4)) for _ in range(2))
    return data, bilevel.State(jnp.int32(0), w, theta, None)


def by_hand(data: Logistic, state: bilevel.State, steps: int, window: int) -> Array:
    """The hypergradient of so many steps, of which the last ones are differentiated."""
    rows = jnp.arange(20)

    def outer(theta: Array) -> Array:
        w = state.params
        for k in range(steps):
            w = w - ALPHA * jax.grad(data.inner)(w, theta, rows)
            w = w if k >= steps - window else jax.lax.stop_gradient(w)
        return data.outer(w, theta, rows)

    return jax.grad(outer)(state.hypers)


@pytest.mark.parametrize(
    ("solver", "steps", "window"),
    [
        (bilevel.darts(**RATES), 1, 1),
        (bilevel.t1_t2(**RATES, inner_steps=3), 3, 1),
        (bilevel.truncated(**RATES, inner_steps=5, window=2), 5, 2),
        (bilevel.unrolled(**RATES, inner_steps=3, adjoint=hg.Checkpointed()), 3, 3),
    ],
    ids=["darts", "t1_t2", "truncated", "unrolled"],
)
def test_directions_are_those_of_unrolled_steps(
    x64: None, solver: bilevel.Solver, steps: int, window: int
) -> None:
    data, state = logistic()
    after = jax.jit(partial(solver.step, data.problem()))(state, jax.random.key(0))
    direction = (state.hypers - after.hypers) / GAMMA
    np.testing.assert_allclose(direction, by_hand(data, state, steps, window), atol=1e-12)


def test_a_truncated_window_is_that_of_the_adjoint(x64: None) -> None:
    data, state = logistic()
    rows = jnp.broadcast_to(jnp.arange(20), (5, 20))

    def outer(theta: Array) -> Array:
        w = hg.train(data.inner, state.params, {"learning_rate": ALPHA}, theta, rows, steps=5,
                     optimizer=hg.sgd(), adjoint=hg.Truncated(2)).params  # fmt: skip
        return data.outer(w, theta, rows[0])

    np.testing.assert_allclose(
        jax.jit(jax.grad(outer))(state.hypers), by_hand(data, state, 5, 2), atol=1e-12
    )


@pytest.mark.slow
def test_the_reversible_adjoint_gives_what_storing_everything_gives(x64: None) -> None:
    data, state = logistic()
    ends = []
    for adjoint in (hg.Reversible(), hg.Stored()):
        settings: Any = {"inner_steps": 8, "optimizer": hg.momentum(), "restart": True}
        solver = bilevel.unrolled(**RATES, **settings, adjoint=adjoint)
        ends.append(solved(data.problem(5), state[1:3], solver, steps=3))
    np.testing.assert_allclose(ends[0].hypers, ends[1].hypers, rtol=1e-8)
    np.testing.assert_allclose(ends[0].params, ends[1].params, rtol=1e-8)


# ---- tables, records, counts


def test_tables_average_to_what_they_reduce(x64: None) -> None:
    data, state = logistic()
    problem, solver = data.problem(5), bilevel.saba(**RATES)
    begin = jax.jit(partial(solver.init, problem))(*state[1:3])
    rows = jnp.arange(20)
    slope = jax.grad(data.inner)(state.params, state.hypers, rows)
    outer = jax.grad(data.outer, argnums=(0, 1))(state.params, state.hypers, rows)
    for mean, expected in zip((begin.memory.inner.mean[0], *begin.memory.outer.mean), (slope, *outer)):
        np.testing.assert_allclose(mean, expected, atol=1e-14)
    end = solved(problem, state[1:3], solver, steps=50).state
    assert end.step == 50
    for averages in end.memory[1:]:
        for mean, table, entry in zip(
            *map(jax.tree.leaves, (averages.mean, averages.table, averages.entry))
        ):
            np.testing.assert_allclose(mean, table.mean(axis=0), atol=1e-14)
            np.testing.assert_array_equal(entry, table[averages.block])


def test_blocks_are_drawn_evenly_and_cover_the_examples() -> None:
    problem = quadratic().problem(4)
    inner, outer = problem.draw(jax.random.key(0), 3000, 3000)
    assert np.bincount(inner, minlength=3).min() > 900 and np.bincount(outer, minlength=2).min() > 1400
    assert np.concatenate([problem.inner_rows(i) for i in range(3)]).tolist() == list(range(12))
    assert np.concatenate([problem.outer_rows(j) for j in range(2)]).tolist() == list(range(8))


def test_records_evaluations_and_going_on() -> None:
    q = quadratic()
    problem, solver = q.problem(2), bilevel.soba(rate=0.1, hyper_rate=0.1)
    look = lambda state: (state.step, state.hypers[1])  # noqa: E731
    whole = solved(problem, start(), solver, steps=6, record=look, every=3)
    assert whole.recorded[0].tolist() == [0, 3, 6]
    np.testing.assert_array_equal(whole.recorded[1][-1], whole.hypers[1])
    np.testing.assert_array_equal(whole.recorded[1][0], start()[1][1])
    assert whole.evaluations.tolist() == [0, 3 * 6, 6 * 6]  # 2 * 2 + 2 a step
    assert bilevel.saba(rate=0.1, hyper_rate=0.1).work(problem) == (2 * 12 + 8, 6)
    state = solved(problem, start(), solver, steps=3, every=3).state
    step = jax.jit(partial(solver.step, problem))
    for count in range(3, 6):
        state = step(state, jax.random.fold_in(jax.random.key(KEY), count))
    np.testing.assert_allclose(flat(state.hypers), flat(whole.hypers), rtol=1e-5, atol=1e-7)


SOLVERS = {  # with the work of a step on minibatches of 5
    "darts, order 1": (bilevel.darts(**RATES, order=1), 10),
    "darts": (bilevel.darts(**RATES), 25),
    "soba": (bilevel.soba(**RATES), 15),
    "saba": (bilevel.saba(**RATES), 15),
    "f2sa": (bilevel.f2sa(**RATES, penalty=1.0, inner_steps=4), 75),
    "amortized": (bilevel.amortized(**RATES, inner_steps=4, linear_steps=3), 65),
    "t1_t2": (bilevel.t1_t2(**RATES, inner_steps=2), 25),
    "truncated": (bilevel.truncated(**RATES, inner_steps=7, window=3), 70),
    "unrolled": (bilevel.unrolled(**RATES, inner_steps=7), 110),
}


def products(jaxpr: Any) -> int:
    """How many rows of data are multiplied by weights or residuals."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            total += 5 * any(x.aval.shape == (5, 4) for x in equation.invars)
        total += times * sum(products(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("name", SOLVERS)
def test_the_work_of_a_step(name: str) -> None:
    """A gradient multiplies every row twice, by weights and by residuals; the pass of a product 4 times.

    Where parts of a pass are kept from before, or not used, less is done than is counted.
    """
    solver, work = SOLVERS[name]
    data, state = logistic()
    problem = data.problem(5)
    assert solver.work(problem).step == work
    begin = solver.init(problem, *state[1:3])
    jaxpr = jax.make_jaxpr(partial(solver.step, problem))(begin, jax.random.key(0)).jaxpr
    done = products(jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]) / 2
    least = work if name in ("darts, order 1", "soba", "saba", "f2sa") else 0.6 * work
    assert least <= done <= work


def test_functions_are_traced_a_fixed_number_of_times() -> None:
    data, state = logistic()
    traced = []

    def inner(w: Array, theta: Array, rows: Array) -> Array:
        traced.append(1)
        return data.inner(w, theta, rows)

    problem = bilevel.Problem(inner, data.outer, 20, 20, 5)

    @jax.jit
    def run(hyper_rate: Array) -> Array:
        solver = bilevel.soba(rate=0.1, hyper_rate=hyper_rate)
        return bilevel.solve(problem, *state[1:3], solver, steps=100, key=jax.random.key(0)).hypers

    ends = [run(jnp.float32(rate)) for rate in (0.1, 0.2)]
    assert len(traced) == 2  # for its shape, and in the loop
    assert ends[0].dtype == jnp.float32 and not np.allclose(*ends)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.soba(rate=0.0, hyper_rate=1.0), r"soba\(rate=0.0, .*: rate must be one number"),
        (
            lambda: bilevel.soba(rate=1.0, hyper_rate=None),  # type: ignore[arg-type]
            r"soba\(.*hyper_rate=None.*: hyper_rate must be one number above 0",
        ),
        (lambda: bilevel.saba(rate=1.0, hyper_rate=-1.0), r"saba\(.*: hyper_rate must be one"),
        (
            lambda: bilevel.saba(rate=1.0, hyper_rate=jnp.ones(2)),
            r"saba\(.*: hyper_rate must be one number above 0, or a schedule",
        ),
        (
            lambda: bilevel.soba(rate=1.0, hyper_rate=1.0, linear_rate=float("nan")),
            r"soba\(.*: linear_rate must be one number above 0",
        ),
        (lambda: bilevel.f2sa(rate=1.0, hyper_rate=1.0, penalty=0), r"f2sa\(.*: penalty must be one"),
        (lambda: bilevel.soba(rate=float("inf"), hyper_rate=1.0), r"soba\(rate=inf.*: rate must be one"),
        (lambda: bilevel.soba(rate=True, hyper_rate=1.0), r"soba\(rate=True.*: rate must be one"),
        (lambda: bilevel.soba(rate=1j, hyper_rate=1.0), r"soba\(rate=1j.*: rate must be one"),
        (
            lambda: bilevel.soba(rate=1.0, hyper_rate=lambda count: count * jnp.ones(2)),
            r"soba\(.*hyper_rate=<schedule>.*: hyper_rate must be one number above 0, or a schedule",
        ),
        (lambda: bilevel.soba(rate=lambda count: None, hyper_rate=1.0), r"soba\(.*: rate must be one"),
        (lambda: bilevel.darts(rate=1.0, hyper_rate=1.0, order=3), r"darts\(.*order=3\): order must be 1"),
        (
            lambda: bilevel.darts(rate=1.0, hyper_rate=1.0, order=1, lookahead=0.1),
            r"darts\(.*lookahead=0.1, order=1\): order must be 1, without lookahead, or 2",
        ),
        (
            lambda: bilevel.amortized(rate=1.0, hyper_rate=1.0, inner_steps=0, linear_steps=1),
            r"amortized\(.*: inner_steps must be a whole number of at least 1",
        ),
        (
            lambda: bilevel.truncated(rate=1.0, hyper_rate=1.0, inner_steps=2, window=3),
            r"truncated\(.*: window must be at most inner_steps",
        ),
        (
            lambda: bilevel.t1_t2(rate=1.0, hyper_rate=1.0, inner_steps=1.5),  # type: ignore[arg-type]
            r"t1_t2\(.*inner_steps=1.5\): inner_steps must be a whole number",
        ),
        (lambda: bilevel.Problem(max, max, 0, 1), r"Problem\(.*: inner_size must be a whole number"),
        (lambda: bilevel.Problem(max, max, 4, 6, 4), r"Problem\(.*batch_size=4\): batch_size must divide"),
        (lambda: bilevel.Problem(max, max, 4, 6, 0), r"Problem\(.*: batch_size must be a whole number"),
    ],
    ids=["rate", "none", "hyper_rate", "shape", "linear_rate", "penalty", "infinite", "bool", "complex",
         "schedule", "nothing", "order", "lookahead",
         "inner_steps", "window", "whole", "size", "divides", "batch_size"],
)  # fmt: skip
def test_settings_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1"),
        ({"every": 3}, ValueError, "every must divide steps"),
        ({"every": 0}, ValueError, "every must be a whole number of at least 1"),
        ({"key": 0}, TypeError, r"key must be one key, such as jax.random.key\(0\)"),
        (
            {"params": jnp.arange(4)},
            TypeError,
            r"params is int32; there are derivatives in real floats only",
        ),
        ({"hypers": {}}, ValueError, "hypers has no arrays in it"),
        (
            {"problem": ("inner", lambda *_: jnp.zeros(2))},
            ValueError,
            r"inner must return one scalar float",
        ),
        (
            {"problem": ("outer", lambda *_: jnp.int32(0))},
            ValueError,
            r"outer must return one scalar float",
        ),
        (
            {"problem": ("inner_size", None)},
            ValueError,
            r"inner looks at its rows, and Problem\(inner, outer, inner_size=None, .* give inner_size",
        ),
        ({"problem": ("outer_size", None)}, ValueError, "outer looks at its rows, .* give outer_size"),
    ],
    ids=[
        "steps",
        "divides",
        "every",
        "key",
        "params",
        "hypers",
        "inner",
        "outer",
        "inner_size",
        "outer_size",
    ],
)
def test_calls_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    data, state = logistic()
    functions: Any = {"inner": data.inner, "outer": data.outer}
    functions |= dict.fromkeys(("inner_size", "outer_size"), len(data.X))
    if "problem" in changes:
        functions |= dict([changes.pop("problem")])
    start: dict[str, Any] = {"params": state.params, "hypers": state.hypers}
    call = start | {"steps": 10, "every": 1, "key": jax.random.key(0)} | changes
    problem, solver = bilevel.Problem(**functions), bilevel.soba(**RATES)
    with pytest.raises(error, match=r"solve\(problem, params, hypers, soba\(rate=0.4.*" + message):
        bilevel.solve(problem, call.pop("params"), call.pop("hypers"), solver, **call)
