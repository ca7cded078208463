"""Time of a hypergradient in multiples of plain training, on one core, for networks of many kinds.

The task is that of `benchmarks.hypergradient`: the gradient of an outer loss in every learning rate of a
schedule ``(T,)``.  Run it with

    python -m benchmarks.time            # about an hour
    python -m benchmarks.time --fast     # seconds, writes nothing

Times are processor time of a single thread on a single core, so that what else runs on the machine hardly
counts, and the least of some rounds, in each of which everyone is called once.  Compile time is processor
time from the trace to the executable, with the threads of the compiler.

================  ==========================================================================================
contestant        what it is
================  ==========================================================================================
plain training    a ``lax.scan``, no hypergradient: the unit of time
sqrt-T remat      nested ``lax.scan`` with ``jax.checkpoint``, as a user of plain JAX writes it: the rival
others            the adjoints that `hypergrad.plan` proposes, with the time that it promises
================  ==========================================================================================
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hypergrad as hg
from benchmarks.hypergradient import (
    OPTIMIZERS,
    PLAIN,
    REMAT,
    REVERSIBLE,
    Arrays,
    Contestant,
    Training,
    hypergrad_with,
    rematerialised,
    scanned,
)
from benchmarks.machine import Row, describe_machine, on_one_core, progress, ratio, say, show, versions
from experiments.common import records
from hypergrad import nets

RESULTS = Path(__file__).parent / "results" / "time.json"


class Workload(NamedTuple):
    """A network and its minibatches.

    Attributes:
      net: ``(init, apply)``.
      shape: of one input.
      classes: of its label, or of the labels of its tokens.
      batch: examples in a minibatch.
      steps: ``T``.
      tokens: whether inputs are tokens, each of which foretells a label.
    """

    net: tuple[Callable[..., Any], Callable[..., Array]]
    shape: tuple[int, ...]
    classes: int
    batch: int
    steps: int
    tokens: bool = False


WORKLOADS = {
    "784-50-50-50-10, batch 200": Workload(nets.mlp((784, 50, 50, 50, 10)), (784,), 10, 200, 400),
    "784-100-100-10, batch 64": Workload(nets.mlp((784, 100, 100, 10)), (784,), 10, 64, 400),
    "784-512-512-10, batch 128": Workload(nets.mlp((784, 512, 512, 10)), (784,), 10, 128, 100),
    "transformer": Workload(
        nets.transformer(64, 32, width=64, depth=2, heads=4), (32,), 64, 16, 100, tokens=True
    ),
    "transformer, 204 arrays": Workload(
        nets.transformer(64, 16, width=32, depth=18, heads=2), (16,), 64, 8, 50, tokens=True
    ),
    "ConvNet": Workload(nets.convnet((16, 16, 3), 10, width=32, depth=2), (16, 16, 3), 10, 32, 100),
}
FAST = {"64-30-10, batch 20": Workload(nets.mlp((64, 30, 10)), (64,), 10, 20, 9)}


def make_arrays(work: Workload, rate: float, rows: int = 1_000) -> tuple[Array, Arrays]:
    """Learning rates ``(T,)``, and random data."""
    rng = np.random.default_rng(0)

    def data() -> tuple[Array, Array]:
        if work.tokens:
            tokens = rng.integers(0, work.classes, size=(rows, work.shape[0] + 1), dtype=np.int32)
            return jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
        inputs = rng.normal(size=(rows, *work.shape)).astype(np.float32)
        return jnp.asarray(inputs), jnp.asarray(rng.integers(0, work.classes, size=rows, dtype=np.int32))

    indices = rng.integers(0, rows, size=(work.steps, work.batch), dtype=np.int32)
    arrays = Arrays(work.net[0](jax.random.key(0)), jnp.asarray(indices), *data(), *data())
    return jnp.full(work.steps, rate, jnp.float32), arrays


def losses(work: Workload) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Inner loss ``loss(params, data, rows)``, and outer loss ``(params, inputs, labels)``."""

    def whole(params: Any, inputs: Array, labels: Array) -> Array:
        logits = work.net[1](params, inputs)
        return nets.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))

    return lambda params, data, rows: whole(params, data[0][rows], data[1][rows]), whole


def proposals(work: Workload, training: Training) -> dict[str, tuple[hg.Adjoint, float]]:
    """The adjoints that `hypergrad.plan` proposes, and the times that it promises."""
    rates, arrays = make_arrays(work, training.rate)
    hypers, data = {"learning_rate": rates, **training.hypers}, (arrays.inputs, arrays.labels)
    made = hg.plan(
        losses(work)[0], arrays.params, hypers, data, arrays.indices, steps=work.steps,
        optimizer=training.program, budget=1e15,
    )  # fmt: skip
    found = {}
    for estimate in made.estimates:
        name = type(estimate.adjoint).__name__
        segments = name == "Reversible" and getattr(estimate.adjoint, "segments", 1) > 1
        found[f"{name} in segments" if segments else name] = (estimate.adjoint, estimate.time)
    return found


# ---- measuring


class Runner(NamedTuple):
    """A compiled contestant, its row, and its arguments."""

    row: Row
    call: Callable[..., Any]
    arguments: tuple[Array, Arrays]


def prepared(
    key: tuple[str, str, str], work: Workload, contestant: Contestant, promised: float | None
) -> Runner:
    """Compile a contestant, in a trace of its own."""
    problem, optimizer, name = key
    training = OPTIMIZERS[optimizer]
    arguments = make_arrays(work, training.rate)

    def outer(rates: Array, arrays: Arrays) -> Array:
        params = contestant(training, rates, arrays)
        return losses(work)[1](params, arrays.outer_inputs, arrays.outer_labels)

    begin = time.process_time()
    call = jax.jit(outer if name == PLAIN else jax.grad(outer)).lower(*arguments).compile()
    seconds = time.process_time() - begin
    row = {"problem": problem, "optimizer": optimizer, "contestant": name, "promised": promised}
    return Runner(row | {"compile_seconds": seconds, "times": []}, call, arguments)


def runners(problem: str, work: Workload, optimizer: str, brief: bool) -> list[Runner]:
    """All contestants for one network and one optimizer."""
    inner = losses(work)[0]
    everyone: dict[str, tuple[Contestant, float | None]] = {
        PLAIN: (lambda *x: scanned(*x, inner=inner), None),
        REMAT: (rematerialised(checkpoint_steps=False, inner=inner), None),
    }
    proposed: dict[str, tuple[hg.Adjoint, float | None]] = {REVERSIBLE: (hg.Reversible(), None)}
    if not brief:
        proposed |= proposals(work, OPTIMIZERS[optimizer])
    for name, (adjoint, promised) in proposed.items():
        # The proposal reserves room for its tapes; the need is known before the run.
        kept = hg.Reversible() if name == REVERSIBLE else adjoint
        everyone[name] = (hypergrad_with(lambda *_, kept=kept: kept, inner), promised)
    progress(f"compiling {problem}, {optimizer}")
    return [prepared((problem, optimizer, n), work, *each) for n, each in everyone.items()]


def timed(everyone: Sequence[Runner], rounds: int) -> None:
    """Call everyone once in each round, every other round in the opposite order."""
    for runner in everyone:
        jax.block_until_ready(runner.call(*runner.arguments))
    for k in range(rounds):
        for runner in everyone[:: -1 if k % 2 else 1]:
            begin = time.process_time()
            jax.block_until_ready(runner.call(*runner.arguments))
            runner.row["times"].append(time.process_time() - begin)


def compared(rows: Sequence[Row]) -> None:
    """Fill in what relates a row to plain training and to the rival."""
    for row in rows:
        row["seconds"] = min(row["times"])
    for row in rows:
        same = {r["contestant"]: r for r in rows if all(r[k] == row[k] for k in ("problem", "optimizer"))}
        row["time_ratio"] = ratio(row["seconds"], same[PLAIN]["seconds"])
        row["rival_ratio"] = ratio(row["seconds"], same[REMAT]["seconds"])
        row["compile_ratio"] = ratio(row["compile_seconds"], same[REMAT]["compile_seconds"])


def table(rows: Sequence[Row]) -> str:
    """All rows as text."""
    head = f"{'problem':27} {'optimizer':9} {'contestant':22} {'ms':>8} {'/plain':>7} {'/remat':>7}"
    lines = [f"{head} {'promise':>7} {'compile':>8} {'/remat':>6}"]
    for r in rows:
        lines.append(
            f"{r['problem']:27} {r['optimizer']:9} {r['contestant']:22} {1e3 * r['seconds']:8.1f} "
            f"{r['time_ratio']:7.2f} {r['rival_ratio']:7.2f} {show(r['promised'], '.1f'):>7} "
            f"{r['compile_seconds']:7.1f}s {r['compile_ratio']:6.2f}"
        )
    return "\n".join(lines)


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="one small network; writes nothing")
    parser.add_argument("--problems", nargs="+", choices=list(WORKLOADS), help="networks (default all)")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--brief", action="store_true", help="only Reversible and the rival")
    parser.add_argument("--rounds", type=int, help="calls of each (default 5)")
    parser.add_argument("--core", type=int, default=0, help="the core that everything runs on (default 0)")
    parser.add_argument("--output", type=Path, help=f"where the report goes (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (1 if args.fast else 5)
    args.output = args.output or (None if args.fast or args.brief or args.problems else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report."""
    args = parse(arguments)
    on_one_core(args.core)
    machine = describe_machine()
    say(f"{machine['name']}; jax {jax.__version__}, hypergrad {hg.__version__}; one thread on one core")
    works = FAST if args.fast else {k: v for k, v in WORKLOADS.items() if k in (args.problems or WORKLOADS)}
    report: dict[str, Any] = {
        "config": {
            "rounds": args.rounds,
            "optimizers": {k: OPTIMIZERS[k].hypers for k in args.optimizers},
        },
        "machine": machine | {"packages": versions(("jaxlib",))},
        "parameters": {},
        "rows": [],
    }
    for problem, work in works.items():
        everyone = [
            r for name in args.optimizers for r in runners(problem, work, name, args.fast or args.brief)
        ]
        timed(everyone, args.rounds)
        new = [runner.row for runner in everyone]
        compared(new)
        say(table(new))
        report["parameters"][problem] = parameters(work)
        report["rows"] += new
        if args.output:  # at once, so that a run that is stopped loses nothing
            records.write(args.output, report)
    if args.output:
        say(f"\nwritten: {args.output}")
    return 0


def parameters(work: Workload) -> int:
    """How many numbers a network has."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(work.net[0], jax.random.key(0))))


if __name__ == "__main__":
    sys.exit(main())
