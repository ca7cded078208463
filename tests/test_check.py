"""`check_hypergradient` on problems whose verdict is known beforehand."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.check.report import Finding
from tests.problems import classification

START = np.array([1.0, -2.0, 0.5])  # of NumPy: float32 or, in 64-bit mode, float64


def square(w: Any, meta: Any, step: Any) -> Any:
    return jnp.sum((w - 1.0) ** 2)


def trained(hypers: Any, steps: int = 20, loss: Any = square, adjoint: Any = None) -> Any:
    start = START.copy()  # JAX may remember the type that an array had in another mode
    return hg.train(loss, start, hypers, steps=steps, adjoint=adjoint).params


def quadratic(e: Any, steps: int = 20, adjoint: Any = None) -> Any:
    hypers = {"learning_rate": e["rate"][:steps], "momentum": e["momentum"]}
    return jnp.sum(trained(hypers, steps, adjoint=adjoint) ** 2)


EVERYTHING = {"rate": jnp.full(20, 0.05), "momentum": jnp.float32(0.5)}


def check(objective: Callable[..., Any], everything: Any, **settings: Any) -> hg.Report:
    return hg.check_hypergradient(objective, everything, **{"quiet": True, **settings})


def verdicts(report: hg.Report) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report[1:]}


def test_a_healthy_problem_is_trusted_and_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = hg.check_hypergradient(quadratic, EVERYTHING, steps=(5, 10, 20))
    assert report.trusted and set(verdicts(report).values()) == {"ok"}
    assert report.recovery.numbers == {"runs": 1}
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    assert text.startswith("Hypergradient in 21 numbers of float32: trusted\n")
    for name, verdict in verdicts(report).items():
        assert re.search(rf"^  {name} +{verdict}  ", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(jnp.sum, jnp.ones(3)).trusted
    assert capsys.readouterr() == ("", "")


def test_progress_says_what_is_compiled_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    check(lambda z, steps: jnp.sum(z**2) * steps, jnp.ones(3), steps=(1, 2, 3), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    first, last = shown.err.splitlines()
    assert first == "check_hypergradient: compiling the objective and its hypergradient ..."
    assert re.fullmatch(r"check_hypergradient: 8/8 checks, 0:\d\d, chaos, T = 3", last)


# Finite differences.


@pytest.mark.slow
def test_float32_network_of_100_steps_is_not_condemned() -> None:
    objective, everything = classification(dtype=jnp.float32, steps=100)
    some = {name: everything[name] for name in ("params", "hypers")}
    report = check(lambda e: objective(everything | e, hg.Stored()), some)
    assert report.finite_differences.verdict == "ok", str(report)
    assert max(report.finite_differences.numbers["relative_error"].values()) < 0.02
    assert report.finite_differences.numbers["cosine"] > 0.9999


@pytest.mark.usefixtures("x64")
def test_float64_slopes_are_right_to_many_digits() -> None:
    report = check(quadratic, {"rate": jnp.full(20, 0.05), "momentum": jnp.asarray(0.5)})
    assert report.trusted
    assert "of float64" in report.subject
    assert max(report.finite_differences.numbers["relative_error"].values()) < 1e-5
    assert report.finite_differences.numbers["noise"] < 1e-12


@jax.custom_vjp
def wrongly_differentiated(x: Any) -> Any:
    return x**2


wrongly_differentiated.defvjp(lambda x: (x**2, x), lambda x, bar: (1.8 * x * bar,))  # 2 would be right


def test_a_wrong_rule_disagrees_and_its_leaf_is_named() -> None:
    def objective(e: Any) -> Any:
        hypers = {"learning_rate": e["rate"], "momentum": 0.5}
        return jnp.sum(trained(hypers)) + wrongly_differentiated(e["wrong"])

    report = check(objective, {"rate": jnp.full(20, 0.05), "wrong": jnp.float32(1.0)})
    assert not report.trusted and "NOT TRUSTED" in str(report)
    assert report.finite_differences.verdict == "failed"
    assert report.finite_differences.meaning.startswith(
        "Disagrees with finite differences by 0.1 in ['wrong']"
    )
    errors = report.finite_differences.numbers["relative_error"]
    assert errors["['wrong']"] == pytest.approx(0.1, rel=0.01)
    assert errors["['rate']"] < 0.01


def test_a_forgotten_path_disagrees() -> None:
    report = check(lambda z: jnp.sum(jax.lax.stop_gradient(z) ** 2 + z), jnp.arange(1.0, 4.0))
    assert report.finite_differences.verdict == "failed"


@pytest.mark.parametrize("rate", [10.0, 12.5])
def test_chaos_is_not_taken_for_a_wrong_hypergradient(rate: float) -> None:
    report = check(ocean, jnp.float32(rate), steps=(5, 15, 30))
    assert report.finite_differences.verdict == "warning", str(report)
    assert "Cannot tell" in report.finite_differences.meaning
    assert "jax.enable_x64" in report.finite_differences.meaning
    assert report.chaos.verdict == "failed" and "chaotic" in report.chaos.meaning
    assert report.metasmoothness.verdict == "failed" and "rough" in report.metasmoothness.meaning
    assert not report.trusted


def ocean(rate: Any, steps: int) -> Any:
    """Descent over waves with a step far longer than they are."""
    hypers = {"learning_rate": rate, "momentum": 0.5}
    waves = lambda w, meta, step: jnp.sum(jnp.cos(w))  # noqa: E731
    return jnp.sum(jnp.sin(trained(hypers, steps, waves, hg.Stored())))


@pytest.mark.usefixtures("x64")
def test_float64_finds_a_chaotic_hypergradient_right_but_useless() -> None:
    report = check(ocean, jnp.asarray(10.0), steps=(4, 8, 12))
    assert report.finite_differences.verdict == "ok", str(report)
    assert report.chaos.verdict == "failed"
    assert not report.trusted


def test_an_array_without_influence_is_too_small_to_resolve() -> None:
    report = check(lambda e: jnp.sum(e["a"] ** 2) + 1e-9 * jnp.sum(e["b"]), {"a": START, "b": START})
    assert report.finite_differences.verdict == "ok"
    assert report.finite_differences.numbers["unclear"] == ["['b']"]
    assert "Too small to resolve: ['b'], at most 0.0%" in report.finite_differences.meaning


def test_a_hypergradient_that_is_really_zero_is_no_failure() -> None:
    report = check(lambda z: 3.0 + 0.0 * jnp.sum(z), START)
    assert report.finite_differences.verdict == "ok" and report.trusted
    assert report.finite_differences.meaning.startswith("The hypergradient is 0, and so are differences")
    assert report.metasmoothness.verdict == "not checked"
    report = check(lambda e: jnp.sum(e["a"] ** 2) + jnp.sum(jnp.sign(e["b"])), {"a": START, "b": START})
    assert report.trusted and report.finite_differences.numbers["zero"] == ["['b']"]
    assert report.finite_differences.meaning.endswith(" Zero, like the differences: ['b'].")


def test_a_zero_that_should_not_be_one_fails() -> None:
    report = check(lambda z: jnp.sum(jax.lax.stop_gradient(z) ** 2), START)
    assert report.finite_differences.verdict == "failed" and report.verdict == "NOT TRUSTED"


def test_an_infinite_hypergradient_fails() -> None:
    report = check(lambda z: jnp.sum(jnp.sqrt(z)), jnp.array([1.0, 0.0]))
    assert report.finite_differences.verdict == "failed"
    assert report.finite_differences.meaning == "The hypergradient in everything is NaN or infinite."
    report = check(lambda z: jnp.sum(jnp.log(z * 0)) + jnp.sum(z), START)
    assert report.finite_differences.verdict == "failed"


def test_an_objective_of_changing_value_cannot_be_told() -> None:
    calls: list[int] = []

    def drift() -> np.ndarray:
        calls.append(1)
        return np.float32(len(calls))

    def objective(z: Any) -> Any:
        return jnp.sum(z) + jax.pure_callback(drift, jax.ShapeDtypeStruct((), jnp.float32))

    report = check(objective, START)
    assert report.finite_differences.verdict == "warning"
    assert "when it is evaluated again" in report.finite_differences.meaning


@pytest.mark.usefixtures("x64")
def test_the_noise_is_measured() -> None:
    def objective(z: Any) -> Any:  # waves too fine to see are noise of standard deviation 1e-6
        return jnp.sum(jnp.exp(z)) + 1e-6 * math.sqrt(2) * jnp.sin(1e12 * z[0])

    objective = without_derivative_of_noise(objective)
    report = check(objective, jnp.array([1.0, 0.3]), directions=1)
    assert 0.3e-6 < report.finite_differences.numbers["noise"] < 3e-6
    assert report.finite_differences.verdict == "ok", str(report)


def without_derivative_of_noise(objective: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = jax.custom_vjp(objective)
    wrapped.defvjp(lambda z: (objective(z), z), lambda z, bar: (bar * jnp.exp(z),))
    return wrapped


@pytest.mark.quick("0.999")
@pytest.mark.parametrize("momentum", [0.97, 0.999])
def test_points_where_the_run_fails_are_left_out(momentum: float, caplog: pytest.LogCaptureFixture) -> None:
    """A momentum near 1 may not be moved by a sixteenth; the differences use smaller steps then."""
    everything = {"rate": jnp.full(20, 0.05), "momentum": jnp.float32(momentum)}
    report = check(quadratic, everything)
    assert report.finite_differences.verdict == "ok", str(report)
    assert not caplog.records


def test_a_point_outside_the_domain_is_an_error_that_says_so() -> None:
    everything = {"rate": jnp.full(20, 0.05), "momentum": jnp.float32(1.5)}
    with pytest.raises(ValueError, match=r"hypers\['momentum'\] has 1\.5 in it; it must lie in \[0, 1\)"):
        check(quadratic, everything)


def test_a_part_that_is_seen_but_not_resolved_is_confirmed_by_nothing() -> None:
    """Of a slope that rounding hides in part: right or wrong by 4%, nobody can tell or may trust."""
    for factor in (1.0, 1.04):
        objective = small_part(factor)
        report = check(objective, {"eps": jnp.float32(1e-3), "rate": jnp.float32(1.0)})
        numbers = report.finite_differences.numbers
        assert numbers["unconfirmed"] == ["['eps']"] and numbers["unclear_share"] < 0.1
        assert report.finite_differences.verdict == "warning" and not report.trusted
        assert report.verdict == "cannot tell" and str(report).splitlines()[0].endswith(": cannot tell")
        assert "Differences resolve the slope in ['eps'] to" in report.finite_differences.meaning


def small_part(factor: float) -> Callable[..., Any]:
    """``10 rate² + eps``, with a derivative in eps that is wrong by a factor."""

    @jax.custom_vjp
    def objective(e: Any) -> Any:
        return 10 * e["rate"] ** 2 + 0.1 * e["eps"]

    objective.defvjp(
        lambda e: (objective(e), e["rate"]),
        lambda rate, bar: ({"eps": 0.1 * factor * bar, "rate": 20 * rate * bar},),
    )
    return objective


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stair", [1e-3, 1e-4])
def test_a_staircase_that_follows_its_slope_is_not_condemned(stair: float) -> None:
    """Rounded on the way, and flat between: differences finer than a stair say nothing of the slope."""

    @jax.custom_jvp
    def rounded(z: Any) -> Any:
        return stair * jnp.round(z / stair)

    rounded.defjvp(lambda z, u: (rounded(*z), u[0]))
    report = check(lambda z: 0.9 * z + 0.1 * rounded(z), jnp.asarray(1.2345678))
    assert report.finite_differences.verdict != "failed", str(report)


# Exact recovery.


def test_recovery_is_not_checked_where_nothing_is_played_backwards() -> None:
    report = check(lambda e: quadratic(e, adjoint=hg.Checkpointed()), EVERYTHING)
    assert report.recovery.verdict == "not checked" and report.trusted
    report = check(lambda e: jnp.sum(e["rate"] ** 2) + jax.lax.stop_gradient(quadratic(e)), EVERYTHING)
    assert report.recovery.numbers == {"runs": 0}


@pytest.mark.slow
def test_every_run_is_counted_also_under_jit() -> None:
    report = check(jax.jit(lambda e: quadratic(e) + quadratic(e, 10)), EVERYTHING)
    assert report.recovery.verdict == "ok" and report.recovery.numbers == {"runs": 2}
    assert report.recovery.meaning == "All 2 runs arrived at their start bit for bit."


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_run_that_is_not_recovered_fails(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def drift() -> np.ndarray:
        calls.append(1)
        return np.float32(1e-3 * len(calls))

    def loss(w: Any, meta: Any, step: Any) -> Any:
        return jnp.sum(w**2) + jnp.sum(w) * jax.pure_callback(drift, jax.ShapeDtypeStruct((), jnp.float32))

    def objective(rate: Any, adjoint: Any = None) -> Any:
        return jnp.sum(trained({"learning_rate": rate, "momentum": 0.5}, loss=loss, adjoint=adjoint))

    report = check(wrap(objective), jnp.float32(0.1))
    assert not report.trusted
    assert report.recovery.verdict == "failed"
    assert report.recovery.meaning.startswith("train(steps=20")
    assert "did not arrive at its start" in report.recovery.meaning
    assert report.finite_differences.verdict == report.metasmoothness.verdict == "not checked"
    assert not caplog.records


def test_an_optimizer_that_cannot_be_reversed_fails() -> None:
    def objective(rate: Any) -> Any:
        hypers = {"learning_rate": rate}
        return jnp.sum(hg.train(square, START, hypers, steps=5, optimizer=hg.sgd()).params)

    report = check(objective, jnp.float32(0.1))
    assert report.recovery.verdict == "failed" and "overwrites 'params'" in report.recovery.meaning
    assert report.precision.verdict == "not checked"


@pytest.mark.slow
def test_buffers_that_are_too_small_under_jit_are_no_failure() -> None:
    """Momenta of 0.3 need more bits than are reserved for unknown ones; without jit they are known."""
    everything = {"rate": jnp.full(200, 0.05), "momentum": jnp.full(200, 0.3)}
    report = check(lambda e: quadratic(e, 200), everything, directions=1)
    assert report.recovery.verdict == "ok", str(report)


# Chaos.


def growth(loss: Any, start: float, steps: Any, rate: float = 0.1) -> Finding:
    """Of the derivative in rate and start of a descent from the start."""

    def objective(e: Any, steps: int) -> Any:
        hypers = {"learning_rate": e["rate"]}
        return hg.train(
            loss, e["start"], hypers, steps=steps, optimizer=hg.sgd(), adjoint=hg.Stored()
        ).params

    everything = {"rate": jnp.float32(rate), "start": jnp.float32(start)}
    return check(objective, everything, steps=steps, directions=1).chaos


def test_exponential_growth_has_its_closed_form() -> None:
    """``w_T = (1 + α)^T w_0``: the derivative in ``w_0 = 0`` doubles every ``log 2 / log(1 + α)`` steps."""
    chaos = growth(lambda w, meta, step: -0.5 * w**2, 0.0, (20, 40, 60, 80))
    assert chaos.verdict == "failed"
    assert chaos.numbers["rate"] == pytest.approx(math.log(1.1), rel=1e-4)
    assert "doubles every 7.27 steps" in chaos.meaning


def test_polynomial_growth_has_its_closed_form() -> None:
    """``w_T = w_0 - 9 α T``: the derivative in α grows like T."""
    chaos = growth(lambda w, meta, step: 9.0 * w, 0.0, (20, 40, 60, 80))
    assert chaos.verdict == "ok" and "like T**1: stable" in chaos.meaning
    assert chaos.numbers["exponent"] == pytest.approx(1.0, abs=1e-3)
    assert chaos.numbers["norms"] == pytest.approx([9 * T for T in (20, 40, 60, 80)], rel=1e-3)


def test_fast_polynomial_growth_is_a_warning() -> None:
    """``w_T = w_0 - 9 α Σ t``: the derivative in α grows like T²."""
    chaos = growth(lambda w, meta, step: 9.0 * w * step, 0.0, (20, 40, 60, 80))
    assert chaos.verdict == "warning" and "growing" in chaos.meaning
    assert chaos.numbers["exponent"] == pytest.approx(2.0, abs=0.05)


@pytest.mark.slow
def test_a_run_that_diverges_at_some_length_fails() -> None:
    def objective(rate: Any, steps: int) -> Any:
        return jnp.sum(trained({"learning_rate": rate, "momentum": 0.5}, steps))

    report = check(objective, jnp.float32(9.0), steps=(2, 3, 50))
    assert report.chaos.verdict == "failed" and report.chaos.meaning.startswith("At T = 50")
    assert np.isfinite(report.chaos.numbers["norms"][:2]).all()
    assert report.recovery.verdict == "failed" and "training has diverged" in report.recovery.meaning


def test_chaos_is_not_checked_without_lengths_or_growth() -> None:
    assert "Pass steps=(25, 50, 100)" in check(jnp.sum, START).chaos.meaning
    report = check(lambda z, steps: jnp.sum(z) * (steps > 1), START, steps=(1, 2, 3))
    assert report.chaos.verdict == "not checked" and "zero" in report.chaos.meaning


# Metasmoothness.


def test_metasmoothness_of_a_parabola_has_its_closed_form() -> None:
    """``f = c z²/2`` at ``z = 2``, step 10%: ``f' = 2c`` before and ``1.8c`` after."""
    report = check(lambda z: 1.5 * z**2, jnp.float32(2.0), step=0.1)
    numbers = report.metasmoothness.numbers
    assert report.metasmoothness.verdict == "ok"
    assert numbers["predicted"] == pytest.approx(-1.2, rel=1e-5)
    assert numbers["changes"][-1] == pytest.approx(1.5 * (1.8**2 - 2**2), rel=1e-5)
    assert numbers["slopes"] == pytest.approx([-1.2, -1.14, -1.08], rel=1e-5)
    assert numbers["curvature"] == pytest.approx(3.0, rel=1e-3)
    assert numbers["cosine"] == pytest.approx(1.0) and numbers["metasmoothness"] == 1.0


def test_metasmoothness_counts_signs_that_turn() -> None:
    """Of two numbers one passes its optimum: ``g = (4, 0.02)`` before and ``(3.8, -0.18)`` after."""
    target = jnp.array([0.0, 1.98])
    report = check(lambda z: jnp.sum((z - target) ** 2), jnp.array([2.0, 1.99]), step=0.05)
    before, after = 2 * np.array([2.0, 0.01]), 2 * np.array([1.9, 0.01 - 0.0995])
    weights = np.array([2.0, np.sqrt((2.0**2 + 1.99**2) / 2)]) * (np.abs(before) + np.abs(after))
    numbers = report.metasmoothness.numbers
    assert numbers["same_signs"] == 0.5
    assert numbers["metasmoothness"] == pytest.approx((weights[0] - weights[1]) / weights.sum(), rel=0.02)


def test_a_step_beyond_the_optimum_is_curved_not_rough() -> None:
    report = check(lambda z: jnp.sum((z - 1.0) ** 2), jnp.full(3, 1.002))
    assert report.metasmoothness.verdict == "warning"
    assert "Smooth, but curved" in report.metasmoothness.meaning
    assert report.trusted


def test_waves_shorter_than_the_step_are_rough() -> None:
    with jax.enable_x64(True):
        start = jnp.array(START, jnp.float64)
        report = check(lambda z: jnp.sum(z + 1e-3 * jnp.sin(3e4 * z)), start)
    assert report.finite_differences.verdict == "ok", str(report)
    assert report.metasmoothness.verdict == "failed" and "rough" in report.metasmoothness.meaning
    assert not report.trusted


def test_a_step_that_leaves_the_domain_is_a_warning() -> None:
    everything = {"rate": jnp.full(20, 0.05), "momentum": jnp.float32(0.97)}
    report = check(lambda e: -quadratic(e), everything, step=0.05)
    assert report.metasmoothness.verdict == "warning", str(report)
    assert "leads to where the run fails: train(steps=20" in report.metasmoothness.meaning
    report = check(lambda z: jnp.sum(jnp.log(z)), jnp.ones(2), step=2.0)
    assert "is NaN or infinite" in report.metasmoothness.meaning


def test_a_step_lost_in_rounding_is_a_warning() -> None:
    report = check(lambda z: 1e4 + jnp.sum(z), jnp.ones(2), step=1e-5)
    assert "little more than rounding" in report.metasmoothness.meaning


# Precision.


def test_low_precision_inputs_are_a_warning() -> None:
    report = check(lambda e: jnp.sum(e["a"].astype(jnp.float32) ** 2), {"a": jnp.ones(3, jnp.bfloat16)})
    assert report.precision.verdict == "warning"
    assert report.precision.meaning.startswith("['a'] (bfloat16): the hypergradient is rounded to the same")
    assert report.precision.numbers["inputs"] == ["['a'] (bfloat16)"]
    assert not report.trusted


@pytest.mark.quick("bfloat16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inside_the_run_is_a_warning(dtype: Any) -> None:
    def loss(w: Any, meta: Any, step: Any) -> Any:
        return jnp.sum(jnp.tanh(w.astype(dtype)).astype(w.dtype) ** 2)

    def objective(rate: Any) -> Any:
        return jnp.sum(trained({"learning_rate": rate, "momentum": 0.5}, loss=loss))

    report = check(objective, jnp.float32(0.1), directions=1)
    assert report.precision.verdict == "warning"
    assert f"computes in {jnp.dtype(dtype).name}" in report.precision.meaning
    assert report.finite_differences.verdict != "failed", str(report)


def test_products_of_reduced_precision_on_accelerators_are_a_warning(monkeypatch: Any) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    matrix = jnp.ones((3, 3)) + jnp.eye(3)
    report = check(lambda z: jnp.sum((matrix @ z) ** 2), START)
    assert report.precision.verdict == "warning"
    assert "jax.default_matmul_precision('highest')" in report.precision.meaning
    with jax.default_matmul_precision("highest"):
        assert check(lambda z: jnp.sum((matrix @ z) ** 2), START).precision.verdict == "ok"


# What goes in.


def test_what_is_no_array_of_floats_is_held_fixed() -> None:
    def objective(e: Any) -> Any:
        noise = jax.random.normal(e["key"], (3,))
        return jnp.sum(e["z"] ** 2 * noise**2) * e["power"]

    everything = {"z": START, "key": jax.random.key(0), "power": 2, "none": None}
    report = check(objective, everything)
    assert report.trusted and report.subject == "Hypergradient in 3 numbers of float32"
    assert list(report.finite_differences.numbers["relative_error"]) == ["['z']"]


def test_directions_come_from_the_key() -> None:
    cubic = lambda z: jnp.sum(z**3)  # noqa: E731
    z = jnp.linspace(1.0, 2.0, 50)
    first, again, other = (check(cubic, z, key=jax.random.key(k)).finite_differences for k in (1, 1, 2))
    assert first == again
    assert first.numbers["relative_error"] != other.numbers["relative_error"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "few steps": ({"steps": (10, 20)}, r"steps=\(10, 20\).*three or more whole numbers that increase"),
    "one number of steps": ({"steps": 10}, r"steps must be three or more"),
    "steps that fall": ({"steps": (30, 20, 10)}, r"steps must be three or more"),
    "steps of zero": ({"steps": (0, 1, 2)}, r"steps must be three or more"),
    "no directions": ({"directions": 0}, r"directions=0.*directions must be a whole number"),
    "half a direction": ({"directions": 1.5}, r"directions must be a whole number"),
    "a step of zero": ({"step": 0.0}, r"step=0\.0.*step must be a positive number"),
    "a step that is NaN": ({"step": math.nan}, r"step must be a positive number"),
    "a tolerance of one": ({"tolerance": 1.0}, r"tolerance=1\.0.*tolerance must lie in \(0, 1\)"),
    "no floats": ({"everything": {"a": jnp.arange(3)}}, r"everything has no floats in it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    changes, message = REFUSED[case]
    calls: list[int] = []
    with pytest.raises(ValueError, match=message) as raised:
        hg.check_hypergradient(**{"objective": calls.append, "everything": START} | changes)
    assert str(raised.value).startswith("check_hypergradient(steps=")
    assert not calls


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda z: z, r"must return one scalar, and returned float32\[3\]"),
        (lambda z: (jnp.sum(z), z), r"must return one scalar, and returned tuple"),
        (lambda z: jnp.argmax(z), r"must return a float, and returned int32"),
    ],
    ids=["array", "pair", "integer"],
)
def test_refuses_what_is_no_objective(objective: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check(objective, START)
