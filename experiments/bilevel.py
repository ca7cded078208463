"""Bilevel solvers beside each other, by time and by gradient evaluations, on two problems.

Data hyper-cleaning: half of the training labels of MNIST are replaced by random ones, and a softmax
classifier ``w`` minimises ``f = mean_i sigmoid(θ_i) loss_i(w) + penalty/2 |w|²``, biases not penalised.
The ``θ``, one for each of 20,000 examples, are to minimise the loss ``g`` on 5,000 clean examples; shown is
the test error, beside that of a classifier trained on the clean examples alone.

Regularisation selection: logistic regression on a9a, ``f = mean_i loss_i(w) + ½ Σ_k exp(θ_k) w_k²``, and
``g`` is the loss on examples held out.  Shown is the suboptimality of ``h(θ) = g(w*(θ))``, the inner
problem being solved to the end for every point that is drawn.

Every method has the same budget of gradient evaluations (see `hypergrad.bilevel` for how they count), and
constant step sizes that are the best of a grid, with other seeds; the grid begins alike for all, and grows
where the best is at its edge.  "reversible" is `hg.train` from the start for every hypergradient, played
backwards bit for bit.  The first order of DARTS never moves ``θ`` here, since ``g`` does not depend on it
directly: it is training without hyperparameter optimization.

    python -m experiments.bilevel            # MNIST and a9a
    python -m experiments.bilevel --fast     # digits, to see that it runs
"""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax import Array
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from experiments.common import cli, figures, records, statistics, workloads
from experiments.common.workloads import linear
from hypergrad import bilevel, data, implicit, nets

# Seeds of the grid, used for nothing else: rates are the best for the first, and must not diverge for any.
TUNED_ON = tuple(range(1000, 1010))

METHODS: dict[str, Callable[..., bilevel.Solver]] = {
    "DARTS, order 1": partial(bilevel.darts, order=1),
    "DARTS, order 2": partial(bilevel.darts, order=2),
    "T1-T2": partial(bilevel.t1_t2, inner_steps=1),
    "truncated, 5 of 10": partial(bilevel.truncated, inner_steps=10, window=5),
    "amortized, 5 and 5": partial(bilevel.amortized, inner_steps=5, linear_steps=5),
    "SOBA": bilevel.soba,
    "SABA": bilevel.saba,
    "F2SA": partial(bilevel.f2sa, penalty=lambda count: 1 + count / 100),
}
ALL = (*METHODS, "reversible")


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    task: str
    data: str
    examples: tuple[int, int]  # of the inner and the outer function
    batch_size: int
    budget: int  # gradients of single examples in a run
    rates: tuple[float, ...]  # neighbours on `statistics.LADDER`
    hyper_rates: tuple[float, ...]
    reversible_steps: int
    widened: int = 8  # how often the grid may grow
    points: int = 12  # of a curve, beside its start
    seeds: int = 10
    wrong: float = 0.5  # share of the training labels that are replaced by a random one, in hyper-cleaning
    penalty: float = 1e-3  # in hyper-cleaning
    methods: tuple[str, ...] = ALL


FULL = (
    Config(
        "hyper-cleaning",
        "mnist",
        examples=(20_000, 5_000),
        batch_size=100,
        budget=1_500_000,
        rates=(0.1, 0.3, 1.0),
        hyper_rates=(3e2, 1e3, 3e3, 1e4, 3e4),
        reversible_steps=150,
    ),
    Config(
        "regularisation",
        "a9a",
        examples=(24_000, 8_000),
        batch_size=100,
        budget=10_000_000,
        rates=(0.1, 0.3, 1.0),
        hyper_rates=(3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
        reversible_steps=200,
    ),
)
SMALL: dict[str, Any] = {
    "data": "digits",
    "examples": (1_000, 400),
    "budget": 60_000,
    "rates": (0.1,),
    "reversible_steps": 20,
    "widened": 0,
    "points": 3,
    "seeds": 2,
}
FAST = (  # every method once, since compiling takes the time
    replace(
        FULL[0],
        hyper_rates=(1e3, 3e3),
        methods=("DARTS, order 2", "T1-T2", "SOBA", "SABA", "reversible"),
        **SMALL,
    ),
    replace(
        FULL[1],
        hyper_rates=(10.0, 30.0),
        methods=("DARTS, order 1", "truncated, 5 of 10", "amortized, 5 and 5", "F2SA"),
        **SMALL,
    ),
)


def methods(config: Config) -> dict[str, Callable[..., bilevel.Solver]]:
    """From the rates of ``w`` and ``θ`` to a solver, by name."""
    settings: Any = {"optimizer": hg.momentum(), "adjoint": hg.Reversible(), "restart": True}
    reference = partial(bilevel.unrolled, inner_steps=config.reversible_steps, **settings)
    every = METHODS | {"reversible": reference}
    return {name: every[name] for name in config.methods}


class Examples(NamedTuple):
    """The data: arguments of the compiled functions, not constants inside them."""

    inputs: Array  # (n, features), centred where they are images
    labels: Array  # (n,)
    outer_inputs: Array
    outer_labels: Array
    test_inputs: Array
    test_labels: Array


class Task(NamedTuple):
    """One of the two problems.

    Attributes:
      start: from examples to parameters and hyperparameters.
      inner: ``f`` of examples, parameters, hyperparameters and rows.
      outer: ``g``, likewise.
      quality: of examples, parameters and hyperparameters, a dictionary of numbers, which are NaN for a run
        that diverged; "tuned" is the one by which step sizes are chosen, and sees no test examples.
      references: what is reached without a bilevel problem, by name.
    """

    start: Callable[[Examples], tuple[Any, Any]]
    inner: Callable[..., Array]
    outer: Callable[..., Array]
    quality: Callable[[Examples, Any, Any], dict[str, Array]]
    references: Callable[[Examples], dict[str, float]]

    def problem(self, config: Config, e: Examples) -> bilevel.Problem:
        """The description that all solvers work on."""
        sizes = {"inner_size": len(e.labels), "outer_size": len(e.outer_labels)}
        return bilevel.Problem(
            partial(self.inner, e), partial(self.outer, e), **sizes, batch_size=config.batch_size
        )


# ---- the two problems


def cleaning(config: Config) -> Task:
    """A weight for every training example."""

    losses = partial(workloads.losses, linear)

    def start(e: Examples) -> tuple[nets.Dense, Array]:
        zero = nets.Dense(jnp.zeros((e.inputs.shape[1], 10)), jnp.zeros(10))
        return zero, jnp.zeros(len(e.labels))

    def penalty(w: nets.Dense) -> Array:
        return config.penalty / 2 * jnp.sum(w.weights**2)

    def clean(e: Examples, w: nets.Dense) -> Array:
        return jnp.mean(losses(w, e.outer_inputs, e.outer_labels))

    def inner(e: Examples, w: nets.Dense, theta: Array, rows: Array) -> Array:
        weights = jax.nn.sigmoid(theta[rows])
        return jnp.mean(weights * losses(w, e.inputs[rows], e.labels[rows])) + penalty(w)

    def outer(e: Examples, w: nets.Dense, theta: Array, rows: Array) -> Array:
        return jnp.mean(losses(w, e.outer_inputs[rows], e.outer_labels[rows]))

    def quality(e: Examples, w: nets.Dense, theta: Array) -> dict[str, Array]:
        tuned = clean(e, w)
        error = nets.error_rate(linear(w, e.test_inputs), e.test_labels)
        return {"tuned": tuned, "shown": jnp.where(jnp.isfinite(tuned), error, jnp.nan)}

    @jax.jit
    def slope(e: Examples, w: nets.Dense) -> tuple[Array, nets.Dense]:
        return jax.value_and_grad(lambda w: clean(e, w) + penalty(w))(w)

    def references(e: Examples) -> dict[str, float]:
        zero, unravel = ravel_pytree(start(e)[0])

        def evaluate(w: np.ndarray) -> tuple[float, np.ndarray]:
            value, found = slope(e, unravel(jnp.asarray(w, jnp.float32)))
            return float(value), np.asarray(ravel_pytree(found)[0], np.float64)

        found = scipy.optimize.minimize(evaluate, np.asarray(zero, np.float64), jac=True, method="L-BFGS-B")
        error = nets.error_rate(linear(unravel(jnp.float32(found.x)), e.test_inputs), e.test_labels)
        return {"clean examples alone": float(error)}

    return Task(start, inner, outer, jax.jit(quality), references)


def regularisation(config: Config) -> Task:
    """A logarithm of a penalty for every feature; labels are 0 and 1."""

    def losses(w: Array, inputs: Array, labels: Array) -> Array:
        return optax.sigmoid_binary_cross_entropy(inputs @ w, labels)

    def start(e: Examples) -> tuple[Array, Array]:
        return jnp.zeros(e.inputs.shape[1]), jnp.full(e.inputs.shape[1], jnp.log(0.1))

    def inner(e: Examples, w: Array, theta: Array, rows: Array) -> Array:
        return jnp.mean(losses(w, e.inputs[rows], e.labels[rows])) + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(e: Examples, w: Array, theta: Array, rows: Array) -> Array:
        return jnp.mean(losses(w, e.outer_inputs[rows], e.outer_labels[rows]))

    def quality(e: Examples, w: Array, theta: Array) -> dict[str, Array]:
        solved = minimum(inner, e, w, theta)
        slope = jax.grad(lambda w: inner(e, w, theta, jnp.arange(len(e.labels))))(solved)
        value = jnp.mean(losses(solved, e.outer_inputs, e.outer_labels))
        # A run that diverged may end at penalties with which there is no minimum to speak of.
        value = jnp.where(jnp.linalg.norm(slope) < 1e-4, value, jnp.nan)
        return {"tuned": value, "shown": value}

    return Task(start, inner, outer, jax.jit(quality), lambda e: {})


def minimum(inner: Callable[..., Array], e: Examples, w: Array, theta: Array, steps: int = 2) -> Array:
    """``w*(θ)`` for logistic regression, by Newton's method from ``w``, with each Hessian four times."""
    whole = jnp.arange(len(e.labels))
    gradient = jax.grad(lambda w: inner(e, w, theta, whole))

    def newton(_: Any, w: Array) -> Array:
        p = jax.nn.sigmoid(e.inputs @ w)
        weighted = (p * (1 - p) / len(p))[:, None] * e.inputs
        H = e.inputs.T @ weighted + jnp.diag(jnp.exp(theta) + 1e-6)
        factor = jax.scipy.linalg.cho_factor(H)
        return jax.lax.fori_loop(0, 4, lambda _, w: w - jax.scipy.linalg.cho_solve(factor, gradient(w)), w)

    return jax.lax.fori_loop(0, steps, newton, w)


def least(task: Task, e: Examples) -> float:
    """The least ``h(θ)`` that L-BFGS finds with hypergradients at the solution, in float64."""
    with jax.enable_x64(True):
        e = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.ndim == 2 else x.dtype), e)
        w, theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), task.start(e))
        whole, held_out = jnp.arange(len(e.labels)), jnp.arange(len(e.outer_labels))

        @jax.jit
        def value(e: Examples, w: Array, theta: Array) -> tuple[Any, Array, Array]:
            def objective(w: Array, theta: Array) -> Array:
                return task.inner(e, w, theta, whole)

            @implicit.minimizer(objective, linear=implicit.Direct())
            def fit(w: Array, theta: Array) -> Array:
                return minimum(task.inner, e, w, theta)

            def h(theta: Array) -> tuple[Array, Array]:
                solved = fit(w, theta)
                return task.outer(e, solved, theta, held_out), solved

            (found, solved), slope = jax.value_and_grad(h, has_aux=True)(theta)
            return found, slope, solved

        def evaluate(theta: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal w
            found, slope, w = value(e, w, jnp.asarray(theta))
            return float(found), np.asarray(slope)

        bounds = [(-16.0, 8.0)] * len(theta)
        found = scipy.optimize.minimize(
            evaluate,
            np.asarray(theta),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 1000},
        )
    if not found.success:
        raise RuntimeError(f"L-BFGS did not find the best penalties: {found.message}")
    return float(found.fun)


TASKS = {"hyper-cleaning": cleaning, "regularisation": regularisation}


def examples(config: Config, directory: str | None, seed: int) -> Examples:
    """The data in a random order; for hyper-cleaning a random part of it, with labels replaced."""
    rng = np.random.default_rng(seed)
    if config.data == "a9a":
        table = data.a9a(directory)
        inputs, labels = table.train_inputs, table.train_labels
        test = table.test_inputs, table.test_labels
    else:
        inputs, labels, *test = workloads.flat(workloads.load(config.data, directory))
    n, m = config.examples
    if config.task == "regularisation":  # the same two sets for all seeds, and so the same least loss
        labels, test = (labels > 0).astype(np.int32), (test[0], (test[1] > 0).astype(np.int32))
        order = np.random.default_rng(0).permutation(len(labels))
        order = np.concatenate([rng.permutation(order[:n]), rng.permutation(order[n : n + m])])
        chosen, held_out = labels[order[:n]], labels[order[n:]]
    else:
        order = rng.permutation(len(labels))[: n + m]
        wrong = rng.random(n) < config.wrong
        chosen = np.where(wrong, rng.integers(0, 10, n), labels[order[:n]]).astype(np.int32)
        held_out = labels[order[n:]]
    arrays = (inputs[order[:n]], chosen, inputs[order[n:]], held_out, *test)
    return Examples(*map(jnp.asarray, arrays))


# ---- runs


class Curve(NamedTuple):
    """A run of a method.

    Attributes:
      seconds: at every point, beside what compiling and judging took.
      evaluations: gradients of single examples up to there.
      shown: what the figure shows.
      tuned: by what step sizes are chosen, at the end; infinite for a run that diverged.
    """

    seconds: np.ndarray
    evaluations: np.ndarray
    shown: np.ndarray
    tuned: float


def runner(config: Config, task: Task, make: Callable[..., bilevel.Solver]) -> Callable[..., Any]:
    """A run of a method, compiled at its first call, of examples, the two rates and a seed."""
    sizes = bilevel.Problem(task.inner, task.outer, *config.examples, config.batch_size)
    work = make(rate=1.0, hyper_rate=1.0).work(sizes)
    steps = (config.budget - work.start) // work.step
    every = max(1, steps // config.points)
    steps = steps // every * every

    @jax.jit
    def run(e: Examples, rate: Array, hyper_rate: Array, key: Array) -> Any:
        solver = make(rate=rate, hyper_rate=hyper_rate)
        return bilevel.solve(
            task.problem(config, e),
            *task.start(e),
            solver,
            steps=steps,
            key=key,
            record=lambda state: (state.params, state.hypers),
            every=every,
        ).recorded

    evaluations = work.start + work.step * np.arange(0, steps + 1, every)

    def timed(e: Examples, rates: tuple[float, float], seed: int, whole: bool = True) -> Curve:
        arguments = (e, *map(jnp.float32, rates), jax.random.key(seed))
        begin = time.perf_counter()
        try:
            recorded = jax.block_until_ready(run(*arguments))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if "ReversalError" not in str(error):
                raise
            recorded = None  # diverged
        # All steps do the same work, so the clock is read once.
        seconds = (time.perf_counter() - begin) * evaluations / evaluations[-1]
        if recorded is None:
            return Curve(seconds, evaluations, np.full(len(evaluations), np.nan), np.inf)
        places = range(len(evaluations)) if whole else [len(evaluations) - 1]
        judged = [task.quality(e, *jax.tree.map(lambda x, k=k: x[k], recorded)) for k in places]
        shown = np.array([float(q["shown"]) for q in judged])
        tuned = float(np.nan_to_num(judged[-1]["tuned"], nan=np.inf))
        return Curve(seconds, evaluations, shown, tuned)

    return timed


Runs = dict[str, Callable[..., Curve]]
Pair = tuple[float, float]


class Tuned(NamedTuple):
    """The rates of ``w`` and ``θ`` that were chosen, and all that were tried."""

    pair: Pair
    rates: tuple[float, ...]
    hyper_rates: tuple[float, ...]


class Result(NamedTuple):
    """What came out for one problem.

    Attributes:
      rates: by method.
      curves: by method, one for every seed.
      least: subtracted from what is shown.
      references: by name, one for every seed.
    """

    rates: dict[str, Tuned]
    curves: dict[str, list[Curve]]
    least: float
    references: dict[str, list[float]]


def tune(config: Config, run: Runs, directory: str | None) -> dict[str, Tuned]:
    """The best rates for every method, of a grid that grows until they are not at its edge."""
    first, *others = ((seed, examples(config, directory, seed)) for seed in TUNED_ON)
    found = {}
    for name, timed in run.items():

        @cache
        def reached(pair: Pair, place: int = 0, timed: Any = timed) -> float:
            seed, e = (first, *others)[place]
            return timed(e, pair, seed, whole=False).tuned

        def stable(pair: Pair, reached: Any = reached) -> bool:
            return all(reached(pair, 1 + k) < np.inf for k in range(len(others)))

        axes = (config.rates, config.hyper_rates)
        best, axes, inside = statistics.widening(axes, reached, stable, config.widened)
        found[name] = Tuned(best, *axes)
        edge = "" if inside else ", at the edge of the grid"
        print(f"{config.task}: {name:<20} rates {best}, tuned to {reached(best):.5f}{edge}", flush=True)
    return found


def compare(
    config: Config, task: Task, run: Runs, rates: dict[str, Tuned], directory: str | None
) -> Result:
    """Runs of all methods, compiled before, from new seeds; the methods take turns."""
    curves: dict[str, list[Curve]] = {name: [] for name in run}
    references = []
    for seed in range(config.seeds):
        e = examples(config, directory, seed)
        references.append(task.references(e))
        for name, timed in run.items():
            curves[name].append(timed(e, rates[name].pair, seed))
    floor = 0.0
    if config.task == "regularisation":
        found = least(task, e)
        floor = min(found, *(np.nanmin(c.shown) for each in curves.values() for c in each))
    return Result(rates, curves, float(floor), {k: [each[k] for each in references] for k in references[0]})


def summary(config: Config, result: Result) -> dict[str, Any]:
    """Medians and quartiles over the seeds, as JSON can hold them."""
    methods = {}
    for name, curves in result.curves.items():
        shown = np.nan_to_num([curve.shown for curve in curves], nan=np.inf) - result.least
        # One of the seeds, so that a run that diverged, infinite from there, is not averaged with another.
        low, median, high = np.quantile(shown, (0.25, 0.5, 0.75), axis=0, method="nearest")
        methods[name] = {
            "rates": result.rates[name].pair,
            "grid": {k: getattr(result.rates[name], k) for k in ("rates", "hyper_rates")},
            "evaluations": curves[0].evaluations,
            "seconds": np.median([curve.seconds for curve in curves], axis=0),
            "median": median,
            "quartiles": [low, high],
            "diverged": np.isinf(shown[:, -1]).sum(),
        }
    return records.plain(
        {
            "config": config,
            "cores": os.cpu_count(),
            "least": result.least,
            "references": {name: np.median(each) for name, each in result.references.items()},
            "methods": methods,
        }
    )


def main(
    configs: Sequence[Config] = FULL, directory: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """Run both comparisons and print them; write the figure and its record if there is a folder for it."""
    record = {}
    for config in configs:
        task = TASKS[config.task](config)
        run = {name: runner(config, task, make) for name, make in methods(config).items()}
        rates = tune(config, run, directory)
        record[config.task] = summary(config, compare(config, task, run, rates, directory))
    for name, each in record.items():
        unit = "test error" if name == "hyper-cleaning" else "suboptimality"
        print(f"\n{name}: {unit} at the end, median [quartiles] of {each['config']['seeds']} seeds")
        for method, found in each["methods"].items():
            low, middle, high = (
                "infinite" if x is None else f"{x:.3g}"
                for x in (found["quartiles"][0][-1], found["median"][-1], found["quartiles"][1][-1])
            )
            print(f"{method:<20}{middle:>10} [{low}, {high}]  {found['evaluations'][-1]:>9} evaluations, "
                  f"{found['seconds'][-1]:.2f} s, {found['diverged']} diverged")  # fmt: skip
        for reference, value in each["references"].items():
            print(f"{reference:<20}{value:>10.3g}")
    if output is not None:
        draw(Path(output) / "bilevel.png", record)
    return record


def draw(path: Path, record: dict[str, Any]) -> None:
    """A row for every problem; by gradient evaluations and by time."""
    figure, axes = figures.figure(len(record), 2, width=5.6, height=3.7)
    shades = figures.shades(len(ALL))
    for row, (name, each) in zip(axes, record.items()):
        for method, found in each["methods"].items():
            k = ALL.index(method)
            look = figures.look(
                k, color=shades[k], linewidth=1.3, marker="osv^Dx+*P"[k], markersize=4, label=method
            )
            # Without the start, which is the same for all; a run that diverged ends.
            by = np.array(found["evaluations"])[1:] / 1e6, np.array(found["seconds"])[1:]
            low, median, high = np.array([found["median"], *found["quartiles"]], float)[[1, 0, 2], 1:]
            for place, x in zip(row, by):
                place.plot(x, median, **look)
                place.fill_between(x, low, high, color=shades[k], alpha=0.15, linewidth=0)
        for (reference, value), place in itertools.product(each["references"].items(), row):
            place.axhline(value, color="0.3", linewidth=0.9, linestyle=(0, (6, 4)), label=reference)
        cleaning, data = name == "hyper-cleaning", each["config"]["data"]
        units = "gradients of single examples, millions", "time on the machine of the record, s"
        for place, xlabel in zip(row, units):
            place.set(
                title=f"Hyper-cleaning, {data}" if cleaning else f"Regularisation, {data}",
                xlabel=xlabel,
                ylabel="test error" if cleaning else "suboptimality of h(θ), nats",
                yscale="linear" if cleaning else "log",
            )
            place.grid(alpha=0.25, which="both")
    handles = {
        label: line for place in axes[:, 0] for line, label in zip(*place.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    configs, run = cli.parse("bilevel", __doc__, FULL, arguments, fast=lambda _: FAST, flags=("data_dir",))
    return main(configs, run.data_dir, run.output)


if __name__ == "__main__":
    command()
