"""Learn a learning rate and a momentum for every step and every layer, by hypergradients.

Section 3.1 of Maclaurin, Duvenaud and Adams (2015): the training loss after ``T`` steps is minimised over
``α[t, layer]`` and ``γ[t, layer]``, with weights and minibatches drawn anew at every meta-iteration.  What
was learned is judged on seeds it has not seen, against the best constant schedule and the best cosine
decay that a search finds with the same number of training runs.

    python -m experiments.learn_schedule                    # digits, under two minutes on two cores
    python -m experiments.learn_schedule --data mnist       # the paper's setting
"""

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
from experiments.common import cli, figures, records, statistics, workloads
from experiments.common.cli import option
from experiments.common.statistics import plus_minus
from experiments.common.workloads import Examples
from hypergrad import constraints, files, meta, nets

HIDDEN = (50, 50, 50)
UNSEEN = 10_000  # seeds from here on are used by neither the learning nor the searches


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    data: str
    steps: int
    batch_size: int
    learning_rate: float  # before learning, for all steps and layers
    meta_step: float  # of Adam in the logarithm of the rates and the log-odds of the momenta, decayed to 0
    momentum: float = 0.9
    examples: int = 10_000
    meta_iterations: int = option(50, "and runs of each search")
    judged_on: int = option(10, "unseen seeds")
    seed: int = 0


PAPER = {"steps": 100, "batch_size": 200, "learning_rate": float(np.exp(-1.0)), "meta_step": 0.08}
SETTINGS = {
    "digits": Config("digits", steps=50, batch_size=100, learning_rate=1.0, meta_step=0.1),
    "mnist": Config("mnist", **PAPER),
    "fashion-mnist": Config("fashion-mnist", **PAPER),
}


class Setting(NamedTuple):
    """Data and network of a configuration."""

    examples: Examples
    init: Callable[..., Any]
    apply: Callable[..., Array]

    def loss(self, params: Any, examples: Examples) -> Array:
        """Loss on all training examples."""
        return nets.cross_entropy(self.apply(params, examples.images), examples.labels)


class Judged(NamedTuple):
    """Final training loss and test error over seeds."""

    loss: np.ndarray
    error: np.ndarray


def setting(config: Config, directory: str | None) -> Setting:
    """Load the data, centre it, and make the network."""
    loaded = workloads.load(config.data, directory)
    images, labels, *test = workloads.flat(loaded)
    few = images[: config.examples], labels[: config.examples]
    network = nets.mlp([images.shape[1], *HIDDEN, loaded.classes])
    return Setting(Examples(*map(jnp.asarray, (*few, *test))), *network)


def trainer(config: Config, s: Setting, adjoint: Any = None) -> Callable[..., hg.Trained]:
    """Training as a function of examples, hyperparameters, and a key for weights and minibatches."""

    def run(examples: Examples, hypers: Any, key: Array) -> hg.Trained:
        def loss(params: Any, meta: Any, rows: Array) -> Array:
            return workloads.minibatch_loss(s.apply, params, examples, rows)

        count = len(examples.images)
        start, rows = workloads.start_and_rows(s.init, key, count, config.batch_size, config.steps)
        return hg.train(loss, start, hypers, None, rows, steps=config.steps, adjoint=adjoint)

    return run


def judge(config: Config, s: Setting, hypers: Any) -> Judged:
    """Train with given hyperparameters from unseen seeds."""
    run = trainer(config, s)

    @jax.jit
    def results(examples: Examples, hypers: Any, key: Array) -> tuple[Array, Array]:
        params = run(examples, hypers, key).params
        error = nets.error_rate(s.apply(params, examples.test_images), examples.test_labels)
        return s.loss(params, examples), error

    seeds = range(UNSEEN, UNSEEN + config.judged_on)
    pairs = [results(s.examples, hypers, jax.random.key(seed)) for seed in seeds]
    return Judged(*(np.asarray(column, np.float64) for column in zip(*pairs)))


def search(config: Config, s: Setting, shape: Callable[[float], Array]) -> dict[str, float]:
    """The best constant momentum and rate (times a shape over the steps), by as many runs on a grid."""
    momenta = (0.5, 0.8, 0.9, 0.95, 0.98)
    rates = np.geomspace(0.03, 30.0, max(1, config.meta_iterations // len(momenta))).tolist()
    run = trainer(config, s, hg.Stored())  # floats may overflow here: a diverged run just loses

    @jax.jit
    def final(examples: Examples, hypers: Any, key: Array) -> Array:
        return s.loss(run(examples, hypers, key).params, examples)

    def loss(hypers: dict[str, float]) -> Array:
        return final(s.examples, shaped(hypers, shape), jax.random.key(config.seed))

    tried = statistics.grid(learning_rate=rates, momentum=momenta)
    return statistics.ranked(tried, loss)[0] | {"runs": len(tried)}


def shaped(hypers: dict[str, float], shape: Callable[[float], Array]) -> dict[str, Array]:
    """A constant momentum, and a rate for every step."""
    return {
        "learning_rate": shape(hypers["learning_rate"]),
        "momentum": jnp.float32(hypers["momentum"]),
    }


def learn(config: Config, s: Setting, start: Any, checkpoint: str | None) -> meta.Optimized:
    """Follow hypergradients of the training loss, with a new key at every meta-iteration."""
    run = trainer(config, s)
    return meta.optimize(
        lambda hypers, key: s.loss(run(s.examples, hypers, key).params, s.examples),
        start,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.meta_step, config.meta_iterations)),
        steps=config.meta_iterations,
        constraints={"learning_rate": constraints.positive, "momentum": constraints.unit},
        key=jax.random.key(config.seed),
        checkpoint=checkpoint,
    )


def main(
    config: Config, directory: str | None = None, checkpoint: str | None = None, output: str | None = None
) -> dict[str, Any]:
    """Learn, search, judge and print; where there is an output, write figure, record and schedule."""
    s = setting(config, directory)
    structure = jax.eval_shape(s.init, jax.random.key(0))
    constant = {
        name: jax.tree.map(lambda _, v=value: jnp.full(config.steps, v), structure)
        for name, value in (("learning_rate", config.learning_rate), ("momentum", config.momentum))
    }
    learned = learn(config, s, constant, checkpoint)
    steps = jnp.arange(config.steps)
    shapes = {
        "best constant": lambda rate: jnp.full(config.steps, rate, jnp.float32),
        "best cosine decay": lambda rate: rate * jnp.cos(0.5 * jnp.pi * steps / config.steps) ** 2,
    }
    found = {name: search(config, s, shape) for name, shape in shapes.items()}
    contestants = {"before": constant, "learned": learned.hypers} | {
        name: shaped(found[name], shape) for name, shape in shapes.items()
    }
    judged = {name: judge(config, s, hypers) for name, hypers in contestants.items()}
    report(config, judged, found)
    if output is not None:
        run, key = trainer(config, s), jax.random.key(UNSEEN)
        curves = {name: run(s.examples, hypers, key).losses for name, hypers in contestants.items()}
        name = "learn_schedule" if config.data == "digits" else f"learn_schedule_{config.data}"
        record = {"config": config, "searches": found, "results": judged}
        draw(Path(output) / f"{name}.png", learned, curves, record)
        # The layers by name: {"learning_rate": {"layer 0": {"weights": (T,), "biases": (T,)}, ...}, ...}
        named = {
            hyper: {f"layer {k}": layer._asdict() for k, layer in enumerate(tree)}
            for hyper, tree in learned.hypers.items()
        }
        files.save(Path(output) / f"{name}.npz", named, config=records.plain(config))
    return {"judged": judged, "learned": learned, "searches": found}


def report(config: Config, judged: dict[str, Judged], found: dict[str, dict[str, float]]) -> None:
    """A line for every schedule."""
    print(
        f"{config.data}, {config.steps} steps: mean ± standard deviation over {config.judged_on} new seeds"
    )
    print(f"{'schedule':<20}{'training loss':>20}{'test error, %':>20}   runs")
    runs = {"before": 0, "learned": config.meta_iterations} | {k: v["runs"] for k, v in found.items()}
    for name, (loss, error) in judged.items():
        cells = (
            plus_minus(loss.mean(), loss.std(), ".4f"),
            plus_minus(100 * error.mean(), 100 * error.std()),
        )
        print(f"{name:<20}{cells[0]:>20}{cells[1]:>20}{runs[name]:>7}")
    for name, best in found.items():
        print(f"{name}: learning rate {best['learning_rate']:.3g}, momentum {best['momentum']}")
    print("a run of 'learned' is a hypergradient, which takes about as long as four plain training runs")


def draw(path: Path, learned: meta.Optimized, curves: dict[str, Array], record: dict[str, Any]) -> None:
    """The learned schedules by layer, the outer loss, and training before and after."""
    figure, axes = figures.figure(2, 2)
    titles = {"learning_rate": "Learned learning rate", "momentum": "Learned momentum"}
    for place, (name, title) in zip(axes[0], titles.items()):
        weights = {f"layer {k + 1}": layer.weights for k, layer in enumerate(learned.hypers[name])}
        figures.lines(place, weights)
        place.set(title=f"{title} of the weights", xlabel="training step", ylabel=name.replace("_", " "))
    axes[0, 0].set_yscale("log")
    figures.lines(axes[1, 0], {"loss after training": learned.history.loss})
    axes[1, 0].set(title="Learning the schedule", xlabel="meta-iteration", ylabel="training loss, nats")
    figures.lines(axes[1, 1], curves)
    axes[1, 1].set(title="Training, unseen seed", xlabel="training step", ylabel="minibatch loss, nats")
    axes[1, 1].set_yscale("log")
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    fast = {"meta_iterations": 5, "steps": 20, "judged_on": 2}
    config, run = cli.parse(
        "learn_schedule", __doc__, SETTINGS, arguments,
        fast=lambda config: replace(config, **fast), flags=("data_dir", "checkpoint"),
    )  # fmt: skip
    return main(config, run.data_dir, run.checkpoint, run.output)


if __name__ == "__main__":
    command()
