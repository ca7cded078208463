"""Which optimizer is best depends on what is tuned: ε too, by hypergradients and by quasi-random search.

Choi, Shallue, Nado, Lee, Maddison and Dahl (2019): an optimizer contains another one where some limit of
its hyperparameters is that one, SGD ⊆ Momentum ⊆ {RMSProp with momentum, Adam} and SGD ⊆ Nesterov ⊆ NAdam,
the last steps by large ε; so no optimizer should do worse than one it contains, where everything is tuned.
This program tunes and compares, and says of every such pair whether it holds.

What is tuned, in coordinates in which the hyperparameters depend little on each other:

======  ========  ================================================================================
symbol  name      meaning
======  ========  ================================================================================
``γ``   momentum  momentum, or ``β1`` of Adam and NAdam
``ε̃``   eps       ``ε``, or ``√ε`` where it stands inside the root: in units of the gradient
``r``   rate      ``α / ((1-γ) ε̃)``; without ``1-γ`` where averages of gradients, not sums, are kept,
                  and without ``ε̃`` where it is not tuned
======  ========  ================================================================================

In the limit of large ``ε`` only ``r`` and ``γ`` are left, and so is Momentum or Nesterov, but for the first
steps: there Adam and NAdam correct for an average that began at zero.  Momenta stay above 0.25, so that SGD
too is contained only nearly.  All learning rates fall linearly to zero, ``α_t = α (1 - t/T)``; ``β2`` and
decay stay at their defaults.  All tuners minimise the same validation loss after training, from the same
seeds, and choose the best of all settings they have tried.  Among those of an optimizer are the settings
that its tuner has found for the optimizers it contains, so that not to find these again does not count.

    python -m experiments.epsilon                    # a quarter of an hour on two cores, mostly compiling
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures, records, workloads
from experiments.common.cli import option
from experiments.common.statistics import paired, plus_minus, standard_error
from hypergrad import constraints, data, files, nets

UNSEEN = 10_000  # seeds from here on are used by neither tuner
CHANCE = 0.9  # error of a run that diverged
LEAST_MOMENTUM = 0.26
CONSTRAINTS = {
    "rate": constraints.positive,
    "eps": constraints.positive,
    "momentum": constraints.interval(0.25, 1.0),  # the buffers of exact reversal have room for 2.1 bits
}
CHUNK = 16  # trainings that run at a time


@dataclass(frozen=True)
class Method:
    """An optimizer and how its hyperparameters are to be read."""

    optimizer: Callable[[], Any]
    momentum: str | None = None  # name of γ
    sums: bool = False  # of gradients are kept, not averages
    eps_power: float | None = None  # ε̃ = ε ** eps_power


METHODS = {
    "SGD": Method(hg.sgd),
    "Momentum": Method(hg.heavy_ball, "momentum", sums=True),
    "Nesterov": Method(hg.nesterov, "momentum", sums=True),
    "RMSProp": Method(hg.rmsprop_momentum, "momentum", sums=True, eps_power=0.5),
    "Adam": Method(hg.adam, "b1", eps_power=1.0),
    "NAdam": Method(hg.nadam, "b1", eps_power=1.0),
}
TUNED_EPS = ", ε"
CONTESTANTS = (
    "SGD", "Momentum", "Nesterov", "RMSProp", "RMSProp, ε", "Adam", "Adam, ε", "NAdam", "NAdam, ε",
)  # fmt: skip
PAIRS = (  # the first is contained in the second, in the limit of large ε or at the default one
    ("SGD", "Momentum"),
    ("SGD", "Nesterov"),
    ("Momentum", "RMSProp, ε"),
    ("Momentum", "Adam, ε"),
    ("Nesterov", "NAdam, ε"),
    ("RMSProp", "RMSProp, ε"),
    ("Adam", "Adam, ε"),
    ("NAdam", "NAdam, ε"),
)
# Ranges of the searches, log-uniform; of momentum, the range of 1 - γ.  The hypergradients may leave them.
FALL = (0.02, 0.7)
RATE = {"plain": (1e-2, 30.0), "adaptive": (1e-4, 1e-1), "tuned eps": (1e-1, 1e3)}
EPS = (1e-5, 1.0)
TUNERS = ("hypergradients", "search", "longer search")


@dataclass(frozen=True)
class Workload:
    """Data and network."""

    data: str
    net: str
    steps: int
    batch_size: int
    train: int  # rows of the training images that are trained on; those after them validate
    validation: int
    test: int


WORKLOADS = (
    Workload("digits", "MLP", 100, 64, 1137, 300, 360),
    Workload("fashion-mnist", "MLP", 100, 64, 5000, 1000, 4000),
    Workload("digits", "ConvNet", 60, 32, 1137, 300, 360),
    Workload("fashion-mnist", "ConvNet", 60, 32, 5000, 1000, 4000),
)


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    workloads: tuple[Workload, ...] = WORKLOADS
    contestants: tuple[str, ...] = CONTESTANTS
    first_runs: int = option(8, "of the search, the best of which is where the hypergradients start")
    meta_steps: int = 16
    meta_step: float = option(0.3, "of Adam in the logarithms, decayed to 0")
    hypergradient_cost: int = option(4, "in plain trainings, what the longer search takes it to be")
    tuning_seeds: int = option(2, "every run of a tuner is so many trainings")
    judged_on: int = 8
    seed: int = 0

    @property
    def runs(self) -> int:
        """Of each tuner."""
        return self.first_runs + self.meta_steps

    @property
    def longer_runs(self) -> int:
        """Of the search that takes as long as the hypergradients."""
        return self.first_runs + self.hypergradient_cost * self.meta_steps


class Examples(NamedTuple):
    """Images, centred, and labels."""

    images: Array
    labels: Array


class Setting(NamedTuple):
    """What a workload consists of."""

    train: Examples
    validation: Examples
    test: Examples
    init: Callable[..., Any]
    apply: Callable[..., Array]


class Start(NamedTuple):
    """What chance decides in a training."""

    params: Any
    rows: Array  # (steps, batch_size), of the training images


class Compiled(NamedTuple):
    """What is made once for an optimizer on a workload; see the functions that make these."""

    setting: Setting
    tuning: Start  # for the seeds of the tuners
    unseen: Start
    measure: Callable[[Any, Examples], tuple[np.ndarray, np.ndarray]]
    trainings: Callable[[Mapping[str, np.ndarray], Start], Any]
    hypergradient: Callable[[Mapping[str, Array], Start], tuple[Array, dict[str, Array]]]


class Tried(NamedTuple):
    """What a tuner has tried: coordinates by name, ``(runs,)``, and losses, infinite if diverged."""

    points: dict[str, np.ndarray]
    losses: np.ndarray

    def first(self, count: int) -> "Tried":
        """Only the first runs."""
        return Tried({name: x[:count] for name, x in self.points.items()}, self.losses[:count])

    def then(self, other: "Tried") -> "Tried":
        """These runs and others after them."""
        points = {name: np.concatenate([x, other.points[name]]) for name, x in self.points.items()}
        return Tried(points, np.concatenate([self.losses, other.losses]))

    def best(self) -> dict[str, np.ndarray]:
        """The point with the least loss."""
        return {name: x[np.argmin(self.losses)] for name, x in self.points.items()}


class Outcome(NamedTuple):
    """A tuned optimizer, and how it does from unseen seeds."""

    hypers: dict[str, np.ndarray]
    tuning_losses: np.ndarray  # (runs,), as tried
    validation_loss: np.ndarray  # (judged_on,) from here
    validation_error: np.ndarray
    test_error: np.ndarray
    seconds: np.ndarray  # that tuning took, with compiling


class Verdict(NamedTuple):
    """Error of the general optimizer less that of the special one."""

    difference: float
    standard_error: float
    worse: bool
    better: bool


def hypers(name: str, point: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a contestant's optimizer at given coordinates; differentiable."""
    method = METHODS[name.removesuffix(TUNED_EPS)]
    rate = point["rate"] * point.get("eps", 1.0)
    if method.sums:
        rate = rate * (1 - point["momentum"])
    result = {"learning_rate": rate}
    if method.momentum is not None:
        result[method.momentum] = point["momentum"]
    if method.eps_power is not None:
        default = jnp.full_like(rate, method.optimizer().hypers["eps"])
        result["eps"] = point["eps"] ** (1 / method.eps_power) if "eps" in point else default
    return result


def quasi_random(name: str, count: int, seed: int) -> dict[str, np.ndarray]:
    """The first points of a scrambled Halton sequence over the ranges of a contestant."""
    method = METHODS[name.removesuffix(TUNED_EPS)]
    if name.endswith(TUNED_EPS):
        ranges = {"rate": RATE["tuned eps"], "eps": EPS}
    else:
        ranges = {"rate": RATE["plain" if method.eps_power is None else "adaptive"]}
    if method.momentum is not None:
        ranges["momentum"] = FALL
    units = scipy.stats.qmc.Halton(len(ranges), rng=np.random.default_rng(seed)).random(count)
    points = {k: low * (high / low) ** u for (k, (low, high)), u in zip(ranges.items(), units.T)}
    if "momentum" in points:
        points["momentum"] = 1 - points["momentum"]
    return {name: np.asarray(x, np.float32) for name, x in points.items()}


def verdict(special: np.ndarray, general: np.ndarray) -> Verdict:
    """Compare errors ``(n,)`` seed by seed: worse, or better, by more than two standard errors?"""
    found = paired(general, special)
    return Verdict(*found, found.sign() > 0, found.sign() < 0)


def setting(workload: Workload, directory: str | None) -> Setting:
    """Load the data, centre it, and make the network."""
    loaded = workloads.load(workload.data, directory)
    images, test = loaded.train_images, loaded.test_images[: workload.test]
    if workload.net == "MLP":
        init, apply = nets.mlp([images[0].size, 32 if workload.data == "digits" else 50, loaded.classes])
    else:
        if workload.data != "digits":  # a convolution of 28x28 pixels takes four times as long
            images, test = (x.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) for x in (images, test))
        init, apply = nets.convnet((*images.shape[1:], 1), loaded.classes, width=8, depth=2)
    train = slice(workload.train)
    validation = slice(workload.train, workload.train + workload.validation)
    mean = images[train].mean(axis=0)
    return Setting(
        Examples(jnp.asarray(images[train] - mean), jnp.asarray(loaded.train_labels[train])),
        Examples(jnp.asarray(images[validation] - mean), jnp.asarray(loaded.train_labels[validation])),
        Examples(jnp.asarray(test - mean), jnp.asarray(loaded.test_labels[: workload.test])),
        init,
        apply,
    )


def starts(workload: Workload, s: Setting, keys: Array) -> Start:
    """Weights and minibatches for every key, ``(n, ...)``."""

    @jax.jit
    @jax.vmap
    def start(key: Array) -> Start:
        sizes = workload.train, workload.batch_size, workload.steps
        return Start(*workloads.start_and_rows(s.init, key, *sizes))

    return start(keys)


def trainer(workload: Workload, s: Setting, optimizer: Any, adjoint: Any) -> Callable[..., Any]:
    """Trained parameters as a function of examples, hyperparameters and start."""
    shape = 1 - jnp.arange(workload.steps) / workload.steps

    def run(examples: Examples, hypers: dict[str, Array], start: Start) -> Any:
        def loss(params: Any, meta: Any, rows: Array) -> Array:
            return workloads.minibatch_loss(s.apply, params, examples, rows)

        hypers = {**hypers, "learning_rate": hypers["learning_rate"] * shape}
        options = {"steps": workload.steps, "optimizer": optimizer, "adjoint": adjoint}
        return hg.train(loss, start.params, hypers, None, start.rows, **options).params

    return run


def trainings(workload: Workload, s: Setting, optimizer: Any) -> Callable[..., Any]:
    """Train with each of the hyperparameters ``(n,)`` from each of the starts, in chunks."""
    # Floats may overflow here: a diverged run just loses.
    run = jax.jit(jax.vmap(trainer(workload, s, optimizer, hg.Stored()), in_axes=(None, 0, 0)))

    def many(hypers: Mapping[str, np.ndarray], start: Start) -> Any:
        seeds, parts = len(start.rows), []
        count = seeds * len(hypers["learning_rate"])
        for first in range(0, count, CHUNK):
            pairs = np.arange(first, first + CHUNK) % count  # the last chunk is filled up
            settings = {k: jnp.asarray(x)[pairs // seeds] for k, x in hypers.items()}
            parts.append(run(s.train, settings, jax.tree.map(lambda x, k=pairs % seeds: x[k], start)))
        return jax.tree.map(lambda *x: jnp.concatenate(x)[:count], *parts)

    return many


def hypergradient(
    workload: Workload, s: Setting, optimizer: Any
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Validation loss, a mean over the starts, and its derivatives in the optimizer's hyperparameters."""
    adjoint = hg.Reversible(bits=2.1) if optimizer.reversible else hg.Checkpointed()
    run = trainer(workload, s, optimizer, adjoint)

    def loss(hypers: Any, train: Examples, validation: Examples, start: Start) -> Array:
        def one(start: Start) -> Array:
            params = run(train, hypers, start)
            return nets.cross_entropy(s.apply(params, validation.images), validation.labels)

        return jax.vmap(one)(start).mean()

    both = jax.jit(jax.value_and_grad(loss))
    return lambda hypers, start: both(hypers, s.train, s.validation, start)


def judge(s: Setting) -> Callable[[Any, Examples], tuple[np.ndarray, np.ndarray]]:
    """Losses and errors ``(n,)`` of ``n`` trained nets, infinite and `CHANCE` where training diverged."""

    @jax.jit
    def measure(params: Any, examples: Examples) -> tuple[Array, Array]:
        def one(params: Any) -> tuple[Array, Array]:
            logits = s.apply(params, examples.images)
            loss = nets.cross_entropy(logits, examples.labels)
            finite = jnp.isfinite(loss)
            error = jnp.where(finite, nets.error_rate(logits, examples.labels), CHANCE)
            return jnp.where(finite, loss, jnp.inf), error

        return jax.lax.map(one, params)

    return lambda params, examples: tuple(np.asarray(x, np.float64) for x in measure(params, examples))


def inherited(name: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Settings found for the optimizers that a contestant contains, in its coordinates, ``(n,)``.

    Where ε stays at its default in the special one it does here; else it is large.
    """
    general = METHODS[name.removesuffix(TUNED_EPS)]
    points: dict[str, list[Any]] = {"rate": [], "momentum": [], "eps": []}
    for contained in (special for special, of in PAIRS if of == name and special in found):
        special, h = METHODS[contained], found[contained]
        momentum = h[special.momentum] if special.momentum else 0.0
        eps = h["eps"] ** special.eps_power if special is general and special.eps_power else 1.0
        points["rate"].append(h["learning_rate"] / eps / (1 - momentum if special.sums else 1))
        points["momentum"].append(np.maximum(momentum, LEAST_MOMENTUM))
        points["eps"].append(eps)
    return {k: np.asarray(points[k], np.float32) for k in quasi_random(name, 1, seed=0)}


def tried(name: str, points: dict[str, np.ndarray], c: Compiled) -> Tried:
    """Train at points ``(n,)`` and validate."""
    count = len(points["rate"])
    if count == 0:
        return Tried(points, np.zeros(0))
    losses, _ = c.measure(c.trainings(hypers(name, points), c.tuning), c.setting.validation)
    return Tried(points, losses.reshape(count, -1).mean(axis=1))


def search(config: Config, name: str, c: Compiled, count: int) -> Tried:
    """Train at the first so many quasi-random points, and validate."""
    return tried(name, quasi_random(name, count, config.seed), c)


def chained(name: str, raw: Any, c: Compiled) -> tuple[Array, Any, dict[str, Array]]:
    """Validation loss, its derivatives in unconstrained coordinates, and the constrained ones."""

    def to_hypers(raw: Any) -> tuple[dict[str, Any], Any]:
        point = constraints.constrain({k: CONSTRAINTS[k] for k in raw}, raw)
        return hypers(name, point), point

    settings, pull, point = jax.vjp(to_hypers, raw, has_aux=True)
    loss, derivatives = c.hypergradient(settings, c.tuning)
    return loss, pull(derivatives)[0], point


def descend(config: Config, name: str, c: Compiled, point: Mapping[str, Any]) -> tuple[Tried, str]:
    """Follow hypergradients from a point; what was tried, and why it ended early, if it did.

    `hypergrad.meta.optimize` compiles its objective at every call; here one program serves an optimizer
    with ε tuned and without.
    """
    raw = constraints.unconstrain(
        {k: CONSTRAINTS[k] for k in point}, {k: jnp.float32(x) for k, x in point.items()}
    )
    adam = optax.adam(optax.cosine_decay_schedule(config.meta_step, config.meta_steps))
    state, seen, losses, stopped = adam.init(raw), [], [], ""
    for _ in range(config.meta_steps):
        try:
            loss, gradient, now = jax.device_get(chained(name, raw, c))
        except (ArithmeticError, jax.errors.JaxRuntimeError) as error:
            stopped = str(error).strip().splitlines()[-1]
            break
        if not np.isfinite([loss, *gradient.values()]).all():
            stopped = f"loss {loss}, hypergradient {gradient}"
            break
        seen.append(now)
        losses.append(float(loss))
        updates, state = adam.update(gradient, state, raw)
        raw = optax.apply_updates(raw, updates)
    points = {k: np.array([now[k] for now in seen], np.float32) for k in point}
    return Tried(points, np.array(losses)), stopped


def cell(
    config: Config, name: str, c: Compiled, others: Mapping[str, Mapping[str, Outcome]]
) -> dict[str, Outcome]:
    """Tune one contestant on one workload by every tuner, and judge what was found from unseen seeds.

    `others` has the contestants that have been tuned before it.
    """
    began = time.perf_counter()
    searched = search(config, name, c, config.longer_runs)
    per_run = (time.perf_counter() - began) / config.longer_runs
    handed = {
        tuner: tried(name, inherited(name, {k: o[tuner].hypers for k, o in others.items()}), c)
        for tuner in TUNERS
    }
    first = searched.first(config.first_runs).then(handed["hypergradients"])
    began = time.perf_counter()
    descended, stopped = descend(config, name, c, first.best())
    if stopped:
        print(f"  {name}: after {len(descended.losses)} hypergradients, {stopped}")
    every = {  # in the order of `TUNERS`; all begin with the same points
        "hypergradients": first.then(descended),
        "search": searched.first(config.runs).then(handed["search"]),
        "longer search": searched.then(handed["longer search"]),
    }
    seconds = {tuner: per_run * len(t.losses) for tuner, t in every.items()}
    seconds["hypergradients"] = per_run * len(first.losses) + time.perf_counter() - began

    best = {tuner: hypers(name, t.best()) for tuner, t in every.items()}
    settings = {k: np.array([b[k] for b in best.values()]) for k in best["search"]}
    params = c.trainings(settings, c.unseen)
    loss, error = c.measure(params, c.setting.validation)
    _, test_error = c.measure(params, c.setting.test)
    columns = (x.reshape(len(best), -1) for x in (loss, error, test_error))
    return {
        tuner: Outcome(
            {k: np.asarray(x) for k, x in best[tuner].items()},
            every[tuner].losses,
            *rows,
            np.asarray(seconds[tuner]),
        )
        for tuner, *rows in zip(best, *columns)
    }


Cells = dict[str, dict[str, dict[str, Outcome]]]  # by workload, contestant, tuner


def compare(config: Config, directory: str | None = None, checkpoint: str | None = None) -> Cells:
    """All contestants on all workloads; finished cells are saved to, and taken from, the checkpoint."""
    about = records.plain(config)
    done: Cells = {}
    if checkpoint is not None and Path(checkpoint).exists():
        tree, found = files.load(checkpoint)
        if found.get("config") != about:
            raise ValueError(
                f"compare(checkpoint={checkpoint!r}): it holds results of another configuration; give "
                "another file to start again"
            )
        done = jax.tree.map(
            lambda x: Outcome(**x), tree, is_leaf=lambda node: isinstance(node, dict) and "seconds" in node
        )
    cells: Cells = {}
    for workload in config.workloads:
        place = f"{workload.data} {workload.net}"
        try:
            s = setting(workload, directory)
        except data.DataError as error:
            print(f"{place}: left out. {error}")
            continue
        cells[place] = {}
        measure = judge(s)
        tuning = jax.random.split(jax.random.key(config.seed), config.tuning_seeds)
        unseen = jax.vmap(jax.random.key)(UNSEEN + jnp.arange(config.judged_on))
        begin = tuple(starts(workload, s, keys) for keys in (tuning, unseen))
        compiled: dict[str, Compiled] = {}  # once for each optimizer, with ε tuned and without
        for name in config.contestants:
            if name not in done.setdefault(place, {}):
                base = name.removesuffix(TUNED_EPS)
                if base not in compiled:
                    optimizer = METHODS[base].optimizer()
                    run = trainings(workload, s, optimizer), hypergradient(workload, s, optimizer)
                    compiled[base] = Compiled(s, *begin, measure, *run)
                done[place][name] = cell(config, name, compiled[base], done[place])
                if checkpoint is not None:
                    files.save(checkpoint, done, config=about)
            cells[place][name] = done[place][name]
        report(place, cells[place])
    return cells


def report(place: str, row: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Print the table of one workload."""
    print(f"\n{place}: validation and test error in per cent, mean ± standard error over unseen seeds")
    print(f"{'':<12}" + "".join(f"{tuner:>32}" for tuner in TUNERS))
    for name, outcomes in row.items():
        entries = []
        for tuner in TUNERS:
            errors = 100 * outcomes[tuner].validation_error, 100 * outcomes[tuner].test_error
            entries.append("  ".join(plus_minus(x.mean(), standard_error(x)) for x in errors))
        print(f"{name:<12}" + "".join(f"{entry:>32}" for entry in entries), flush=True)


def verdicts(cells: Cells) -> list[dict[str, Any]]:
    """The verdict on every pair of the hierarchy, by workload and tuner.

    ``found_less``: the tuner of the general optimizer ended at a larger validation loss than that of the
    special one.  Where optimizers contain each other exactly, that is a failure of the tuner.
    """
    return [
        {"workload": place, "tuner": tuner, "special": special, "general": general}
        | verdict(row[special][tuner].test_error, row[general][tuner].test_error)._asdict()
        | {"found_less": bool(least(row[general][tuner]) > least(row[special][tuner]))}
        for tuner in TUNERS
        for special, general in PAIRS
        for place, row in cells.items()
        if special in row and general in row
    ]


def least(outcome: Outcome) -> float:
    """The validation loss for which a setting was chosen."""
    return float(np.min(outcome.tuning_losses))


def conclude(config: Config, cells: Cells, found: Sequence[Mapping[str, Any]]) -> None:
    """Print the verdicts, what they come to, and what they cost."""
    print("\nmore general less special optimizer, test error in per cent, by workload:")
    for v in found:
        says = "worse" if v["worse"] else "better" if v["better"] else "no difference"
        numbers = plus_minus(100 * v["difference"], 100 * v["standard_error"], "+.2f")
        pair = f"{v['special']} ⊆ {v['general']}"
        print(f"{v['tuner']:<16}{pair:<24}{v['workload']:<24}{numbers:>15}  {says}")
    print()
    for tuner in TUNERS:
        mine = [v for v in found if v["tuner"] == tuner]
        worse = [v for v in mine if v["worse"]]
        print(
            f"{tuner}: of {len(mine)} comparisons the more general optimizer is better in "
            f"{sum(v['better'] for v in mine)} and worse in {len(worse)} by more than two standard errors: "
            f"'never worse' is {'refuted' if worse else 'not refuted'} at this budget"
        )
        if worse:
            print(
                f"  in {sum(v['found_less'] for v in worse)} of these {len(worse)} already the validation "
                "loss was larger: the tuner found no setting as good in the larger space"
            )
    chance = 100 * scipy.stats.t.sf(2.0, config.judged_on - 1)
    print(
        "standard errors are over seeds of training, not over repetitions of the tuning; of optimizers "
        f"that do equally well {chance:.0f}% come out worse by chance"
    )
    finite = [
        np.isfinite(o[t].validation_loss) for row in cells.values() for o in row.values() for t in TUNERS
    ]
    print(
        f"{np.size(finite) - np.sum(finite)} of {np.size(finite)} trainings from unseen seeds diverged and "
        f"count as an error of {100 * CHANCE:.0f}%"
    )
    seconds = {t: sum(float(o[t].seconds) for row in cells.values() for o in row.values()) for t in TUNERS}
    print(
        f"runs, of {config.tuning_seeds} trainings each: hypergradients {config.first_runs} and "
        f"{config.meta_steps} hypergradients, each of the time of about {config.hypergradient_cost} runs; "
        f"search {config.runs}; longer search {config.longer_runs}; each also one run for every optimizer "
        "contained. Seconds in all, with compiling: "
        + ", ".join(f"{tuner} {seconds[tuner]:.0f}" for tuner in TUNERS)
    )


def main(
    config: Config, directory: str | None = None, checkpoint: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """Tune, judge and print; where there is an output, write figure and record."""
    cells = compare(config, directory, checkpoint)
    found = verdicts(cells)
    conclude(config, cells, found)
    if output is not None:
        record = {
            "config": config,
            "ranges": {"rate": RATE, "eps": EPS, "1 - momentum": FALL},
            "judged on seeds": list(range(UNSEEN, UNSEEN + config.judged_on)),
            "results": cells,
            "verdicts": found,
        }
        draw(Path(output) / "epsilon.png", cells, record)
    return {"cells": cells, "verdicts": found}


def draw(path: Path, cells: Cells, record: dict[str, Any]) -> None:
    """Test errors by workload, contestant and tuner."""
    figure, axes = figures.figure(2, 2, width=6.0)
    for place, (name, row) in zip(axes.flat, cells.items()):
        for k, tuner in enumerate(TUNERS):
            errors = [100 * o[tuner].test_error for o in row.values()]
            x = np.arange(len(row)) + 0.22 * (k - 1)
            style = figures.look(k, linestyle="none", marker="os^"[k], markersize=5, capsize=2, label=tuner)
            place.errorbar(x, [e.mean() for e in errors], [standard_error(e) for e in errors], **style)
        for k, contestant in enumerate(row):
            if contestant.endswith(TUNED_EPS):
                place.axvspan(k - 0.5, k + 0.5, color="0.93", zorder=0)
        place.set_xticks(range(len(row)), row, rotation=30, ha="right")
        place.set(title=name, ylabel="test error, %", xlabel="optimizer; shaded: ε tuned too")
        place.grid(axis="y", alpha=0.25)
        place.legend(fontsize="small", loc="upper right")
    for place in axes.flat[len(cells) :]:
        place.set_axis_off()
    figures.save(figure, path, record)


FAST = Config(
    (replace(WORKLOADS[0], steps=20),),
    ("Momentum", "Adam", "Adam, ε"),
    first_runs=2,
    meta_steps=2,
    judged_on=2,
)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    flags = ("data_dir", "checkpoint")
    config, run = cli.parse("epsilon", __doc__, Config(), arguments, fast=lambda _: FAST, flags=flags)
    return main(config, run.data_dir, run.checkpoint, run.output)


if __name__ == "__main__":
    command()
