"""How few steps reach a target loss: the best learning rate, the best schedule, and the bound.

The noisy quadratic model of Zhang et al. (2019), for several batch sizes and preconditioners ``h^(-p)``.
The schedule is constant in equal pieces; it is found by L-BFGS on hypergradients of the exact expected
loss, and the number of steps by bisection.  Then hypergradients through sampled training, played backwards,
are averaged over seeds and held against the exact one.

    python -m experiments.noisy_quadratic                    # a few minutes on two cores
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures
from experiments.common.statistics import standard_error
from hypergrad import problems
from hypergrad.problems import NoisyQuadratic


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024, 16384)
    powers: tuple[float, ...] = (0.0, 0.5, 0.75)  # p of the preconditioner
    dimensions: int = 10_000
    target: float = 0.01
    pieces: int = 10
    tolerance: float = 0.002  # of the number of steps, relative
    # Above 2 there are shorter runs (with p = 0.5 and batch size 16384 of 45 steps and not 98), but they
    # pass through losses of 1e20 and more.
    limit: float = cli.option(2.0, "largest learning rate times largest curvature")
    random_starts: int = 2
    sampled_steps: int = 40
    sampled_runs: int = 10_000
    seed: int = 0


class Found(NamedTuple):
    """The shortest run found that reaches the target."""

    steps: float
    rates: np.ndarray  # (pieces,)


class Row(NamedTuple):
    """One entry of the table."""

    batch_size: int
    power: float
    fixed: Found
    scheduled: Found
    bound: float


class Sampled(NamedTuple):
    """Hypergradients of a schedule, ``(T,)`` each."""

    exact: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray


def log_excess(log_rates: Array, problem: NoisyQuadratic, steps: Array, target: Array) -> Array:
    """``log(L_T / target)`` after equal pieces at constant rates; the objective."""
    length = steps / log_rates.shape[0]

    def piece(second_moment: Array, log_rate: Array) -> tuple[Array, None]:
        return problems.sgd_after(problem, jnp.exp(log_rate), length, second_moment), None

    end, _ = jax.lax.scan(piece, problem.variance, log_rates)
    return jnp.log(problems.expected_loss(problem, end) / target)


value_and_hypergradient = jax.jit(jax.value_and_grad(log_excess))


def search(
    problem: NoisyQuadratic, steps: float, target: float, limit: float, starts: Iterable[np.ndarray]
) -> tuple[float, np.ndarray]:
    """The least ``log_excess`` and its log rates, by L-BFGS-B from every start until one is below 0.

    `hypergrad.meta.optimize` compiles its objective at every call; here one program serves all problems and
    numbers of steps.
    """
    top = math.log(limit / float(problem.curvature.max()))

    def objective(log_rates: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_hypergradient(log_rates, problem, steps, target)
        if not (np.isfinite(value) and np.isfinite(gradient).all()):  # the run diverged: turn back
            return 1e3, np.zeros_like(log_rates)
        return float(value), np.asarray(gradient)

    def enough(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        if intermediate_result.fun <= 0:
            raise StopIteration

    best = (math.inf, np.empty(0))
    for start in starts:
        result = scipy.optimize.minimize(
            objective,
            np.minimum(start, top),
            jac=True,
            method="L-BFGS-B",
            bounds=[(top - 20.0, top)] * len(start),
            callback=enough,
            options={"maxiter": 300, "maxls": 40, "ftol": 1e-10, "gtol": 1e-7},
        )
        best = min(best, (float(result.fun), result.x), key=lambda pair: pair[0])
        if best[0] <= 0:
            break
    return best


def bisect(reach: Callable[[float], np.ndarray | None], low: float, high: Found, tolerance: float) -> Found:
    """The least number of steps, between one too small and one that suffices."""
    while high.steps > low * (1 + tolerance):
        middle = math.sqrt(low * high.steps)
        rates = reach(middle)
        if rates is None:
            low = middle
        else:
            high = Found(middle, rates)
    return high


def row(config: Config, batch_size: int, power: float, neighbours: Sequence[np.ndarray]) -> Row:
    """Solve for one batch size and preconditioner, starting also from schedules of neighbours."""
    problem = problems.noisy_quadratic(config.dimensions, batch_size, power)
    bound = float(problems.information_bound(problem, config.target))
    low = scipy.optimize.brentq(
        lambda t: float(problems.least_loss(problem, t)) - config.target, 0.0, bound
    )  # fewer steps cannot do
    top = config.limit / float(problem.curvature.max())
    tried: list[np.ndarray] = []

    def reaching(starts: Sequence[np.ndarray]) -> Callable[[float], np.ndarray | None]:
        def reach(steps: float) -> np.ndarray | None:
            # What was best at other lengths comes first: it mostly settles the matter.
            excess, log_rates = search(
                problem, steps, config.target, config.limit, [*tried[:-3:-1], *starts]
            )
            tried.append(log_rates)
            return np.exp(log_rates) if excess <= 0 else None

        return reach

    reach = reaching([np.log([rate]) for rate in top * np.geomspace(0.5, 0.005, 3)])
    steps, rates = bound, reach(bound)
    while rates is None:
        steps, rates = 2 * steps, reach(2 * steps)
    fixed = bisect(reach, low, Found(steps, rates), config.tolerance)

    tried.clear()
    rng = np.random.default_rng(config.seed)
    decay = np.linspace(0.0, 1.0, config.pieces)
    constant = np.repeat(fixed.rates, config.pieces)
    starts = [np.log(constant), *map(np.log, neighbours), np.log(top) - 5.0 * decay]
    for _ in range(config.random_starts):
        starts.append(np.log(top) - np.sort(rng.uniform(0.0, 6.0, config.pieces)))
    scheduled = bisect(reaching(starts), low, Found(fixed.steps, constant), config.tolerance)
    return Row(batch_size, power, fixed, scheduled, bound)


def sampled_hypergradient(config: Config) -> Sampled:
    """The hypergradient of a schedule through sampled training, and that of the exact recursion."""
    steps = config.sampled_steps
    problem = problems.noisy_quadratic(100, batch_size=4.0)
    rates = jnp.geomspace(0.5, 0.1, steps)

    def exact(rates: Array) -> Array:
        hypers = {"learning_rate": rates, "momentum": 0.5}
        return problems.expect(problems.heavy_ball(), problem, hypers, steps=steps).losses[-1]

    def sampled(rates: Array, key: Array) -> Array:
        params, normals = problems.sample(problem, key, steps)
        trained = hg.train(
            problems.sampled_loss,
            params,
            {"learning_rate": rates, "momentum": 0.5},
            problem,
            normals,
            steps=steps,
            optimizer=hg.heavy_ball(),
            adjoint=hg.Reversible(),
        )
        return problems.expected_loss(problem, trained.params**2)

    keys = jax.random.split(jax.random.key(config.seed), config.sampled_runs)
    many = jax.jit(jax.vmap(jax.grad(sampled), in_axes=(None, 0)))
    runs = np.asarray(many(rates, keys), np.float64)
    return Sampled(np.asarray(jax.grad(exact)(rates)), runs.mean(axis=0), standard_error(runs))


def main(config: Config, output: str | None = None) -> dict[str, Any]:
    """Solve, print, and where there is an output write figure and record."""
    rows: list[Row] = []
    line = "{:>6} {:>10} {:>14} {:>16} {:>10}"
    print(f"steps to an expected loss of {config.target}, {config.dimensions} dimensions")
    print(line.format("p", "batch size", "best rate", "best schedule", "bound"))
    with jax.enable_x64(True):  # losses of a thousandth of a percent apart are told apart
        for power in config.powers:
            neighbours: list[np.ndarray] = []
            for batch_size in config.batch_sizes:
                rows.append(row(config, batch_size, power, neighbours))
                neighbours = [rows[-1].scheduled.rates]
                numbers = (rows[-1].fixed.steps, rows[-1].scheduled.steps, rows[-1].bound)
                print(line.format(power, batch_size, *(f"{x:,.1f}" for x in numbers)), flush=True)

    sampled = sampled_hypergradient(config)
    apart = (sampled.mean - sampled.exact) / sampled.standard_error
    print(
        f"hypergradient of {config.sampled_steps} rates, mean of {config.sampled_runs} sampled runs: from "
        f"the exact one {np.sqrt(np.mean(apart**2)):.1f} standard errors in the root mean square, "
        f"{np.abs(apart).max():.1f} at most"
    )

    if output is not None:
        record = {
            "config": config,
            "rows": [
                {
                    "batch_size": r.batch_size,
                    "power": r.power,
                    "bound": r.bound,
                    "fixed": {"steps": r.fixed.steps, "rate": r.fixed.rates[0]},
                    "scheduled": r.scheduled,
                }
                for r in rows
            ],
            "sampled": sampled,
        }
        draw(Path(output) / "noisy_quadratic.png", config, rows, sampled, record)
    return {"rows": rows, "sampled": sampled}


def draw(path: Path, config: Config, rows: list[Row], sampled: Sampled, record: dict[str, Any]) -> None:
    """Steps by batch size, schedules by preconditioner and by batch size, and the sampled hypergradient."""
    figure, ((steps, by_power), (by_batch, hypergradient)) = figures.figure(2, 2, height=4.0)
    for power, marker, colour in zip(config.powers, "osv^D", figures.COLOURS):
        mine = [r for r in rows if r.power == power]
        for kind, dashes in (("fixed", "-"), ("scheduled", "--")):
            numbers = [getattr(r, kind).steps for r in mine]
            look = {"marker": marker, "color": colour, "linestyle": dashes, "markersize": 6}
            look["fillstyle"] = "full" if kind == "fixed" else "none"
            label = f"p = {power:g}, {'best rate' if kind == 'fixed' else 'best schedule'}"
            steps.loglog([r.batch_size for r in mine], numbers, label=label, **look)
    first = [r for r in rows if r.power == config.powers[0]]
    bounds = [r.bound for r in first]
    steps.loglog([r.batch_size for r in first], bounds, ":", color="0", linewidth=2, label="bound")
    steps.set(title=f"Steps to a loss of {config.target:g}", xlabel="batch size", ylabel="training steps")

    middle = config.batch_sizes[len(config.batch_sizes) // 2]
    ends = np.linspace(0.0, 1.0, config.pieces + 1)
    panels = (
        (by_power, f"Best schedules, batch size {middle}", "p = {0.power:g}",
         [r for r in rows if r.batch_size == middle]),
        (by_batch, f"Best schedules, p = {config.powers[0]:g}", "batch size {0.batch_size}", first),
    )  # fmt: skip
    for axes, title, label, shown in panels:
        for k, r in enumerate(shown):
            look = figures.look(k, label=label.format(r), linewidth=1.6)
            axes.stairs(r.scheduled.rates, ends, baseline=None, **look)
        axes.set(title=title, xlabel="share of the run", ylabel="learning rate", yscale="log")

    t = np.arange(config.sampled_steps)
    hypergradient.errorbar(
        t, sampled.mean, 2 * sampled.standard_error, fmt="o", color="0.5", markersize=3,
        label=f"mean of {config.sampled_runs:,} sampled runs, ±2 standard errors",
    )  # fmt: skip
    hypergradient.plot(t, sampled.exact, "-", color="0", linewidth=1, label="exact recursion")
    hypergradient.set(
        title="Hypergradient of the final loss", xlabel="training step", ylabel="∂ loss / ∂ learning rate"
    )
    for axes in (steps, by_power, by_batch, hypergradient):
        axes.grid(alpha=0.25)
        axes.legend(fontsize="x-small", handlelength=3.5)
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    fast = {"batch_sizes": (1024,), "dimensions": 1000, "tolerance": 0.02, "sampled_runs": 500}
    config, run = cli.parse(
        "noisy_quadratic", __doc__, Config(), arguments, fast=lambda config: replace(config, **fast)
    )
    return main(config, run.output)


if __name__ == "__main__":
    command()
