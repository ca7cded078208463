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

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

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
from hypergrad import data, files, plots


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


class Result(NamedTuple):
    """What an experiment gave: our arrays, the authors', the comparisons, and the seconds it took."""

    ours: Arrays
    theirs: Arrays
    comparisons: list[Comparison]
    seconds: float


def read_reference(folder: Path, name: str) -> Arrays:
    """The arrays that the authors saved of an experiment, and of those that it also refers to."""
    names = (*EXPERIMENTS[name].also, name)
    saved = [json.loads((folder / f"{x}.json").read_text())["reference"] for x in names]
    return {key: np.asarray(x) for part in saved for key, x in part.items()}


def run(name: str, setting: Setting, theirs: Arrays) -> Result:
    """Run an experiment in float64 and compare."""
    start = time.perf_counter()
    with jax.enable_x64(True):
        ours = {key: np.asarray(x) for key, x in EXPERIMENTS[name].compute(setting).items()}
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", flush=True)
    return Result(ours, theirs, EXPERIMENTS[name].compare(ours, theirs), seconds)


def write(folder: Path, name: str, result: Result, config: dict[str, Any]) -> None:
    """Write the figure of an experiment, the record of the comparisons, and our arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {c.array: {k: x for k, x in c._asdict().items() if k != "array"} for c in result.comparisons}
    record = {
        "config": config,
        "digits": DIGITS,
        "floor": FLOOR,
        "seconds": round(result.seconds, 1),
        "comparisons": rows,
    }
    plots.save(EXPERIMENTS[name].draw(result.ours, result.theirs), folder / f"{name}.png", record)
    files.save(folder / f"{name}.npz", result.ours)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    """Run, compare, print and write; return the results by experiment.

    Raises SystemExit with status 1 where an array disagrees and 2 where a file is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce_2015", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--fast", action="store_true", help="a sixteenth of the work; writes nothing")
    parser.add_argument("--all-points", action="store_true", help="all 1000 step sizes, not every 4th")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--data-dir", help="folder that holds mnist/ (default: HYPERGRAD_DATA)")
    parser.add_argument("--reference", help="folder of the authors' results (default: HYPERGRAD_REFERENCE)")
    parser.add_argument(
        "--output", help="folder to write to (default: figures/reproduce_2015; with --fast nothing)"
    )
    options = parser.parse_args(arguments)
    reference = options.reference or os.environ.get("HYPERGRAD_REFERENCE")
    if not reference:
        parser.error("the authors' results are needed: pass --reference or set HYPERGRAD_REFERENCE")
    names = [name for name in EXPERIMENTS if name in options.only]
    folder = options.data_dir or os.environ.get("HYPERGRAD_DATA")
    if options.fast and not folder:
        for name in [name for name in names if EXPERIMENTS[name].needs_data]:
            print(f"skipped {name}: it needs MNIST (pass --data-dir or set HYPERGRAD_DATA)")
            names.remove(name)
        if not names:
            parser.error("nothing is left to run without HYPERGRAD_DATA")
    try:
        theirs = {name: read_reference(Path(reference), name) for name in names}
        needed = any(EXPERIMENTS[name].needs_data for name in names)
        digits = read_digits(folder) if needed else (None, None)
    except OSError as error:
        parser.error(f"{error}; --reference or HYPERGRAD_REFERENCE must be the folder of the results")
    except data.DataError as error:
        parser.error(f"{error} (or pass --data-dir)")

    setting = Setting(options.fast, options.all_points, *digits)
    config = {"fast": options.fast, "all_points": options.all_points}
    output = options.output or (None if options.fast else "figures/reproduce_2015")
    results = {}
    for name in names:
        results[name] = run(name, setting, theirs[name])
        if output is not None:
            write(Path(output), name, results[name], config)
    print(table({name: result.comparisons for name, result in results.items()}))
    wrong = [f"{name}/{c.array}" for name, r in results.items() for c in r.comparisons if c.agrees is False]
    if wrong:
        print("does not agree: " + ", ".join(wrong))
        raise SystemExit(1)
    return results


if __name__ == "__main__":
    main()
