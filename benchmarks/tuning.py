"""Hypergradients against searches for hyperparameters, on the same noisy objective and at equal cost.

A network is trained by AdamW from weights and minibatches that are drawn anew for every run, and the loss
on held-out data is to become small.  `hypergrad.tune` is given the middle of the ranges, and Optuna's
searches the ranges.  Run it with

    pip install "hypergrad-jax[bench-tuning]"
    python -m benchmarks.tuning            # about an hour
    python -m benchmarks.tuning --show     # the record's tables for the documentation
    python -m benchmarks.tuning --fast     # seconds, on the digits; writes nothing

============  =========================================================================================
budget        what a search may spend
============  =========================================================================================
equal runs    as many runs as `tune`, of which a hypergradient counts as many as it takes times as long
equal time    as much processor time as `tune`; here the time counts that a search takes to think
many times    ten times either (``--times``), whatever is spent first
============  =========================================================================================

A search whose time is over goes on until it has made as many runs as `tune`, for ten minutes at most
(``--patience``).  Times are processor time of a single core, without compilation.  Every trial of a search
is one run of new random numbers; at the end of a budget its best trials are run again with keys that all of
them share, as `tune` does it, and this is part of the budget.  The results are then judged on 20 seeds and
on examples that nobody has seen.
"""

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg
from benchmarks.machine import describe_machine, on_one_core, progress, say, versions
from experiments.common import records
from experiments.common.statistics import Difference, paired, plus_minus, standard_error
from experiments.transformer import between, library_codes
from hypergrad import data, nets

RESULTS = Path(__file__).parent / "results" / "tuning.json"
UNSEEN = 10_000  # seeds from here on judge
AGAIN, KEYS = 5, 6  # how many of the best trials are run again, and with how many keys
WORST = 10.0  # what a run counts that diverges, and the most that any counts
SEARCHES = {
    "TPE": "TPESampler",
    "CMA-ES": "CmaEsSampler",
    "Gaussian process": "GPSampler",
    "Sobol": "QMCSampler",
}
TUNE = "hypergradients"
BUDGETS = ("equal runs", "equal time", "many times")

Hypers = dict[str, Any]


# ---- what is trained


class Task(NamedTuple):
    """A network with its data.

    Attributes:
      init: from a key to the parameters, a tuple of ``layers`` parts.
      loss: of parameters and rows of inputs and labels.
      parts: inputs and labels to train on, to minimize the loss of, and to judge by.
      batch: rows of a minibatch.
    """

    init: Callable[[Array], Any]
    loss: Callable[[Any, Array, Array], Array]
    parts: list[tuple[Array, Array]]
    batch: int

    @property
    def layers(self) -> int:
        """Parts of the parameters."""
        return len(jax.eval_shape(self.init, jax.random.key(0)))

    def problem(self, space: "Space", judged: bool = False) -> "Knotted":
        """What is to become small, or what is judged by."""
        inputs, labels = self.parts[0]

        def batches(key: Array, steps: int) -> tuple[Array, Array]:
            rows = jax.random.randint(key, (steps, self.batch), 0, len(inputs))
            return inputs[rows], labels[rows]

        return Knotted(
            self.init,
            lambda params, meta, batch: self.loss(params, *batch),
            batches,
            lambda params: self.loss(params, *self.parts[2 if judged else 1]),
            meta=space,
        )


def pictures(dataset: data.Dataset, net: tuple[Any, Any], batch: int, flat: bool) -> Task:
    """A network on pictures, those of 28 x 28 at half their size."""

    def small(images: np.ndarray) -> np.ndarray:
        if images.shape[1] == 28:
            images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        return (images - 0.3) / 0.3

    images, labels = small(dataset.train_images), dataset.train_labels
    order = np.random.default_rng(0).permutation(len(images))
    held = min(2_000, len(images) // 4)
    test = slice(0, 5_000)
    rows = [
        (images[order[held:]], labels[order[held:]]),
        (images[order[:held]], labels[order[:held]]),
        (small(dataset.test_images)[test], dataset.test_labels[test]),
    ]
    shaped = [
        (jnp.asarray(x.reshape(len(x), -1) if flat else x[..., None], jnp.float32), jnp.asarray(y))
        for x, y in rows
    ]
    return Task(net[0], lambda params, x, y: nets.cross_entropy(net[1](params, x), y), shaped, batch)


def characters(length: int, width: int, batch: int) -> Task:
    """A transformer of two blocks that predicts the next character of source texts."""
    codes, vocabulary = library_codes(400_000)
    cut = np.split(codes, [len(codes) * 8 // 10, len(codes) * 9 // 10])
    parts = [tuple(map(jnp.asarray, data.windows(part, length, length))) for part in cut]
    parts = [parts[0], *((x[:256], y[:256]) for x, y in parts[1:])]
    init, apply = nets.transformer(len(vocabulary), length, width=width, depth=2, heads=2)
    return Task(init, lambda params, x, y: nets.cross_entropy(apply(params, x), y), parts, batch)


TASKS: dict[str, Callable[[], Task]] = {
    "MLP": lambda: pictures(data.fashion_mnist(), nets.mlp((196, 32, 32, 32, 10)), 64, True),
    "ConvNet": lambda: pictures(
        data.fashion_mnist(), nets.convnet((14, 14, 1), 10, width=4, depth=3), 16, False
    ),
    "transformer": lambda: characters(16, 16, 8),
}
FAST = {"MLP, digits": lambda: pictures(data.digits(), nets.mlp((64, 16, 10)), 32, True)}


# ---- what is tuned


class Space(NamedTuple):
    """Hyperparameters, all of them between 0 and 1 in logarithms of their ranges.

    Attributes:
      start: the middle of the ranges: numbers, values at knots ``(K,)``, or tuples of them by layer.
      fixed: what is not tuned.
    """

    start: Hypers
    fixed: Hypers

    @property
    def count(self) -> int:
        """How many numbers."""
        return sum(np.size(x) for x in jax.tree.leaves(self.start))

    def hypers(self, place: Array) -> Hypers:
        """Hyperparameters from coordinates ``(count,)`` between 0 and 1."""
        leaves, structure = jax.tree.flatten(self.start)
        ends = np.cumsum([np.size(x) for x in leaves])[:-1]
        parts = [x.reshape(np.shape(leaf)) for x, leaf in zip(jnp.split(place, ends), leaves)]
        found = jax.tree.unflatten(structure, parts)
        return {name: jax.tree.map(lambda u, name=name: valued(name, u), x) for name, x in found.items()}

    def whole(self, hypers: Mapping[str, Any], steps: int) -> Hypers:
        """With what is fixed, and with values at every step where there are knots."""

        def at_every_step(name: str, x: Any) -> Any:
            if not jnp.ndim(x):
                return x
            return 1 - between(1 - x, steps) if name in BETAS else between(x, steps)

        return self.fixed | {
            name: jax.tree.map(lambda x, name=name: at_every_step(name, x), value)
            for name, value in hypers.items()
        }


BETAS = ("b1", "b2")
RANGES = {"learning_rate": (1e-4, 1.0), "b1": (1e-3, 1.0), "b2": (1e-3, 1.0), "weight_decay": (1e-6, 1.0)}


def valued(name: str, place: Any) -> Any:
    """A hyperparameter from its place between 0 and 1; betas by what they lack to 1."""
    low, high = map(float, np.log(RANGES[name]))
    value = jnp.exp(low + (high - low) * place)
    return jnp.maximum(1 - value, 0) if name in BETAS else value


def spaces(layers: int) -> list[Space]:
    """Constants; a learning rate in knots; rates and momenta in knots by layer, and weight decays."""
    middle = {name: np.float32(valued(name, 0.5)) for name in RANGES}
    usual = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}

    def knots(name: str, count: int) -> Any:
        return np.full(count, middle[name], np.float32)

    def without(*names: str) -> Hypers:
        return {name: x for name, x in usual.items() if name not in names}

    by_layer = {name: (knots(name, 200 // layers),) * layers for name in ("learning_rate", "b1")}
    by_layer["weight_decay"] = (middle["weight_decay"],) * layers
    return [
        Space(middle, {}),
        Space({"learning_rate": knots("learning_rate", 30)}, without("learning_rate")),
        Space(by_layer, without(*by_layer)),
    ]


@dataclass(frozen=True)
class Knotted(hg.Problem):
    """A problem whose hyperparameters are given in knots; its ``meta`` is the `Space`."""

    def train(self, hypers: Any, key: Any = None, *, steps: int, **settings: Any) -> hg.Trained:
        """One run."""
        plain = hg.Problem(self.init, self.loss, self.batches, self.validation)
        return plain.train(self.meta.whole(hypers, steps), key, steps=steps, **settings)


# ---- what a run costs


class Runs(NamedTuple):
    """Compiled runs, and how long they take.

    Attributes:
      score: of coordinates and a key.
      judge: of hyperparameters and a key, on unseen examples.
      seconds: of a run.
      ratio: how many runs a hypergradient takes.
    """

    score: Callable[[Array, Array], float]
    judge: Callable[[Hypers, Array], float]
    seconds: float
    ratio: float


def compiled(task: Task, space: Space, steps: int) -> Runs:
    """Compile a run, its judgement and its hypergradient, and time them."""
    settings: Any = {"steps": steps, "optimizer": hg.adamw(), "adjoint": hg.Stored()}

    # The data are an argument: as constants they would be looked through by the compiler.
    def objective(hypers: Hypers, key: Array, parts: Any, judged: bool = False) -> Array:
        return task._replace(parts=parts).problem(space, judged).objective(**settings)(hypers, key)

    run = jax.jit(lambda place, key, parts: objective(space.hypers(place), key, parts))
    judged = jax.jit(lambda hypers, key, parts: objective(hypers, key, parts, True))
    slope = jax.jit(jax.value_and_grad(objective))
    middle, rest = jnp.full(space.count, 0.5), (jax.random.key(0), task.parts)
    seconds = quickest(run, middle, *rest)

    def finite(function: Callable[..., Array]) -> Callable[..., float]:
        def number(*arguments: Any) -> float:
            try:
                with hg.readable_errors():
                    value = float(function(*arguments, task.parts))
            except ArithmeticError:  # it has diverged
                return WORST
            return min(value, WORST) if np.isfinite(value) else WORST

        return number

    times_as_long = quickest(slope, space.hypers(middle), *rest) / seconds
    return Runs(finite(run), finite(judged), seconds, times_as_long)


def quickest(function: Callable[..., Any], *arguments: Any) -> float:
    """The least processor time of five calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        begin = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - begin)
    return min(times)


# ---- contestants


class Settings(NamedTuple):
    """What `hypergrad.tune` is asked for, how often, and what the searches may spend.

    Attributes:
      steps: of a run.
      trials: of `tune`.
      meta_steps: of `tune`.
      repeats: of everything.
      times: as much as `tune` a search may spend at last.
      patience: minutes in which a search may make as many runs as `tune`.
    """

    steps: int
    trials: int
    meta_steps: int
    repeats: int
    times: int
    patience: int


def tuned(task: Task, space: Space, settings: Settings, runs: Runs, repeat: int) -> tuple[Hypers, float]:
    """What hypergradients find, and how many runs that took at most."""
    found = hg.tune(
        task.problem(space), hypers=space.start, steps=settings.steps, optimizer=hg.adamw(),
        learn=list(space.start), trials=settings.trials, meta_steps=settings.meta_steps,
        adjoint=hg.Stored(), key=jax.random.key(repeat), progress=False,
    )  # fmt: skip
    hypers = {name: found.hypers[name] for name in space.start}
    scored = KEYS * (1 + settings.trials + len(found.scores))
    return hypers, scored + settings.meta_steps * runs.ratio


class Trial(NamedTuple):
    """One of a search: its coordinates, its score, and the runs and the time that are spent with it."""

    place: np.ndarray
    score: float
    runs: int
    seconds: float

    def reached(self, limit: tuple[float, float]) -> bool:
        """Whether so many runs or so much time is spent."""
        return self.runs >= limit[0] or self.seconds >= limit[1]


def searched(
    name: str, space: Space, runs: Runs, least: tuple[float, float], most: tuple[float, float], repeat: int
) -> list[Trial]:
    """A search of Optuna, until so many runs or so much time is spent.

    Args:
      name: of the search.
      space: what it searches.
      runs: compiled runs.
      least: runs that it makes in any case, if they take no more than so many seconds.
      most: runs and seconds.
      repeat: seed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    options: dict[str, Any] = {"TPE": {"multivariate": True}, "Sobol": {"scramble": True}}.get(name, {})
    study = optuna.create_study(sampler=getattr(optuna.samplers, SEARCHES[name])(seed=repeat, **options))
    names = [str(k) for k in range(space.count)]
    kinds = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    trials: list[Trial] = []
    thought = 0.0
    while not (trials and _spent(trials, least, most)):
        begin = time.process_time()
        trial = study.ask(kinds)
        thought += time.process_time() - begin
        place = np.asarray([trial.params[name] for name in names], np.float32)
        score = runs.score(jnp.asarray(place), jax.random.key(repeat * 1_000_000 + len(trials) + 1))
        begin = time.process_time()
        study.tell(trial, score)
        thought += time.process_time() - begin
        done = len(trials) + 1
        trials.append(Trial(place, score, done, thought + done * runs.seconds))
    return trials


def _spent(trials: Sequence[Trial], least: tuple[float, float], most: tuple[float, float]) -> bool:
    """Whether the last trial is the last that a search may make."""
    return trials[-1].reached(least) and trials[-1].reached(most)


def best_of(trials: Sequence[Trial], runs: Runs, most: tuple[float, float]) -> np.ndarray:
    """The coordinates that a search ends with at the end of a budget."""
    reserved = AGAIN * KEYS
    within = [
        t for t in trials if t.runs + reserved <= most[0] and t.seconds + reserved * runs.seconds <= most[1]
    ]
    best = sorted(within or trials[:1], key=lambda t: t.score)[:AGAIN]
    keys = [jax.random.key(UNSEEN - 1 - k) for k in range(KEYS)]
    return min(best, key=lambda t: np.mean([runs.score(jnp.asarray(t.place), key) for key in keys])).place


# ---- a comparison


def judged(runs: Runs, hypers: Hypers, unseen: int) -> list[float]:
    """Losses on unseen seeds."""
    return [runs.judge(hypers, jax.random.key(UNSEEN + k)) for k in range(unseen)]


def compared(task: Task, space: Space, settings: Settings, unseen: int) -> dict[str, Any]:
    """Losses on unseen seeds ``(repeats, unseen)`` of everyone at the end of every budget."""
    runs = compiled(task, space, settings.steps)
    losses: dict[str, Any] = {TUNE: []}
    spent_on: dict[str, Any] = {name: [] for name in SEARCHES}
    spent_by_us = []
    for repeat in range(settings.repeats):
        hypers, spent = tuned(task, space, settings, runs, repeat)
        spent_by_us.append(spent)
        losses[TUNE].append(judged(runs, hypers, unseen))
        time_spent = spent * runs.seconds
        limits = {
            "equal runs": (spent, np.inf),
            "equal time": (np.inf, time_spent),
            "many times": (settings.times * spent, settings.times * time_spent),
        }
        for name in SEARCHES:
            progress(f"{name}, {space.count} hyperparameters, repeat {repeat}")
            trials = searched(
                name, space, runs, (spent, 60 * settings.patience), limits["many times"], repeat
            )
            spent_on[name].append([len(trials), trials[-1].seconds / time_spent])
            for budget, limit in limits.items():
                found = None
                if trials[-1].reached(limit):
                    place = best_of(trials, runs, limit)
                    found = judged(runs, space.hypers(jnp.asarray(place)), unseen)
                losses.setdefault(f"{name}, {budget}", []).append(found)
    return {
        "hyperparameters": space.count,
        "times": settings.times,
        "seconds_of_a_run": runs.seconds,
        "runs_of_a_hypergradient": runs.ratio,
        "runs": spent_by_us,
        "trials": spent_on,
        "losses": losses,
        "start": judged(runs, space.hypers(jnp.full(space.count, 0.5)), unseen),
    }


def tuned_again(
    task: Task, space: Space, settings: Settings, unseen: int, row: Mapping[str, Any]
) -> dict[str, Any]:
    """A comparison in which hypergradients have had another turn; what `tune` is charged is the same."""
    runs = compiled(task, space, settings.steps)
    found = [tuned(task, space, settings, runs, repeat)[0] for repeat in range(settings.repeats)]
    losses = {**row["losses"], TUNE: [judged(runs, hypers, unseen) for hypers in found]}
    return {**row, "losses": losses}


def over_seeds(losses: Sequence[Sequence[float] | None]) -> np.ndarray | None:
    """Means over the repeats, by seed; None if a repeat is missing."""
    return None if any(x is None for x in losses) else np.mean(np.asarray(losses, np.float64), axis=0)


def differences(row: Mapping[str, Any], budget: str) -> dict[str, Difference | None]:
    """Hypergradients less every search at the end of a budget, on the same seeds."""
    ours = over_seeds(row["losses"][TUNE])
    found = {}
    for name in SEARCHES:
        theirs = over_seeds(row["losses"][f"{name}, {budget}"])
        found[name] = None if theirs is None else paired(ours, theirs)
    return found


def table(rows: Mapping[str, Any]) -> str:
    """All comparisons as text."""
    lines = []
    for cell, row in rows.items():
        ours = over_seeds(row["losses"][TUNE])
        assert ours is not None
        lines.append(
            f"{cell}: {row['hyperparameters']} hyperparameters, {np.mean(row['runs']):.0f} runs of "
            f"{1e3 * row['seconds_of_a_run']:.1f} ms, of which a hypergradient takes "
            f"{row['runs_of_a_hypergradient']:.1f}; loss from {np.mean(row['start']):.3f} to "
            f"{plus_minus(ours.mean(), standard_error(ours), '.3f')}"
        )
        for budget in BUDGETS:
            told = ", ".join(
                f"{k} {x or '(did not get there)'}" for k, x in differences(row, budget).items()
            )
            lines.append(f"    less that of a search, {budget}: {told}")
    return "\n".join(lines)


def markdown(rows: Mapping[str, Any], budget: str) -> str:
    """What hypergradients reach, and that less what a search reaches: a table of the documentation."""
    lines = [f"| network, hyperparameters | loss | {' | '.join(f'less {name}' for name in SEARCHES)} |"]
    lines.append("|---|---|" + "---|" * len(SEARCHES))
    for cell, row in rows.items():
        ours = over_seeds(row["losses"][TUNE])
        assert ours is not None
        told = [
            plus_minus(ours.mean(), standard_error(ours), ".3f"),
            *(
                "" if x is None else plus_minus(x.mean, x.standard_error, "+.3f")
                for x in differences(row, budget).values()
            ),
        ]
        lines.append(f"| {cell.split(',')[0]}, {row['hyperparameters']} | {' | '.join(told)} |")
    return "\n".join(lines)


def wins_from(rows: Mapping[str, Any], task: str, budget: str) -> int | None:
    """From how many hyperparameters on hypergradients are better than every search; None for nowhere."""
    mine = sorted(
        (r for cell, r in rows.items() if cell.startswith(task)), key=lambda r: r["hyperparameters"]
    )
    least = None
    for row in reversed(mine):
        if any(x is not None and x.sign() >= 0 for x in differences(row, budget).values()):
            break
        least = row["hyperparameters"]
    return least


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one small network and size; writes nothing")
    parser.add_argument("--show", action="store_true", help="print the tables of the record")
    parser.add_argument("--again", action="store_true", help="tune again where searches are on record")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--sizes", nargs="+", type=int, choices=(0, 1, 2), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of a run")
    parser.add_argument("--trials", type=int, default=16, help="of hypergrad.tune before hypergradients")
    parser.add_argument("--meta-steps", type=int, default=40, help="of hypergrad.tune")
    parser.add_argument("--repeats", type=int, default=1, help="of every tuning")
    parser.add_argument(
        "--times", type=int, default=10, help="as much as others a search may spend at last"
    )
    parser.add_argument(
        "--patience", type=int, default=10, help="minutes in which a search may make as many runs as tune"
    )
    parser.add_argument("--unseen", type=int, default=20, help="seeds that judge")
    parser.add_argument("--core", type=int, default=0, help="the core that everything runs on")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"record, default {RESULTS.name}")
    args = parser.parse_args(arguments)
    if args.fast:
        args.steps, args.trials, args.meta_steps, args.unseen, args.sizes = 10, 2, 2, 3, [0]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write the record after every comparison."""
    args = parse(arguments)
    if args.show:
        rows = records.read(args.output)["rows"]
        for budget in BUDGETS:
            say(f"{budget}\n\n{markdown(rows, budget)}\n")
        return 0
    on_one_core(args.core)
    if importlib.util.find_spec("optuna") is None:
        say("Optuna is missing: pip install 'hypergrad-jax[bench-tuning]'; nothing is compared")
        return 0 if args.fast else 1
    settings = Settings(args.steps, args.trials, args.meta_steps, args.repeats, args.times, args.patience)
    tasks = FAST if args.fast else {name: TASKS[name] for name in args.tasks}
    rows = {}
    asked = settings._asdict() | {"unseen": args.unseen}
    del asked["times"], asked["patience"]  # which may be others for every comparison
    if not args.fast and args.output.exists():
        before = records.read(args.output)
        rows = before["rows"] if before["config"] == records.plain(asked) else {}
    for name, make in tasks.items():
        task = make()
        for size in args.sizes:
            cell = f"{name}, size {size}"
            if cell in rows and not args.again:
                continue
            begin, space = time.perf_counter(), spaces(task.layers)[size]
            if cell in rows:
                row = tuned_again(task, space, settings, args.unseen, rows[cell])
            else:
                row = compared(task, space, settings, args.unseen)
            rows[cell] = records.plain(row)
            progress(f"{cell}: {time.perf_counter() - begin:.0f} s")
            say(table({cell: rows[cell]}))
            if not args.fast:
                machine = describe_machine() | {
                    "packages": versions(("jaxlib", "optuna", "cmaes", "torch"))
                }
                records.write(args.output, {"config": asked, "machine": machine, "rows": rows})
    for name in tasks:
        for budget in BUDGETS:
            least = wins_from(rows, name, budget)
            where = "at no size" if least is None else f"from {least} hyperparameters on"
            say(f"{name}, {budget}: hypergradients are better than every search {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
