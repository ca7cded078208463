"""Learn a learning rate and a momentum for every step and every layer, by hypergradients.

Section 3.1 of Maclaurin, Duvenaud and Adams (2015): the training loss after ``T`` steps is minimised over
``α[t, layer]`` and ``γ[t, layer]``, with weights and minibatches drawn anew at every meta-iteration.  What
was learned is judged on seeds it has not seen, against the best constant schedule and the best cosine
decay that a search finds with the same number of training runs.

    python -m experiments.learn_schedule                    # digits, under two minutes on two cores
    python -m experiments.learn_schedule --data mnist       # the paper's setting
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from hypergrad import constraints, data, files, meta, nets, plots

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
    meta_iterations: int = 50
    judged_on: int = 10
    seed: int = 0


PAPER = {"steps": 100, "batch_size": 200, "learning_rate": float(np.exp(-1.0)), "meta_step": 0.08}
SETTINGS = {
    "digits": Config("digits", steps=50, batch_size=100, learning_rate=1.0, meta_step=0.1),
    "mnist": Config("mnist", **PAPER),
    "fashion-mnist": Config("fashion-mnist", **PAPER),
}


class Examples(NamedTuple):
    """The data: arguments of the compiled functions, not constants inside them."""

    images: Array  # (n, pixels), centred
    labels: Array  # (n,)
    test_images: Array
    test_labels: Array


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
    loaders = {
        "digits": lambda: data.digits(),
        "mnist": lambda: data.mnist(directory),
        "fashion-mnist": lambda: data.fashion_mnist(directory),
    }
    loaded = loaders[config.data]()
    images = loaded.train_images.reshape(len(loaded.train_images), -1)
    test = loaded.test_images.reshape(len(loaded.test_images), -1)
    mean = images.mean(axis=0)
    init, apply = nets.mlp([images.shape[1], *HIDDEN, loaded.classes])
    few = slice(config.examples)
    arrays = (images - mean)[few], loaded.train_labels[few], test - mean, loaded.test_labels
    return Setting(Examples(*map(jnp.asarray, arrays)), init, apply)


def trainer(config: Config, s: Setting, adjoint: Any = None) -> Callable[..., hg.Trained]:
    """Training as a function of examples, hyperparameters, and a key for weights and minibatches."""

    def run(examples: Examples, hypers: Any, key: Array) -> hg.Trained:
        def loss(params: Any, meta: Any, rows: Array) -> Array:
            return nets.cross_entropy(s.apply(params, examples.images[rows]), examples.labels[rows])

        weights, batches = jax.random.split(key)
        count = len(examples.images)
        rows = data.minibatches(batches, count, min(config.batch_size, count), config.steps)
        return hg.train(loss, s.init(weights), hypers, None, rows, steps=config.steps, adjoint=adjoint)

    return run


def judge(config: Config, s: Setting, hypers: Any, seeds: Sequence[int]) -> Judged:
    """Train with given hyperparameters from several seeds."""
    run = trainer(config, s)

    @jax.jit
    def results(examples: Examples, hypers: Any, key: Array) -> tuple[Array, Array]:
        params = run(examples, hypers, key).params
        error = nets.error_rate(s.apply(params, examples.test_images), examples.test_labels)
        return s.loss(params, examples), error

    pairs = [results(s.examples, hypers, jax.random.key(seed)) for seed in seeds]
    return Judged(*(np.asarray(column, np.float64) for column in zip(*pairs)))


def search(config: Config, s: Setting, shape: Callable[[float], Array], runs: int) -> dict[str, float]:
    """The best constant momentum and rate (times a shape over the steps), by as many runs on a grid."""
    momenta = (0.5, 0.8, 0.9, 0.95, 0.98)
    rates = np.geomspace(0.03, 30.0, max(1, runs // len(momenta)))
    run = trainer(config, s, hg.Stored())  # floats may overflow here: a diverged run just loses

    @jax.jit
    def final(examples: Examples, rate: Array, momentum: Array, key: Array) -> Array:
        hypers = {"learning_rate": rate, "momentum": momentum}
        return s.loss(run(examples, hypers, key).params, examples)

    key = jax.random.key(config.seed)
    trials = {
        (rate, momentum): float(final(s.examples, shape(rate), jnp.float32(momentum), key))
        for rate, momentum in itertools.product(rates, momenta)
    }
    rate, momentum = min(trials, key=lambda k: np.nan_to_num(trials[k], nan=np.inf))
    return {"learning_rate": float(rate), "momentum": momentum, "runs": len(trials)}


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
    run = trainer(config, s)

    def objective(hypers: Any, key: Array) -> Array:
        return s.loss(run(s.examples, hypers, key).params, s.examples)

    learned = meta.optimize(
        objective,
        constant,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.meta_step, config.meta_iterations)),
        steps=config.meta_iterations,
        constraints={"learning_rate": constraints.positive, "momentum": constraints.unit},
        key=jax.random.key(config.seed),
        checkpoint=checkpoint,
    )

    steps = jnp.arange(config.steps)
    shapes = {
        "best constant": lambda rate: jnp.full(config.steps, rate, jnp.float32),
        "best cosine decay": lambda rate: rate * jnp.cos(0.5 * jnp.pi * steps / config.steps) ** 2,
    }
    found = {name: search(config, s, shape, config.meta_iterations) for name, shape in shapes.items()}
    contestants = {"before": constant, "learned": learned.hypers} | {
        name: {
            "learning_rate": shape(found[name]["learning_rate"]),
            "momentum": jnp.float32(found[name]["momentum"]),
        }
        for name, shape in shapes.items()
    }
    unseen = range(UNSEEN, UNSEEN + config.judged_on)
    judged = {name: judge(config, s, hypers, unseen) for name, hypers in contestants.items()}

    print(
        f"{config.data}, {config.steps} steps: mean ± standard deviation over {config.judged_on} new seeds"
    )
    print(f"{'schedule':<20}{'training loss':>20}{'test error, %':>20}   runs")
    runs = {"before": 0, "learned": config.meta_iterations} | {k: int(v["runs"]) for k, v in found.items()}
    for name, result in judged.items():
        loss = f"{result.loss.mean():.4f} ± {result.loss.std():.4f}"
        error = f"{100 * result.error.mean():.2f} ± {100 * result.error.std():.2f}"
        print(f"{name:<20}{loss:>20}{error:>20}{runs[name]:>7}")
    for name, best in found.items():
        print(f"{name}: learning rate {best['learning_rate']:.3g}, momentum {best['momentum']}")
    print("a run of 'learned' is a hypergradient, which takes about as long as four plain training runs")

    if output is not None:
        key = jax.random.key(UNSEEN)
        curves = {name: run(s.examples, hypers, key).losses for name, hypers in contestants.items()}
        record = {
            "config": asdict(config),
            "searches": found,
            "results": {k: {f: v.tolist() for f, v in r._asdict().items()} for k, r in judged.items()},
        }
        folder = Path(output)
        name = "learn_schedule" if config.data == "digits" else f"learn_schedule_{config.data}"
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / f"{name}.png", learned, curves, record)
        # The layers by name: {"learning_rate": {"layer 0": {"weights": (T,), "biases": (T,)}, ...}, ...}
        named = {
            hyper: {f"layer {k}": layer._asdict() for k, layer in enumerate(tree)}
            for hyper, tree in learned.hypers.items()
        }
        files.save(folder / f"{name}.npz", named, config=asdict(config))
    return {"judged": judged, "learned": learned, "searches": found}


def draw(path: Path, learned: meta.Optimized, curves: dict[str, Array], record: dict[str, Any]) -> None:
    """The learned schedules by layer, the outer loss, and training before and after."""
    figure, axes = plots.figure(2, 2)
    titles = {"learning_rate": "Learned learning rate", "momentum": "Learned momentum"}
    for place, (name, title) in zip(axes[0], titles.items()):
        weights = {f"layer {k + 1}": layer.weights for k, layer in enumerate(learned.hypers[name])}
        plots.lines(place, weights)
        place.set(title=f"{title} of the weights", xlabel="training step", ylabel=name.replace("_", " "))
    axes[0, 0].set_yscale("log")
    plots.lines(axes[1, 0], {"loss after training": learned.history.loss})
    axes[1, 0].set(title="Learning the schedule", xlabel="meta-iteration", ylabel="training loss, nats")
    plots.lines(axes[1, 1], curves)
    axes[1, 1].set(title="Training, unseen seed", xlabel="training step", ylabel="minibatch loss, nats")
    axes[1, 1].set_yscale("log")
    plots.save(figure, path, record)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.learn_schedule", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", choices=tuple(SETTINGS), default="digits")
    parser.add_argument(
        "--data-dir", help="folder with mnist/ and fashion-mnist/ (default $HYPERGRAD_DATA)"
    )
    parser.add_argument("--meta-iterations", type=int, default=50, help="and runs of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="file to save progress to and resume from")
    parser.add_argument("--fast", action="store_true", help="a few meta-iterations, to see that it runs")
    parser.add_argument("--output", help="folder for the figure (default figures, none with --fast)")
    return parser.parse_args(arguments)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    given = parse(arguments)
    config = replace(SETTINGS[given.data], meta_iterations=given.meta_iterations, seed=given.seed)
    if given.fast:
        config = replace(config, meta_iterations=5, steps=20, judged_on=2)
    output = given.output or (None if given.fast else "figures")
    return main(config, given.data_dir, given.checkpoint, output)


if __name__ == "__main__":
    command()
