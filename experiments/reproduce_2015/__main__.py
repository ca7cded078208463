"""The numbers that the authors of 2015 saved, computed again by the exactly reversible engine.

Maclaurin, Duvenaud and Adams kept the results of their runs.  Ten of their experiments are run here anew
through ``hg.train(..., adjoint=hg.Reversible())`` in float64, and every array that comes out is compared
with theirs, number by number, to the six digits that their files carry.  An eleventh, on Omniglot, cannot
be had to the digit, for the order of its data is lost: see ``experiments.omniglot``.

    export HYPERGRAD_REFERENCE=...  HYPERGRAD_DATA=...   # their results; the folder that holds mnist/
    python -m experiments.reproduce_2015                 # five minutes on two cores
    python -m experiments.reproduce_2015 --fast          # a minute, writes nothing

===================================  ======================================================  =====
experiment                           what is learned                                         steps
===================================  ======================================================  =====
figure1_toy_2d                       rates and momenta of every step, for two weights        50
schedule_beta_0.9_meta_step_0.04     rates, momenta and initial scales of every layer        100
mean_initial_hypergradient_50_seeds  nothing: the first hypergradient of those, averaged     100
chaos_learning_rate_wiggle           nothing: loss and hypergradient at up to 1000 rates     50
init_distribution_1                  the distribution of the initial weights                 20
train_short_whetlab_init             nothing: one run                                        100
distill_logistic_30_images           30 training images and an L2 penalty                    20
per_weight_L2_logistic               an L2 penalty for every weight                          50
L2_granularity_logistic              L2 penalties: one, by layer, by input pixel             200
optimize_all_sign_steps              penalties, initial scales, rates and momenta            50
===================================  ======================================================  =====

The exit status is 1 where an array disagrees and 2 where the files are missing.

Source: Maclaurin, Duvenaud, Adams, "Gradient-based hyperparameter optimization through reversible
learning", ICML 2015, and the results in the authors' repository.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import cli, figures, records
from experiments.reproduce_2015 import (
    chaos,
    distill,
    initial_weights,
    penalties,
    schedules,
    sign_steps,
    single_run,
    toy,
)
from experiments.reproduce_2015.authors import Arrays, Setting, read_digits
from experiments.reproduce_2015.compare import DIGITS, FLOOR, Comparison, compare_all, table
from hypergrad import data, files


class Experiment(NamedTuple):
    """One of the authors' experiments.

    compute: from a setting to our arrays, those of theirs under the same names.
    draw: from our arrays and theirs to a figure.
    compare: from our arrays and theirs to rows of the table.
    needs_data: whether MNIST is needed.
    also: other reference files with arrays to compare with.
    """

    compute: Callable[[Setting], Arrays]
    draw: Callable[[Arrays, Arrays], Any]
    compare: Callable[[Arrays, Arrays], list[Comparison]] = compare_all
    needs_data: bool = True
    also: tuple[str, ...] = ()


SCHEDULE = "schedule_beta_0.9_meta_step_0.04"
EXPERIMENTS = {
    "figure1_toy_2d": Experiment(toy.compute, toy.draw, needs_data=False),
    SCHEDULE: Experiment(schedules.learn, schedules.draw_learned),
    "mean_initial_hypergradient_50_seeds": Experiment(
        schedules.average, schedules.draw_average, also=(SCHEDULE,)
    ),
    "chaos_learning_rate_wiggle": Experiment(chaos.compute, chaos.draw, chaos.compare_regions),
    "init_distribution_1": Experiment(initial_weights.compute, initial_weights.draw),
    "train_short_whetlab_init": Experiment(single_run.compute, single_run.draw),
    "distill_logistic_30_images": Experiment(distill.compute, distill.draw, distill.compare_regions),
    "per_weight_L2_logistic": Experiment(penalties.per_weight, penalties.draw_per_weight),
    "L2_granularity_logistic": Experiment(penalties.pooled, penalties.draw_pooled),
    "optimize_all_sign_steps": Experiment(sign_steps.compute, sign_steps.draw),
}


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    all_points: bool = cli.option(False, "all 1000 step sizes, not every 4th")
    only: tuple[str, ...] = cli.option((*EXPERIMENTS,), "default all", metavar="NAME", choices=EXPERIMENTS)


class Result(NamedTuple):
    """What an experiment gave: our arrays, the authors', the comparisons, and the seconds it took."""

    ours: Arrays
    theirs: Arrays
    comparisons: list[Comparison]
    seconds: float


def read_reference(folder: Path, name: str) -> Arrays:
    """The arrays that the authors saved of an experiment, and of those that it also refers to."""
    names = (*EXPERIMENTS[name].also, name)
    saved = [records.read(folder / f"{x}.json")["reference"] for x in names]
    return {key: np.asarray(x) for part in saved for key, x in part.items()}


def run(name: str, setting: Setting, theirs: Arrays) -> Result:
    """Run an experiment in float64 and compare."""
    start = time.perf_counter()
    with jax.enable_x64(True):
        ours = {key: np.asarray(x) for key, x in EXPERIMENTS[name].compute(setting).items()}
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", flush=True)
    return Result(ours, theirs, EXPERIMENTS[name].compare(ours, theirs), seconds)


def write(folder: Path, name: str, result: Result, setting: Setting) -> None:
    """Write the figure of an experiment, the record of the comparisons, and our arrays."""
    record = {
        "config": {"fast": setting.fast, "all_points": setting.all_points},
        "digits": DIGITS,
        "floor": FLOOR,
        "seconds": round(result.seconds, 1),
        "comparisons": {c.array: dict(list(c._asdict().items())[1:]) for c in result.comparisons},
    }
    figures.save(EXPERIMENTS[name].draw(result.ours, result.theirs), folder / f"{name}.png", record)
    files.save(folder / f"{name}.npz", result.ours)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """Run, compare, print and write; return the results by experiment.

    Raises SystemExit with status 1 where an array disagrees and 2 where a file is missing.
    """
    config, options = cli.parse(
        "reproduce_2015", __doc__, Config(), arguments,
        fast=lambda config: config, flags=("data_dir", "reference"), output="figures/reproduce_2015",
    )  # fmt: skip
    reference = options.reference or os.environ.get("HYPERGRAD_REFERENCE")
    if not reference:
        options.error("the authors' results are needed: pass --reference or set HYPERGRAD_REFERENCE")
    names = [name for name in EXPERIMENTS if name in config.only]
    folder = options.data_dir or os.environ.get("HYPERGRAD_DATA")
    if options.fast and not folder:
        for name in [name for name in names if EXPERIMENTS[name].needs_data]:
            print(f"skipped {name}: it needs MNIST (pass --data-dir or set HYPERGRAD_DATA)")
            names.remove(name)
        if not names:
            options.error("nothing is left to run without HYPERGRAD_DATA")
    try:
        theirs = {name: read_reference(Path(reference), name) for name in names}
        digits = read_digits(folder) if any(EXPERIMENTS[x].needs_data for x in names) else (None, None)
    except OSError as error:
        options.error(f"{error}; --reference or HYPERGRAD_REFERENCE must be the folder of the results")
    except data.DataError as error:
        options.error(f"{error} (or pass --data-dir)")

    setting = Setting(options.fast, config.all_points, *digits)
    results = {}
    for name in names:
        results[name] = run(name, setting, theirs[name])
        if options.output is not None:
            write(Path(options.output), name, results[name], setting)
    print(table({name: result.comparisons for name, result in results.items()}))
    wrong = [f"{name}/{c.array}" for name, r in results.items() for c in r.comparisons if c.agrees is False]
    if wrong:
        print("does not agree: " + ", ".join(wrong))
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
