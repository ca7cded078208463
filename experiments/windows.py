"""How much a window of a long run tells of its hypergradient, by the position of the window.

Who distills through long runs differentiates a few steps only, which end at a random step, for all states
of the run do not fit into memory.  Exact reversal keeps none of them, so that the gradient of every window
can be compared with the exact one: of the loss where the window ends, and of the loss at the end of the
run.  The comparison is made where learning begins, at real images, and at what is learned in windows.

    python -m experiments.windows                    # digits: 100 images, 200 steps, windows of 20, 40, 80
    python -m experiments.windows --data mnist       # takes much longer
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.cli import option
from hypergrad import data, nets
from hypergrad.distillation import WindowCosines, window_cosines
from hypergrad.distillation.distilled import centred

STATES = {"real images": 0, "after learning": 1}  # and the share of the meta-steps before them


@dataclass(frozen=True)
class Config:
    """What to run."""

    data: str = option("digits", "", choices=workloads.NAMES)
    hidden: int = 100
    per_class: int = option(10, "learned images for every class")
    steps: int = option(200, "of the inner training")
    batch_size: int = option(20, "learned images in a step")
    learning_rate: float = option(1.0, "of the inner training, in every step")
    windows: tuple[int, ...] = option((20, 40, 80), "lengths that are compared")
    window: int = option(40, "that is learned in")
    meta_steps: int = option(100, "of learning in windows")
    meta_step: float = option(0.02, "of Adam, decayed to 0")
    ends: int = option(10, "positions of a window")
    runs: int = option(5, "initial weights, for the comparison")
    real: int = option(1000, "real images in the loss")
    seed: int = 0


def learned(config: Config, loaded: data.Dataset, meta_steps: int) -> hg.Distilled:
    """The set after so many meta-steps in windows."""
    pixels = int(np.prod(loaded.train_images.shape[1:]))
    return hg.distill(
        nets.mlp((pixels, config.hidden, loaded.classes)),
        loaded.train_images,
        loaded.train_labels,
        hg.Recipe(config.steps, config.learning_rate, batch_size=config.batch_size),
        per_class=config.per_class,
        learn=("images",),
        normalise=centred,
        window=config.window,
        real_batch=config.real,
        validation=0,
        meta_steps=meta_steps,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.meta_step, max(1, config.meta_steps))),
        adjoint=hg.Stored(),  # of a window; the quickest for so small a network, and the same to rounding
        key=jax.random.key(config.seed),
    )


def main(config: Config, directory: str | None = None, output: str | None = None) -> dict[str, Any]:
    """Compare, print, and where there is an output write figure and record."""
    loaded = workloads.load(config.data, directory)
    pixels = int(np.prod(loaded.train_images.shape[1:]))
    network = nets.mlp((pixels, config.hidden, loaded.classes))
    real = loaded.train_images[: config.real], loaded.train_labels[: config.real]
    found: dict[str, list[WindowCosines]] = {}
    for state, share in STATES.items():
        made = learned(config, loaded, share * config.meta_steps)
        found[state] = window_cosines(
            network, made, real, config.windows, ends=config.ends, runs=config.runs
        )
        for each in found[state]:
            print(f"{state}: {each}")
    record = {"config": config, "cosines": found}
    if output is not None:
        name = "windows" if config == Config() else f"windows_{config.data}"
        draw(Path(output) / f"{name}.png", config, found, record)
    return record


def draw(path: Path, config: Config, found: dict[str, list[WindowCosines]], record: dict[str, Any]) -> None:
    """Cosines by position: for the loss at the end of the window, and for that at the end of the run."""
    made, axes = figures.figure(1, 2, width=4.8)
    titles = ("of the loss where the window ends", "of the loss at the end of the run")
    for panel, (name, title) in enumerate(zip(("same_end", "whole_run"), titles)):
        place = axes[0, panel]
        for row, (state, cosines) in enumerate(found.items()):
            for k, each in enumerate(cosines):
                values = getattr(each, name)
                style = figures.look(k, marker="o" if row else "s", markersize=4, alpha=1.0 if row else 0.6)
                style["markerfacecolor"] = style["color"] if row else "white"
                place.plot(each.ends, values.mean(0), label=f"{state}, window {each.window}", **style)
        place.set(xlabel="last step of the window", title=title, ylim=(min(0, place.get_ylim()[0]), 1.03))
        place.grid(alpha=0.25)
    axes[0, 0].set_ylabel("cosine with the exact gradient")
    axes[0, 1].legend(fontsize="x-small")
    figures.save(made, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    config, run = cli.parse(
        "windows", __doc__, Config(), arguments,
        fast=lambda config: replace(
            config, hidden=10, per_class=1, steps=12, windows=(4,), window=4, meta_steps=2,
            ends=3, runs=1, real=200,
        ),
        flags=("data_dir",),
    )  # fmt: skip
    return main(config, run.data_dir, run.output)


if __name__ == "__main__":
    command()
