"""Memory of hypergradients of GPT-2-small, by compilation alone: nothing is allocated, and nothing runs.

What is compiled is the gradient of a held-out loss after ``T`` steps of AdamW, in the learning rate of
every step and in the initial weights.  The model has 124 million parameters: 12 scanned and rematerialized
layers of width 768 with 12 heads, a vocabulary of 50,257 whose embedding is also the last layer, and the
cross-entropy in 8 chunks.

    python -m benchmarks.large                  # a minute or two of compilation for each row
    python -m benchmarks.large --batch 64
    python -m benchmarks.large --fast           # a tiny model, in seconds; writes nothing

Reported are the bytes that the compiled program needs beside its arguments and results, as
``compiled.memory_analysis()`` has them, and the largest of the buffers they consist of, by shape, from
XLA's own account of its buffers.  Both depend on the compiler of the machine's platform.

======================  ==============================================================================
contestant              what it is
======================  ==============================================================================
Reversible              `hypergrad.Reversible` with the bits it reserves by default
Reversible, tight       with as many bits as the decay of the weights takes, which ``jit`` hides
Reversible, √T          tight, in √T segments
Checkpointed            `hypergrad.Checkpointed`
Stored                  `hypergrad.Stored`
plain, √T               ``lax.scan`` and optax, in √T segments; every step and segment rematerialized
======================  ==============================================================================
"""

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import hypergrad as hg
from benchmarks.machine import GIB, Row, describe_machine, progress, say, slug, versions
from experiments.common import records
from hypergrad import nets

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "optax", "hypergrad-jax")
ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
# Buffers are placed before machine code is made, which takes most of the time.
QUICK: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DECAY_BITS = {"params": 0.001}  # a step decays by 1 - 0.1 α, where α is at most 6e-4

PyTree = Any
Train = Callable[[Any, Array, PyTree, Array], PyTree]


class Model(NamedTuple):
    """Sizes of the transformer and of a minibatch."""

    vocabulary: int = 50_257
    length: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    sequence: int = 128
    batch: int = 8
    chunks: int = 8  # of the cross-entropy

    def network(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``(init, apply)``."""
        sizes = {"width": self.width, "depth": self.depth, "heads": self.heads}
        return nets.transformer(
            self.vocabulary, self.length, **sizes, tied=True, scan_layers=True, remat=True
        )

    def loss(self, params: PyTree, meta: None, tokens: Array) -> Array:
        """Of predicting the next token, nats."""
        _, apply = self.network()
        hidden = apply(params, tokens[:, :-1], logits=False)
        return nets.chunked_cross_entropy(*hidden, tokens[:, 1:], chunks=self.chunks)


TINY = Model(vocabulary=512, length=32, width=32, depth=2, heads=2, sequence=16, batch=2)


# ---- contestants


def with_adjoint(make: Callable[[int], hg.Adjoint]) -> Train:
    """Training by `hypergrad.train`, with an adjoint that may depend on the number of steps."""

    def run(model: Model, rates: Array, params: PyTree, batches: Array) -> PyTree:
        steps = len(rates)
        hypers = {"learning_rate": rates, **ADAMW}
        adjoint = make(steps)
        return hg.train(
            model.loss, params, hypers, None, batches, steps=steps, optimizer=hg.adamw(), adjoint=adjoint
        ).params

    return run


def plain(model: Model, rates: Array, params: PyTree, batches: Array) -> PyTree:
    """Training by nested scans, with optax."""
    adam = optax.scale_by_adam(ADAMW["b1"], ADAMW["b2"], ADAMW["eps"])
    optimizer = optax.chain(adam, optax.add_decayed_weights(ADAMW["weight_decay"]))

    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry: Any, x: tuple[Array, Array]) -> Any:
        params, state = carry
        rate, tokens = x
        gradient = jax.grad(model.loss)(params, None, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return (jax.tree.map(lambda w, u: w - rate * u, params, updates), state), None

    @partial(jax.checkpoint, prevent_cse=False)
    def segment(carry: Any, xs: Any) -> Any:
        return jax.lax.scan(step, carry, xs)

    steps = len(rates)
    length = math.isqrt(steps)
    whole = steps // length * length
    carry = (params, optimizer.init(params))
    cut = jax.tree.map(lambda x: x[:whole].reshape(-1, length, *x.shape[1:]), (rates, batches))
    carry, _ = jax.lax.scan(segment, carry, cut)
    if whole < steps:
        carry, _ = segment(carry, (rates[whole:], batches[whole:]))
    return carry[0]


CONTESTANTS: dict[str, Train] = {
    "Reversible": with_adjoint(lambda _: hg.Reversible()),
    "Reversible, tight": with_adjoint(lambda _: hg.Reversible(bits=DECAY_BITS)),
    "Reversible, √T": with_adjoint(lambda t: hg.Reversible(bits=DECAY_BITS, segments=math.isqrt(t))),
    "Checkpointed": with_adjoint(lambda _: hg.Checkpointed()),
    "Stored": with_adjoint(lambda _: hg.Stored()),
    "plain, √T": plain,
}
FAST = ["plain, √T"]


# ---- compilation


def shapes(model: Model, steps: int) -> tuple[Any, ...]:
    """Learning rates, weights, minibatches of ``T`` steps and a held-out one; nothing is allocated."""
    init, _ = model.network()
    tokens = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = model.batch, model.sequence + 1
    return (
        jax.ShapeDtypeStruct((steps,), jnp.float32),
        jax.eval_shape(init, jax.random.key(0)),
        tokens((steps, *rows)),
        tokens(rows),
    )


def hypergradient(model: Model, train: Train) -> Callable[..., Any]:
    """The gradient of the held-out loss in learning rates and initial weights."""

    def outer(rates: Array, params: PyTree, batches: Array, held_out: Array) -> Array:
        return model.loss(train(model, rates, params, batches), None, held_out)

    return jax.grad(outer, argnums=(0, 1))


def compiled(model: Model, name: str, steps: int) -> Row:
    """Bytes of a contestant's program, and the buffers they consist of."""
    arguments = shapes(model, steps)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(arguments[1]))
    row: Row = {"contestant": name, "steps": steps, "parameters": parameters}
    begin = time.perf_counter()
    lowered = jax.jit(hypergradient(model, CONTESTANTS[name])).lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        memory = lowered.compile(compiler_options=QUICK | {"xla_dump_to": folder}).memory_analysis()
        texts = [path.read_text() for path in Path(folder).glob("*buffer-assignment.txt")]
    row["compile_seconds"] = time.perf_counter() - begin
    row["temp_bytes"], row["argument_bytes"] = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    row["output_bytes"] = memory.output_size_in_bytes
    row["bytes_per_parameter"] = memory.temp_size_in_bytes / parameters
    row["buffers"] = buffers(max(texts, key=len, default=""))
    return row


def buffers(text: str) -> list[Row]:
    """The places in the block of temporary memory, largest first, and the shapes that use them in turn.

    Args:
      text: XLA's account of its buffers, ``*buffer-assignment.txt`` of a dump.
    """
    _, _, block = text.partition("preallocated-temp:\n")
    block = block.partition("\nallocation ")[0]
    value = r"value: <\d+ (\S+) .*?> \(size=(\d+),offset=(\d+)\): (.*)"
    found = sorted(
        ((int(size), int(offset), name, shape) for name, size, offset, shape in re.findall(value, block)),
        reverse=True,
    )
    places: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for size, offset, name, shape in found:
        if (size, offset) not in places:
            if any(offset < at + n and at < offset + size for n, at in places):
                continue  # smaller, in a place that is counted
            places[size, offset] = []
        places[size, offset].append((re.sub(r"\{[\d,:TSE()]*\}$", "", shape), name))
    return [
        {
            "bytes": size,
            "shapes": sorted({shape for shape, _ in users}),
            "values": [name for _, name in users],
        }
        for (size, _), users in places.items()
        if size >= 2**10
    ]


# ---- what is reported


def table(rows: Sequence[Row]) -> str:
    """A line for every contestant and number of steps."""
    head = (
        f"{'contestant':<20}{'T':>6}{'temporary':>14}{'per parameter':>16}{'arguments':>14}{'compiled':>11}"
    )
    lines = [
        f"{r['contestant']:<20}{r['steps']:>6}{r['temp_bytes'] / GIB:>10.2f} GiB"
        f"{r['bytes_per_parameter']:>10.1f} bytes{r['argument_bytes'] / GIB:>10.2f} GiB"
        f"{r['compile_seconds']:>9.0f} s"
        for r in rows
    ]
    return "\n".join([head, *lines])


def largest(row: Row, count: int) -> str:
    """The buffers that dominate, those of the same shapes together."""
    alike: dict[str, list[int]] = {}
    for each in row["buffers"]:
        shapes = each["shapes"]
        more = f" and {len(shapes) - 3} other shapes" if len(shapes) > 3 else ""
        alike.setdefault(" or ".join(shapes[:3]) + more, []).append(each["bytes"])
    order = sorted(alike.items(), key=lambda pair: -sum(pair[1]))
    lines = [
        f"{sum(sizes) / row['parameters']:>8.2f} bytes per parameter: {len(sizes):>3} x {shape}"
        for shape, sizes in order[:count]
    ]
    return "\n".join([f"{row['contestant']}, T={row['steps']}: the largest buffers", *lines])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of steps T (default 1 16 96 1000)")
    parser.add_argument("--batch", type=int, help="sequences in a minibatch (default 8)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTESTANTS), help="contestants")
    parser.add_argument("--buffers", type=int, default=8, help="kinds of buffers to print (default 8)")
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    args.steps = sorted(set(args.steps or ([4] if args.fast else [1, 16, 96, 1000])))
    args.only = args.only or (FAST if args.fast else [*CONTESTANTS])
    args.output = args.output or (None if args.fast else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Compile, print, and write the report."""
    args = parse(arguments)
    model = TINY if args.fast else Model()
    model = model._replace(batch=args.batch or model.batch)
    machine = describe_machine()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    rows: list[Row] = []
    for steps in args.steps:
        for name in args.only:
            if "√" in name and steps == 1:
                continue  # one segment
            progress(f"compiling {name}, T={steps}")
            rows.append(compiled(model, name, steps))
            progress(largest(rows[-1], args.buffers))
            if args.output:
                write(args.output, model, machine, rows)
    parameters = rows[0]["parameters"]
    say(f"{parameters:,} parameters, batches of {model.batch} sequences of {model.sequence} tokens")
    say("\n" + table(rows))
    for row in rows:
        if row["steps"] == args.steps[-1]:
            say("\n" + largest(row, args.buffers))
    return rows


def write(folder: Path, model: Model, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The report so far, with the 50 largest buffers of each program."""
    batch = "" if model.batch == Model().batch else f"-batch-{model.batch}"
    path = folder / f"large{batch}-{slug(machine['name'])}.json"
    short = [row | {"buffers": row["buffers"][:50]} for row in rows]
    config = {"model": model, "adamw": ADAMW, "decay_bits": DECAY_BITS}
    records.write(
        path, {"config": config, "machine": machine | {"packages": versions(PACKAGES)}, "rows": short}
    )


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
