"""K-FAC on an autoencoder of handwritten digits, beside Adam and Nesterov with tuned rates.

64-100-50-25-6-25-50-100-64, tanh but for the code and the logits, on all 1,797 digits at every step, with
Glorot's initial weights.  The loss is the cross-entropy, summed over pixels, mean over images, and a
penalty of ``1/2 10⁻⁵ ‖w‖²``; what is shown is its excess over the entropy of the pixels, below which
nothing can get.  The time of a step is the least of a few runs that take turns.

    python -m experiments.kfac_autoencoder        # some three minutes on two cores
    python -m experiments.kfac_autoencoder --variants    # doubly factored and late, in a minute
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg
from hypergrad import curvature, data, nets, plots

SIZES = (64, 100, 50, 25, 6, 25, 50, 100, 64)
LINEAR = (3, 7)  # the code and the logits
SHOWN = (0, 10, 25, 50, 100, 200, 300, 1000)
VARIANTS: dict[str, dict[str, Any]] = {
    "K-FAC, fixed rate": {},
    "first layer doubly factored": {"doubly": (8, *[0] * 7)},  # rows of 8 pixels
    "late": {"asynchrony": hg.Asynchrony(refresh=5, statistics_delay=2, inverse_delay=5)},
}
FIXED = {"learning_rate": 0.1, "damping": 0.1, "norm_constraint": 0.1}


@dataclass(frozen=True)
class Config:
    """What to run."""

    steps: int = 301
    baseline_steps: int = 1001
    damping: tuple[float, ...] = (1.0, 150.0)
    share: int = 2  # K-FAC's network sees one of so many examples at a step, and others at the next
    adam_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    nesterov_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    nesterov_momenta: tuple[float, ...] = (0.9, 0.99)
    penalty: float = 1e-5
    timings: int = 3
    seed: int = 0


class Curve(NamedTuple):
    """One optimizer: its best hyperparameters, the excess loss at every step, milliseconds per step."""

    hypers: dict[str, float]
    excess: np.ndarray
    milliseconds: float


def init(key: Array) -> tuple[nets.Dense, ...]:
    """Glorot's uniform weights, and biases of 0."""
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, len(SIZES) - 1)
    pairs = itertools.pairwise(SIZES)
    return tuple(nets.Dense(glorot(k, pair), jnp.zeros(pair[1])) for k, pair in zip(keys, pairs))


def autoencoder(params: Sequence[nets.Dense], images: Array, probes: Sequence[Any]) -> tuple[Array, Any]:
    """Logits of the pixels, and what goes into the layers, as K-FAC wants it (see `hypergrad.layers`)."""
    inputs = [images]
    for k, (weights, biases) in enumerate(params):
        computed = inputs[-1] @ weights + biases[None] + probes[k]
        inputs.append(computed if k in LINEAR else jnp.tanh(computed))
    return inputs[-1], tuple(inputs[:-1])


def trainer(config: Config, optimizer: Any, steps: int) -> Callable[..., Array]:
    """The losses of a run, compiled, as a function of images and hyperparameters."""

    def losses(images: Array, hypers: Mapping[str, Array]) -> Array:
        def loss(params: Any, images: Array, step: Array) -> Array:
            logits, _ = autoencoder(params, images, [0.0] * len(params))
            squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
            by_image = jax.vmap(curvature.bernoulli().loss)(logits, images)
            return jnp.mean(by_image) + 0.5 * config.penalty * squares

        start = init(jax.random.key(config.seed))
        options = {"steps": steps, "optimizer": optimizer, "adjoint": hg.Stored()}
        return hg.train(loss, start, hypers, images, **options).losses

    return jax.jit(losses)


def in_shares(config: Config) -> Any:
    """K-FAC's network, which goes through the examples in shares."""

    def network(params: Any, images: Array, step: Array, probes: Any) -> Any:
        n = len(images)
        rows = jnp.arange(-(-n // config.share))
        return autoencoder(params, images[(step * len(rows) + rows) % n], probes)

    return network


def kfac(config: Config) -> Any:
    """Adaptive K-FAC."""
    return hg.adaptive_kfac(in_shares(config), curvature.bernoulli())


def variants(config: Config) -> dict[str, np.ndarray]:
    """Excess losses of K-FAC with a fixed rate, and of its variants with the same hyperparameters."""
    images, curves = all_digits(), {}
    for name, options in VARIANTS.items():
        network = in_shares(config)
        optimizer = hg.kfac(network, curvature.bernoulli(), norm_constraint=True, **options)
        run = trainer(config, optimizer, config.steps)
        losses = run(jnp.asarray(images), jax.tree.map(jnp.float32, FIXED))
        curves[name] = np.asarray(losses, np.float64) - entropy(images)
        at = [f"{curves[name][i]:8.2f}" for i in SHOWN if i < config.steps]
        print(f"{name:<30}" + "".join(at))
    return curves


def all_digits() -> np.ndarray:
    """All images, as rows of pixels."""
    loaded = data.digits()
    return np.concatenate([loaded.train_images, loaded.test_images]).reshape(-1, SIZES[0])


def entropy(images: np.ndarray) -> float:
    """The least cross-entropy that any logits have, per image."""
    each = -sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0) for p in (images, 1 - images))
    return float(each.sum(axis=1).mean())


def contest(config: Config, images: np.ndarray) -> dict[str, Curve]:
    """Every optimizer with the best of its hyperparameters."""
    grids = {
        **{f"K-FAC, λ = {x:g} at first": [{"damping": x, "l2": config.penalty}] for x in config.damping},
        "Adam": [{"learning_rate": rate} for rate in config.adam_rates],
        "Nesterov": [
            {"learning_rate": rate, "momentum": momentum}
            for rate, momentum in itertools.product(config.nesterov_rates, config.nesterov_momenta)
        ],
    }
    optimizers = {"K-FAC": kfac(config), "Adam": hg.adam(), "Nesterov": hg.nesterov()}
    steps = {"K-FAC": config.steps, "Adam": config.baseline_steps, "Nesterov": config.baseline_steps}
    runs = {name: trainer(config, optimizer, steps[name]) for name, optimizer in optimizers.items()}
    floor, images = entropy(images), jnp.asarray(images)

    def run(name: str, hypers: dict[str, float]) -> np.ndarray:
        found = runs[name.partition(",")[0]](images, jax.tree.map(jnp.float32, hypers))
        return np.asarray(found, np.float64) - floor

    best = {}
    for name, grid in grids.items():
        trials = [(run(name, hypers), hypers) for hypers in grid]
        best[name] = min(trials, key=lambda trial: np.nan_to_num(trial[0][-1], nan=np.inf))
    times: dict[str, list[float]] = {name: [] for name in best}
    for _ in range(config.timings):
        for name, (excess, hypers) in best.items():
            began = time.perf_counter()
            run(name, hypers)
            times[name].append(1e3 * (time.perf_counter() - began) / len(excess))
    return {name: Curve(hypers, excess, min(times[name])) for name, (excess, hypers) in best.items()}


def main(config: Config, output: str | None = None) -> dict[str, Curve]:
    """Run, print a table, and where there is an output write figure and record."""
    curves = contest(config, all_digits())
    print(
        "excess loss, nats per image, at iteration" + " " * 8 + "".join(f"{i:>8}" for i in SHOWN) + "   ms"
    )
    for name, curve in curves.items():
        at = [f"{curve.excess[i]:8.2f}" if i < len(curve.excess) else " " * 8 for i in SHOWN]
        about = ", ".join(f"{key} {value:g}" for key, value in curve.hypers.items() if key != "l2")
        print(f"{name + ' (' + about + ')':<49}" + "".join(at) + f"{curve.milliseconds:6.1f}")
    first, adam = next(iter(curves.values())), curves["Adam"]
    print(f"an iteration of K-FAC takes {first.milliseconds / adam.milliseconds:.1f} times one of Adam")
    if output is not None:
        draw(Path(output) / "kfac_autoencoder.png", config, curves)
    return curves


def draw(path: Path, config: Config, curves: Mapping[str, Curve]) -> None:
    """Loss by iteration and by time."""
    figure, axes = plots.figure(1, 2)
    plots.lines(axes[0, 0], {name: curve.excess for name, curve in curves.items()})
    axes[0, 0].set(title="By iteration", xlabel="iteration", xscale="symlog", yscale="log")
    plots.lines(axes[0, 1], {name: curve.excess for name, curve in curves.items()})
    for line, curve in zip(axes[0, 1].get_lines(), curves.values()):
        line.set_xdata(1e-3 * curve.milliseconds * np.arange(len(curve.excess)))
    axes[0, 1].relim()
    axes[0, 1].autoscale()
    axes[0, 1].set(title="By time, on the machine of the record", xlabel="seconds", yscale="log")
    for place in axes[0]:
        place.set_ylabel("excess loss, nats per image")
    record = {
        "config": asdict(config),
        "results": {
            name: {
                "hypers": curve.hypers,
                "milliseconds": curve.milliseconds,
                "excess": {str(i): curve.excess[i] for i in SHOWN if i < len(curve.excess)},
            }
            for name, curve in curves.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Curve]:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m experiments.kfac_autoencoder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a few iterations, to see that it runs")
    parser.add_argument("--variants", action="store_true", help="print the losses of K-FAC's variants only")
    parser.add_argument("--output", help="folder for the figure (default figures, none with --fast)")
    given = parser.parse_args(arguments)
    if given.fast:
        config = Config(11, 11, (1.0,), 8, (1e-2,), (3e-2,), (0.9,), timings=1, seed=given.seed)
    else:
        config = Config(seed=given.seed)
    if given.variants:
        variants(config)
        return {}
    return main(config, given.output or (None if given.fast else "figures"))


if __name__ == "__main__":
    command()
