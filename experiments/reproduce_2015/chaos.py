"""Final loss and its derivative in the log of the step size, at up to 1000 step sizes, into the chaos."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.common import figures
from experiments.reproduce_2015 import authors
from experiments.reproduce_2015.authors import Arrays, Params, Setting
from experiments.reproduce_2015.compare import Comparison, compare

SIZES, STEPS = (784, 200, 50, 10), 50
# Ends of the regions of log α, and whether the reference's advice is to compare there: nobody's arithmetic
# follows the others' beyond.  The loss is compared absolutely, the hypergradient relatively.
REGIONS = (
    (0.5, 1.5, True),
    (1.5, 1.85, True),
    (1.85, 2.1, False),
    (2.1, 2.2, False),
    (2.2, 2.6, False),
)
LOSS, GRADIENT = 1e-6, 1e-4
NOT_FINITE = 997  # the authors' hypergradients from this point on are not numbers


def compute(setting: Setting) -> Arrays:
    """Loss and hypergradient at every step size."""
    loss = authors.classifier(SIZES)

    def outer(log_alpha: Array, start: Params, given: Any, rows: Array) -> Array:
        return loss(authors.train(loss, start, jnp.exp(log_alpha), 0.9, given, rows).params, given)

    evaluate = jax.jit(jax.value_and_grad(outer))
    step = 1 if setting.all_points else 66 if setting.fast else 4
    points = np.union1d(np.arange(0, 1000, step), [] if setting.fast else [999]).astype(int)
    log_alpha = np.linspace(0.5, 2.5, 1000)[points]
    given = authors.examples(setting.digits, slice(1000), centred=False)
    run = authors.second_draw(SIZES, -2.0), given, authors.consecutive(STEPS, 250, 1000)
    pairs = [evaluate(x, *run) for x in tqdm(log_alpha, desc="chaos", leave=False)]
    losses, hypergradients = (np.array(x) for x in zip(*pairs))
    return {"point": points, "log_alpha": log_alpha, "loss": losses, "dloss_dlogalpha": hypergradients}


def compare_regions(ours: Arrays, theirs: Mapping[str, np.ndarray]) -> list[Comparison]:
    """Compare region by region."""
    points = ours["point"]
    result = [compare("log_alpha", ours["log_alpha"], np.asarray(theirs["log_alpha"])[points])]
    for low, high, asked in REGIONS:
        for name in ("loss", "dloss_dlogalpha"):
            inside = (ours["log_alpha"] >= low) & (ours["log_alpha"] < high)
            inside &= (name == "loss") | (points < NOT_FINITE)
            if not inside.any():
                continue
            a, b = ours[name][inside], np.asarray(theirs[name])[points[inside]]
            granted = LOSS if name == "loss" else GRADIENT * np.abs(b)
            row = compare(f"{name}, log α in [{low}, {high})", a, b, apart=True, granted=granted)
            result.append(row if asked else row._replace(agrees=None))
    return result


def draw(ours: Arrays, theirs: Arrays) -> Any:
    """Loss and hypergradient against the step size."""
    figure, axes = figures.figure(2, 1, width=7)
    about = (
        ("loss", "Loss after 50 steps", "loss (nats)", None),
        ("dloss_dlogalpha", "Hypergradient of that loss", "|d loss / d log step size| (nats)", NOT_FINITE),
    )
    for place, (name, title, words, end) in zip(axes[:, 0], about):
        place.plot(
            theirs["log_alpha"][:end], np.abs(theirs[name])[:end], color="0.6", lw=1, label="authors, 2015"
        )
        place.plot(ours["log_alpha"], np.abs(ours[name]), "k.", ms=4, label="reversible engine")
        place.axvspan(2.2, 2.5, color="0.88", zorder=0, label="chaotic")
        place.axvline(1.85, color="k", lw=1, ls=":", label="compared up to here")
        place.set(
            title=title, xlabel="natural log of the step size", ylabel=words, yscale="log", xlim=(0.5, 2.5)
        )
        place.legend(fontsize="small")
    return figure
