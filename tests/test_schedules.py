"""The families against optax and closed forms, their derivatives against finite differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import constraints, meta, schedules
from hypergrad.schedules import Constant, OneCycle, PerStep, PiecewiseLinear, Triangular, WarmupCosine

# No kink stands on a whole count, so all are differentiable in all parameters.
FAMILIES = {
    "constant": Constant(0.3),
    "per step": PerStep(np.linspace(0.1, 1.2, 12)),
    "piecewise linear": PiecewiseLinear(np.array([0.5, 3.3, 4.1, 9.7]), np.array([0.2, 1.0, 0.7, 0.1])),
    "warm-up, cosine": WarmupCosine(0.1, 0.9, 3.4, 10.6, 0.05),
    "triangular": Triangular(0.1, 0.8, 4.7),
    "one-cycle": OneCycle(10.3, 0.9, 0.32, 0.81, 7.0, 50.0),
}
TRIANGLE = PiecewiseLinear(np.array([0.0, 2.0, 4.0], np.float32), np.array([0.0, 1.0, 0.0], np.float32))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Constant(0.3), optax.constant_schedule(0.3)),
        (
            PiecewiseLinear(np.array([0.0, 4.0, 9.0]), np.array([1.0, 0.1, 0.02])),
            optax.piecewise_interpolate_schedule("linear", 1.0, {4: 0.1, 9: 0.2}),
        ),
        (
            WarmupCosine(0.1, 0.9, 5.0, 20.0, 0.05),
            optax.warmup_cosine_decay_schedule(0.1, 0.9, 5, 20, 0.05),
        ),
        (WarmupCosine(0.1, 0.9, 0.0, 20.0), optax.warmup_cosine_decay_schedule(0.1, 0.9, 0, 20)),
        (OneCycle(20.0, 0.9, 0.25, 0.8), optax.linear_onecycle_schedule(20, 0.9, 0.25, 0.8)),
    ],
    ids=["constant", "linear", "warm-up", "cosine", "one-cycle"],
)
def test_is_optaxs(ours: Any, theirs: Any) -> None:
    found, expected = jax.jit(lambda: schedules.values((ours, theirs), 30))()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert len(set(found.tolist())) > 5 or isinstance(ours, Constant)


@pytest.mark.parametrize("steps", [7, 10, 33])
def test_one_cycle_is_optaxs_where_its_knots_are_cut_to_whole_counts(steps: int) -> None:
    theirs = optax.linear_onecycle_schedule(steps, 0.9)
    start, final = (np.floor(pct * steps) / steps for pct in (0.3, 0.85))
    cut, plain = OneCycle(steps, 0.9, start, final), OneCycle(steps, 0.9)
    found, smooth, expected = jax.jit(lambda: schedules.values((cut, plain, theirs), steps + 3))()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    # Uncut, the three lines stand where the shares say.
    by_hand = np.interp(
        np.arange(steps + 3), [0, 0.3 * steps, 0.85 * steps, steps], [0.036, 0.9, 0.036, 0.036e-4]
    )
    np.testing.assert_allclose(smooth, by_hand, rtol=2e-5, atol=1e-8)
    assert np.abs(smooth - expected).max() > 1e-3


@pytest.mark.slow
@pytest.mark.quick("warm-up, cosine")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_need_no_promotion_of_types(name: str) -> None:
    """Called in a strict session, and as hyperparameters there: the bits of a lenient one."""

    def total(schedule: Any) -> Any:
        by_hand = sum(jnp.sin(schedule(jnp.int32(count))).astype(jnp.float32) for count in (0, 5, 20))
        return by_hand + jnp.sum(jnp.sin(schedules.values(schedule, 12)))

    for given in (FAMILIES[name], jax.tree.map(jnp.float32, FAMILIES[name])):
        expected = jax.value_and_grad(total)(given)
        with jax.numpy_dtype_promotion("strict"):
            found = jax.value_and_grad(total)(given)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_optaxs_schedules_need_no_promotion_of_types() -> None:
    """Nor do functions that return whole numbers."""
    given = [optax.cosine_decay_schedule(0.3, 9), optax.exponential_decay(0.3, 4, 0.5), lambda count: count]
    expected = schedules.values(given, 12)
    with jax.numpy_dtype_promotion("strict"):
        jax.tree.map(np.testing.assert_array_equal, schedules.values(given, 12), expected)
    assert expected[2].dtype == jnp.float32


def test_one_cycle_with_a_peak_of_zero_is_optaxs() -> None:
    both = OneCycle(20.0, 0.0, 0.25, 0.8), optax.linear_onecycle_schedule(20, 0.0, 0.25, 0.8)
    found, expected = jax.jit(lambda: schedules.values(both, 25))()
    np.testing.assert_array_equal(found, expected)


def test_warmup_to_a_peak_of_zero_goes_on_to_the_end_value() -> None:
    both = WarmupCosine(0.5, 0.0, 2.0, 6.0, 0.2), optax.warmup_cosine_decay_schedule(0.5, 0.0, 2, 6, 0.2)
    found, theirs = jax.jit(lambda: schedules.values(both, 8))()
    rising = [0.2 * (1 - np.cos(np.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(found, [0.5, 0.25, *rising, 0.2, 0.2], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(theirs, [0.5, 0.25, *[0.0] * 6], atol=1e-8)  # what the docstring says of it


def test_one_cycle_may_end_in_a_jump() -> None:
    found = jax.jit(lambda: schedules.values(OneCycle(8.0, 1.0, 0.5, 1.0, 4.0, 2.0), 10))()
    assert found.tolist() == [0.25, 0.4375, 0.625, 0.8125, 1.0, 0.8125, 0.625, 0.4375, 0.125, 0.125]


def test_triangular_is_smiths_formula() -> None:
    base, top, stepsize = 0.1, 0.7, 3.0
    count = np.arange(20)
    cycle = np.floor(1 + count / (2 * stepsize))
    expected = base + (top - base) * np.maximum(0, 1 - np.abs(count / stepsize - 2 * cycle + 1))
    found = schedules.values(Triangular(base, top, cycle_steps=2 * stepsize), 20)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("x64")
def test_agrees_with_finite_differences_in_every_parameter(name: str) -> None:
    schedule = FAMILIES[name]
    weights = np.random.default_rng(0).normal(size=15)

    def total(schedule: Any) -> Any:
        return jnp.vdot(schedules.values(schedule, 15), weights)

    gradient = jax.jit(jax.grad(total))(schedule)
    assert type(gradient) is type(schedule)
    flat, unravel = jax.flatten_util.ravel_pytree(schedule)
    moves = 1e-5 * np.eye(flat.size)
    above, below = (jax.jit(jax.vmap(lambda x: total(unravel(x))))(flat[None] + s * moves) for s in (1, -1))
    found, _ = jax.flatten_util.ravel_pytree(gradient)
    np.testing.assert_allclose(found, (above - below) / 2e-5, rtol=1e-7, atol=1e-9)
    assert np.abs(found).min() > 1e-6  # every parameter matters


@pytest.mark.parametrize("name", FAMILIES)
def test_is_an_optax_schedule(name: str) -> None:
    schedule = FAMILIES[name]
    expected = jax.jit(lambda: schedules.values(schedule, 15))()
    assert expected.shape == (15,) and expected.dtype == jnp.float32
    for optimizer in (optax.sgd(schedule), optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)):
        state, update = optimizer.init(jnp.float32(0)), jax.jit(optimizer.update)
        for t in range(15):
            change, state = update(jnp.float32(-1), state)
            assert float(change) == pytest.approx(float(expected[t]), rel=1e-6)
    if name != "triangular":  # held after the end
        assert jax.jit(lambda: schedule(15) == schedule(1000))()


def test_follows_the_precision_of_its_parameters() -> None:
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), FAMILIES["warm-up, cosine"])
    found = jax.jit(lambda s: schedules.values(s, 600))(half._replace(decay_steps=jnp.bfloat16(1024)))
    assert found.dtype == jnp.float32
    assert len(set(found.tolist())) > 500  # counts are not rounded to bfloat16
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            schedule = jax.tree.map(dtype, FAMILIES["one-cycle"])
            assert jax.eval_shape(lambda s: schedules.values(s, 3), schedule).dtype == dtype


def test_at_a_knot_the_derivative_is_that_of_the_line_to_the_right() -> None:
    at_the_peak = jax.grad(lambda s: s(2))(TRIANGLE)
    assert at_the_peak.positions.tolist() == [0.0, 0.5, 0.0]
    assert at_the_peak.values.tolist() == [0.0, 1.0, 0.0]
    straight = TRIANGLE._replace(values=jnp.array([0.0, 1.0, 2.0]))  # no kink: the derivative is unique
    assert jax.grad(lambda s: s(2))(straight).positions.tolist() == [0.0, -0.5, 0.0]


def test_equal_knots_jump_and_disordered_traced_knots_wait_for_their_predecessor() -> None:
    def values(schedule: Any) -> Any:
        return (found := schedules.values(schedule, 6)), found

    both = jax.jit(jax.jacobian(values, has_aux=True))
    jump = PiecewiseLinear(jnp.array([0.0, 2.0, 2.0, 4.0]), jnp.array([0.0, 1.0, 5.0, 7.0]))
    crossed = jump._replace(positions=jnp.array([0.0, 2.0, 1.5, 4.0]))
    for schedule in (jump, crossed):
        jacobian, found = both(schedule)
        assert found.tolist() == [0.0, 0.5, 5.0, 6.0, 7.0, 7.0]
        assert all(np.isfinite(x).all() for x in jacobian)


@pytest.mark.parametrize("warmup", [0.0, 5.0])
@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_lengths_of_zero_have_finite_derivatives(warmup: float, decay: float) -> None:
    def values(schedule: Any) -> Any:
        return (found := schedules.values(schedule, 8)), found

    # Traced, so that a decay that ends before the warm-up does is not refused.
    both = jax.jit(jax.jacobian(values, has_aux=True))
    jacobian, found = both(WarmupCosine(0.5, 1.0, warmup, decay, 0.25))
    assert all(np.isfinite(column).all() for column in jacobian)
    rising = [0.5 + 0.1 * t for t in range(int(warmup))]
    falling = [0.25 + 0.75 * np.cos(np.pi * t / 10) ** 2 for t in range(int(decay - warmup))]
    np.testing.assert_allclose(found, (rising + falling + [0.25] * 8)[:8], rtol=1e-6)


def test_values_maps_a_tree_of_schedules_and_leaves_numbers_alone() -> None:
    rates = np.ones(4)
    tree = {"layers": (Constant(0.5), optax.linear_schedule(1.0, 0.0, 4)), "momentum": 0.9, "rates": rates}
    found = schedules.values(tree, 4)
    np.testing.assert_array_equal(found["layers"], [[0.5] * 4, [1.0, 0.75, 0.5, 0.25]])
    assert found["momentum"] == 0.9 and found["rates"] is rates


def test_values_of_an_optax_schedule_have_derivatives() -> None:
    def values(peak: Any) -> Any:
        return schedules.values(optax.cosine_decay_schedule(peak, 10), 5)

    expected = [optax.cosine_decay_schedule(2.0, 10)(count) for count in range(5)]
    np.testing.assert_allclose(values(2.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jacobian(values)(2.0), np.array(expected) / 2, rtol=1e-6)
    assert schedules.values(optax.constant_schedule(1), 2).dtype == jnp.float32
    np.testing.assert_array_equal(schedules.values(PerStep(values(2.0)), 5), values(2.0))


# ---- learning


def loss(params: Any, data: Any, step: Any) -> Any:
    inputs, outputs = data
    return jnp.mean((jnp.tanh(inputs @ params["in"]) @ params["out"] - outputs) ** 2)


def problem(dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), dtype)

    inputs = normal(16, 3)
    return {"in": normal(3, 4) / 2, "out": normal(4, 1) / 2}, (inputs, jnp.tanh(inputs[:, :1]))


def after_training(schedule: Any, dtype: Any, steps: int = 20) -> Any:
    params, data = problem(dtype)
    hypers = {"learning_rate": schedules.values(schedule, steps), "momentum": 0.8}
    return loss(hg.train(loss, params, hypers, data, steps=steps).params, data, None)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hypergradient_of_a_warmup_cosine_agrees_with_finite_differences() -> None:
    value = jax.jit(lambda schedule: after_training(schedule, jnp.float64))
    schedule = WarmupCosine(0.05, 0.4, 4.3, 18.6, 0.02)
    gradient = jax.grad(value)(schedule)
    for field, derivative in gradient._asdict().items():
        x, h = getattr(schedule, field), 1e-5
        above, below = (value(schedule._replace(**{field: x + s * h})) for s in (1, -1))
        assert float(derivative) == pytest.approx(float(above - below) / (2 * h), rel=1e-5)
        assert abs(derivative) > 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hypergradient_of_a_schedule_for_each_layer_agrees_with_finite_differences() -> None:
    params, _ = problem(jnp.float64)
    start = PiecewiseLinear(jnp.array([0.4, 6.5, 18.7]), jnp.array([0.1, 0.5, 0.05]))
    tree = schedules.per_layer(start, params)
    assert tree == {"in": start, "out": start}
    value = jax.jit(lambda tree: after_training(tree, jnp.float64))
    gradient = jax.grad(value)(tree)
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    direction = np.random.default_rng(1).normal(size=flat.size)
    above, below = (value(unravel(flat + s * 1e-5 * direction)) for s in (1, -1))
    found = jnp.vdot(jax.flatten_util.ravel_pytree(gradient)[0], direction)
    assert float(found) == pytest.approx(float(above - below) / 2e-5, rel=1e-6)
    assert not np.allclose(gradient["in"].values, gradient["out"].values)


@pytest.mark.quick("warm-up, cosine")
@pytest.mark.parametrize(
    ("start", "within"),
    [
        (
            WarmupCosine(0.05, 0.2, 4.3, 18.6, 0.02),
            WarmupCosine(
                *[constraints.positive] * 3, constraints.interval(15.0, 25.0), constraints.positive
            ),
        ),
        (
            PiecewiseLinear(jnp.array([0.0, 6.5, 19.5]), jnp.array([0.05, 0.2, 0.05])),
            PiecewiseLinear(constraints.ascending, constraints.positive),
        ),
    ],
    ids=["warm-up, cosine", "piecewise linear"],
)
def test_meta_optimize_learns_every_parameter_within_its_domain(start: Any, within: Any) -> None:
    best = meta.optimize(
        lambda schedule, key: after_training(schedule, jnp.float32),
        start,
        optimizer=optax.adam(0.1),
        steps=8,
        constraints=within,
        progress=False,
    )
    assert type(best.hypers) is type(start)
    assert best.history.loss[-1] < 0.9 * best.history.loss[0]
    for learned, before in zip(jax.tree.leaves(best.hypers), jax.tree.leaves(start)):
        assert not np.array_equal(learned, before)
    constraints.unconstrain(within, best.hypers)  # refuses what is outside


# ---- refusals


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_per_step_refuses_what_is_no_schedule(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"PerStep\(values of shape .*\(T,\) with T >= 1"):
        PerStep(jnp.ones(shape))(0)


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((1,), (1,)), ((), ()), ((2, 2), (2, 2))])
def test_piecewise_linear_refuses_what_are_no_knots(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"PiecewiseLinear\(positions of shape .*\(K,\) with K >= 2"):
        PiecewiseLinear(*map(jnp.ones, shapes))(0)


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [
        (TRIANGLE._replace(positions=jnp.array([0.0, 4.0, 2.0])), "the positions must ascend"),
        (TRIANGLE._replace(positions=jnp.array([0.0, np.nan, 2.0])), "the positions must ascend"),
        (WarmupCosine(0.0, 1.0, 5.0, 4.0), "0 <= warmup_steps <= decay_steps"),
        (WarmupCosine(0.0, 1.0, -1.0, 4.0), "0 <= warmup_steps <= decay_steps"),
        (Triangular(0.0, 1.0, 0.0), "cycle_steps > 0"),
        (OneCycle(10.0, 1.0, 0.9), "0 <= pct_start <= pct_final <= 1"),
        (OneCycle(0.0, 1.0), "steps and divisors > 0"),
        (OneCycle(10.0, 1.0, div_factor=-1.0), "steps and divisors > 0"),
    ],
    ids=str,
)
def test_known_parameters_that_break_a_rule_are_refused(schedule: Any, rule: str) -> None:
    for call in (schedule, jax.jit(lambda count: schedule(count))):
        with pytest.raises(ValueError, match=rf"^{type(schedule).__name__}\([\s\S]*\): {rule}; "):
            call(0)


def test_values_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match=r"values\(steps=0\): a schedule has at least 1"):
        schedules.values(optax.constant_schedule(1.0), 0)


def test_values_refuses_vector_schedules() -> None:
    with pytest.raises(ValueError, match=r"values\(schedules\): .*shape \(2,\) for one count"):
        schedules.values(lambda count: jnp.ones(2) * count, 3)
