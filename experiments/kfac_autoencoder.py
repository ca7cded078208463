"""K-FAC on an autoencoder of handwritten digits, beside tuned Adam and Nesterov; and learned K-FAC.

64-100-50-25-6-25-50-100-64, tanh but for the code and the logits, on all 1,797 digits, with Glorot's
initial weights; or on MNIST 784-1000-500-250-30-250-500-1000-784.  The loss is the cross-entropy, summed
over pixels, mean over images, and a penalty of ``1/2 10⁻⁵ ‖w‖²``; what is shown is its excess over the
entropy of the pixels, below which nothing can get.  Three questions:

- contest: all images at every step, of which K-FAC's network sees half; loss by iteration and by second,
  the time of a step being the least of a few runs that take turns; also K-FAC doubly factored, and late;
- batch sizes: loss on all images after as many iterations with minibatches, every optimizer tuned for each;
- learning: rate, momentum and damping of every step, decay and every layer's π, by hypergradients through
  whole runs, from the best of a part of a grid of constants; judged on initial weights and minibatches not
  seen before, against the best constant rate, momentum and damping of the whole grid, with decay and π at
  their defaults, and against the adaptive variant.  Work is counted in plain training runs, of which a
  hypergradient takes several, as measured.

    python -m experiments.kfac_autoencoder        # a quarter of an hour on two cores
    python -m experiments.kfac_autoencoder --data mnist --data-dir folder
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.cli import option
from experiments.common.statistics import edges, grid, paired, plus_minus, ranked, standard_error
from hypergrad import constraints, curvature, meta, nets

SHOWN = (0, 10, 25, 50, 100, 200, 300, 1000)
UNSEEN = 20_000  # seeds from here on are used by neither the learning nor the searches
SIZES = {
    "digits": (64, 100, 50, 25, 6, 25, 50, 100, 64),
    "mnist": (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
}


@dataclass(frozen=True)
class Config:
    """What to run."""

    data: str = "digits"
    sizes: tuple[int, ...] = SIZES["digits"]
    examples: int | None = option(None, "the first so many images (default all)")
    steps: int = option(301, "of K-FAC in the contest")
    baseline_steps: int = option(1001, "of the others in the contest")
    batch_sizes: tuple[int, ...] = option((128, 512), "beside all examples")
    short: int = option(100, "iterations of the comparison of batch sizes")
    learned_steps: int = 40
    learned_batch: int = 256
    meta_iterations: int = option(24, "of the learning")
    meta_step: float = option(0.03, "of Adam in the logarithms and log-odds, decayed to 0")
    finalists: int = option(10, "of a search: the best on one seed, judged again")
    finals: int = option(5, "seeds on which they are")
    judged_on: int = 10
    thin: int = option(1, "of the grids, one in so many")
    penalty: float = 1e-5
    timings: int = 1
    seed: int = 0


class Contestant(NamedTuple):
    """An optimizer and the hyperparameters among which its best are sought."""

    optimizer: Any
    grid: list[dict[str, float]]
    baseline: bool = False  # makes `baseline_steps`


class Trial(NamedTuple):
    """A run: hyperparameters; excess loss before every step, and on all images at the end; ms per step."""

    hypers: dict[str, float]
    excess: np.ndarray
    milliseconds: float


# ---- network and training


def init(sizes: Sequence[int], key: Array) -> tuple[nets.Dense, ...]:
    """Glorot's uniform weights, and biases of 0."""
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = itertools.pairwise(sizes)
    return tuple(nets.Dense(glorot(k, pair), jnp.zeros(pair[1])) for k, pair in zip(keys, pairs))


def autoencoder(params: Sequence[nets.Dense], images: Array, probes: Sequence[Any]) -> tuple[Array, Any]:
    """Logits of the pixels, and what goes into the layers, as K-FAC wants it (see `hypergrad.layers`)."""
    inputs = [images]
    for k, (weights, biases) in enumerate(params):
        computed = inputs[-1] @ weights + biases[None] + probes[k]
        linear = k + 1 in (len(params) // 2, len(params))  # the code and the logits
        inputs.append(computed if linear else jnp.tanh(computed))
    return inputs[-1], tuple(inputs[:-1])


def network(params: Any, images: Array, rows: Array, probes: Any) -> Any:
    """What K-FAC sees: the images of the batch."""
    return autoencoder(params, images[rows], probes)


def first_half(params: Any, images: Array, rows: Array, probes: Any) -> Any:
    """Half of the batch, which is in random order."""
    return autoencoder(params, images[rows[: -(-len(rows) // 2)]], probes)


def trainer(config: Config, optimizer: Any, adjoint: Any = None) -> Callable[..., Array]:
    """Training as a function of images, rows ``(T, batch)``, start and hyperparameters.

    Returns ``T + 1`` losses: of the batches, before every step, and of all images, after the last.
    """

    def loss(params: Any, images: Array, rows: Array) -> Array:
        logits, _ = autoencoder(params, images[rows], [0.0] * len(params))
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        by_image = jax.vmap(curvature.bernoulli().loss)(logits, images[rows])
        return jnp.mean(by_image) + 0.5 * config.penalty * squares

    def run(images: Array, rows: Array, start: Any, hypers: Mapping[str, Any]) -> Array:
        options = {"steps": len(rows), "optimizer": optimizer, "adjoint": adjoint}
        trained = hg.train(loss, start, hypers, images, rows, **options)
        return jnp.append(trained.losses, loss(trained.params, images, jnp.arange(len(images))))

    return run


def entropy(images: np.ndarray) -> float:
    """The least cross-entropy that any logits have, per image."""
    each = -sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0) for p in (images, 1 - images))
    return float(each.sum(axis=1).mean())


def adaptive(config: Config, **options: Any) -> Contestant:
    """K-FAC that sets its rate, momentum and damping itself."""
    optimizer = hg.adaptive_kfac(first_half, curvature.bernoulli(), **options)
    return Contestant(optimizer, grid(damping=(1.0, 150.0), omega=(0.8, 0.95), l2=(config.penalty,)))


def fixed(**options: Any) -> Contestant:
    """K-FAC with constant hyperparameters."""
    optimizer = hg.kfac(first_half, curvature.bernoulli(), norm_constraint=True, **options)
    values = {"learning_rate": (0.03, 0.1, 0.3), "damping": (0.03, 0.1, 0.3), "momentum": (0.5, 0.9)}
    return Contestant(optimizer, grid(**values, norm_constraint=(0.1,)))


def contestants(config: Config) -> dict[str, Contestant]:
    """Who takes part, by name."""
    return {
        "K-FAC, adaptive": adaptive(config),
        "K-FAC": fixed(),
        "Adam": Contestant(hg.adam(), grid(learning_rate=(1e-3, 3e-3, 1e-2, 3e-2)), True),
        "Nesterov": Contestant(
            hg.nesterov(), grid(learning_rate=(3e-3, 1e-2, 3e-2, 1e-1), momentum=(0.9, 0.99)), True
        ),
    }


def variants(config: Config) -> dict[str, Contestant]:
    """K-FAC's variants: the first layer, whose inputs are square images, doubly factored; and late."""
    doubly = (math.isqrt(config.sizes[0]), *[0] * (len(config.sizes) - 2))
    late = hg.Asynchrony(refresh=5, statistics_delay=2, inverse_delay=5)
    return {
        "K-FAC, adaptive, doubly": adaptive(config, doubly=doubly),
        "K-FAC, doubly": fixed(doubly=doubly),
        "K-FAC, late": fixed(asynchrony=late),
    }


def start_and_rows(config: Config, images: Array, batch_size: int, steps: int, key: Array) -> Any:
    """Initial weights, and the rows of every minibatch, by one key."""
    return workloads.start_and_rows(partial(init, config.sizes), key, len(images), batch_size, steps)


# ---- the contest, and batch sizes


def tune(
    config: Config,
    images: Array,
    contestants: Mapping[str, Contestant],
    batch_size: int,
    steps: int | None = None,
    timings: int = 0,
) -> dict[str, list[Trial]]:
    """Every contestant with all of its grid; `steps` None stands for those of the contest."""
    floor = entropy(np.asarray(images))
    tried: dict[str, list[Trial]] = {}
    runs: dict[str, Callable[[dict[str, float]], Trial]] = {}
    for name, contestant in contestants.items():
        count = steps or (config.baseline_steps if contestant.baseline else config.steps)
        start, rows = start_and_rows(config, images, batch_size, count, jax.random.key(config.seed))
        # What diverges just loses: arrays of floats, unlike what is reversed, may overflow.
        run = jax.jit(trainer(config, contestant.optimizer, hg.Stored()))

        def trial(hypers: dict[str, float], run: Any = run, start: Any = start, rows: Any = rows) -> Trial:
            began = time.perf_counter()
            losses = np.asarray(run(images, rows, start, jax.tree.map(jnp.float32, hypers)), np.float64)
            return Trial(hypers, losses - floor, 1e3 * (time.perf_counter() - began) / len(rows))

        tried[name] = [trial(hypers) for hypers in contestant.grid[:: config.thin]]
        runs[name] = trial
    for _ in range(timings):
        for name, trials in tried.items():
            trials.append(runs[name](best(trials).hypers))
    return tried


def best(trials: Sequence[Trial], step: int = -1) -> Trial:
    """The trial with the least loss after so many steps, by default all, and the least time of any."""
    found = ranked(trials, lambda trial: trial.excess[step])[0]
    return found._replace(milliseconds=min(trial.milliseconds for trial in trials))


# ---- learning


class Judged(NamedTuple):
    """What hyperparameters are worth, and what they took.

    Attributes:
      excess: excess loss on all images at the end, over unseen seeds.
      runs: training runs that were paid for it; one with its hypergradient is one.
      work: the same in the time of plain training runs of the same optimizer.
    """

    excess: np.ndarray
    runs: int
    work: float

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return float(standard_error(self.excess))


class Learned(NamedTuple):
    """What came out of the learning and of the searches.

    Attributes:
      optimized: what was learned.
      constants: the best that the search found.
      edges: those of them that are the least or largest of the grid.
      hypergradient: the time of one, in plain training runs.
      judged: by name, how all of it does.
    """

    optimized: meta.Optimized
    constants: dict[str, float]
    edges: list[str]
    hypergradient: float
    judged: dict[str, Judged]


Run = Callable[[Any, Array], Any]  # from hyperparameters and key to loss


def search(
    config: Config, run: Run, order: Sequence[dict[str, float]], further: Sequence[Array]
) -> tuple[dict[str, float], int]:
    """The best of those ranked on one key, and the runs made: the first few again, on further keys.

    What is best on one seed owes that to luck in part; the mean over further seeds does not.
    """
    finalists = order[: config.finalists]
    best = ranked(finalists, lambda hypers: np.mean([float(run(hypers, key)) for key in further]))[0]
    return best, len(order) + len(finalists) * len(further)


def seconds(call: Callable[[], Any], calls: int = 5) -> float:
    """The median time of a call, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def learn(config: Config, images: Array, checkpoint: str | None) -> Learned:
    """K-FAC's hyperparameters by hypergradients, and by a search; both judged on unseen seeds."""
    steps, floor, count = config.learned_steps, entropy(np.asarray(images)), len(config.sizes) - 1
    optimizer = hg.kfac(network, curvature.bernoulli())
    searching, checking, learning = jax.random.split(jax.random.key(config.seed), 3)
    further = list(jax.random.split(checking, config.finals))

    def final(optimizer: Any, batch_size: int, adjoint: Any = None) -> Callable[..., Array]:
        train = trainer(config, optimizer, adjoint)

        def run(images: Array, hypers: Any, key: Array) -> Array:
            start, rows = start_and_rows(config, images, batch_size, steps, key)
            return train(images, rows, start, hypers)[-1]

        return run

    def plain(optimizer: Any, batch_size: int) -> Run:
        run = jax.jit(final(optimizer, batch_size, hg.Stored()))
        return lambda hypers, key: run(images, jax.tree.map(jnp.float32, hypers), key)

    run = plain(optimizer, config.learned_batch)
    rates = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
    dampings = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)
    momenta = (0.5, 0.1, 0.25, 0.9)
    tried = grid(momentum=momenta, learning_rate=rates, damping=dampings)
    thinned = tried[:: config.thin]
    order = ranked(thinned, lambda hypers: run(hypers, searching))
    constants, searched = search(config, run, order, further)
    # Learning starts from the best at the first momentum, on one seed: fewer runs than the search.
    part = tried[: len(tried) // len(momenta) : config.thin]
    before = next(hypers for hypers in order if hypers in part)
    hypers: dict[str, Any] = {name: jnp.full(steps, value) for name, value in before.items()}
    hypers |= {"decay": jnp.float32(0.95), "pi": (jnp.float32(1.0),) * count}
    share = constraints.interval(1 / 64, 1.0)  # what is less than 1 / 128 cannot be reversed
    rate = optax.cosine_decay_schedule(config.meta_step, config.meta_iterations)
    reversible = final(optimizer, config.learned_batch)
    backwards = jax.jit(jax.value_and_grad(reversible, argnums=1))
    each = seconds(lambda: backwards(images, hypers, searching)) / seconds(lambda: run(hypers, searching))
    optimized = meta.optimize(
        lambda hypers, key: reversible(images, hypers, key),
        hypers,
        # Where a run is at the edge of stability its hypergradient is huge; only its direction is of use.
        optimizer=optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate)),
        explosion=np.inf,
        steps=config.meta_iterations,
        constraints={"momentum": share, "decay": share}
        | dict.fromkeys(("learning_rate", "damping", "pi"), constraints.positive),
        key=learning,
        checkpoint=checkpoint,
    )

    def judge(run: Run, hypers: Any, runs: int, learned: int = 0) -> Judged:
        keys = [jax.random.key(seed) for seed in range(UNSEEN, UNSEEN + config.judged_on)]
        excess = np.array([float(run(hypers, key)) - floor for key in keys])
        return Judged(excess, runs + learned, runs + learned * each)

    judged = {
        "learned": judge(run, optimized.hypers, len(part), config.meta_iterations),
        "best constants": judge(run, constants, searched),
        "before learning": judge(run, before, len(part)),
    }
    for name, batch_size in (("minibatches", config.learned_batch), ("all images", len(images))):
        contestant = adaptive(config)
        run = plain(contestant.optimizer, batch_size)
        order = ranked(contestant.grid[:: config.thin], lambda hypers, run=run: run(hypers, searching))
        hand_set, runs = search(config, run, order, further)
        judged[f"adaptive, {name}"] = judge(run, hand_set, runs)
    return Learned(optimized, constants, edges(constants, thinned), each, judged)


# ---- what is shown


def main(
    config: Config, directory: str | None = None, checkpoint: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """Run, print tables, and where there is an output write figure and record."""
    loaded = workloads.load(config.data, directory)
    parts = [loaded.train_images] + ([loaded.test_images] if config.data == "digits" else [])
    images = jnp.asarray(np.concatenate(parts).reshape(-1, config.sizes[0])[: config.examples])
    general = contestants(config)
    tried = tune(config, images, general | variants(config), len(images), timings=config.timings)
    contest = {name: best(trials) for name, trials in tried.items()}
    print_contest(contest)
    of_size = {size: tune(config, images, general, size, config.short) for size in config.batch_sizes}
    by_size = {
        size: {name: best(found[name], config.short) for name in general}
        for size, found in (of_size | {len(images): tried}).items()
    }
    print_batch_sizes(config, by_size)
    learned = learn(config, images, checkpoint)
    print_learned(config, learned)
    if output is not None:
        suffix = "" if config.data == "digits" else f"_{config.data}"
        draw(Path(output) / f"kfac_autoencoder{suffix}.png", config, contest, by_size, learned)
    return {"contest": contest, "batch sizes": by_size, "learned": learned}


def about(hypers: Mapping[str, float]) -> str:
    """Hyperparameters in words."""
    return ", ".join(f"{key} {value:g}" for key, value in hypers.items() if key != "l2")


def print_contest(contest: Mapping[str, Trial]) -> None:
    """A line for every contestant, and how its time compares."""
    print(
        f"{'excess loss, nats per image, at iteration':<80}" + "".join(f"{i:>8}" for i in SHOWN) + "   ms"
    )
    for name, best in contest.items():
        at = [f"{best.excess[i]:8.2f}" if i < len(best.excess) else " " * 8 for i in SHOWN]
        print(f"{name + ' (' + about(best.hypers) + ')':<80}" + "".join(at) + f"{best.milliseconds:6.1f}")
    adam = contest["Adam"].milliseconds
    ratios = (f"{name} {t.milliseconds / adam:.1f}" for name, t in contest.items() if name != "Adam")
    print("time of an iteration, in those of Adam: " + "; ".join(ratios))
    losses = {name: best.excess[-1] for name, best in contest.items()}
    of = {name: name.removesuffix(", doubly").removesuffix(", late") for name in contest}
    pairs = (f"{name} {losses[name] / losses[plain]:.2f}" for name, plain in of.items() if name != plain)
    print("last loss of a variant, in those of the plain one: " + "; ".join(pairs))


def print_batch_sizes(config: Config, by_size: Mapping[int, Mapping[str, Trial]]) -> None:
    """A line for every contestant, a column for every batch size."""
    print(f"\nexcess loss on all images after {config.short} iterations")
    print(f"{'batch size':<20}" + "".join(f"{size:>8}" for size in by_size))
    for name in next(iter(by_size.values())):
        print(
            f"{name:<20}" + "".join(f"{best[name].excess[config.short]:8.2f}" for best in by_size.values())
        )


def print_learned(config: Config, learned: Learned) -> None:
    """How the learned hyperparameters do, and the verdict."""
    print(
        f"\nK-FAC, {config.learned_steps} iterations of {config.learned_batch} images: excess loss on all "
        f"images, mean ± standard error over {config.judged_on} seeds not seen before"
    )
    for name, result in learned.judged.items():
        mean = plus_minus(result.excess.mean(), result.standard_error, ".3f")
        print(f"{name:<24}{mean:>18}   after {result.runs} runs, the work of {result.work:.0f}")
    print(
        f"work is in plain training runs; one with a hypergradient is {learned.hypergradient:.1f} of them"
    )
    at_edge = ", ".join(learned.edges) or "nothing"
    print(f"best constants: {about(learned.constants)}; at an edge of the grid: {at_edge}")
    for name in ("best constants", "adaptive, minibatches", "adaptive, all images"):
        gain = paired(learned.judged[name].excess, learned.judged["learned"].excess)
        verdict = "beat" if gain.sign() > 0 else "did not beat"
        print(f"the learned {verdict} {name}: by {plus_minus(*gain, '.3f')} on the same seeds")


def draw(
    path: Path,
    config: Config,
    contest: Mapping[str, Trial],
    by_size: Mapping[int, Mapping[str, Trial]],
    learned: Learned,
) -> None:
    """Loss by iteration, by time and by batch size; what was learned, and what it is worth."""
    figure, axes = figures.figure(2, 3)
    draw_contest(axes[0], config, contest, by_size)
    draw_learned(axes[1], config, learned)
    figures.save(figure, path, recorded(config, contest, by_size, learned))


def draw_contest(
    axes: Any,
    config: Config,
    contest: Mapping[str, Trial],
    by_size: Mapping[int, Mapping[str, Trial]],
) -> None:
    """Loss by iteration, by time and by batch size."""
    shown = [[i for i in (*SHOWN, len(x.excess) - 1) if i < len(x.excess)] for x in contest.values()]
    for place, units in zip(
        axes[:2], ([1.0] * len(contest), [1e-3 * x.milliseconds for x in contest.values()])
    ):
        curves = {name: best.excess[at] for (name, best), at in zip(contest.items(), shown)}
        figures.lines(place, curves, marker=".")
        for line, at, unit in zip(place.get_lines(), shown, units):
            line.set_xdata(unit * np.array(at))
        place.relim()
        place.autoscale()
        place.set(yscale="log", ylabel="excess loss, nats per image")
    axes[0].set(title="All images, by iteration", xlabel="iteration", xscale="symlog")
    axes[0].set_xlim(left=0)
    axes[1].set(title="By time, on the machine of the record", xlabel="seconds")
    figures.lines(
        axes[2],
        {n: [best[n].excess[config.short] for best in by_size.values()] for n in by_size[max(by_size)]},
        marker="o",
    )
    axes[2].set(title=f"After {config.short} iterations", xlabel="batch size", yscale="log")
    axes[2].set(xticks=range(len(by_size)), xticklabels=[str(size) for size in by_size])
    axes[2].set_ylabel("excess loss, nats per image")


def draw_learned(axes: Any, config: Config, learned: Learned) -> None:
    """What was learned, and what it is worth."""
    hypers = learned.optimized.hypers
    schedules = {name: hypers[name] for name in ("learning_rate", "momentum", "damping")}
    figures.lines(axes[0], {name.replace("_", " "): values for name, values in schedules.items()})
    axes[0].set(title="Learned schedules of K-FAC", xlabel="iteration", ylabel="value", yscale="log")
    figures.lines(axes[1], {"π of every layer": hypers["pi"]}, marker="o")
    axes[1].set(title=f"Learned π; ρ = {float(hypers['decay']):.3f}", xlabel="layer", ylabel="π")
    places = range(len(learned.judged))
    axes[2].errorbar(
        [result.excess.mean() for result in learned.judged.values()],
        places,
        xerr=[result.standard_error for result in learned.judged.values()],
        fmt="o",
        color="0.0",
        capsize=3,
    )
    axes[2].set(yticks=places, yticklabels=list(learned.judged), xlabel="excess loss, nats per image")
    axes[2].set_title(f"After {config.learned_steps} iterations, unseen seeds")
    axes[2].invert_yaxis()
    axes[2].grid(alpha=0.25)


def recorded(
    config: Config,
    contest: Mapping[str, Trial],
    by_size: Mapping[int, Mapping[str, Trial]],
    learned: Learned,
) -> dict[str, Any]:
    """What is written beside the figure."""

    def summary(best: Trial) -> dict[str, Any]:
        shown = {str(i): best.excess[i] for i in SHOWN if i < len(best.excess)}
        return best._asdict() | {"excess": shown | {"final": best.excess[-1]}}

    return {
        "config": config,
        "contest": {name: summary(best) for name, best in contest.items()},
        "batch sizes": {
            size: {n: {"hypers": t.hypers, "final": t.excess[config.short]} for n, t in best.items()}
            for size, best in by_size.items()
        },
        "learned": learned.optimized.hypers,
        "constants": learned.constants,
        "constants at an edge": learned.edges,
        "hypergradient": learned.hypergradient,
        "judged": learned.judged,
    }


FAST = Config(
    steps=4, baseline_steps=4, batch_sizes=(), short=4, learned_steps=3, learned_batch=64,
    meta_iterations=2, finalists=2, finals=1, judged_on=2, thin=24, timings=0, examples=256,
)  # fmt: skip


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    config, run = cli.parse(
        "kfac_autoencoder", __doc__, {name: Config(name, SIZES[name]) for name in SIZES}, arguments,
        fast=lambda c: replace(FAST, data=c.data, sizes=(c.sizes[0], 6, c.sizes[0])),
        flags=("data_dir", "checkpoint"),
        iterations={"type": int, "help": "of every run (default as the tables say)"},
    )  # fmt: skip
    if (n := run.iterations) is not None:
        config = replace(config, steps=n, baseline_steps=n, short=n, learned_steps=n)
    return main(config, run.data_dir, run.checkpoint, run.output)


if __name__ == "__main__":
    command()
