"""ConvNet-3 distillation of MNIST and Fashion-MNIST: accuracy, and time and memory beside what is usual.

Every adjoint is compiled for one meta-step and timed; then as many meta-steps of exact reversal are made as
fit the time, and new networks are trained on what was learned.

    python -m benchmarks.distill                  # within ten minutes on a large GPU, both data sets
    python -m benchmarks.distill --fast           # digits and a small network, in seconds; writes nothing

Random initial weights at evaluation, hard labels, the test set once.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks.machine import (
    GIB,
    MEMORY_SHARE,
    MIB,
    Compiled,
    Row,
    describe_machine,
    machine_memory,
    progress,
    ratio,
    say,
    show,
    slug,
    timed_call,
    versions,
)
from experiments.common import figures
from hypergrad import data, nets
from hypergrad.distillation.distilled import standardised
from hypergrad.distillation.recipe import Network

RESULTS = Path(__file__).parent / "results"
ADJOINTS = {
    "exact reversal": hg.Reversible(),
    "√T checkpoints": hg.Checkpointed(),
    "plain reverse mode": hg.Stored(),
}
# Accuracies for 1 and 10 images a class: those to reach, good ones, and ones to try for.
TARGETS = {
    "mnist": {1: (0.88, 0.917, 0.93), 10: (0.96, 0.974, 0.986)},
    "fashion-mnist": {1: (0.68, 0.706, 0.756), 10: (0.80, 0.846, 0.862)},
}


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    data: tuple[str, ...] = ("mnist", "fashion-mnist")
    per_class: tuple[int, ...] = (1, 10)
    width: int = 128
    depth: int = 3
    steps: int = 50
    batch_size: int = 50  # learned images in an inner step, at most
    real_batch: int = 1000
    runs: int = 1
    learning_rate: float = 0.1
    meta_step: float = 0.01
    minutes: float = 10.0  # for everything
    seeds: int = 10
    seed: int = 0


def network(config: Config, loaded: data.Dataset) -> Network:
    """The ConvNet of a configuration."""
    height, width = loaded.train_images.shape[1:]
    return nets.convnet((height, width, 1), loaded.classes, width=config.width, depth=config.depth)


def recipe(config: Config, images: int) -> hg.Recipe:
    """The inner training, at first."""
    size = min(images, config.batch_size)
    return hg.Recipe(config.steps, config.learning_rate, batch_size=size, shuffled=size < images)


def compiled(config: Config, loaded: data.Dataset, per_class: int, name: str, limit: float) -> Compiled:
    """One meta-step, a hypergradient in images and rates, by one adjoint."""
    net, count = network(config, loaded), per_class * loaded.classes
    mean, std = standardised(loaded.train_images)
    images = jnp.asarray((loaded.train_images[:count] - mean) / std)
    rows = slice(count, count + config.real_batch)
    real = jnp.asarray((loaded.train_images[rows] - mean) / std), jnp.asarray(loaded.train_labels[rows])
    labels = jnp.arange(count) % loaded.classes

    def loss(
        learned: tuple[jax.Array, jax.Array], real: tuple[jax.Array, jax.Array], key: jax.Array
    ) -> Any:
        ours = dataclasses.replace(recipe(config, count), learning_rate=learned[1])
        params = ours.train(net, learned[0], labels, key, ADJOINTS[name])
        return nets.cross_entropy(net[1](params, real[0]), real[1])

    arguments = (images, recipe(config, count).rates()), real, jax.random.key(config.seed)
    begin = time.perf_counter()
    call = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    memory = call.memory_analysis()
    row: Row = {"adjoint": name, "times": [], "seconds": None, "skipped": None}
    row["compile_seconds"] = time.perf_counter() - begin
    row["temp_bytes"] = memory.temp_size_in_bytes
    row["bytes"] = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if row["bytes"] > limit:
        row["skipped"] = f"skipped: would need {row['bytes'] / GIB:.1f} GiB"
    return Compiled(row, call, arguments)


def compare(config: Config, loaded: data.Dataset, per_class: int, repeats: int, limit: float) -> list[Row]:
    """Time and memory of a meta-step by every adjoint, and how far it is from plain autodiff's."""
    everyone = []
    for name in ADJOINTS:
        progress(f"compiling {name}, {loaded.name}, {per_class} a class")
        everyone.append(compiled(config, loaded, per_class, name, limit))
    results: dict[str, Any] = {}
    for k in range(repeats):
        for c in everyone[:: -1 if k % 2 else 1]:
            if c.row["skipped"] is None:
                results[c.row["adjoint"]] = timed_call(c)
    plain = results.get("plain reverse mode")
    for c in everyone:
        found = results.get(c.row["adjoint"])
        c.row["difference"] = None if found is None or plain is None else distance(found[1][0], plain[1][0])
        c.row["time_ratio"] = ratio(c.row["seconds"], everyone[0].row["seconds"])
        c.row["memory_ratio"] = ratio(c.row["bytes"], everyone[0].row["bytes"])
    return [c.row for c in everyone]


def distance(a: jax.Array, b: jax.Array) -> float:
    """Relative difference of two arrays."""
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def learn(config: Config, loaded: data.Dataset, per_class: int, meta_steps: int) -> dict[str, Any]:
    """Distill, and train new networks on it."""
    net, count = network(config, loaded), per_class * loaded.classes
    train = loaded.train_images, loaded.train_labels
    begin = time.perf_counter()
    distilled = hg.distill(
        net,
        *train,
        recipe(config, count),
        per_class=per_class,
        runs=config.runs,
        real_batch=config.real_batch,
        meta_steps=meta_steps,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.meta_step, max(1, meta_steps))),
        key=jax.random.key(config.seed),
    )
    seconds = time.perf_counter() - begin
    test = loaded.test_images, loaded.test_labels
    table = hg.evaluate(
        distilled, {"ConvNet": net}, train, test, seeds=config.seeds, recipes={}, full_seeds=0
    )
    return {
        "meta_steps": meta_steps,
        "seconds": seconds,
        "accuracy": (own := table.score("distilled", "own")).mean,
        "std": own.std,
        "random_real": table.score("random real", "own").mean,
        "history": np.asarray(distilled.history["loss"], float).tolist(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, learn, print, and write the report; 1 if a hypergradient is wrong."""
    args = parse(arguments)
    config: Config = args.config
    begin = time.perf_counter()
    machine = describe_machine()
    limit = MEMORY_SHARE * machine_memory()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    loaders: dict[str, Callable[[], data.Dataset]] = {
        "digits": data.digits,
        "mnist": functools.partial(data.mnist, args.data_dir),
        "fashion-mnist": functools.partial(data.fashion_mnist, args.data_dir),
    }
    plans = [(name, per_class) for name in config.data for per_class in config.per_class]
    rows, agreed = [], True
    for k, (name, per_class) in enumerate(plans):
        loaded = loaders[name]()
        each = compare(config, loaded, per_class, args.repeats, limit)
        say(f"\n{name}, {per_class} a class: one meta-step of {config.steps} inner steps")
        say(f"{'adjoint':<20}{'seconds':>9}{'ratio':>7}{'MiB':>10}{'ratio':>7}{'from plain':>12}")
        for r in each:
            line = f"{r['adjoint']:<20}{show(r['seconds'], '.4f'):>9}{show(r['time_ratio'], '.2f'):>7}"
            line += f"{r['bytes'] / MIB:>10.1f}{show(r['memory_ratio'], '.2f'):>7}"
            say(
                line + f"{show(r['difference'], '.0e'):>12}" + (f"  {r['skipped']}" if r["skipped"] else "")
            )
        agreed = agreed and all(r["difference"] is None or r["difference"] < 1e-2 for r in each)
        # What is left of the time, shared among what is left to do; a fifth is for compiling and tests.
        left = (60 * config.minutes - (time.perf_counter() - begin)) / (len(plans) - k)
        seconds = each[0]["seconds"] or left
        meta_steps = args.meta_steps or max(1, int(0.8 * left / (config.runs * seconds)))
        outcome = learn(config, loaded, per_class, meta_steps)
        must, good, stretch = TARGETS.get(name, {}).get(per_class, (None, None, None))
        wanted = f" (must {must:.1%}, good {good:.1%}, stretch {stretch:.1%})" if must else ""
        say(
            f"accuracy {outcome['accuracy']:.2%} ± {outcome['std']:.2%} on random inits{wanted}; random "
            f"real images {outcome['random_real']:.2%}; {meta_steps} meta-steps, {outcome['seconds']:.0f} s"
        )
        rows.append({"data": name, "per_class": per_class, "adjoints": each, "learned": outcome})
    say(f"\nhypergradients agree: {'yes' if agreed else 'NO'}")
    if args.output:
        report = {"config": asdict(config) | {"about": __doc__}, "rows": rows}
        report["machine"] = machine | {"packages": versions(("jaxlib",))}
        path = args.output / f"distill-{slug(machine['name'])}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(draw(rows, machine["name"]), path, report)
        say(f"written: {path} and {path.with_suffix('.json').name}")
    return 0 if agreed else 1


def draw(rows: Sequence[dict[str, Any]], machine: str) -> Any:
    """The outer losses while learning."""
    figure, axes = figures.figure(1, 1, width=7.0)
    curves = {f"{r['data']}, {r['per_class']} a class": r["learned"]["history"] for r in rows}
    figures.lines(axes[0, 0], curves, linewidth=0.8)
    axes[0, 0].set(xlabel="meta-step", ylabel="loss on real images after training, nats", yscale="log")
    axes[0, 0].set_title(f"ConvNet distillation, {machine}", fontsize="medium")
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="digits and a tiny network; writes nothing")
    parser.add_argument("--data", nargs="+", choices=("digits", "mnist", "fashion-mnist"))
    parser.add_argument("--per-class", type=int, nargs="+")
    parser.add_argument("--width", type=int, help=f"of the ConvNet (default {Config().width})")
    parser.add_argument("--depth", type=int, help=f"of the ConvNet (default {Config().depth})")
    parser.add_argument("--steps", type=int, help=f"of the inner training (default {Config().steps})")
    parser.add_argument("--minutes", type=float, help="for everything (default 10)")
    parser.add_argument("--meta-steps", type=int, help="instead of as many as fit the time")
    parser.add_argument("--repeats", type=int, default=3, help="of the timed meta-step")
    parser.add_argument(
        "--data-dir", help="folder with mnist/ and fashion-mnist/ (default $HYPERGRAD_DATA)"
    )
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    quick = {"data": ("digits",), "per_class": (1,), "width": 4, "depth": 1, "steps": 4}
    quick |= {"real_batch": 50, "seeds": 2}
    asked = {
        name: getattr(args, name) for name in ("data", "per_class", "width", "depth", "steps", "minutes")
    }
    asked = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v is not None}
    args.config = Config(**((quick if args.fast else {}) | asked))
    args.meta_steps = args.meta_steps or (2 if args.fast else None)
    args.output = args.output or (None if args.fast else RESULTS)
    return args


if __name__ == "__main__":
    sys.exit(main())
