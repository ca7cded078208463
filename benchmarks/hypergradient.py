"""Time and memory of a hypergradient, side by side with the ways others would take.

The task is the same for all: the gradient of an outer loss, after ``T`` steps of training a small network
with momentum, in every single learning rate of a schedule ``(T,)``.  Run it on any machine with

    python -m benchmarks.hypergradient            # some ten minutes on two cores
    python -m benchmarks.hypergradient --fast     # under a minute, writes nothing

======================  ==============================================================================
contestant              what it is
======================  ==============================================================================
plain training          a ``lax.scan``, no hypergradient: the unit of time
Reversible              ``hypergrad.Reversible()``, momentum known before the run
Stored, Checkpointed    hypergrad's other adjoints
sqrt-T remat            nested ``lax.scan`` with ``jax.checkpoint``: the honest rival on time
sqrt-T remat, steps     the same with every step checkpointed too: less memory, more time
treeverse 8, 32         Equinox's checkpointed scan with so many checkpoints: the rival on memory
optax                   ``jax.grad`` through ``lax.scan`` and an ``optax`` optimizer, all stored
higher, TorchOpt        the same unrolled in PyTorch, with ``--torch`` and where installed
======================  ==============================================================================

Times are the best of some calls of the compiled function.  Memory is what XLA reserves beside arguments
and results (``temp_size_in_bytes``), which is exact and the same in every call; for PyTorch it is how far
the resident size of a process of its own grows.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
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
from hypergrad import nets
from hypergrad.files import replace_file

MOMENTUM = 0.9
RESULTS = Path(__file__).parent / "results"
MEMORY_SHARE = 0.6  # of the machine's memory that one contestant may take
AGREEMENT = 1e-3  # relative difference of hypergradients below which contestants did the same
MIB, GIB = 2.0**20, 2.0**30

Params = tuple[nets.Dense, ...]
Row = dict[str, Any]


# ---- the problem


class Problem(NamedTuple):
    """Sizes of the problem; everything else follows from them and the seed."""

    sizes: tuple[int, ...] = (784, 50, 50, 50, 10)
    rows: int = 10_000
    batch: int = 200
    outer_rows: int = 1_000
    rate: float = 0.2
    seed: int = 0


class Arrays(NamedTuple):
    """All arrays of a problem: arguments of the compiled functions, not constants inside them."""

    params: Params
    indices: Array
    inputs: Array
    labels: Array
    outer_inputs: Array
    outer_labels: Array


def make_arrays(problem: Problem, steps: int) -> tuple[Array, Arrays]:
    """Learning rates ``(T,)`` and the arrays: normal inputs, labelled by a noisy linear teacher."""
    rng = np.random.default_rng(problem.seed)
    count = problem.rows + problem.outer_rows
    x = rng.normal(size=(count, problem.sizes[0])).astype(np.float32)
    teacher = rng.normal(size=(problem.sizes[0], problem.sizes[-1])) / math.sqrt(problem.sizes[0])
    y = np.argmax(x @ teacher + 0.3 * rng.normal(size=(count, problem.sizes[-1])), axis=1).astype(np.int32)
    indices = rng.integers(0, problem.rows, size=(steps, problem.batch), dtype=np.int32)
    params = nets.mlp(problem.sizes)[0](jax.random.key(problem.seed))
    rates = problem.rate * (0.55 + 0.45 * np.cos(np.pi * np.arange(steps) / steps))
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


# ---- the contestants: functions (rates, arrays) -> trained parameters


def plain_step(arrays: Arrays) -> Callable[..., Any]:
    """One step of training, written out: ``v <- γ v - (1 - γ) g;  w <- w + α v``."""

    def step(carry: tuple[Params, Params], x: tuple[Array, Array]) -> Any:
        params, velocity = carry
        rate, rows = x
        gradient = jax.grad(loss)(params, (arrays.inputs, arrays.labels), rows)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v - (1 - MOMENTUM) * g, velocity, gradient)
        params = jax.tree.map(lambda w, v: w + rate * v, params, velocity)
        return (params, velocity), None

    return step


def at_rest(arrays: Arrays) -> tuple[Params, Params]:
    """Parameters and velocity at the start."""
    return arrays.params, jax.tree.map(jnp.zeros_like, arrays.params)


def scanned(rates: Array, arrays: Arrays) -> Params:
    """Plain training."""
    (params, _), _ = jax.lax.scan(plain_step(arrays), at_rest(arrays), (rates, arrays.indices))
    return params


def hypergrad_with(adjoint: hg.Adjoint) -> Callable[[Array, Arrays], Params]:
    """Training with hypergrad."""

    def run(rates: Array, arrays: Arrays) -> Params:
        hypers = {"learning_rate": rates, "momentum": MOMENTUM}
        data = (arrays.inputs, arrays.labels)
        steps = rates.shape[0]
        return hg.train(
            loss, arrays.params, hypers, data, arrays.indices, steps=steps, adjoint=adjoint
        ).params

    return run


def rematerialised(checkpoint_steps: bool) -> Callable[[Array, Arrays], Params]:
    """√T rematerialisation as a user of plain JAX writes it: a scan of checkpointed scans."""

    def run(rates: Array, arrays: Arrays) -> Params:
        steps = rates.shape[0]
        # Many short segments: a step inside one keeps more than a state between two.
        segments = next(n for n in range(math.isqrt(steps - 1) + 1, steps + 1) if steps % n == 0)
        step = plain_step(arrays)
        if checkpoint_steps:
            step = jax.checkpoint(step, prevent_cse=False)

        @jax.checkpoint
        def segment(carry: Any, xs: Any) -> Any:
            return jax.lax.scan(step, carry, xs)

        cut = jax.tree.map(lambda x: x.reshape(segments, -1, *x.shape[1:]), (rates, arrays.indices))
        (params, _), _ = jax.lax.scan(segment, at_rest(arrays), cut)
        return params

    return run


def treeverse(checkpoints: int) -> Callable[[Array, Arrays], Params]:
    """Equinox's checkpointed scan: the same step, run again as often as the few checkpoints ask."""

    def run(rates: Array, arrays: Arrays) -> Params:
        from equinox.internal import scan

        xs = (rates, arrays.indices)
        step = plain_step(arrays)
        (params, _), _ = scan(step, at_rest(arrays), xs, kind="checkpointed", checkpoints=checkpoints)
        return params

    return run


def with_optax(rates: Array, arrays: Arrays) -> Params:
    """A scan over an optax optimizer whose learning rate is set at every step."""

    @optax.inject_hyperparams
    def optimizer(learning_rate: Array) -> optax.GradientTransformation:
        average = optax.ema(MOMENTUM, debias=False)
        return optax.chain(average, optax.scale_by_learning_rate(learning_rate))

    transform = optimizer(learning_rate=rates[0])

    def step(carry: Any, x: tuple[Array, Array]) -> Any:
        params, state = carry
        state.hyperparams["learning_rate"], rows = x
        gradient = jax.grad(loss)(params, (arrays.inputs, arrays.labels), rows)
        updates, state = transform.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (arrays.params, transform.init(arrays.params))
    (params, _), _ = jax.lax.scan(step, start, (rates, arrays.indices))
    return params


PLAIN, REVERSIBLE, STORED = "plain training", "Reversible", "Stored"
REMAT, REMAT_STEPS = "sqrt-T remat", "sqrt-T remat, steps"
TORCH = ("higher", "TorchOpt")
CONTESTANTS: dict[str, Callable[[Array, Arrays], Params]] = {
    PLAIN: scanned,
    REVERSIBLE: hypergrad_with(hg.Reversible()),
    STORED: hypergrad_with(hg.Stored()),
    "Checkpointed": hypergrad_with(hg.Checkpointed()),
    REMAT: rematerialised(checkpoint_steps=False),
    REMAT_STEPS: rematerialised(checkpoint_steps=True),
    "treeverse 8": treeverse(8),
    "treeverse 32": treeverse(32),
    "optax": with_optax,
}


def hypergradient(name: str) -> Callable[[Array, Arrays], Any]:
    """The function that is measured: hypergradient ``(T,)``, or only the outer loss for plain training."""

    def outer(rates: Array, arrays: Arrays) -> Array:
        return outer_loss(CONTESTANTS[name](rates, arrays), arrays.outer_inputs, arrays.outer_labels)

    return outer if name == PLAIN else jax.grad(outer)


# ---- measuring


class Compiled(NamedTuple):
    """A contestant compiled for one number of steps, the row of its results, and its arguments."""

    row: Row
    call: Callable[..., Array]
    arguments: tuple[Array, Arrays]


def missing(name: str) -> str | None:
    """Why a contestant cannot run here, or None."""
    needs = {"treeverse": "equinox", "higher": "higher", "TorchOpt": "torchopt"}.get(name.split()[0])
    absent = [m for m in (needs, needs in ("higher", "torchopt") and "torch") if m and not _installed(m)]
    return f"skipped: {' and '.join(absent)} not installed" if absent else None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def new_row(name: str, steps: int) -> Row:
    """A row with nothing measured yet."""
    empty = ("skipped", "compile_seconds", "seconds", "times", "temp_bytes", "output_bytes")
    derived = ("device_peak_bytes", "time_ratio", "memory_ratio", "difference")
    return {"contestant": name, "steps": steps} | dict.fromkeys(empty + derived)


def compiled(name: str, arguments: tuple[Array, Arrays], limit: float) -> Compiled:
    """Compile a contestant; it is skipped where it cannot run or would need too much memory."""
    row = new_row(name, arguments[0].shape[0])
    row["skipped"] = missing(name)
    if row["skipped"]:
        return Compiled(row, lambda *_: jnp.nan, arguments)
    begin = time.perf_counter()
    call = jax.jit(hypergradient(name)).lower(*arguments).compile()
    row["compile_seconds"] = time.perf_counter() - begin
    memory = call.memory_analysis()
    row["temp_bytes"], row["output_bytes"] = memory.temp_size_in_bytes, memory.output_size_in_bytes
    if row["temp_bytes"] > limit:
        row["skipped"] = f"skipped: would need {row['temp_bytes'] / GIB:.1f} GiB"
    return Compiled(row, call, arguments)


def warm_up(contestant: Compiled) -> np.ndarray | None:
    """First call: the hypergradient, and on a GPU the peak of the allocator."""
    device = jax.devices()[0]
    before = device.memory_stats()
    try:
        gradient = np.asarray(contestant.call(*contestant.arguments))
    except jax.errors.JaxRuntimeError as error:  # one that fails must not take the others' results along
        contestant.row["skipped"] = f"failed: {str(error).strip().splitlines()[0][:80]}"
        return None
    after = device.memory_stats()
    # The allocator only tells its highest peak ever.  Contestants come in the order of their memory, so
    # that each makes a new one; where it does not (compiling took more) nothing is known.
    if before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
        contestant.row["device_peak_bytes"] = after["peak_bytes_in_use"] - before["bytes_in_use"]
    return gradient


def time_interleaved(contestants: Sequence[Compiled], repeats: int) -> None:
    """Time every contestant once a round, every other round in the opposite order."""
    for row in (c.row for c in contestants):
        row["times"] = []
    for k in range(repeats):
        for c in contestants if k % 2 == 0 else reversed(contestants):
            begin = time.perf_counter()
            jax.block_until_ready(c.call(*c.arguments))
            c.row["times"].append(time.perf_counter() - begin)
            c.row["seconds"] = min(c.row["times"])


def measure(
    problem: Problem, names: Sequence[str], step_counts: Sequence[int], repeats: int, limit: float
) -> tuple[list[Row], dict[tuple[str, int], np.ndarray]]:
    """Rows of all contestants, and their hypergradients by name and number of steps.

    Args:
      problem: its sizes.
      names: keys of `CONTESTANTS`.
      step_counts: the ``T`` to measure.
      repeats: timed calls of each.
      limit: bytes above which a contestant is skipped.
    """
    all_compiled: list[Compiled] = []
    for steps in step_counts:
        arguments = make_arrays(problem, steps)
        for name in names:
            progress(f"compiling {name}, T={steps}")
            all_compiled.append(compiled(name, arguments, limit))
    gradients = {}
    runnable = [c for c in all_compiled if c.row["skipped"] is None]
    for c in sorted(runnable, key=lambda c: c.row["temp_bytes"]):
        key = c.row["contestant"], c.row["steps"]
        progress(f"warming up {key[0]}, T={key[1]}")
        gradient = warm_up(c)
        if gradient is not None:
            gradients[key] = gradient
    for steps in step_counts:
        progress(f"timing T={steps}")
        running = [c for c in runnable if c.row["steps"] == steps and c.row["skipped"] is None]
        time_interleaved(running, repeats)
    return [c.row for c in all_compiled], gradients


def compare(rows: Sequence[Row], gradients: dict[tuple[str, int], np.ndarray]) -> None:
    """Fill in what relates a row to others: to plain training, to Reversible, and to Stored's result.

    Where Stored did not run, hypergradients are compared with the first there is, in order of the rows.
    """
    for row in rows:
        steps = row["steps"]
        row["time_ratio"] = ratio(row["seconds"], find(rows, PLAIN, steps)["seconds"])
        row["memory_ratio"] = ratio(row["temp_bytes"], find(rows, REVERSIBLE, steps)["temp_bytes"])
        same = {name: g for (name, count), g in gradients.items() if count == steps and name != PLAIN}
        if row["contestant"] in same:
            first = next(r["contestant"] for r in rows if r["steps"] == steps and r["contestant"] in same)
            reference = same.get(STORED, same[first]).astype(np.float64)
            error = np.linalg.norm(same[row["contestant"]] - reference)
            row["difference"] = float(error / np.linalg.norm(reference))


def find(rows: Sequence[Row], name: str, steps: int) -> Row:
    """The row of a contestant, or one with nothing measured."""
    found = [r for r in rows if r["contestant"] == name and r["steps"] == steps]
    return found[0] if found else new_row(name, steps)


def ratio(a: float | None, b: float | None) -> float | None:
    """Quotient ``a / b`` of what was measured."""
    return a / b if a is not None and b else None


def check_exactness(problem: Problem, steps: int) -> Row:
    """Whether a long run returns to its start bit for bit, its momentum differing by step and layer.

    `hypergrad.Reversible` compares the start it recovers with the real one and raises where they differ.
    """
    rates, arrays = make_arrays(problem, steps)
    rng = np.random.default_rng(problem.seed + 1)
    momentum = tuple(rng.uniform(0.5, 0.99, steps).astype(np.float32) for _ in arrays.params)

    def outer(rates: Array, arrays: Arrays) -> Array:
        hypers = {"learning_rate": rates, "momentum": momentum}
        data = (arrays.inputs, arrays.labels)
        trained = hg.train(loss, arrays.params, hypers, data, arrays.indices, steps=steps)
        return outer_loss(trained.params, arrays.outer_inputs, arrays.outer_labels)

    begin, message = time.perf_counter(), None
    try:
        gradient = jax.block_until_ready(jax.jit(jax.grad(outer))(rates, arrays))
        message = None if bool(jnp.all(jnp.isfinite(gradient))) else "the hypergradient is not finite"
    except (hg.ReversalError, jax.errors.JaxRuntimeError) as error:  # the latter wraps it under jit
        if "ReversalError" not in f"{type(error).__name__} {error}":
            raise
        message = str(error)
    seconds = time.perf_counter() - begin
    return {"steps": steps, "bit_exact": message is None, "message": message, "seconds": seconds}


# ---- PyTorch, each contestant in a process of its own so that its memory is its own


def measure_torch(
    problem: Problem, name: str, steps: int, repeats: int, like: Row, limit: float
) -> tuple[Row, np.ndarray | None]:
    """Row and hypergradient of a PyTorch contestant; `like` is Stored's row, whose memory predicts its."""
    row = new_row(name, steps)
    row["skipped"] = missing(name)
    if not row["skipped"] and (like["temp_bytes"] or 0) > limit:
        row["skipped"] = f"skipped: would need about {like['temp_bytes'] / GIB:.1f} GiB"
    if row["skipped"]:
        return row, None
    rates, arrays = make_arrays(problem, steps)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "problem.npz")
        layers = {f"{k}{i}": v for i, layer in enumerate(arrays.params) for k, v in zip("wb", layer)}
        np.savez(
            file, rates=rates, **layers, **{k: v for k, v in arrays._asdict().items() if k != "params"}
        )
        command = [sys.executable, "-m", __spec__.name, "--torch-worker", name, file, str(repeats)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        row["skipped"] = f"failed: {(done.stderr.strip() or 'killed').splitlines()[-1][:80]}"
        return row, None
    result = json.loads(done.stdout.splitlines()[-1])
    row |= {"times": result["times"], "seconds": min(result["times"]), "temp_bytes": result["bytes"]}
    return row, np.array(result["gradient"])


def torch_worker(name: str, file: str, repeats: int) -> None:
    """Measure one PyTorch contestant in this process and print the result as a line of JSON."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = {k: torch.from_numpy(v).to(device) for k, v in np.load(file).items()}
    arrays |= {k: v.long() for k, v in arrays.items() if not v.is_floating_point()}
    unroll = {"higher": unroll_higher, "TorchOpt": unroll_torchopt}[name]
    times = []
    before = _torch_peak(torch, device)
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        rates = arrays["rates"].clone().requires_grad_()
        gradient = unroll(torch_net(arrays, device), rates, arrays).tolist()  # waits for the device
        times.append(time.perf_counter() - begin)
    grown = _torch_peak(torch, device) - before
    print(json.dumps({"times": times[1:], "bytes": grown, "gradient": gradient}))


def _torch_peak(torch: Any, device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def torch_net(arrays: dict[str, Any], device: str) -> Any:
    """The network with the start of the problem as its parameters."""
    import torch

    layers: list[Any] = []
    for i in range(sum(k[0] == "w" for k in arrays)):
        layer = torch.nn.Linear(*arrays[f"w{i}"].shape, device=device)
        with torch.no_grad():
            layer.weight.copy_(arrays[f"w{i}"].T)
            layer.bias.copy_(arrays[f"b{i}"])
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def unroll_higher(net: Any, rates: Any, arrays: dict[str, Any]) -> Any:
    """Hypergradient with ``higher``.

    PyTorch's momentum sums gradients, so that scaling the loss by 1 - γ makes it the averaging one.
    """
    import higher
    import torch

    cross_entropy = torch.nn.functional.cross_entropy
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=MOMENTUM)
    with higher.innerloop_ctx(net, optimizer) as (fast, differentiable):
        for rate, rows in zip(rates, arrays["indices"]):
            value = cross_entropy(fast(arrays["inputs"][rows]), arrays["labels"][rows])
            differentiable.step((1 - MOMENTUM) * value, override={"lr": [rate]})
        outer = cross_entropy(fast(arrays["outer_inputs"]), arrays["outer_labels"])
        return torch.autograd.grad(outer, rates)[0]


def unroll_torchopt(net: Any, rates: Any, arrays: dict[str, Any]) -> Any:
    """Hypergradient with TorchOpt's functional optimizer; see `unroll_higher` for the loss."""
    import torch
    import torchopt

    cross_entropy, call = torch.nn.functional.cross_entropy, torch.func.functional_call
    schedule = list(rates)  # cut once: indexing a tensor would cost a (T,) gradient at every step
    optimizer = torchopt.sgd(lr=lambda count: schedule[int(count)], momentum=MOMENTUM)
    params = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    state = optimizer.init(params)
    for rows in arrays["indices"]:
        value = cross_entropy(call(net, params, (arrays["inputs"][rows],)), arrays["labels"][rows])
        scaled = (1 - MOMENTUM) * value
        gradients = torch.autograd.grad(scaled, tuple(params.values()), create_graph=True)
        updates, state = optimizer.update(dict(zip(params, gradients)), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = cross_entropy(call(net, params, (arrays["outer_inputs"],)), arrays["outer_labels"])
    return torch.autograd.grad(outer, rates)[0]


# ---- verdict and report


def bits_per_step(rows: Sequence[Row], parameters: int) -> float | None:
    """Bits of memory that Reversible takes per parameter and step: the slope between the two longest runs.

    Nothing is subtracted: schedules and other arrays with one entry a step count as if they were tape.
    """
    known = [r for r in rows if r["contestant"] == REVERSIBLE and r["temp_bytes"] is not None]
    if len(known) < 2:
        return None
    a, b = sorted(known, key=lambda r: r["steps"])[-2:]
    return 8 * (b["temp_bytes"] - a["temp_bytes"]) / (parameters * (b["steps"] - a["steps"]))


def verdict(rows: Sequence[Row], parameters: int) -> list[dict[str, Any]]:
    """The project's aims beside what was measured: ``at_most`` or ``at_least`` a ratio.

    The aims are about T = 1000 and 4000.  In a shorter run the ratios are given but not judged.
    """
    longest = max(r["steps"] for r in rows)
    middle = 1000 if any(r["steps"] == 1000 for r in rows) else longest
    aims: list[dict[str, Any]] = []

    def add(what: str, value: float | None, side: str, aim: float, judged: bool) -> None:
        met = None if value is None or not judged else value <= aim if side == "at_most" else value >= aim
        aims.append({"what": what, "value": value, side: aim, "met": met})

    def judge(measure: str, a: str, b: str, steps: int, side: str, aim: float, judged: bool) -> None:
        value = ratio(find(rows, a, steps)[measure], find(rows, b, steps)[measure])
        name = "time" if measure == "seconds" else "memory"
        add(f"{name}: {a} / {b}, T={steps}", value, side, aim, judged)

    judge("seconds", REVERSIBLE, PLAIN, middle, "at_most", 3, middle >= 1000)
    for steps in sorted({middle, longest}):
        for rival in ("Checkpointed", REMAT):
            judge("seconds", REVERSIBLE, rival, steps, "at_most", 1, steps >= 1000)
    for rival in (REMAT, REMAT_STEPS):
        judge("temp_bytes", rival, REVERSIBLE, longest, "at_least", 10, longest >= 4000)
    judge("seconds", "treeverse 8", REVERSIBLE, longest, "at_least", 2, longest >= 4000)
    value = ratio(bits_per_step(rows, parameters), math.log2(1 / MOMENTUM))
    add("bits per parameter and step / log2(1/γ)", value, "at_most", 1.1, longest >= 4000)
    return aims


def show(value: float | None, form: str) -> str:
    """A number in a table, or a dash."""
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = f"{'contestant':<20}{'T':>6}{'seconds':>10}{'/ plain':>9}{'MiB':>10}{'/ Reversible':>14}"
    lines = [head + f"{'MiB out':>9}{'difference':>12}"]
    for r in rows:
        line = f"{r['contestant']:<20}{r['steps']:>6}"
        if r["skipped"]:
            lines.append(f"{line}  {r['skipped']}")
            continue
        line += f"{show(r['seconds'], '.3f'):>10}{show(r['time_ratio'], '.2f'):>9}"
        line += f"{show(ratio(r['temp_bytes'], MIB), '.2f'):>10}{show(r['memory_ratio'], '.2f'):>14}"
        line += f"{show(ratio(r['output_bytes'], MIB), '.3f'):>9}{show(r['difference'], '.1e'):>12}"
        peak = show(ratio(r["device_peak_bytes"], MIB), ".1f")
        lines.append(line + (f"  device peak {peak} MiB" if peak != "-" else ""))
    return "\n".join(lines)


def verdict_text(aims: Sequence[dict[str, Any]]) -> str:
    """The verdict as text."""
    lines = []
    for a in aims:
        aim = f"<= {a['at_most']}" if "at_most" in a else f">= {a['at_least']}"
        unjudged = "not measured" if a["value"] is None else "not judged at this T"
        word = {None: unjudged, True: "met", False: "MISSED"}[a["met"]]
        lines.append(f"{a['what']:<58}{show(a['value'], '.2f'):>8}   aim {aim:<8}{word}")
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on, as the operating system and JAX name it."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    name = f"{cpu}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return {
        "name": name,
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": machine_memory(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
    }


def machine_memory() -> int:
    """Bytes of memory of the device, or of the machine where that is the device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    names = ("jax", "jaxlib", "optax", "equinox", "numpy", "torch", "higher", "torchopt")
    found = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), "hypergrad": hg.__version__, **found}


def save(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(report, indent=1).encode())


def load(path: Path) -> dict[str, Any]:
    """Read a report that `save` wrote."""
    return json.loads(path.read_text())


def plot(report: dict[str, Any], path: Path) -> None:
    """Time against memory: a line per contestant, a point per number of steps, labelled at the ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in report["rows"] if r["time_ratio"] and r["temp_bytes"] and r["contestant"] != PLAIN]
    names = list(dict.fromkeys(r["contestant"] for r in rows))
    markers = dict(zip([*CONTESTANTS, *TORCH], "xoDsv^<>PXd"))
    # Where labels keep clear of their neighbours: offset in points and alignment; the others right.
    left, above, below = ((-6, 1), "right"), ((0, 6), "center"), ((0, -13), "center")
    sides = {REVERSIBLE: left, "Checkpointed": above, REMAT_STEPS: above, REMAT: below, "optax": below}
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in names:
        own = [r for r in rows if r["contestant"] == name]
        x, y = [r["temp_bytes"] / MIB for r in own], [r["time_ratio"] for r in own]
        ours = name == REVERSIBLE
        colours = {"color": "black" if ours else "0.45", "markerfacecolor": "black" if ours else "white"}
        axes.plot(x, y, marker=markers[name], linewidth=1.4 if ours else 0.7, label=name, **colours)
        offset, align = sides.get(name, ((6, -5), "left"))
        for r, a, b in list(zip(own, x, y))[:: max(1, len(own) - 1)]:  # the ends of the line
            text = {"textcoords": "offset points", "fontsize": 7, "ha": align}
            axes.annotate(str(r["steps"]), (a, b), offset, **text)
    axes.axhline(1, color="0.6", linestyle=":", label=PLAIN)
    axes.set(xscale="log", yscale="log", xlabel="temporary memory, MiB", ylabel="time / plain training")
    axes.margins(x=0.1)
    for axis, (low, high), digits in (
        (axes.xaxis, axes.get_xlim(), (1, 3)),
        (axes.yaxis, axes.get_ylim(), (1, 2, 3, 4, 5, 7)),
    ):
        ticks = [a * 10**k for k in range(6) for a in digits if low <= a * 10**k <= high]
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_title(
        f"Hypergradient of T learning rates (labels: T), {report['machine']['name']}", fontsize=10
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def say(text: str) -> None:
    """Print at once, for logs."""
    print(text, flush=True)


def progress(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="T=100, one repeat, writes nothing")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of steps T (default 100 1000 4000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTESTANTS), help="contestants")
    parser.add_argument("--repeats", type=int, help="timed calls of each (default 3)")
    parser.add_argument("--torch", action="store_true", help="also higher and TorchOpt, where installed")
    parser.add_argument("--exactness", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    parser.add_argument("--torch-worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.steps = sorted(set(args.steps or ([100] if args.fast else [100, 1000, 4000])))
    args.repeats = args.repeats or (1 if args.fast else 3)
    args.output = args.output or (None if args.fast else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report; 1 if a run was not reversed exactly or results disagree."""
    args = parse(arguments)
    if args.torch_worker:
        name, file, repeats = args.torch_worker
        torch_worker(name, file, int(repeats))
        return 0
    # Else a GPU multiplies with 10-bit mantissas, and rounding hides whether the contestants agree.
    jax.config.update("jax_default_matmul_precision", "float32")
    problem, machine, limit = Problem(), describe_machine(), MEMORY_SHARE * machine_memory()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    exactness = None
    if args.exactness:
        exactness = check_exactness(problem, 200 if args.fast else 10_000)
        word = "yes" if exactness["bit_exact"] else f"NO: {exactness['message']}"
        say(f"bit-exact: {word}  (T={exactness['steps']}, {exactness['seconds']:.1f} s with compiling)")

    rows, gradients = measure(problem, args.only or list(CONTESTANTS), args.steps, args.repeats, limit)
    for name, steps in [(n, t) for t in args.steps for n in TORCH if args.torch]:
        progress(f"running {name}, T={steps}")
        row, gradient = measure_torch(problem, name, steps, args.repeats, find(rows, STORED, steps), limit)
        rows.append(row)
        if gradient is not None:
            gradients[name, steps] = gradient
    rows.sort(key=lambda r: r["steps"])  # stable: contestants stay in order
    compare(rows, gradients)
    parameters = sum(math.prod(s) + s[1] for s in zip(problem.sizes[:-1], problem.sizes[1:]))
    aims = verdict(rows, parameters)
    agree = [r["difference"] for r in rows if r["difference"] is not None]
    say("\n" + table(rows) + "\n")
    agreed = all(x < AGREEMENT for x in agree)
    if agree:
        say(f"hypergradients agree: {'yes' if agreed else 'NO'} (largest difference {max(agree):.1e})")
    say(f"bits per parameter and step: {show(bits_per_step(rows, parameters), '.4f')}\n")
    say(verdict_text(aims))
    if args.output:
        config = {"problem": problem._asdict(), "momentum": MOMENTUM, "parameters": parameters}
        config |= {"steps": args.steps, "repeats": args.repeats, "memory_limit_bytes": limit}
        report = {"config": config, "versions": versions(), "machine": machine, "exactness": exactness}
        report |= {"rows": rows, "bits_per_step": bits_per_step(rows, parameters), "verdict": aims}
        slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
        path = args.output / f"hypergradient-{slug}.json"
        save(report, path)
        plot(load(path), path.with_suffix(".png"))
        say(f"\nwritten: {path} and {path.with_suffix('.png').name}")
    return 0 if agreed and (exactness is None or exactness["bit_exact"]) else 1


if __name__ == "__main__":
    sys.exit(main())
