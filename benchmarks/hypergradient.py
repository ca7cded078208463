"""Time and memory of a hypergradient, side by side with the ways others would take.

The task is the same for all: the gradient of an outer loss, after ``T`` steps of training a small network
with momentum or Adam, in every single learning rate of a schedule ``(T,)``.  Run it on any machine with

    python -m benchmarks.hypergradient            # some twenty minutes on two cores
    python -m benchmarks.hypergradient --fast     # under a minute, writes nothing

======================  ==============================================================================
contestant              what it is
======================  ==============================================================================
plain training          a ``lax.scan``, no hypergradient: the unit of time
Reversible              ``hypergrad.Reversible()``, with factors known before the run
Reversible, segments    the same in segments, as many as take the least memory, 2 or more
Stored, Checkpointed    hypergrad's other adjoints
sqrt-T remat            nested ``lax.scan`` with ``jax.checkpoint``: the honest rival on time
sqrt-T remat, steps     the same with every step checkpointed too: less memory, more time
treeverse 8, 32         Equinox's checkpointed scan with so many checkpoints: the rival on memory
optax                   ``jax.grad`` through ``lax.scan`` and an ``optax`` optimizer, all stored
higher, TorchOpt        momentum unrolled in PyTorch, with ``--torch`` and where installed
======================  ==============================================================================

Times are the best of some calls of the compiled function, of one call where ``T`` is large; there only the
contestants in `LONG` are called at all.  Memory is what XLA reserves beside arguments and results
(``temp_size_in_bytes``), which is exact, the same in every call, and known of those too that never ran; for
PyTorch it is how far the resident size of a process of its own grows.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from benchmarks import pytorch
from benchmarks.machine import (
    GIB,
    MEMORY_SHARE,
    MIB,
    Compiled,
    Row,
    describe_machine,
    machine_memory,
    progress,
    ratio,
    say,
    show,
    slug,
    timed_call,
    versions,
)
from experiments.common import figures
from hypergrad import nets
from hypergrad.program import Optimizer

MOMENTUM, B1, B2, EPS = 0.9, 0.9, 0.999, 1e-8
PACKAGES = ("jaxlib", "optax", "equinox", "torch", "higher", "torchopt")
RESULTS = Path(__file__).parent / "results"
AGREEMENT = 1e-3  # relative difference of hypergradients below which contestants did the same
AFFORDABLE = 8_000  # steps: all calls of a contestant together, and the longest run of one not in `LONG`

Params = tuple[nets.Dense, ...]
Loss = Callable[..., Array]  # loss(params, data, rows)


# ---- the problem


class Problem(NamedTuple):
    """Sizes of the problem; everything else follows from them and the seed."""

    sizes: tuple[int, ...] = (784, 50, 50, 50, 10)
    rows: int = 10_000
    batch: int = 200
    outer_rows: int = 1_000
    seed: int = 0


class Arrays(NamedTuple):
    """All arrays of a problem: arguments of the compiled functions, not constants inside them."""

    params: Params
    indices: Array
    inputs: Array
    labels: Array
    outer_inputs: Array
    outer_labels: Array


def make_arrays(problem: Problem, rate: float, steps: int) -> tuple[Array, Arrays]:
    """Learning rates ``(T,)`` that fall from `rate`, and the arrays.

    Inputs are normal, labelled by a noisy linear teacher.
    """
    rng = np.random.default_rng(problem.seed)
    count = problem.rows + problem.outer_rows
    x = rng.normal(size=(count, problem.sizes[0])).astype(np.float32)
    teacher = rng.normal(size=(problem.sizes[0], problem.sizes[-1])) / math.sqrt(problem.sizes[0])
    y = np.argmax(x @ teacher + 0.3 * rng.normal(size=(count, problem.sizes[-1])), axis=1).astype(np.int32)
    indices = rng.integers(0, problem.rows, size=(steps, problem.batch), dtype=np.int32)
    params = nets.mlp(problem.sizes)[0](jax.random.key(problem.seed))
    rates = rate * (0.55 + 0.45 * np.cos(np.pi * np.arange(steps) / steps))
    n = problem.rows
    arrays = Arrays(params, *map(jnp.asarray, (indices, x[:n], y[:n], x[n:], y[n:])))
    return jnp.asarray(rates, jnp.float32), arrays


def loss(params: Params, data: tuple[Array, Array], rows: Array) -> Array:
    """Inner loss on a minibatch, with the signature that `hypergrad.train` wants."""
    return outer_loss(params, data[0][rows], data[1][rows])


def outer_loss(params: Params, inputs: Array, labels: Array) -> Array:
    """Cross-entropy of a tanh network; its widths are those of the parameters."""
    sizes = (params[0].weights.shape[0], *(layer.weights.shape[1] for layer in params))
    return nets.cross_entropy(nets.mlp(sizes)[1](params, inputs), labels)


# ---- the optimizers, three times each: of hypergrad, in plain JAX, of optax


class Training(NamedTuple):
    """An optimizer in all its forms.

    Attributes:
      program: hypergrad's.
      hypers: its constant hyperparameters.
      rate: the largest learning rate.
      bits: destroyed by a step, per parameter.
      update: ``update(α, n, g, w, *state) -> (w, *state)``, on one array, in step ``n`` from 1; written
        out.  The state starts at 0.
      transform: ``transform(learning_rate=...)``, optax's, whose rate can be set at every step.
    """

    program: Optimizer
    hypers: dict[str, float]
    rate: float
    bits: float
    update: Callable[..., tuple[Array, ...]]
    transform: Callable[..., optax.GradientTransformationExtraArgs]


def momentum_update(rate: Array, n: Array, g: Array, w: Array, v: Array) -> tuple[Array, ...]:
    """``v <- γ v - (1 - γ) g;  w <- w + α v``."""
    v = MOMENTUM * v - (1 - MOMENTUM) * g
    return w + rate * v, v


def adam_update(rate: Array, n: Array, g: Array, w: Array, m: Array, v: Array) -> tuple[Array, ...]:
    """``m <- β1 m + (1-β1) g;  v <- β2 v + (1-β2) g²;  w <- w - α m̂ / (√v̂ + ε)``."""
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
    m_hat, v_hat = m / (1 - B1**n), v / (1 - B2**n)
    # The root has no derivative at 0: one coordinate whose gradient is always 0, such as the weight of a
    # pixel at the edge, would make the whole hypergradient NaN.  (It would with optax, whose root is
    # plain; the inputs of this problem have no such pixels.)
    moved = v_hat > 0
    root = jnp.where(moved, jnp.sqrt(jnp.where(moved, v_hat, 1)), 0)
    return w - rate * m_hat / (root + EPS), m, v


@optax.inject_hyperparams
def _optax_momentum(learning_rate: Array) -> optax.GradientTransformation:
    average = optax.ema(MOMENTUM, debias=False)
    return optax.chain(average, optax.scale_by_learning_rate(learning_rate))


@optax.inject_hyperparams
def _optax_adam(learning_rate: Array) -> optax.GradientTransformation:
    return optax.adam(learning_rate, B1, B2, EPS)


OPTIMIZERS = {
    "momentum": Training(
        program=hg.momentum(),
        hypers={"momentum": MOMENTUM},
        rate=0.2,
        bits=-math.log2(MOMENTUM),
        update=momentum_update,
        transform=_optax_momentum,
    ),
    "adam": Training(
        program=hg.adam(),
        hypers={"b1": B1, "b2": B2, "eps": EPS},
        rate=1e-3,
        bits=-math.log2(B1) - math.log2(B2),
        update=adam_update,
        transform=_optax_adam,
    ),
}


# ---- the contestants: functions (training, rates, arrays) -> trained parameters

Contestant = Callable[[Training, Array, Arrays], Params]


def plain_loop(
    training: Training, rates: Array, arrays: Arrays, inner: Loss = loss
) -> tuple[Any, Any, Any]:
    """Step, start and inputs of a scan that trains in plain JAX; parameters come first in its carry."""

    def step(carry: tuple[Params, ...], x: tuple[Array, Array, Array]) -> Any:
        rate, n, rows = x
        gradient = jax.grad(inner)(carry[0], (arrays.inputs, arrays.labels), rows)
        leaves = zip(*map(jax.tree.leaves, (gradient, *carry)))
        moved = zip(*(training.update(rate, n, *leaf) for leaf in leaves))
        return tuple(map(jax.tree.structure(gradient).unflatten, moved)), None

    zeros = jax.tree.map(jnp.zeros_like, arrays.params)
    start = (arrays.params, *[zeros] * len(training.program.variables))
    return step, start, (rates, 1 + jnp.arange(rates.shape[0]), arrays.indices)


def scanned(training: Training, rates: Array, arrays: Arrays, inner: Loss = loss) -> Params:
    """Plain training."""
    return jax.lax.scan(*plain_loop(training, rates, arrays, inner))[0][0]


def hypergrad_with(make: Callable[[Training, Array, Arrays], hg.Adjoint], inner: Loss = loss) -> Contestant:
    """Training with hypergrad."""

    def run(training: Training, rates: Array, arrays: Arrays) -> Params:
        return hg.train(
            inner,
            arrays.params,
            {"learning_rate": rates, **training.hypers},
            (arrays.inputs, arrays.labels),
            arrays.indices,
            steps=rates.shape[0],
            optimizer=training.program,
            adjoint=make(training, rates, arrays),
        ).params

    return run


def in_segments(training: Training, rates: Array, arrays: Arrays) -> hg.Reversible:
    """At least 2 segments, as many as take the least memory (see `hypergrad.Reversible`).

    Beside the bits that it destroys a step has its rows, of which every segment makes a copy.  The segments
    are equally long: for what is left over, all rows would be copied.
    """
    steps, parameters = rates.shape[0], sum(x.size for x in jax.tree.leaves(arrays.params))
    step = parameters * training.bits / 8 + arrays.indices[0].nbytes
    start = 8 * parameters * (1 + len(training.program.variables))
    divisors = [S for S in range(min(2, steps), steps + 1) if steps % S == 0]
    return hg.Reversible(segments=min(divisors, key=lambda S: S * start + steps / S * step))


def rematerialised(checkpoint_steps: bool, inner: Loss = loss) -> Contestant:
    """√T rematerialisation as a user of plain JAX writes it: a scan of checkpointed scans."""

    def run(training: Training, rates: Array, arrays: Arrays) -> Params:
        steps = rates.shape[0]
        # Many short segments: a step inside one keeps more than a state between two.
        segments = next(n for n in range(math.isqrt(steps - 1) + 1, steps + 1) if steps % n == 0)
        step, start, xs = plain_loop(training, rates, arrays, inner)
        if checkpoint_steps:
            step = jax.checkpoint(step, prevent_cse=False)

        @jax.checkpoint
        def segment(carry: Any, xs: Any) -> Any:
            return jax.lax.scan(step, carry, xs)

        cut = jax.tree.map(lambda x: x.reshape(segments, -1, *x.shape[1:]), xs)
        return jax.lax.scan(segment, start, cut)[0][0]

    return run


def treeverse(checkpoints: int) -> Contestant:
    """Equinox's checkpointed scan: the same step, run again as often as the few checkpoints ask."""

    def run(training: Training, rates: Array, arrays: Arrays) -> Params:
        from equinox.internal import scan

        loop = plain_loop(training, rates, arrays)
        return scan(*loop, kind="checkpointed", checkpoints=checkpoints)[0][0]

    return run


def with_optax(training: Training, rates: Array, arrays: Arrays) -> Params:
    """A scan over an optax optimizer whose learning rate is set at every step."""
    transform = training.transform(learning_rate=rates[0])

    def step(carry: Any, x: tuple[Array, Array]) -> Any:
        params, state = carry
        state.hyperparams["learning_rate"], rows = x
        gradient = jax.grad(loss)(params, (arrays.inputs, arrays.labels), rows)
        updates, state = transform.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (arrays.params, transform.init(arrays.params))
    return jax.lax.scan(step, start, (rates, arrays.indices))[0][0]


PLAIN, REVERSIBLE, SEGMENTS = "plain training", "Reversible", "Reversible, segments"
STORED, CHECKPOINTED, OPTAX = "Stored", "Checkpointed", "optax"
REMAT, REMAT_STEPS, TREEVERSE = "sqrt-T remat", "sqrt-T remat, steps", "treeverse 8"
TORCH = ("higher", "TorchOpt")
CONTESTANTS: dict[str, Contestant] = {
    PLAIN: scanned,
    REVERSIBLE: hypergrad_with(lambda *_: hg.Reversible()),
    SEGMENTS: hypergrad_with(in_segments),
    STORED: hypergrad_with(lambda *_: hg.Stored()),
    CHECKPOINTED: hypergrad_with(lambda *_: hg.Checkpointed()),
    REMAT: rematerialised(checkpoint_steps=False),
    REMAT_STEPS: rematerialised(checkpoint_steps=True),
    TREEVERSE: treeverse(8),
    "treeverse 32": treeverse(32),
    OPTAX: with_optax,
}
LONG = (PLAIN, REVERSIBLE, SEGMENTS, REMAT)
FAST = (PLAIN, REVERSIBLE, REMAT, OPTAX)


def hypergradient(optimizer: str, name: str) -> Callable[[Array, Arrays], Any]:
    """The function that is measured: hypergradient ``(T,)``, or only the outer loss for plain training."""

    def outer(rates: Array, arrays: Arrays) -> Array:
        params = CONTESTANTS[name](OPTIMIZERS[optimizer], rates, arrays)
        return outer_loss(params, arrays.outer_inputs, arrays.outer_labels)

    return outer if name == PLAIN else jax.grad(outer)


# ---- measuring


class Key(NamedTuple):
    """What a row is about."""

    optimizer: str
    contestant: str
    steps: int


def missing(name: str) -> str | None:
    """Why a contestant cannot run here, or None."""
    needs = {"treeverse": ["equinox"], "higher": ["higher", "torch"], "TorchOpt": ["torchopt", "torch"]}
    absent = [module for module in needs.get(name.split()[0], ()) if not _installed(module)]
    return f"skipped: {' and '.join(absent)} not installed" if absent else None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def new_row(key: Key) -> Row:
    """A row with nothing measured yet."""
    measured = ("skipped", "compile_seconds", "seconds", "temp_bytes", "output_bytes")
    derived = ("time_ratio", "memory_ratio", "difference")
    return key._asdict() | {"times": []} | dict.fromkeys(measured + derived)


def compiled(key: Key, arguments: tuple[Array, Arrays], limit: float, long: Sequence[str]) -> Compiled:
    """Compile a contestant; it will not be called where it cannot, or needs too much memory or time."""
    row = new_row(key)
    row["skipped"] = missing(key.contestant)
    if row["skipped"]:
        return Compiled(row, lambda *_: jnp.nan, arguments)
    begin = time.perf_counter()
    call = jax.jit(hypergradient(key.optimizer, key.contestant)).lower(*arguments).compile()
    row["compile_seconds"] = time.perf_counter() - begin
    memory = call.memory_analysis()
    row["temp_bytes"], row["output_bytes"] = memory.temp_size_in_bytes, memory.output_size_in_bytes
    if row["temp_bytes"] > limit:
        row["skipped"] = f"skipped: would need {row['temp_bytes'] / GIB:.1f} GiB"
    elif key.steps > AFFORDABLE and key.contestant not in long:
        row["skipped"] = "not called: too long"
    return Compiled(row, call, arguments)


def measure(
    problem: Problem,
    optimizers: Sequence[str],
    names: Sequence[str],
    step_counts: Sequence[int],
    repeats: int,
    limit: float,
    long: Sequence[str] = LONG,
) -> tuple[list[Row], dict[Key, np.ndarray]]:
    """Rows of all contestants, and their hypergradients.

    Args:
      problem: its sizes.
      optimizers: keys of `OPTIMIZERS`.
      names: keys of `CONTESTANTS`.
      step_counts: the ``T`` to measure.
      repeats: calls of each, or fewer where ``T`` is large.
      limit: bytes above which a contestant is not called.
      long: contestants that are called where ``T`` is large.
    """
    everyone = []
    for optimizer, steps in itertools.product(optimizers, step_counts):
        arguments = make_arrays(problem, OPTIMIZERS[optimizer].rate, steps)
        for name in names:
            progress(f"compiling {name}, {optimizer}, T={steps}")
            everyone.append(compiled(Key(optimizer, name, steps), arguments, limit, long))
    gradients = {}
    # Everyone once a round, every other round in the opposite order.
    for k in range(repeats):
        progress(f"round {k + 1} of {repeats}")
        for c in everyone[:: -1 if k % 2 else 1]:
            row = c.row
            if row["skipped"] is None and (k == 0 or (k + 1) * row["steps"] <= AFFORDABLE):
                gradient = timed_call(c)
                if gradient is not None:
                    gradients[key_of(row)] = np.asarray(gradient)
    return [c.row for c in everyone], gradients


def compare(rows: Sequence[Row], gradients: dict[Key, np.ndarray]) -> None:
    """Fill in what relates a row to others: to plain training, to Reversible, and to Stored's result.

    Where Stored did not run, hypergradients are compared with the first there is, in order of the rows.
    """
    for row in rows:
        key = key_of(row)
        plain, reversible = (find(rows, key._replace(contestant=name)) for name in (PLAIN, REVERSIBLE))
        row["time_ratio"] = ratio(row["seconds"], plain["seconds"])
        row["memory_ratio"] = ratio(row["temp_bytes"], reversible["temp_bytes"])
        order = [STORED, *(r["contestant"] for r in rows if r["contestant"] != PLAIN)]
        same = [gradients[k] for name in order if (k := key._replace(contestant=name)) in gradients]
        if key in gradients and key.contestant != PLAIN:
            reference = same[0].astype(np.float64)
            error = np.linalg.norm(gradients[key] - reference)
            row["difference"] = float(error / np.linalg.norm(reference))


def key_of(row: Row) -> Key:
    """What a row is about."""
    return Key(*(row[k] for k in Key._fields))


def find(rows: Sequence[Row], key: Key) -> Row:
    """The row of a contestant, or one with nothing measured."""
    return next((r for r in rows if key_of(r) == key), new_row(key))


# Optimizers whose runs are checked, their largest learning rates, and the ranges of what differs.
EXACT: dict[str, tuple[Optimizer, float, dict[str, tuple[float, float]]]] = {
    "momentum": (hg.momentum(), 0.2, {"momentum": (0.5, 0.99)}),
    "adam": (hg.adam(), 1e-3, {"b1": (0.5, 0.99), "b2": (0.9, 0.9999)}),
    "adamw": (hg.adamw(), 1e-3, {"b1": (0.5, 0.99), "b2": (0.9, 0.9999), "weight_decay": (0.01, 0.1)}),
}


def check_exactness(problem: Problem, name: str, steps: int) -> Row:
    """Whether a long run returns to its start bit for bit, its hyperparameters differing by step and layer.

    `hypergrad.Reversible` compares the start it recovers with the real one and raises where they differ.
    """
    program, rate, ranges = EXACT[name]
    rates, arrays = make_arrays(problem, rate, steps)
    rng = np.random.default_rng(problem.seed + 1)
    random = {
        hyper: tuple(rng.uniform(*bounds, steps).astype(np.float32) for _ in arrays.params)
        for hyper, bounds in ranges.items()
    }

    def outer(rates: Array, arrays: Arrays) -> Array:
        hypers, data = {"learning_rate": rates, **random}, (arrays.inputs, arrays.labels)
        params = hg.train(
            loss, arrays.params, hypers, data, arrays.indices, steps=steps, optimizer=program
        ).params
        return outer_loss(params, arrays.outer_inputs, arrays.outer_labels)

    begin, message, size = time.perf_counter(), None, None
    try:
        gradient = jax.block_until_ready(jax.jit(jax.grad(outer))(rates, arrays))
        size = float(jnp.linalg.norm(gradient))  # not finite where so long a training is chaotic
    except (hg.ReversalError, jax.errors.JaxRuntimeError) as error:  # the latter wraps it under jit
        if "ReversalError" not in f"{type(error).__name__} {error}":
            raise
        message = str(error)
    seconds = time.perf_counter() - begin
    known = {"optimizer": name, "steps": steps, "seconds": seconds}
    norm = size if size is not None and math.isfinite(size) else None
    return known | {"bit_exact": message is None, "message": message, "hypergradient_norm": norm}


# ---- verdict and report


class Aim(NamedTuple):
    """An aim of the project: a ratio of what two contestants take, and where it should lie."""

    optimizer: str
    steps: int
    measure: str
    dividend: str
    divisor: str
    side: str
    limit: float


TIME, MEMORY, AT_MOST, AT_LEAST = "seconds", "temp_bytes", "<=", ">="
AIMS = [
    Aim("momentum", 1000, TIME, REVERSIBLE, PLAIN, AT_MOST, 3),
    Aim("momentum", 1000, TIME, REVERSIBLE, REMAT, AT_MOST, 1),
    Aim("momentum", 1000, TIME, REVERSIBLE, CHECKPOINTED, AT_MOST, 1),
    Aim("momentum", 4000, TIME, REVERSIBLE, REMAT, AT_MOST, 1),
    Aim("momentum", 4000, TIME, REVERSIBLE, CHECKPOINTED, AT_MOST, 1),
    Aim("momentum", 4000, TIME, TREEVERSE, REVERSIBLE, AT_LEAST, 2),
    Aim("momentum", 4000, MEMORY, REMAT, REVERSIBLE, AT_LEAST, 10),
    Aim("momentum", 4000, MEMORY, REMAT_STEPS, REVERSIBLE, AT_LEAST, 10),
    Aim("adam", 1000, TIME, REVERSIBLE, REMAT, AT_MOST, 1),
    Aim("adam", 1000, MEMORY, REMAT, REVERSIBLE, AT_LEAST, 8),
    Aim("adam", 1000, MEMORY, OPTAX, REVERSIBLE, AT_LEAST, 200),
]
for _name in OPTIMIZERS:
    AIMS += [
        Aim(_name, 20_000, MEMORY, SEGMENTS, REVERSIBLE, AT_MOST, 1),
        Aim(_name, 20_000, MEMORY, SEGMENTS, CHECKPOINTED, AT_MOST, 1),
        # One pass more: without it there are at least three, forwards, backwards, and the products.
        Aim(_name, 20_000, TIME, SEGMENTS, REVERSIBLE, AT_MOST, 1.33),
    ]


def bits_per_step(rows: Sequence[Row], optimizer: str, parameters: int) -> float | None:
    """Bits of memory that Reversible takes per parameter and step: the slope between the two longest runs.

    Nothing is subtracted: schedules and other arrays with one entry a step count as if they were tape.
    """
    own = [r for r in rows if (r["contestant"], r["optimizer"]) == (REVERSIBLE, optimizer)]
    known = sorted((r["steps"], r["temp_bytes"]) for r in own if r["temp_bytes"] is not None)
    if len(known) < 2:
        return None
    (short, less), (long, more) = known[-2:]
    return 8 * (more - less) / (parameters * (long - short))


def verdict(rows: Sequence[Row], parameters: int) -> list[dict[str, Any]]:
    """The project's aims beside what was measured; ``met`` is None where it was not."""
    found: list[tuple[str, float | None, str, float]] = []
    for aim in AIMS:
        key = Key(aim.optimizer, aim.dividend, aim.steps)
        a, b = find(rows, key), find(rows, key._replace(contestant=aim.divisor))
        kind = "time" if aim.measure == TIME else "memory"
        what = f"{kind}: {aim.dividend} / {aim.divisor}, {aim.optimizer}, T={aim.steps}"
        found.append((what, ratio(a[aim.measure], b[aim.measure]), aim.side, aim.limit))
    for name, training in OPTIMIZERS.items():
        value = ratio(bits_per_step(rows, name, parameters), training.bits)
        found.append((f"bits that Reversible keeps / bits destroyed, {name}", value, AT_MOST, 1.1))
    return [
        {"what": what, "value": value, "side": side, "limit": limit, "met": within(value, side, limit)}
        for what, value, side, limit in found
    ]


def within(value: float | None, side: str, limit: float) -> bool | None:
    """Whether a value lies on the right side of its limit; None if there is none."""
    return None if value is None else value <= limit if side == AT_MOST else value >= limit


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = f"{'optimizer':<10}{'contestant':<22}{'T':>6}{'seconds':>10}{'/ plain':>9}{'MiB':>11}"
    lines = [head + f"{'/ Reversible':>14}{'MiB out':>9}{'difference':>12}"]
    for r in rows:
        line = f"{r['optimizer']:<10}{r['contestant']:<22}{r['steps']:>6}"
        line += f"{show(r['seconds'], '.3f'):>10}{show(r['time_ratio'], '.2f'):>9}"
        line += f"{show(ratio(r['temp_bytes'], MIB), '.2f'):>11}{show(r['memory_ratio'], '.2f'):>14}"
        line += f"{show(ratio(r['output_bytes'], MIB), '.3f'):>9}{show(r['difference'], '.1e'):>12}"
        lines.append(line + (f"  {r['skipped']}" if r["skipped"] else ""))
    return "\n".join(lines)


def verdict_text(aims: Sequence[dict[str, Any]]) -> str:
    """The verdict as text."""
    words = {None: "not measured", True: "met", False: "MISSED"}
    return "\n".join(
        f"{a['what']:<66}{show(a['value'], '.2f'):>8}   aim {a['side']} {a['limit']:<6}{words[a['met']]}"
        for a in aims
    )


def draw(rows: Sequence[Row], machine: str) -> Any:
    """Memory and time against T, a line per contestant: a row of axes for each optimizer."""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in rows))
    names = list(dict.fromkeys(r["contestant"] for r in rows if r["contestant"] != PLAIN))
    figure, axes = figures.figure(len(optimizers), 2, width=4.6)
    for row, optimizer in zip(axes, optimizers):
        for k, name in enumerate(names):
            own = [r for r in rows if (r["optimizer"], r["contestant"]) == (optimizer, name)]
            ours = name in (REVERSIBLE, SEGMENTS)
            colour = figures.COLOURS[0 if ours else (k + 1) // 3]
            style = {"marker": "oPDsv^<>Xdph"[k], "label": name, "linewidth": 2 if ours else 1}
            style |= {"color": colour, "linestyle": figures.LINES[k % 4]}
            style |= {"markerfacecolor": colour if ours else "white"}
            for place, value, unit in zip(row, ("temp_bytes", "time_ratio"), (MIB, 1)):
                points = [(r["steps"], r[value] / unit) for r in own if r[value] is not None]
                place.loglog(*zip(*points) if points else ((), ()), **style)
        row[0].set(title=f"{optimizer}: memory", ylabel="memory beside arguments, MiB")
        row[1].set(title=f"{optimizer}: time", ylabel="time, plain trainings")
        for place in row:
            place.set_xlabel("training steps T")
            ticks = sorted({r["steps"] for r in rows})
            place.set_xticks(ticks, [f"{t:,}" for t in ticks])
            place.grid(alpha=0.25)
        ticks = [t for t in (1, 2, 3, 4, 5, 7, 10, 15, 20) if t <= 1.3 * row[1].get_ylim()[1]]
        row[1].set_yticks(ticks, [str(t) for t in ticks])
        for place in row:
            place.minorticks_off()
    figure.suptitle(f"Hypergradient of T learning rates, {machine}", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small",
                  handlelength=4)  # fmt: skip
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few contestants, small; writes nothing")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of steps T (default 1000 4000 20000)")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(CONTESTANTS), help="contestants, called at any T"
    )
    parser.add_argument("--repeats", type=int, help="calls of each (default 3), fewer where T is large")
    parser.add_argument("--torch", action="store_true", help="also higher and TorchOpt, where installed")
    parser.add_argument("--exactness", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    args.steps = sorted(set(args.steps or ([100] if args.fast else [1000, 4000, 20_000])))
    args.repeats = args.repeats or (1 if args.fast else 3)
    args.output = args.output or (None if args.fast else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report; 1 if a run was not reversed exactly or results disagree."""
    args = parse(arguments)
    # Else a GPU multiplies with 10-bit mantissas, and rounding hides whether the contestants agree.
    jax.config.update("jax_default_matmul_precision", "float32")
    # Most of a short run is compilation, whose time grows with the layers.
    problem = Problem(sizes=(784, 50, 10)) if args.fast else Problem()
    machine, limit = describe_machine(), MEMORY_SHARE * machine_memory()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    exactness = []
    for name in (["adamw"] if args.fast else EXACT) if args.exactness else ():
        exactness.append(x := check_exactness(problem, name, 200 if args.fast else 10_000))
        word = "yes" if x["bit_exact"] else f"NO: {x['message']}"
        norm = "overflows" if x["hypergradient_norm"] is None else f"{x['hypergradient_norm']:.2g}"
        say(f"bit-exact, {name}: {word}  (T={x['steps']}, norm of the hypergradient {norm})")

    names, long = args.only or (FAST if args.fast else [*CONTESTANTS]), args.only or LONG
    rows, gradients = measure(problem, args.optimizers, names, args.steps, args.repeats, limit, long)
    for key in [Key("momentum", n, t) for n in TORCH for t in args.steps if args.torch and t <= AFFORDABLE]:
        progress(f"running {key.contestant}, T={key.steps}")
        rows.append(row := new_row(key) | {"skipped": missing(key.contestant)})
        # Also PyTorch stores everything.
        memory = find(rows, key._replace(contestant=STORED))["temp_bytes"]
        if row["skipped"] is None and memory and memory > limit:
            row["skipped"] = f"skipped: would need about {memory / GIB:.1f} GiB"
        if row["skipped"] is None:
            arguments = make_arrays(problem, OPTIMIZERS["momentum"].rate, key.steps)
            measured = pytorch.measure(key.contestant, *arguments, MOMENTUM, args.repeats)
            gradient = measured.pop("gradient", None)
            row |= measured
            if gradient is not None:
                gradients[key] = np.array(gradient)
    compare(rows, gradients)
    parameters = sum(math.prod(s) + s[1] for s in zip(problem.sizes[:-1], problem.sizes[1:]))
    aims = verdict(rows, parameters)
    agree = [r["difference"] for r in rows if r["difference"] is not None]
    say("\n" + table(rows) + "\n")
    agreed = all(x < AGREEMENT for x in agree)
    if agree:
        say(f"hypergradients agree: {'yes' if agreed else 'NO'} (largest difference {max(agree):.1e})")
    bits = {name: bits_per_step(rows, name, parameters) for name in args.optimizers}
    for name, value in bits.items():
        say(f"bits per parameter and step, {name}: {show(value, '.4f')}")
    say("\n" + verdict_text([a for a in aims if a["value"] is not None]))
    if args.output:
        config = {"problem": problem._asdict(), "parameters": parameters, "memory_limit_bytes": limit}
        config |= {"optimizers": {k: OPTIMIZERS[k].hypers for k in args.optimizers}}
        config |= {"rates": {k: OPTIMIZERS[k].rate for k in args.optimizers}}
        config |= {"steps": args.steps, "repeats": args.repeats}
        report = {
            "config": config,
            "machine": machine | {"packages": versions(PACKAGES)},
            "exactness": exactness,
        }
        report |= {"rows": rows, "bits_per_step": bits, "verdict": aims}
        path = args.output / f"hypergradient-{slug(machine['name'])}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(draw(rows, machine["name"]), path, report)
        say(f"\nwritten: {path} and {path.with_suffix('.json').name}")
    return 0 if agreed and all(x["bit_exact"] for x in exactness) else 1


if __name__ == "__main__":
    sys.exit(main())
