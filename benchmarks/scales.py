"""Hypergradients of runs whose numbers are large or small, in float32, beside those in float64.

Parameters in units of ``p`` and gradients in units of ``g``: the inner loss is ``p g f(w / p)``, and every
hyperparameter has the unit that makes the run the same for all ``p`` and ``g``.  So its outer loss and its
hypergradients, in the logarithm of every hyperparameter and of every number at the start, are the same too,
and what comes out differently is rounding's.

    python -m benchmarks.scales            # some half an hour on two cores
    python -m benchmarks.scales --fast     # some optimizers, in a minute; writes nothing

======================  ==============================================================================
experiment              what it is
======================  ==============================================================================
an optimizer's name     ``p`` from 1e-4 to 1e4, ``g`` from 1e3 to 1e-9, runs of 1, 2, 20 and 200 steps
rows, an optimizer      one leaf whose rows have gradients from 1 down to 1e-8, at the usual
                        hyperparameters; every row has a rate of its own
network, adam           a small tanh network, the loss and ε times 1, 1e-4 and 1e-6
regression, adam        a line through targets near 22, at the defaults
======================  ==============================================================================

Optimizers that can be reversed are, the others are differentiated by `hypergrad.Checkpointed`.  The
reference is `hypergrad.Stored` in float64.  A hypergradient is

* **right** if each of its parts is within 1e-3 of that part, in the Euclidean norm;
* **hard** if what is not is within three times the error of `Stored` in float32, the largest in any units
  of what is one run, or, in an experiment of one unit, of runs that begin a few roundings away; or if that
  has no number either;
* **refused** if there was an error instead;
* **wrong** else.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from benchmarks.machine import Row, describe_machine, progress, say, slug, versions
from hypergrad._base.errors import LaneWarning
from hypergrad.files import replace_file
from hypergrad.program import Optimizer

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-3  # relative error of what is right
SLACK = 3.0  # times the error of `Stored` in float32 that is right too
NOTHING = 1e-7  # of the largest part of a hypergradient: smaller parts are compared with this
PARAMETERS = (1e-4, 1e-2, 1.0, 1e2, 1e4)
GRADIENTS = (1e3, 1.0, 1e-3, 1e-6, 1e-9)
PAIRS = [(p, g) for p in PARAMETERS for g in GRADIENTS]
STEPS = (1, 2, 20, 200)
OURS = hg.Reversible(bits=1)
# Nearly all of the time goes to compiling.
QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
RIGHT, HARD, WRONG, REFUSED = KINDS = "right", "hard", "wrong", "refused"

PyTree = Any
Power = tuple[float, float]  # of the units of parameters and gradients


class Scaled(NamedTuple):
    """An optimizer whose runs are the same in all units.

    Attributes:
      optimizer: of hypergrad's.
      hypers: of the run in units of 1.
      units: what powers of the units of parameters and gradients they are multiplied by; ``(0, 0)`` for
        those that are left out.
      state: its start, from parameters and both units; else zeros.
      switch: from a step on, the unit of the learning rate is another; of RAdam.
      loss_units: whether the optimizer is made from the loss.
    """

    optimizer: Optimizer | Callable[[Callable[..., Any]], Optimizer]
    hypers: dict[str, float]
    units: dict[str, Power]
    state: Callable[[PyTree, Any, Any], dict[str, PyTree]] | None = None
    switch: tuple[int, Power] | None = None


def unrectified(b2: float) -> int:
    """How many of the first steps of RAdam are not divided by the size of gradients."""
    n = np.arange(1, 1000)
    longest = 2 / (1 - b2) - 1
    return int(np.argmax(longest - 2 * n * b2**n / (1 - b2**n) > 4))


RATE, EPS, ROOT = (
    (1.0, 0.0),
    (0.0, 1.0),
    (0.0, 2.0),
)  # units of Adam's α, of an ε outside a root, and inside
DECAY = {"weight_decay": (-1.0, 0.0)}
ADAM: dict[str, Power] = {"learning_rate": RATE, "eps": EPS}
ADAM_HYPERS = {"learning_rate": 0.02, "b1": 0.9, "b2": 0.999, "eps": 1e-3}
PLAIN: dict[str, Power] = {"learning_rate": (1.0, -1.0)}
SQUARED: dict[str, Power] = {"learning_rate": RATE, "eps": ROOT}


def _filled(values: Mapping[str, Callable[[Any, Any], Any]]) -> Callable[[PyTree, Any, Any], Any]:
    """A state all of whose numbers are one, in its unit."""

    def state(params: PyTree, p: Any, g: Any) -> dict[str, PyTree]:
        return {
            k: jax.tree.map(lambda w, f=f: jnp.full_like(w, f(p, g)), params) for k, f in values.items()
        }

    return state


def _prodigy(params: PyTree, p: Any, g: Any) -> dict[str, PyTree]:
    return {"estim_lr": jax.tree.map(lambda w: jnp.full((), 1e-2 * p, w.dtype), params)}


def _diagonal(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Hutchinson's estimate with signs that are the same in float32 and float64."""

    def diagonal(params: PyTree, meta: PyTree, batch: PyTree, step: Any) -> PyTree:
        sign = lambda x: (1 - 2 * ((jnp.arange(x.size) + step) % 2)).astype(x.dtype).reshape(x.shape)  # noqa: E731
        signs = jax.tree.map(sign, params)
        _, product = jax.jvp(jax.grad(lambda w: loss(w, meta, batch)), (params,), (signs,))
        return jax.tree.map(jnp.multiply, signs, product)

    return diagonal


def _adam_with(**hypers: float) -> dict[str, float]:
    return {**ADAM_HYPERS, **hypers}


OPTIMIZERS: dict[str, Scaled] = {
    "adam": Scaled(hg.adam(), ADAM_HYPERS, ADAM),
    "momentum": Scaled(hg.momentum(), {"learning_rate": 0.5, "momentum": 0.9}, PLAIN),
    "shampoo": Scaled(hg.shampoo(), {"learning_rate": 0.02, "momentum": 0.9, "eps": 1e-3}, SQUARED),
    "rmsprop_momentum": Scaled(
        hg.rmsprop_momentum(),
        {"learning_rate": 3e-3, "momentum": 0.9, "decay": 0.9, "eps": 1e-4},
        SQUARED,
    ),
    "rmsprop_momentum centered": Scaled(
        hg.rmsprop_momentum(centered=True),
        {"learning_rate": 3e-3, "momentum": 0.9, "decay": 0.9, "eps": 1e-3},
        SQUARED,
    ),
    "adagrad_momentum": Scaled(
        hg.adagrad_momentum(), {"learning_rate": 0.01, "momentum": 0.9, "eps": 1e-3}, SQUARED
    ),
    "heavy_ball": Scaled(hg.heavy_ball(), {"learning_rate": 0.05, "momentum": 0.9}, PLAIN),
    "adamw": Scaled(hg.adamw(), _adam_with(weight_decay=0.1), ADAM | DECAY),
    "radam": Scaled(hg.radam(), _adam_with(b2=0.99), ADAM, switch=(unrectified(0.99), (1.0, -1.0))),
    "lars": Scaled(
        hg.lars(),
        {"learning_rate": 1.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.01},
        {"weight_decay": (-1.0, 1.0)},
    ),
    "lamb": Scaled(hg.lamb(), _adam_with(learning_rate=0.02, weight_decay=0.1), {"eps": EPS} | DECAY),
    "lion": Scaled(
        hg.lion(),
        {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "weight_decay": 0.1},
        {"learning_rate": RATE} | DECAY,
    ),
    "signum": Scaled(
        hg.signum(),
        {"learning_rate": 0.01, "beta": 0.9, "weight_decay": 0.1},
        {"learning_rate": RATE} | DECAY,
    ),
    "grams": Scaled(hg.grams(), _adam_with(weight_decay=0.1), ADAM | DECAY),
    "cautious_adamw": Scaled(hg.cautious_adamw(), _adam_with(weight_decay=0.1), ADAM | DECAY),
    "muon": Scaled(
        hg.muon(), {"learning_rate": 0.005, "beta": 0.95, "eps": 1e-3, "weight_decay": 0.1}, ADAM | DECAY
    ),
    "normuon": Scaled(
        hg.normuon(),
        {"learning_rate": 0.005, "beta": 0.95, "b2": 0.95, "eps": 1e-20, "weight_decay": 0.1},
        {"learning_rate": RATE} | DECAY,
    ),
    "adamuon": Scaled(
        hg.adamuon(sign=False),
        {"learning_rate": 0.005, "beta": 0.95, "b2": 0.95, "eps": 1e-20, "weight_decay": 0.1},
        {"learning_rate": RATE} | DECAY,
    ),
    "adabelief": Scaled(hg.adabelief(), _adam_with(eps_root=1e-6), ADAM | {"eps_root": ROOT}),
    "yogi": Scaled(
        hg.yogi(),
        _adam_with(eps=1e-3),
        ADAM,
        _filled({"mu": lambda p, g: 1e-6 * g, "nu": lambda p, g: 1e-6 * g * g}),
    ),
    "adopt": Scaled(hg.adopt(), _adam_with(b2=0.99), ADAM),
    "ademamix": Scaled(hg.ademamix(), _adam_with(b3=0.999, alpha=5.0, weight_decay=0.1), ADAM | DECAY),
    "sophia": Scaled(
        lambda loss: hg.sophia(_diagonal(loss), update_interval=2),
        {
            "learning_rate": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 0.05,
            "gamma": 1.0,
            "clip_threshold": 0.5,
            "weight_decay": 0.01,
        },
        {"eps": (-1.0, 1.0), "clip_threshold": (1.0, 0.0)},
    ),
    "madgrad": Scaled(
        hg.madgrad(),
        {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.01, "eps": 0.0},
        {"learning_rate": (1.5, -0.5), "weight_decay": (-1.0, 1.0)},
    ),
    "prodigy": Scaled(
        hg.prodigy(estim_lr0=1e-2),
        {
            "learning_rate": 0.1,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-2,
            "estim_lr_coef": 1.0,
            "weight_decay": 0.1,
        },
        {"eps": EPS} | DECAY,
        _prodigy,
    ),
    "dadapt_adamw": Scaled(
        hg.dadapt_adamw(estim_lr0=1e-2),
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-2, "weight_decay": 0.1},
        {"eps": EPS} | DECAY,
        _prodigy,
    ),
    "novograd": Scaled(
        hg.novograd(),
        {"learning_rate": 0.01, "b1": 0.9, "b2": 0.5, "eps": 1e-3, "weight_decay": 0.1},
        ADAM | DECAY,
    ),
    "adafactor": Scaled(
        hg.adafactor(2, multiply_by_parameter_scale=False),
        {
            "learning_rate": 0.02,
            "decay_rate": 0.8,
            "clipping_threshold": 1.0,
            "momentum": 0.9,
            "weight_decay_rate": 0.001,
            "eps": 1e-5,
        },
        SQUARED,
    ),
    "clip(adam)": Scaled(hg.clip(hg.adam()), _adam_with(max_delta=0.05), ADAM | {"max_delta": EPS}),
    "clip_by_global_norm(momentum)": Scaled(
        hg.clip_by_global_norm(hg.momentum()),
        {"learning_rate": 0.5, "momentum": 0.9, "max_norm": 0.2},
        PLAIN | {"max_norm": EPS},
    ),
    "with_average(adam)": Scaled(hg.with_average(hg.adam()), _adam_with(ema_decay=0.9), ADAM),
    # Not reversible:
    "sgd": Scaled(hg.sgd(), {"learning_rate": 0.5}, PLAIN),
    "nesterov": Scaled(hg.nesterov(), {"learning_rate": 0.05, "momentum": 0.9}, PLAIN),
    "adagrad": Scaled(hg.adagrad(), {"learning_rate": 0.05, "eps": 1e-3}, SQUARED),
    "adadelta": Scaled(
        hg.adadelta(),
        {"learning_rate": 1.0, "rho": 0.9, "eps": 0.0},
        {},
        _filled({"step_nu": lambda p, g: 1e-4 * p * p}),
    ),
    "rmsprop": Scaled(hg.rmsprop(), {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-4}, SQUARED),
    "rmsprop centered": Scaled(
        hg.rmsprop(centered=True), {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-3}, SQUARED
    ),
    "sm3": Scaled(hg.sm3(), {"learning_rate": 0.05, "momentum": 0.9, "eps": 1e-3}, SQUARED),
    "adamax": Scaled(hg.adamax(), ADAM_HYPERS, ADAM),
    "nadam": Scaled(hg.nadam(), ADAM_HYPERS, ADAM),
    "amsgrad": Scaled(hg.amsgrad(), ADAM_HYPERS, ADAM),
}
MATRICES = ("muon", "normuon", "adamuon")  # for which a leaf must be one


# ---- the run that is the same in all units


class Data(NamedTuple):
    """A small classification problem: rows, their classes, rows of the outer loss and theirs."""

    x: np.ndarray
    y: np.ndarray
    outer_x: np.ndarray
    outer_y: np.ndarray


def data(rows: int = 24, inputs: int = 5, classes: int = 4) -> Data:
    """Normal inputs and classes by chance, so that no gradient ever vanishes."""
    rng = np.random.default_rng(0)
    draw = lambda: (rng.normal(size=(rows, inputs)), np.eye(classes)[rng.integers(0, classes, rows)])  # noqa: E731
    return Data(*draw(), *draw())


def start(name: str, inputs: int = 5, classes: int = 4) -> dict[str, np.ndarray]:
    """Parameters in units of 1."""
    rng = np.random.default_rng(1)
    params = {"weights": rng.normal(size=(inputs, classes)) / 2, "bias": rng.normal(size=classes) / 2}
    return {"weights": params["weights"]} if name in MATRICES else params


def cross_entropy(w: PyTree, x: Any, y: Any) -> Any:
    """Of a network of one layer, with logits that saturate."""
    z = x.astype(w["weights"].dtype) @ w["weights"]
    logits = 3 * jnp.tanh(z + w["bias"][None] if "bias" in w else z)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y.astype(logits.dtype), axis=1))


def inner_loss(w: PyTree, units: tuple[Any, Any], step: Any) -> Any:
    """``p g f(w / p)`` on half of the rows, in turn."""
    p, g = units
    d = data()
    x, y = (jnp.asarray(each, w["weights"].dtype).reshape(2, -1, each.shape[1])[step % 2] for each in d[:2])
    return (p * g) * cross_entropy(jax.tree.map(lambda x: x / p, w), x, y)


class Cell(NamedTuple):
    """Units, and the hyperparameters in them, as arrays with an axis of cells in front."""

    p: Any
    g: Any
    hypers: dict[str, Any]


def cells(scaled: Scaled, pairs: Sequence[tuple[float, float]], steps: int, dtype: Any) -> Cell:
    """What goes in, for several pairs of units."""
    p, g = np.array(pairs, np.float64).T
    hypers = {}
    for name, value in scaled.hypers.items():
        a, b = scaled.units.get(name, (0.0, 0.0))
        hypers[name] = value * p**a * g**b
        if name == "learning_rate" and scaled.switch is not None:
            first, (a, b) = scaled.switch
            early = value * p**a * g**b
            hypers[name] = np.where(np.arange(steps) < first, early[:, None], hypers[name][:, None])
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), Cell(p, g, hypers))


def outer(name: str, steps: int, adjoint: Any, factors: PyTree, cell: Cell, oracle: Any = None) -> Any:
    """The outer loss, as a function of factors of everything, all of them 1."""
    scaled = OPTIMIZERS[name]
    optimizer = scaled.optimizer
    if callable(optimizer):  # one that needs the loss
        optimizer = optimizer(inner_loss)
    dtype = cell.p.dtype
    at = {k: jnp.asarray(x, dtype) for k, x in start(name).items()}
    params = jax.tree.map(lambda x, factor: cell.p * x * factor, at, factors["start"])
    hypers = {k: x * factors[k] for k, x in cell.hypers.items()}
    state = None if scaled.state is None else scaled.state(params, cell.p, cell.g)
    if oracle is None:
        trained = hg.train(
            inner_loss, params, hypers, (cell.p, cell.g),
            steps=steps, optimizer=optimizer, adjoint=adjoint, state=state,
        )  # fmt: skip
        ends, losses = [trained.params], trained.losses
        ends += [trained.state["average"]] if "average" in trained.state else []
    else:
        ends, losses = oracle(inner_loss, params, hypers, (cell.p, cell.g), steps)
    d = data()
    of = [cross_entropy(jax.tree.map(lambda x: x / cell.p, w), d.outer_x, d.outer_y) for w in ends]
    return sum(of) / len(of) + 0.1 * jnp.mean(losses) / (cell.p * cell.g)


def ones(name: str, dtype: Any) -> PyTree:
    """The factors at which everything is differentiated."""
    hypers = {k: jnp.ones((), dtype) for k in OPTIMIZERS[name].hypers}
    return {**hypers, "start": {k: jnp.ones(x.shape, dtype) for k, x in start(name).items()}}


class Found(NamedTuple):
    """Outer losses and hypergradients, with an axis of cells in front, in float64; and what was refused."""

    value: np.ndarray
    gradient: dict[str, np.ndarray]
    messages: dict[int, str]


def solve(function: Callable[..., Any], dtype: Any, *arguments: Any) -> Found:
    """Evaluate ``function(cells) -> (value, gradient)``, whose refusals are warnings or an error."""
    with jax.enable_x64(dtype == np.float64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, gradient = jax.jit(function, compiler_options=QUICK)(
                *jax.tree.map(lambda x: jnp.asarray(x, dtype), arguments)
            )
            value = np.asarray(value, np.float64)
        except Exception as error:  # all were refused
            if "hypergrad" not in str(error):
                raise
            count = len(jax.tree.leaves(arguments[0])[0])
            return Found(np.full(count, math.nan), {}, dict.fromkeys(range(count), _reason(str(error))))
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)
    messages = {}
    for warning in caught:
        if issubclass(warning.category, LaneWarning):
            text = str(warning.message)
            messages[int(text.split("[")[1].split("]")[0])] = text
    return Found(value, flat(wide), messages)


def _reason(text: str) -> str:
    """The message of the library in that of a callback."""
    return next((line for line in text.splitlines() if "train(" in line), text)[-600:]


def flat(gradient: PyTree) -> dict[str, np.ndarray]:
    """Parts of a hypergradient by name, each of cells by numbers."""
    leaves = {}
    for name, part in gradient.items():
        arrays = [x.reshape(len(x), -1) for x in jax.tree.leaves(part)]
        leaves[name] = np.concatenate(arrays, axis=1)
    return leaves


def errors(found: Found, true: Found, floor: float = NOTHING) -> dict[str, np.ndarray]:
    """Relative error of the outer loss and of every part, by cell; NaN where there is no number."""
    result = {"outer loss": abs(found.value - true.value) / abs(true.value)}
    sizes = {k: np.linalg.norm(x, axis=1) for k, x in true.gradient.items()}
    least = floor * np.max(list(sizes.values()), axis=0)
    for name, size in sizes.items():
        there = found.gradient.get(name, np.full_like(true.gradient[name], math.nan))
        result[name] = np.linalg.norm(there - true.gradient[name], axis=1) / np.maximum(size, least)
    return result


def classify(error: Mapping[str, float], plain: Mapping[str, float] | None, refused: bool) -> str:
    """Right, hard, wrong or refused; without what `Stored` has in float32, nothing is hard."""
    if refused:
        return REFUSED
    off = [name for name, e in error.items() if not e <= TOLERANCE]
    if not off:
        return RIGHT
    hard = plain is not None and all(error[name] <= SLACK * plain[name] for name in off)
    return HARD if hard else WRONG


def judge(
    name: str,
    steps: int,
    run: Callable[..., Found],
    reversible: bool = True,
    nudges: Sequence[int] = (0,),
) -> list[Row]:
    """Rows of results, one for every cell.

    Args:
      name: of the experiment.
      steps: of its runs.
      run: from an adjoint, a dtype and a nudge to what was found.
      reversible: whether the optimizer is.
      nudges: by how many roundings to move where `Stored` in float32 begins.
    """
    begin = time.perf_counter()
    true, found = run(hg.Stored(), np.float64), run(OURS if reversible else hg.Checkpointed(), np.float32)
    count, of_all = len(true.value), errors(found, true)
    each = [{key: float(e[k]) for key, e in of_all.items()} for k in range(count)]
    refused = [k in found.messages or not np.isfinite(found.value[k]) for k in range(count)]
    no_number = [refused[k] or not all(np.isfinite(list(each[k].values()))) for k in range(count)]
    plain, lost = None, [False] * count
    if any(classify(e, None, no) != RIGHT for e, no in zip(each, refused)):
        plains = [errors(run(hg.Stored(), np.float32, nudge), true) for nudge in nudges]
        plain = {
            key: float(max(np.max(e[key], where=np.isfinite(e[key]), initial=0) for e in plains))
            for key in of_all
        }
        lost = [not all(np.isfinite(e[k]) for e in plains[0].values()) for k in range(count)]
    return [
        {
            "experiment": name,
            "steps": steps,
            "cell": k,
            "result": HARD if lost[k] and no_number[k] else classify(each[k], plain, refused[k]),
            "errors": each[k],
            "float32": plain,
            "message": found.messages.get(k),
            "reversible": reversible,
            "seconds": (time.perf_counter() - begin) / count,
        }
        for k in range(count)
    ]


def measure(name: str, steps: int, pairs: Sequence[tuple[float, float]]) -> list[Row]:
    """Rows of an optimizer at a number of steps, one for every pair of units."""
    scaled = OPTIMIZERS[name]

    def run(adjoint: Any, dtype: Any, nudge: int = 0) -> Found:
        one = jax.value_and_grad(partial(outer, name, steps, adjoint))
        with jax.enable_x64(dtype == np.float64):
            arguments = cells(scaled, pairs, steps, dtype), ones(name, dtype)
        return solve(
            jax.vmap(lambda cell, factors: one(factors, cell), in_axes=(0, None)), dtype, *arguments
        )

    reversible = callable(scaled.optimizer) or scaled.optimizer.reversible
    rows = judge(name, steps, run, reversible)
    return [row | {"p": p, "g": g} for row, (p, g) in zip(rows, pairs)]


# ---- runs in one unit only


class Special(NamedTuple):
    """Another experiment.

    Attributes:
      outer: ``outer(factors, c, adjoint)``, of factors of everything, all of them 1, and a scale.
      factors: names and shapes of them.
      scales: the cells.
      by_row: whether the factor of the learning rate has one number for every row, compared by itself.
    """

    outer: Callable[[PyTree, Any, Any, int], Any]
    factors: dict[str, tuple[int, ...]]
    scales: tuple[float, ...] = (1.0,)
    by_row: bool = False


ROW_SIZES = 10.0 ** np.linspace(0, -8, 17)


def rows_of(optimizer: Optimizer, hypers: dict[str, float]) -> Special:
    """One leaf, the gradients of whose rows are from 1 down to 1e-8."""
    rng = np.random.default_rng(2)
    at, target, ahead = rng.normal(size=(3, len(ROW_SIZES), 3))

    def far(w: Any, target: np.ndarray) -> Any:
        return jnp.sum(jnp.log(jnp.cosh(w - target.astype(w.dtype))), axis=1)

    def outer(factors: PyTree, c: Any, adjoint: Any, steps: int) -> Any:
        sizes = c * jnp.asarray(ROW_SIZES, c.dtype)
        loss = lambda w, sizes, step: jnp.sum(sizes * far(w, target))  # noqa: E731
        given = {k: jnp.asarray(x, c.dtype) * factors[k] for k, x in hypers.items()}
        given["learning_rate"] = given["learning_rate"].reshape(1, -1, 1)
        start = jnp.asarray(at, c.dtype)
        trained = hg.train(loss, start, given, sizes, steps=steps, optimizer=optimizer, adjoint=adjoint)
        return jnp.sum(far(trained.params, ahead))

    return Special(outer, dict.fromkeys(hypers, ()) | {"learning_rate": ROW_SIZES.shape}, by_row=True)


def _network(factors: PyTree, c: Any, adjoint: Any, steps: int) -> Any:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 8)).astype(c.dtype), np.eye(4, dtype=c.dtype)[rng.integers(0, 4, 30)]
    params = {
        k: rng.normal(size=shape).astype(c.dtype) / 2 for k, shape in {"a": (8, 6), "b": (6, 4)}.items()
    }

    def error(w: PyTree, rows: slice) -> Any:
        logits = jnp.tanh(x[rows] @ w["a"]) @ w["b"]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y[rows], axis=1))

    hypers = {"learning_rate": 0.01 * factors["learning_rate"], "b1": 0.9 * factors["b1"]}
    hypers |= {"b2": 0.999 * factors["b2"], "eps": 1e-4 * c * factors["eps"]}
    loss = lambda w, c, step: c * error(w, slice(20))  # noqa: E731
    trained = hg.train(loss, params, hypers, c, steps=steps, optimizer=hg.adam(), adjoint=adjoint)
    return error(trained.params, slice(20, None))


def _regression(factors: PyTree, c: Any, adjoint: Any, steps: int) -> Any:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(20, 3)).astype(c.dtype)
    y = (22 + x @ np.array([1, -2, 0.5]) + 0.5 * rng.normal(size=20)).astype(c.dtype)

    def error(w: PyTree, rows: slice) -> Any:
        return jnp.mean((x[rows] @ w["slopes"] + w["offset"] - y[rows]) ** 2)

    hypers = {"learning_rate": 0.1 * factors["learning_rate"], "b1": 0.9 * factors["b1"]}
    hypers |= {"b2": 0.999 * factors["b2"], "eps": 1e-8 * factors["eps"]}
    params = {"slopes": jnp.zeros(3, c.dtype), "offset": jnp.zeros((), c.dtype)}
    loss = lambda w, c, step: c * error(w, slice(12))  # noqa: E731
    trained = hg.train(loss, params, hypers, c, steps=steps, optimizer=hg.adam(), adjoint=adjoint)
    return error(trained.params, slice(12, None))


OF_ADAM: dict[str, tuple[int, ...]] = dict.fromkeys(("learning_rate", "b1", "b2", "eps"), ())
USUAL = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.999}
SPECIAL = {
    "rows, adam": rows_of(hg.adam(), USUAL | {"eps": 1e-8}),
    "rows, momentum": rows_of(hg.momentum(), {"learning_rate": 0.1, "momentum": 0.9}),
    "rows, rmsprop_momentum": rows_of(
        hg.rmsprop_momentum(), {"learning_rate": 1e-3, "momentum": 0.9, "decay": 0.9, "eps": 1e-8}
    ),
    "rows, adagrad_momentum": rows_of(
        hg.adagrad_momentum(), {"learning_rate": 0.01, "momentum": 0.9, "eps": 1e-7}
    ),
    "rows, adabelief": rows_of(hg.adabelief(), USUAL | {"eps": 1e-8, "eps_root": 1e-16}),
    "rows, ademamix": rows_of(hg.ademamix(), USUAL | {"eps": 1e-8, "b3": 0.9999}),
    "network, adam": Special(_network, OF_ADAM, (1.0, 1e-4, 1e-6)),
    "regression, adam": Special(_regression, OF_ADAM),
}


def measure_special(name: str, steps: int) -> list[Row]:
    """Rows of another experiment, one for every scale."""
    special = SPECIAL[name]

    def run(adjoint: Any, dtype: Any, nudge: int = 0) -> Found:
        def one(c: Any, factors: PyTree) -> Any:
            return jax.value_and_grad(lambda f: special.outer(f, c, adjoint, steps))(factors)

        with jax.enable_x64(dtype == np.float64):
            factor = 1 + nudge * np.finfo(dtype).eps
            factors = {k: jnp.full(shape, factor, dtype) for k, shape in special.factors.items()}
        found = solve(jax.vmap(one, in_axes=(0, None)), dtype, np.array(special.scales), factors)
        if special.by_row and found.gradient:
            by_row = found.gradient.pop("learning_rate")
            of_rows = {f"learning_rate {k}": x[:, None] for k, x in enumerate(by_row.T)}
            found = found._replace(gradient=found.gradient | of_rows)
        return found

    return judge(name, steps, run, nudges=range(-4, 5))


# ---- the report


def table(rows: Sequence[Row]) -> str:
    """How many are right and not, by experiment and steps, and the largest error."""
    lines = [
        f"{'experiment':<30} {'steps':>5} {'runs':>4} "
        + " ".join(f"{k:>7}" for k in KINDS)
        + "  largest error"
    ]
    for name, steps in dict.fromkeys((r["experiment"], r["steps"]) for r in rows):
        own = [r for r in rows if (r["experiment"], r["steps"]) == (name, steps)]
        counts = " ".join(f"{sum(r['result'] == k for r in own):>7}" for k in KINDS)
        error, part = max((e, part) for r in own for part, e in r["errors"].items())
        lines.append(f"{name:<30} {steps:>5} {len(own):>4} {counts}  {error:.1e} in {part}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="some of all; writes nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*OPTIMIZERS, *SPECIAL])
    parser.add_argument("--steps", nargs="+", type=int, help=f"lengths of runs (default {STEPS})")
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    args.only = args.only or (["adam", "rows, adam"] if args.fast else [*OPTIMIZERS, *SPECIAL])
    args.steps = args.steps or ([20] if args.fast else list(STEPS))
    args.output = args.output or (None if args.fast else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report; 1 if anything is wrong or refused."""
    args, machine = parse(arguments), describe_machine()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    rows: list[Row] = []
    for name in args.only:
        for steps in args.steps:
            rows += measure(name, steps, PAIRS) if name in OPTIMIZERS else measure_special(name, steps)
            progress(table(rows).splitlines()[-1])
    say("\n" + table(rows) + "\n")
    bad = [r for r in rows if r["result"] in (WRONG, REFUSED)]
    for row in bad:
        units = f", p = {row['p']:g}, g = {row['g']:g}" if "p" in row else ""
        why = row["message"] or {k: f"{e:.1e}" for k, e in row["errors"].items()}
        say(f"{row['result']}: {row['experiment']}, {row['steps']} steps{units}: {why}")
    say(f"{len(rows)} runs, {len(bad)} wrong or refused")
    if args.output:
        config = {"about": __doc__, "parameters": PARAMETERS, "gradients": GRADIENTS, "steps": args.steps}
        report = {"config": config, "machine": machine | {"packages": versions(("jaxlib",))}, "rows": rows}
        path = args.output / f"scales-{slug(machine['name'])}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(report, indent=1) + "\n").encode())
        say(f"\nwritten: {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
