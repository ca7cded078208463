"""Learned schedules against those that are known to be the best.

On the noisy quadratic in one dimension the best rates have a closed form.  On a regression on features with
a power-law spectrum the best schedules of long runs have known shapes: in the easy phase a power of the
remaining time, in the hard phase a plateau and a decay at the end.  All rates are learned by L-BFGS-B on
hypergradients of exact expected losses: one for every step, or in the easy phase at knots in
``log((t + 1) / (T - t))``, so that the first and the last steps have as many knots as all others.

    python -m experiments.optimal_schedules                    # some minutes on one core
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import hypergrad as hg
from experiments.common import cli, figures
from hypergrad import problems
from hypergrad.problems import PowerLaw

INSIDE = (0.1, 0.9)  # the remaining share of the run in which an exponent is fitted


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    quadratic_steps: int = 30
    lengths: tuple[int, ...] = cli.option((1000, 4000, 16000, 64000), "of runs in the easy phase")
    hard_lengths: tuple[int, ...] = cli.option((1000, 4000), "of runs in the hard phase")
    capacity: float = 1.25
    source: float = 2.0
    batch_size: float = 100.0
    hard_capacity: float = 2.0
    hard_source: float = 1.4
    knots: int = 24
    meta_steps: int = 100


class Learned(NamedTuple):
    """A schedule that was learned.

    Attributes:
      steps: ``T``.
      log_rates: of every step, or at the knots.
      loss: the expected excess loss at the end.
    """

    steps: int
    log_rates: np.ndarray
    loss: float


class Fitted(NamedTuple):
    """``height (1 - t/T + shift)^delta``, fitted to a learned schedule."""

    delta: float
    height: float
    shift: float


def places(steps: int, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Where steps and knots are, in ``log((t + 1) / (T - t))``."""
    t = np.arange(steps)
    place = np.log((t + 1) / (steps - t))
    return place, np.linspace(place[0], place[-1], knots)


def rates(log_rates: Any, steps: int) -> Any:
    """The rate of every step, each by itself if there are as many, and otherwise between knots."""
    if len(log_rates) == steps:
        return jnp.exp(log_rates)
    place, knots = places(steps, len(log_rates))
    return jnp.exp(jnp.interp(place, knots, log_rates))


def learn(problem: PowerLaw, steps: int, start: np.ndarray, highest: float, meta_steps: int) -> Learned:
    """The log rates with the least expected loss at the end of the run."""

    def objective(log_rates: Any, key: Any) -> Any:
        return jnp.log(problems.expect_power_law(problem, rates(log_rates, steps))[-1])

    optimizer = hg.meta.LBFGSB(
        corrections=20, loss_tolerance=1e-13, gradient_tolerance=1e-9, bounds=(-15.0, math.log(highest))
    )
    best = hg.meta.optimize(
        objective,
        jnp.asarray(start),
        optimizer=optimizer,
        steps=meta_steps,
        explosion=math.inf,
        progress=False,
    )
    return Learned(steps, np.asarray(best.hypers), float(np.exp(best.history.loss.min())))


def fit(learned: Learned, shifted: bool) -> Fitted:
    """The exponent of a schedule in the inside of the run.

    The spectrum has a largest eigenvalue, so that noise is forgotten as a power only where much of the sum
    of rates is left.  To first order this shifts the end of the decay, by a share of the run that vanishes
    slowly, as ``T^(-1/2a)``.
    """
    remaining = 1 - np.arange(learned.steps) / learned.steps
    inside = (remaining >= INSIDE[0]) & (remaining <= INSIDE[1])
    y, r = np.log(np.asarray(rates(learned.log_rates, learned.steps))[inside]), remaining[inside]

    def line(shift: float) -> tuple[float, float, float]:
        (delta, height), misfit, *_ = np.polyfit(np.log(r + shift), y, 1, full=True)
        return float(misfit[0]), float(delta), float(height)

    found = scipy.optimize.minimize_scalar(lambda s: line(s)[0], bounds=(0.0, 1.0), method="bounded")
    shift = float(found.x) if shifted else 0.0
    _, delta, height = line(shift)
    return Fitted(delta, math.exp(height), shift)


def quadratic(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The best rates of the noisy quadratic in one dimension, and learned ones."""
    problem = problems.noisy_quadratic(1, batch_size=2.0)
    known = np.asarray(problems.optimal_learning_rates(problem, steps)[:, 0])

    def objective(log_rates: Any, key: Any) -> Any:
        hypers = {"learning_rate": jnp.exp(log_rates)}
        return jnp.log(problems.expect(problems.sgd(), problem, hypers, steps=steps).losses[-1])

    optimizer = hg.meta.LBFGSB(corrections=30, loss_tolerance=0.0, gradient_tolerance=1e-10)
    start = jnp.full(steps, math.log(0.1))
    best = hg.meta.optimize(objective, start, optimizer=optimizer, steps=500, progress=False)
    return known, np.exp(np.asarray(best.hypers))


def easy(config: Config) -> list[Learned]:
    """Schedules by length in the easy phase."""
    problem = problems.power_law(
        capacity=config.capacity, source=config.source, noise=1.0, batch_size=config.batch_size
    )
    found, start = [], np.full(config.knots, math.log(0.3))
    for steps in config.lengths:
        found.append(learn(problem, steps, start, 1.2, config.meta_steps))
        start = found[-1].log_rates
        print(f"easy, T = {steps}: delta {fit(found[-1], False).delta:.3f}, with a shift "
              f"{fit(found[-1], True).delta:.3f}", flush=True)  # fmt: skip
    return found


def hard(config: Config) -> list[Learned]:
    """Schedules by length in the hard phase."""
    problem = problems.power_law(capacity=config.hard_capacity, source=config.hard_source)
    found: list[Learned] = []
    for steps in config.hard_lengths:
        share = (np.arange(steps) + 0.5) / steps
        known = found[-1].log_rates if found else np.full(2, math.log(0.3))
        start = np.interp(share, (np.arange(len(known)) + 0.5) / len(known), known)
        found.append(learn(problem, steps, start, 1.0, 2 * config.meta_steps))
        first, plateau, last, decay = parts(found[-1])
        print(f"hard, T = {steps}: first {first:.3f}, plateau {plateau:.3f}, last {last:.3f}; the last "
              f"{decay:.1%} of the steps are below half of the plateau", flush=True)  # fmt: skip
    return found


def parts(learned: Learned) -> tuple[float, float, float, float]:
    """First rate, plateau (median of the first half), last rate, and the share below half of it."""
    x = np.asarray(rates(learned.log_rates, learned.steps))
    plateau = float(np.median(x[: len(x) // 2]))
    return float(x[0]), plateau, float(x[-1]), 1 - (int(np.flatnonzero(x >= plateau / 2)[-1]) + 1) / len(x)


def xi_of(schedules: Sequence[Learned]) -> float:
    """How the height falls with the length, from all lengths but the first, where it has not settled."""
    later = schedules[1:] if len(schedules) > 2 else schedules
    heights = [fit(x, True).height * (1 + fit(x, True).shift) ** fit(x, True).delta for x in later]
    return -float(np.polyfit(np.log([x.steps for x in later]), np.log(heights), 1)[0])


def main(config: Config, output: str | None = None) -> dict[str, Any]:
    """Learn, print, and where there is an output write figure and record."""
    with jax.enable_x64(True):
        known, learned = quadratic(config.quadratic_steps)
        print(f"noisy quadratic: rates off by {np.max(np.abs(learned / known - 1)):.1e} at most")
        schedules, hard_schedules = easy(config), hard(config)
        fits = {x.steps: {"plain": fit(x, False), "shifted": fit(x, True)} for x in schedules}
        xi = xi_of(schedules) if len(schedules) > 1 else math.nan
    shape = problems.best_shape(config.capacity, config.source)
    last = fits[schedules[-1].steps]
    print(
        f"known delta {shape.delta:g}, learned {last['plain'].delta:.3f}, with a shift of the end "
        f"{last['shifted'].delta:.3f}; known xi {shape.xi:g}, learned {xi:.3f}"
    )
    record = {
        "config": config,
        "quadratic": {"known": known, "learned": learned},
        "easy": schedules,
        "fits": fits,
        "xi": xi,
        "known": shape,
        "hard": hard_schedules,
        "parts": {x.steps: parts(x) for x in hard_schedules},
    }
    if output is not None:
        draw(Path(output) / "optimal_schedules.png", record)
    return record


def draw(path: Path, record: dict[str, Any]) -> None:
    """The three problems."""
    figure, (row,) = figures.figure(1, 3)
    quadratic_axes, easy_axes, hard_axes = row
    known, learned = record["quadratic"]["known"], record["quadratic"]["learned"]
    quadratic_axes.plot(known, label="closed form", **figures.look(0))
    quadratic_axes.plot(learned, "o", color=figures.COLOURS[2], markersize=4, label="learned")
    quadratic_axes.set(title="Noisy quadratic, one dimension", xlabel="step t", ylabel="learning rate")

    with jax.enable_x64(True):
        for k, x in enumerate(record["easy"]):
            remaining = 1 - np.arange(x.steps) / x.steps
            y = np.asarray(rates(x.log_rates, x.steps))
            easy_axes.loglog(remaining, y, label=f"T = {x.steps:,}", **figures.look(k))
        longest = record["easy"][-1]
        delta, height = record["known"].delta, record["fits"][longest.steps]["plain"].height
        r = np.geomspace(0.03, 1.0, 20)
        easy_axes.loglog(r, 0.6 * height * r**delta, ":", color="0.5", label=f"(1 - t/T)^{delta:g}")
        for k, x in enumerate(record["hard"]):
            share = (np.arange(x.steps) + 0.5) / x.steps
            hard_axes.plot(
                share, np.asarray(rates(x.log_rates, x.steps)), label=f"T = {x.steps:,}", **figures.look(k)
            )
    easy_axes.set(
        title="Power law, easy phase", xlabel="remaining share of the run, 1 - t/T", ylabel="learning rate",
        xlim=(1.1, 1e-3), ylim=(1e-3, 2.0),
    )  # fmt: skip
    hard_axes.set(title="Power law, hard phase", xlabel="share of the run, t/T", ylabel="learning rate")
    for axes in row:
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    fast = {
        "quadratic_steps": 6,
        "lengths": (200, 400),
        "hard_lengths": (200,),
        "knots": 10,
        "meta_steps": 20,
    }
    config, run = cli.parse(
        "optimal_schedules", __doc__, Config(), arguments, fast=lambda config: replace(config, **fast)
    )
    return main(config, run.output)


if __name__ == "__main__":
    command()
