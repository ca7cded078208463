"""Distill a data set to a few learned images, by hypergradients through whole training runs.

    python -m experiments.distill                       # digits, under two minutes on two cores
    python -m experiments.distill --data mnist --model mlp --per-class 10 --init random
    python -m experiments.distill --gates               # the published settings on MNIST, half an hour
    python -m experiments.distill --long                # 100 images for long runs, half an hour
    python -m experiments.distill --plain               # 100 images for plain SGD, a quarter of an hour

A validation split chooses among the sets on the way; the test set is looked at once, at the end.  The
result is one file, `figures/distill.npz`, that `hypergrad.load_distilled` reads and plain NumPy too.
"""

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.cli import option
from experiments.common.statistics import plus_minus
from hypergrad import data, nets
from hypergrad.distillation.baselines import class_means
from hypergrad.distillation.distilled import centred
from hypergrad.distillation.recipe import Network


def inits(word: str) -> int | None:
    """How many initial weights there are: 1 is fixed, None is random, between them a pool."""
    if not word.isdigit() and word not in ("random", "fixed"):
        raise ArgumentTypeError(f"{word}: pass random, fixed, or a number of initial weights")
    return int(word) if word.isdigit() else {"random": None, "fixed": 1}[word]


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    data: str = option("digits", "", choices=workloads.NAMES)
    model: str = option("mlp", "", choices=("logistic", "mlp", "convnet"))
    per_class: int = option(1, "learned images for every class")
    inits: int | None = option(
        None, "random, fixed, or the size of a pool (default random)", flag="init", type=inits
    )
    learn: tuple[str, ...] = option(("images", "learning_rate"), "see hypergrad.distill")
    steps: int = option(20, "of the inner training")
    learning_rate: float = option(1.0, "at first")
    batch_size: int | None = option(None, "learned images in a step, default all of them")
    adjoint: str = option("reversible", "of the inner training", choices=("reversible", "stored"))
    meta_steps: int = 1000
    meta_step: float = option(0.02, "of Adam, decayed to 0")
    meta_eps: float = option(1e-8, "of Adam; a large one spares pixels that are rarely used")
    start: str = option("real", "images, or means of their classes", choices=("real", "means"))
    real_batch: int = 2000
    runs: int = option(1, "inner trainings for each meta-step")
    window: int | None = option(None, "differentiate only so many steps, anywhere in the run")
    seeds: int = option(20, "new trainings in the evaluation")
    seed: int = 0


class Gate(NamedTuple):
    """A published or measured setting, and what is to be reached in it.

    Attributes:
      config: of it.
      accuracy: least mean test accuracy by the own recipe and inits.
      std: largest standard deviation of it.
      above_random: least difference from random real images by whatever recipe suits those best.
      stretch: a better accuracy to try for.
    """

    config: Config
    accuracy: float
    std: float = 1.0
    above_random: float = 0.0
    stretch: float | None = None


MNIST = Config(data="mnist")
# Whole runs are differentiated, from two initial weights in every meta-step; windows get stuck earlier.
# The rate is not learned: it would grow until training is chaotic.
LONG = replace(
    MNIST, model="mlp", per_class=10, learn=("images", "labels"), steps=200, batch_size=20,
    learning_rate=0.6, adjoint="stored", runs=2, real_batch=1000, meta_steps=6000,
)  # fmt: skip
# Steps so small and, with their momentum, so few that plain SGD goes the same way.
PLAIN = replace(LONG, steps=100, batch_size=50, learning_rate=0.5, meta_steps=2000)
NAMED = {"long": LONG, "plain": PLAIN}
# What begins as noise in pixels that are hardly ever used stays there, and linear weights keep it: so the
# images begin as means, and no pixel moves for small gradients' sake.
LINEAR: dict[str, Any] = {
    "model": "logistic",
    "meta_steps": 800,
    "real_batch": 4000,
    "start": "means",
    "meta_eps": 1e-3,
}
GATES = {
    "logistic regression, 10 images": Gate(replace(MNIST, **LINEAR), 0.923, std=0.0015),
    "logistic regression, Fashion-MNIST, 10 images": Gate(
        replace(MNIST, data="fashion-mnist", **LINEAR), 0.84
    ),
    "MLP, fixed init, 10 images": Gate(replace(MNIST, inits=1, meta_steps=2000), 0.94),
    "MLP, random inits, 10 images": Gate(
        replace(MNIST, meta_steps=2000), 0.85, above_random=0.35, stretch=0.90
    ),
    "MLP, random inits, 100 images": Gate(replace(MNIST, per_class=10), 0.87, stretch=0.92),
}


def network(model: str, shape: Sequence[int], classes: int) -> Network:
    """A network by name, for images of a shape.

    "logistic" begins near zero, N(0, 0.01²), for weights that ten images cannot change stay where they are.
    """
    pixels = int(np.prod(shape))
    if model == "logistic":
        init, apply = nets.mlp((pixels, classes))
        return lambda key: init(key, 0.01), apply
    if model == "mlp":
        return nets.mlp((pixels, 100, classes))
    small = min(shape) < 16
    sides = (*shape, 1) if len(shape) == 2 else tuple(shape)
    return nets.convnet(sides, classes, width=32 if small else 128, depth=2 if small else 3)


def learn(config: Config, loaded: data.Dataset, checkpoint: str | None = None) -> hg.Distilled:
    """Distill as a configuration says."""
    means = class_means(loaded.train_images, loaded.train_labels, loaded.classes)
    recipe = hg.Recipe(
        config.steps,
        config.learning_rate,
        batch_size=config.batch_size,
        inits=config.inits,
        seed=config.seed,
    )
    return hg.distill(
        network(config.model, loaded.train_images.shape[1:], loaded.classes),
        loaded.train_images,
        loaded.train_labels,
        recipe,
        per_class=config.per_class,
        learn=config.learn,
        start=np.tile(means, (config.per_class, 1, 1)) if config.start == "means" else None,
        normalise=centred,
        window=config.window,
        runs=config.runs,
        real_batch=config.real_batch,
        meta_steps=config.meta_steps,
        optimizer=optax.adam(
            optax.cosine_decay_schedule(config.meta_step, config.meta_steps), eps=config.meta_eps
        ),
        adjoint=hg.Stored() if config.adjoint == "stored" else hg.Reversible(),
        key=jax.random.key(config.seed),
        checkpoint=checkpoint,
    )


def evaluate(
    config: Config, loaded: data.Dataset, distilled: hg.Distilled, models: Sequence[str], full: bool = True
) -> hg.Evaluation:
    """Test it on networks by name; the only place where test images are looked at."""
    shape = loaded.train_images.shape[1:]
    return hg.evaluate(
        distilled,
        {model: network(model, shape, loaded.classes) for model in models},
        (loaded.train_images, loaded.train_labels),
        (loaded.test_images, loaded.test_labels),
        seeds=config.seeds,
        full_epochs=50 if config.data == "digits" else 5,
        full_seeds=3 if full else 0,
    )


def main(
    config: Config,
    directory: str | None = None,
    checkpoint: str | None = None,
    output: str | None = None,
    full: bool = True,
    name: str | None = None,
) -> dict[str, Any]:
    """Distill, evaluate and print; where there is an output, write figure, record and the set itself.

    Args:
      config: what to distill.
      directory: of the data.
      checkpoint: file to resume from.
      output: folder for what is written.
      full: test networks of other kinds too, and those trained on all the data.
      name: of a configuration that has one, after which the files are named and only its model is tested.
    """
    loaded = workloads.load(config.data, directory)
    distilled = learn(config, loaded, checkpoint)
    others = ["logistic", "mlp"] if full and name is None else []
    models = list(dict.fromkeys([config.model, *others]))
    table = evaluate(config, loaded, distilled, models, full)
    print(f"{config.data}: {len(distilled.images)} images, learned with the model {config.model}")
    print(table)
    if output is not None:
        made = "" if config == Config() else f"_{config.data}_{config.model}_{len(distilled.images)}"
        made = f"_{name}" if name else made
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        table.noted(distilled).save(folder / f"distill{made}.npz")
        record = {"config": config, "scores": recorded(table), "rankings": table.rankings}
        draw(folder / f"distill{made}.png", loaded, distilled, record)
    return {"distilled": distilled, "table": table}


def recorded(table: hg.Evaluation) -> list[dict[str, Any]]:
    """Scores with their means and standard deviations."""
    return [s._asdict() | {"mean": s.mean, "std": s.std} for s in table.scores]


def figure7(loaded: data.Dataset) -> dict[str, Any]:
    """Figure 7 of Maclaurin et al. 2015: 40 plain meta-steps; the hypergradient against plain autodiff."""
    init, apply = nets.mlp((784, 10))
    fixed = (lambda key: init(key, np.exp(-4.0)), apply)
    mean, _ = centred(loaded.train_images)
    rows = slice(10_000)
    real = loaded.train_images[rows] - mean, loaded.train_labels[rows]
    noise = 0.01 * np.random.default_rng(0).normal(size=(10, 28, 28)).astype(np.float32)

    def made(adjoint: Any, meta_steps: int) -> hg.Distilled:
        return hg.distill(
            fixed,
            *real,
            hg.Recipe(steps=20, learning_rate=1.0, momentum=0.9, l2=0.01, inits=1),
            learn=("images", "l2"),
            start=noise,
            normalise=lambda images: (np.zeros((), images.dtype), np.ones((), images.dtype)),
            real_batch=None,
            validation=0,
            meta_steps=meta_steps,
            optimizer=optax.sgd(1.0),
            adjoint=adjoint,
            progress=False,
        )

    distilled = made(hg.Reversible(), 40)
    first = [made(adjoint, 1).images - noise for adjoint in (hg.Reversible(), hg.Stored())]
    params = distilled.train(fixed, jax.random.key(0))
    test = jnp.asarray(loaded.test_images - mean)
    return {
        "distilled": distilled,
        "validation loss": float(nets.cross_entropy(apply(params, real[0]), real[1])),
        "test accuracy": 1 - float(nets.error_rate(apply(params, test), loaded.test_labels)),
        "pixels": [float(distilled.images.min()), float(distilled.images.max())],
        "difference from autodiff": float(np.linalg.norm(first[0] - first[1]) / np.linalg.norm(first[1])),
    }


def gates(directory: str | None = None, output: str | None = None, fast: bool = False) -> dict[str, Any]:
    """Run every gate, print what was reached, and where there is an output write figure and record."""
    mnist = workloads.load("mnist", directory)
    seven = figure7(mnist)
    low, high = seven["pixels"]
    passed = (
        abs(seven["validation loss"] - 0.419) <= 0.01
        and seven["test accuracy"] >= 0.88
        and max(abs(low + 0.295), abs(high - 0.328)) <= 0.02
        and seven["difference from autodiff"] < 1e-4
    )
    print(
        f"Figure 7 of 2015, fixed init: validation loss {seven['validation loss']:.4f} (0.419 ± 0.01), "
        f"test accuracy {100 * seven['test accuracy']:.1f} (88.0), pixels in [{low:.3f}, {high:.3f}] "
        f"([-0.295, 0.328] ± 0.02), first hypergradient from plain autodiff's "
        f"{seven['difference from autodiff']:.1e} (1e-4): {'reached' if passed else 'MISSED'}"
    )
    sets = {"Figure 7 of 2015, fixed init": seven.pop("distilled")}
    record: dict[str, Any] = {"Figure 7 of 2015, fixed init": seven | {"reached": passed}}
    for name, gate in GATES.items():
        config = replace(gate.config, meta_steps=3, seeds=2) if fast else gate.config
        loaded = mnist if config.data == "mnist" else workloads.load(config.data, directory)
        distilled = sets[name] = learn(config, loaded)
        table = evaluate(config, loaded, distilled, [config.model], full=not fast)
        score = table.score("distilled", "own")
        random = max(s.mean for s in table.scores if s.examples == "random real")
        ok = score.mean >= max(gate.accuracy, random + gate.above_random) and score.std <= gate.std
        stretch = f", stretch {100 * gate.stretch:.1f}" if gate.stretch else ""
        print(
            f"{name}: {plus_minus(100 * score.mean, 100 * score.std)} on {score.inits} inits "
            f"(accept {100 * gate.accuracy:.1f}{stretch}; random real images {100 * random:.1f}): "
            f"{'reached' if ok else 'MISSED'}"
        )
        print(table)
        record[name] = {"config": config, "scores": recorded(table), "rankings": table.rankings}
        record[name]["reached"] = ok
    if output is not None:
        draw_gates(Path(output) / "distill_gates.png", sets, record)
    return record


def draw(path: Path, loaded: data.Dataset, distilled: hg.Distilled, record: Mapping[str, Any]) -> None:
    """The learned images as the network sees them, and how they were learned."""
    made, axes = figures.figure(2, 3, width=3.6, height=2.6)
    for place in axes[0]:
        place.remove()
    top = made.add_subplot(axes[0, 0].get_gridspec()[0, :])
    names = [str(c) for c in range(loaded.classes)]
    some = np.asarray(distilled.inputs)[: 2 * loaded.classes]
    figures.images(top, some, columns=loaded.classes, names=names, label="pixel - mean")
    top.set(title="Learned images, one class a column", xlabel="label")
    figures.lines(axes[1, 0], {"loss on real images": distilled.history["loss"]}, linewidth=0.7)
    axes[1, 0].set(title="Learning the images", xlabel="meta-step", ylabel="loss after training, nats")
    axes[1, 0].set_yscale("log")
    where, errors = np.asarray(distilled.history["validation_error"]).T
    axes[1, 1].plot(where, 100 * errors, "k.-")
    axes[1, 1].set(title="Choosing among them", xlabel="meta-step", ylabel="error on held-out images, %")
    axes[1, 1].grid(alpha=0.25)
    axes[1, 2].plot(distilled.recipe.rates(), "k.-")
    axes[1, 2].set(title="Training on them", xlabel="step", ylabel="learning rate")
    axes[1, 2].set_ylim(bottom=0)
    axes[1, 2].grid(alpha=0.25)
    figures.save(made, path, record)


def draw_gates(path: Path, sets: Mapping[str, hg.Distilled], record: Mapping[str, Any]) -> None:
    """The first ten learned images of every gate."""
    made, axes = figures.figure(len(sets), 1, width=9.0, height=1.5)
    for place, (name, distilled) in zip(axes[:, 0], sets.items()):
        figures.images(place, np.asarray(distilled.inputs)[:10], label="pixel - mean")
        place.set_title(name, fontsize="medium")
    figures.save(made, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    config, run = cli.parse(
        "distill", __doc__, Config(), arguments,
        fast=lambda config: replace(config, meta_steps=5, seeds=2), flags=("data_dir", "checkpoint"),
        gates={"action": "store_true", "help": "run the published settings instead"},
        long={"action": "store_true", "help": "100 images for long runs instead"},
        plain={"action": "store_true", "help": "100 images for plain SGD instead"},
    )  # fmt: skip
    if run.gates:
        return gates(run.data_dir, run.output, run.fast)
    name = next((name for name in NAMED if getattr(run, name)), None)
    if name is not None:
        config = replace(NAMED[name], meta_steps=3, seeds=2) if run.fast else NAMED[name]
    return main(config, run.data_dir, run.checkpoint, run.output, full=not run.fast, name=name)


if __name__ == "__main__":
    command()
