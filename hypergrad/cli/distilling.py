"""``hypergrad distill``: a few learned examples in place of a data set."""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hypergrad import data, nets
from hypergrad._base.fingerprint import digest
from hypergrad.cli.figures import draw_distilled
from hypergrad.cli.folders import CHECKPOINT, HISTORY, Journal
from hypergrad.cli.learning import note
from hypergrad.cli.loading import file_digest
from hypergrad.cli.pasting import write_use_of_distilled
from hypergrad.cli.progress import Progress
from hypergrad.cli.refusals import RefusedError
from hypergrad.cli.runs import Job, Outcome
from hypergrad.cli.settings import check_choice, check_least, option, words
from hypergrad.distillation.evaluation import Evaluation, evaluate, plain_recipe
from hypergrad.distillation.outer_loop import distill
from hypergrad.distillation.recipe import Network, Recipe, in_words

NAME = "distill"
DISTILLED = "distilled.npz"
NETWORKS = ("convnet", "mlp", "logistic")
HIDDEN = 128
SETS = {
    "random real": "random real examples",
    "class means": "class means",
    "distilled": "the learned examples",
}


@dataclass(frozen=True)
class Distill:
    """The settings of the command."""

    data: str = option(
        "digits",
        "an .npz or .csv file, a folder of images, or the name of a data set; see hypergrad.data.load",
        positional=True,
    )
    label: str | None = option(None, "column of a .csv file that holds the classes, default the last one")
    one_hot: str | None = option(
        None, "columns of a .csv file that hold kinds and not amounts: color,shape"
    )
    size: str | None = option(None, "of images from a folder, if they differ, as HEIGHTxWIDTH: 32x32")
    channels: int | None = option(None, "of images from a folder: 1 makes them gray, 3 colored")
    per_class: int = option(1, "learned examples for each class")
    network: str | None = option(None, "default convnet for images and mlp for tables", choices=NETWORKS)
    width: int = option(32, "channels of the convnet")
    steps: int | None = option(None, "of the training on the learned examples; default found by a trial")
    meta_steps: int = option(300, "steps of the learning")
    judge: int = option(5, "networks that are trained on what was learned, and tested")
    full: int = option(1, "networks that are trained on all the data, to rank what was learned; 0 for none")
    seed: int = option(0, "of the learning")


class Examples(NamedTuple):
    """What is distilled.

    Attributes:
      train: inputs and labels.
      test: inputs and labels.
      classes: their number.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int


def prepare(settings: Distill) -> Job:
    """Check the settings, and read the data.

    Args:
      settings: as the command line gives them.
    """
    for flag in ("per_class", "width", "steps", "meta_steps", "judge"):
        if getattr(settings, flag) is not None:
            check_least(f"--{flag.replace('_', '-')}", getattr(settings, flag), 1)
    check_least("--full", settings.full, 0)
    examples = _examples(settings)
    shape = examples.train[0].shape[1:]
    kind = settings.network or ("convnet" if len(shape) > 1 else "mlp")
    network = _network(kind, shape, examples.classes, settings.width)
    path = Path(settings.data)
    digests = {"file": file_digest(path)} if path.is_file() else {}
    digests |= {"data": digest(examples.train, examples.test)}
    name = f"{NAME}-{path.stem}-{settings.per_class}-per-class-{kind}"
    return Job(settings, digests, name, partial(_run, settings, examples, kind, network))


def _examples(settings: Distill) -> Examples:
    """The data, read as the flags say."""
    one_hot = None if settings.one_hot is None else words(settings.one_hot)
    read: dict[str, Any] = {"label": settings.label, "one_hot": one_hot, "channels": settings.channels}
    if settings.size is not None:
        found = re.fullmatch(r"(\d+)x(\d+)", settings.size)
        if found is None:
            raise RefusedError(f"--size {settings.size}: it is not HEIGHTxWIDTH, such as 32x32")
        read["size"] = (int(found[1]), int(found[2]))
    loaded = data.load(settings.data, **{name: x for name, x in read.items() if x is not None})
    if isinstance(loaded, data.Text):
        raise RefusedError(f"{settings.data}: a text has no classes; give images or a table with labels")
    inputs = "images" if isinstance(loaded, data.Dataset) else "inputs"
    train, test = (
        (getattr(loaded, f"{part}_{inputs}"), getattr(loaded, f"{part}_labels"))
        for part in ("train", "test")
    )
    return Examples(train, test, loaded.classes)


def _network(kind: str, shape: tuple[int, ...], classes: int, width: int) -> Network:
    """The network that the command line names, for inputs of a shape."""
    check_choice("--network", kind, NETWORKS)
    features = math.prod(shape)
    if kind == "logistic":
        return nets.mlp((features, classes))
    if kind == "mlp":
        return nets.mlp((features, HIDDEN, classes))
    if len(shape) < 2:
        raise RefusedError("--network convnet: the data are rows of a table; take mlp or logistic")
    height, across, channels = (*shape, 1)[:3]
    depth = min(3, int(math.log2(min(height, across))))
    return nets.convnet((height, across, channels), classes, width=width, depth=depth)


def _run(
    settings: Distill, examples: Examples, kind: str, network: Network, folder: Path, progress: Progress
) -> Outcome:
    journal = Journal(folder / HISTORY)
    total = settings.meta_steps
    progress.begin(f"looking for a recipe, compiling the hypergradient, and meta-step 1 of {total}")
    made = distill(
        network,
        *examples.train,
        None if settings.steps is None else Recipe(steps=settings.steps),
        per_class=settings.per_class,
        meta_steps=total,
        key=jax.random.key(settings.seed),
        checkpoint=folder / CHECKPOINT,
        progress=False,
        callback=partial(note, total=total, journal=journal, progress=progress),
    )
    journal.complete(zip(made.history["loss"], made.history["gradient_norm"]))
    count = len(made.images)
    progress.begin(f"training {settings.judge} networks on what was learned, and on real examples")
    table = evaluate(
        made,
        {kind: network},
        examples.train,
        examples.test,
        seeds=settings.judge,
        recipes={"plain SGD": plain_recipe(count)} if settings.full else {},
        full_seeds=settings.full,
        key=jax.random.fold_in(jax.random.key(settings.seed), 2**31),
    )
    table.noted(made).save(folder / DISTILLED)
    result = {
        "images": np.asarray(made.images),
        "labels": np.asarray(made.labels),
        "history": dict(made.history),
        "accuracies": {name: table.score(name, "own").accuracies for name in SETS},
        "ranking": np.array([(r.recovery, r.improvement, r.score) for r in table.rankings]),
    }
    lines = [
        f"learned: {count} examples in place of {len(examples.train[1]):,}",
        f"trained by: {in_words(made.recipe)}",
        *_scores(table),
        *draw_distilled(folder, made),
        *write_use_of_distilled(folder, DISTILLED),
    ]
    return Outcome(result, lines)


def _scores(table: Evaluation) -> list[str]:
    """Test accuracies on what was learned, and on what needs no learning."""
    found = {name: table.score(name, "own") for name in SETS}
    count = len(found["distilled"].accuracies)
    told = [
        f"{100 * found[name].mean:.1f} ± {100 * found[name].std:.1f} % on {what}"
        for name, what in SETS.items()
    ]
    lines = [f"test accuracy of {count} new networks: {', '.join(told)}"]
    if table.rankings:
        all_data = next(s for s in table.scores if s.examples == "full data")
        lines.append(f"test accuracy of networks trained on all the data: {100 * all_data.mean:.1f} %")
        lines += [f"ranking: {each}" for each in table.rankings]
    if found["distilled"].mean <= found["random real"].mean:
        lines.append("nothing was gained: try more --meta-steps, more --steps, or another --network")
    return lines
