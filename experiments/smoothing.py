"""Where slopes are noise: truncated, exact and smoothed hypergradients, and online estimates.

1. Influence balancing, where truncated hypergradients step the wrong way and online estimates do not.
2. A two-dimensional problem with ripples, where the exact hypergradient gets stuck and smoothing does not.
3. A network at a learning rate at which its training is chaotic; the advice of the report is followed.
4. A network whose training is calm: the exact hypergradient needs far fewer training steps.

    python -m experiments.smoothing                    # some minutes on one core
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.statistics import plus_minus, standard_error

INFLUENCES = 23  # of one parameter, of which 10 are positive
START = 0.5  # of that parameter


def influence(window: int, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Influence balancing: a linear system whose first number feels the negative influences late.

    ``s <- ½ s + ½ shift(s) ± θ``, with the loss ``½ (s_0 - 1)²``, averaged over the run.
    """
    sign = jnp.where(jnp.arange(INFLUENCES) < 10, 1.0, -1.0)

    def start(theta: Array, key: Array) -> Array:
        return jnp.zeros(INFLUENCES)

    def unroll(theta: Array, state: Array, step: Array) -> tuple[Array, Array]:
        def one(s: Array, _: None) -> tuple[Array, Array]:
            s = 0.5 * s + 0.5 * jnp.append(s[1:], 0.0) + sign * theta
            return s, 0.5 * (s[0] - 1) ** 2

        state, losses = jax.lax.scan(one, state, length=window)
        return state, jnp.sum(losses) / steps

    return start, unroll


def exact_influence(steps: int) -> Array:
    """The derivative through the whole run."""
    start, unroll = influence(steps, steps)
    return jax.grad(lambda theta: unroll(theta, start(theta, jax.random.key(0)), 0)[1])(START)


def truncated_influence(window: int, steps: int) -> Array:
    """The sum of the derivatives through single windows."""
    start, unroll = influence(window, steps)

    def one(state: Array, _: None) -> tuple[Array, Array]:
        slope, state = jax.grad(lambda theta: unroll(theta, state, 0)[::-1], has_aux=True)(START)
        return state, slope

    state = start(START, jax.random.key(0))
    return jnp.sum(jax.lax.scan(one, state, length=steps // window)[1])


LENGTH = 100  # of the runs on the two-dimensional problem


def surface(w: Array, theta: Array, step: Array) -> Array:
    """``√(x² + 5) - √5 + sin²(y) exp(-5 x²) + ¼ |y - 100|``."""
    x, y = w[0], w[1]
    ripples = jnp.sin(y) ** 2 * jnp.exp(-5 * x**2)
    return jnp.sqrt(x**2 + 5) - jnp.sqrt(5.0) + ripples + 0.25 * jnp.abs(y - 100)


def rates(theta: Array, t: Array) -> Array:
    """From ``exp(θ_0)`` to ``exp(θ_1)``, linear in the logarithm."""
    return jnp.exp(theta[0] + (theta[1] - theta[0]) * t / (LENGTH - 1))


def regression(theta: Array, steps: int = LENGTH) -> Array:
    """The mean loss on the way down the surface from (1, 1)."""
    hypers = {"learning_rate": rates(theta, jnp.arange(steps))}
    trained = hg.train(
        surface, jnp.ones(2), hypers, steps=steps, optimizer=hg.sgd(), adjoint=hg.Stored()
    )  # fmt: skip
    return jnp.mean(trained.losses)


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    repetitions: int = 1000  # of the estimates of influence balancing, one pair each
    episode: int = cli.option(400, "steps of influence balancing")
    windows: tuple[int, ...] = (1, 10, 100)
    descent: int = cli.option(300, "meta-steps on the two-dimensional problem")
    chaotic: int = cli.option(40, "meta-steps on the network whose training is chaotic")
    chaotic_steps: int = cli.option(200, "its training steps, a multiple of 4")
    log_rate: float = cli.option(4.0, "logarithm of the learning rate at which it starts")
    calm_steps: int = cli.option(1000, "training steps of the network whose training is calm")
    exact: int = cli.option(15, "meta-steps by the exact hypergradient there")
    smoothed: int = cli.option(40, "meta-steps by the smoothed one there")
    knots: int = 5  # of a schedule there
    seed: int = 0


class Slope(NamedTuple):
    """An estimate of the slope of influence balancing."""

    window: int
    mean: float  # over repetitions, summed over the windows of an episode
    standard_error: float
    deviation: float  # of a single update, root mean square over windows


class Learned(NamedTuple):
    """Two outer loops on one objective."""

    exact: np.ndarray  # (n,), the objective before every meta-step
    smoothed: np.ndarray  # the smoothed objective
    exact_end: float  # the objective itself at the end
    smoothed_end: float
    sigma: Any


def repeated(estimator: hg.smoothing.Estimator, theta: Array, windows: int, keys: Array) -> np.ndarray:
    """The estimates of whole episodes by repetition and window."""

    def one(key: Array) -> Array:
        def window(particles: Any, _: None) -> tuple[Any, Array]:
            estimate, particles = estimator.step(theta, particles)
            return particles, estimate.gradient

        return jax.lax.scan(window, estimator.init(theta, key), length=windows)[1]

    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


def slope_of(found: np.ndarray, window: int) -> Slope:
    """What repetitions say, ``(n, windows, ...)``."""
    sums = found.sum(axis=1)
    return Slope(window, sums.mean(), standard_error(sums), float(np.sqrt(found.var(axis=0).mean())))


def balance(config: Config) -> dict[str, Any]:
    """Influence balancing: the exact slope, truncated ones, and online estimates."""
    steps, keys = config.episode, jax.random.split(jax.random.key(config.seed), config.repetitions)
    exact = float(exact_influence(steps))
    print(f"influence balancing, {steps} steps: exact slope {exact:+.2f}")
    found: dict[str, Any] = {"exact": exact, "truncated": {}, "nres": [], "pes": []}
    for window in config.windows:
        truncated = float(truncated_influence(window, steps))
        found["truncated"][window] = truncated
        start, unroll = influence(window, steps)
        for make in (hg.smoothing.nres, hg.smoothing.pes):
            estimator = make(start, unroll, window=window, steps=steps, sigma=0.1, pairs=1)
            slopes = repeated(estimator, jnp.float32(START), steps // window, keys)
            found[make.__name__].append(slope_of(slopes, window))
        online = ", ".join(
            f"{name} {plus_minus(found[name][-1].mean, found[name][-1].standard_error, '+.2f')} "
            f"(an update ± {found[name][-1].deviation:.2g})"
            for name in ("nres", "pes")
        )
        print(f"  windows of {window:3d}: truncated {truncated:+.2f}, {online}", flush=True)
    return found


def deviations(config: Config) -> dict[str, float]:
    """How much an update scatters on the two-dimensional problem, in windows of 10 steps."""
    theta, keys = (
        jnp.array([0.5, 0.5]),
        jax.random.split(jax.random.key(config.seed), config.repetitions // 4),
    )
    start, unroll = hg.smoothing.training(
        surface, lambda theta, key: jnp.ones(2), lambda theta, t: {"learning_rate": rates(theta, t)},
        window=10, steps=LENGTH, optimizer=hg.sgd(),
    )  # fmt: skip
    found = {}
    for make in (hg.smoothing.nres, hg.smoothing.pes):
        estimator = make(start, unroll, window=10, steps=LENGTH, sigma=0.3, pairs=1)
        slopes = repeated(estimator, theta, LENGTH // 10, keys)
        found[make.__name__] = float(np.sqrt(slopes.var(axis=0).sum(axis=-1).mean()))
    print("2-D problem, an update scatters by " + ", ".join(f"{k} {v:.2g}" for k, v in found.items()))
    return found


def compared(
    objective: Any, smooth: Any, start: Any, steps: tuple[int, int], rate: float, sigma: Any
) -> Learned:
    """Descent by Adam on an objective and on the smoothed one, each with its number of meta-steps."""
    exact, smoothed = (
        hg.meta.optimize(f, start, optimizer=optax.adam(rate), steps=n, explosion=math.inf, progress=False)
        for f, n in zip((objective, smooth), steps)
    )
    judge = jax.jit(lambda hypers: objective(hypers, jax.random.key(0)))
    ends = float(judge(exact.hypers)), float(judge(smoothed.hypers))
    return Learned(exact.history.loss, smoothed.history.loss, *ends, sigma)


def told(name: str, found: Learned) -> None:
    """Print where two outer loops began and ended."""
    ends = f"exact {found.exact_end:.3f}, smoothed {found.smoothed_end:.3f}"
    print(f"{name}, from {found.exact[0]:.3f}: {ends}", flush=True)


def stuck(config: Config) -> Learned:
    """The two-dimensional problem from (-4, -4)."""
    start, sigma = jnp.array([-4.0, -4.0]), 0.3
    smooth = hg.smoothed(lambda theta, key: regression(theta), sigma=sigma, pairs=25, fresh=True)
    steps = (config.descent, config.descent)
    found = compared(lambda theta, key: regression(theta), smooth, start, steps, 0.03, sigma)
    told("2-D problem", found)
    return found


def chaotic(config: Config) -> tuple[Learned, hg.Report]:
    """A small network on digits, trained at a chaotic rate; the advice of the report is followed."""
    examples, steps = workloads.flat(workloads.load("digits", None)), config.chaotic_steps
    data = jnp.asarray(examples.images), jnp.asarray(examples.labels)
    init, apply = hg.nets.mlp((64, 30, 10))
    params, rows = workloads.start_and_rows(init, jax.random.key(config.seed), len(data[0]), 100, steps)

    def loss(w: Any, data: Any, rows: Array) -> Array:
        return hg.nets.cross_entropy(apply(w, data[0][rows]), data[1][rows])

    def objective(log_rate: Array, steps: int = steps) -> Array:
        hypers = {"learning_rate": jnp.exp(log_rate), "momentum": 0.9}
        trained = hg.train(loss, params, hypers, data, rows[:steps], steps=steps, adjoint=hg.Stored())
        return jnp.mean(trained.losses)

    start = jnp.float32(config.log_rate)
    lengths = steps // 4, steps // 2, steps
    report = hg.check_hypergradient(objective, start, steps=lengths, directions=1, quiet=True)
    print(report.chaos.meaning)
    sigma = report.chaos.numbers.get("sigma") or 0.1  # a run that is not chaotic has none
    smooth = hg.smoothed(objective, sigma=sigma, pairs=16)
    twice = (config.chaotic, config.chaotic)
    found = compared(lambda x, key: objective(x), lambda x, key: smooth(x), start, twice, 0.05, sigma)
    told("chaotic network", found)
    return found, report


def calm(config: Config, data_dir: str | None) -> tuple[Learned, float]:
    """Rates and momenta of every layer by knots, on Fashion-MNIST: inner steps to the same loss."""
    examples = workloads.flat(workloads.load("fashion-mnist", data_dir))
    few = slice(0, 5000)
    data = workloads.Examples(*(jnp.asarray(x[few]) for x in examples))
    init, apply = hg.nets.mlp((784, 30, 10))
    steps = config.calm_steps
    params, rows = workloads.start_and_rows(init, jax.random.key(config.seed), 5000, 50, steps)

    def objective(raw: Any, key: Array, adjoint: Any) -> Array:
        t = jnp.linspace(0.0, config.knots - 1.0, steps)
        at = lambda x: jnp.interp(t, jnp.arange(config.knots, dtype=t.dtype), x)  # noqa: E731
        hypers = {
            "learning_rate": jax.tree.map(lambda x: jnp.exp(at(x)), raw["log_rate"]),
            "momentum": jax.tree.map(lambda x: jax.nn.sigmoid(at(x)), raw["logit_momentum"]),
        }
        loss = functools.partial(workloads.minibatch_loss, apply)
        trained = hg.train(loss, params, hypers, data, rows, steps=steps, adjoint=adjoint)
        return hg.nets.cross_entropy(apply(trained.params, data.test_images), data.test_labels)

    raw = {
        "log_rate": jax.tree.map(lambda _: jnp.full(config.knots, math.log(0.02)), params),
        "logit_momentum": jax.tree.map(lambda _: jnp.zeros(config.knots), params),
    }
    count = sum(x.size for x in jax.tree.leaves(raw))
    forward = lambda raw, key: objective(raw, key, hg.Stored())  # noqa: E731
    smooth = hg.smoothed(forward, sigma=0.1, pairs=8, fresh=True)
    meta_steps = (config.exact, config.smoothed)
    found = compared(
        lambda raw, key: objective(raw, key, hg.Reversible(bits={"velocity": 4})),
        smooth,
        raw,
        meta_steps,
        0.2,
        0.1,
    )
    share = share_of(found)
    print(
        f"calm network, {count} numbers, from {found.exact[0]:.3f}: exact {found.exact_end:.3f}, smoothed "
        f"{found.smoothed_end:.3f}; to the lowest loss of both the exact one takes {share:.1%} of the runs"
    )
    return found, share


RUNS = (2, 16)  # in a meta-step of the calm network: forward and backward, and forward for eight pairs


def share_of(found: Learned) -> float:
    """The runs that the exact hypergradient needs to the lowest loss that both reach, as a share."""
    target = max(found.exact.min(), found.smoothed.min())
    exact, smoothed = (
        runs * (int(np.flatnonzero(losses <= target)[0]) + 1)
        for runs, losses in zip(RUNS, (found.exact, found.smoothed))
    )
    return exact / smoothed


def main(config: Config, output: str | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """Run, print, and where there is an output write figure and record."""
    influence_found = balance(config)
    scatter = deviations(config)
    regression_found = stuck(config)
    chaotic_found, report = chaotic(config)
    calm_found, share = calm(config, data_dir)
    record = {
        "config": config,
        "influence": influence_found,
        "scatter": scatter,
        "regression": regression_found,
        "chaotic": chaotic_found,
        "report": report.chaos,
        "calm": calm_found,
        "share_of_runs": share,
    }
    if output is not None:
        draw(Path(output) / "smoothing.png", record)
    return record


def draw(path: Path, record: dict[str, Any]) -> None:
    """The slopes of influence balancing, and three pairs of outer loops."""
    figure, ((influences, ripples), (chaos, stable)) = figures.figure(2, 2)
    found = record["influence"]
    influences.axhline(found["exact"], color="0", linewidth=1, label="exact")
    influences.axhline(0, color="0.7", linewidth=0.8)
    truncated = found["truncated"]
    influences.semilogx(list(truncated), list(truncated.values()), "x:", color="0.4", label="truncated")
    for k, name in enumerate(("nres", "pes")):
        x = [s.window * (0.93, 1.07)[k] for s in found[name]]
        influences.errorbar(
            x, [s.mean for s in found[name]], [3 * s.standard_error for s in found[name]],
            fmt="os"[k], color=figures.COLOURS[k + 1], fillstyle=("full", "none")[k], label=name,
        )  # fmt: skip
    influences.set(
        title="Influence balancing", xlabel="window, inner steps", ylabel="slope, ± 3 standard errors"
    )

    for axes, name, title in (
        (ripples, "regression", "Two-dimensional problem"),
        (chaos, "chaotic", "Chaotic network, digits"),
    ):
        learned = record[name]
        for k, kind in enumerate(("exact", "smoothed")):
            label = kind if kind == "exact" else f"smoothed, σ = {learned.sigma:g}"
            axes.plot(getattr(learned, kind), label=label, **figures.look(k))
        axes.set(title=title, xlabel="meta-step", ylabel="mean training loss")
    learned = record["calm"]
    stable.plot(RUNS[0] * np.arange(len(learned.exact)), learned.exact, label="exact", **figures.look(0))
    stable.plot(
        RUNS[1] * np.arange(len(learned.smoothed)),
        learned.smoothed,
        label="smoothed, σ = 0.1",
        **figures.look(1),
    )
    stable.set(
        title="Calm network, Fashion-MNIST",
        xlabel="training runs, forward and backward",
        ylabel="held-out loss, nats",
    )
    for axes in (influences, ripples, chaos, stable):
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small")
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    fast = {
        "repetitions": 40, "episode": 40, "windows": (10,), "descent": 5, "chaotic": 2, "chaotic_steps": 12,
        "calm_steps": 20, "exact": 3, "smoothed": 2, "knots": 2,
    }  # fmt: skip
    config, run = cli.parse(
        "smoothing",
        __doc__,
        Config(),
        arguments,
        fast=lambda config: replace(config, **fast),
        flags=("data_dir",),
    )
    return main(config, run.output, run.data_dir)


if __name__ == "__main__":
    command()
