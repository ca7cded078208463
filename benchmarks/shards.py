"""Training in parts, ``train(shards=8)``: its bits on any number of devices, and its price in time.

The same run of 1,000 steps and its hypergradient in rates, initial weights, a penalty and the data, on 1,
2, 4 and 8 simulated devices and in two processes: a table says which digests of bits agree.  The time is
processor time on one device, in multiples of the same run on whole batches.

    python -m benchmarks.shards            # half an hour on two cores
    python -m benchmarks.shards --fast     # one network on one device and two, writes nothing

One run by itself prints its digests:

    python -m benchmarks.shards mlp adamw                    # on the devices that there are
    python -m benchmarks.shards mlp adamw --processes 2      # on one device in each of two processes
    python -m benchmarks.shards mlp momentum --spoil 31      # with a collective that goes wrong
"""

import argparse
import contextlib
import hashlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from benchmarks.machine import describe_machine, say, show
from experiments.common import records
from hypergrad import sums

RESULTS = Path(__file__).parent / "results" / "shards.json"
PARTS, ROWS = 8, 32
OPTIMIZERS = {"momentum": (hg.momentum(), 0.3), "adamw": (hg.adamw(), 0.01)}


def digest(tree: Any) -> str:
    """The first digits of the SHA-256 of all bits of a tree."""
    leaves = [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]
    arrays = [np.asarray(x.addressable_data(0)) for x in leaves]
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def mlp(steps: int) -> tuple[Any, Any, Any]:
    """A loss of a small network, its parameters, and batches."""
    rng = np.random.default_rng(0)
    sizes = [10, 16, 16, 3]
    params = [
        {"w": rng.normal(size=pair) / np.sqrt(pair[0]), "b": np.zeros(pair[1])}
        for pair in itertools.pairwise(sizes)
    ]
    x = rng.normal(size=(steps, ROWS, 10))
    y = rng.integers(0, 3, size=(steps, ROWS))

    def loss(params: Any, meta: Any, batch: Any) -> Any:
        h, labels = batch
        for layer in params[:-1]:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        logits = jax.nn.log_softmax(h @ params[-1]["w"] + params[-1]["b"])
        penalty = sum(jnp.sum(layer["w"] ** 2) for layer in params)
        return jnp.exp(meta) * penalty - jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))

    return loss, jax.tree.map(jnp.float32, params), (jnp.float32(x), jnp.int32(y))


def transformer(steps: int) -> tuple[Any, Any, Any]:
    """A loss of a small transformer on random windows of a text with structure, and batches."""
    init, apply = hg.nets.transformer(12, 9, width=16, depth=2, heads=2)
    text = (np.arange(4000) ** 2 // 7) % 12
    starts = np.random.default_rng(0).integers(0, len(text) - 9, size=(steps, ROWS))
    windows = text[starts[..., None] + np.arange(9)]

    def loss(params: Any, meta: Any, windows: Any) -> Any:
        logits = jax.nn.log_softmax(apply(params, windows[:, :-1]))
        penalty = jnp.exp(meta) * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return penalty - jnp.mean(jnp.take_along_axis(logits, windows[:, 1:, None], -1))

    return loss, init(jax.random.key(0)), jnp.int32(windows)


def spoil(call: int, checked: bool) -> None:
    """Make one collective go wrong: that with this number, counted over all devices.

    Args:
      call: its number.
      checked: whether what is received is compared with what was sent.
    """
    right, count = sums._exchanged, [0]

    def bad(_: Any) -> Any:
        count[0] += 1
        return np.int32(count[0] == call)

    def wrong(limbs: Any, axes: Any) -> Any:
        received = right(limbs, axes)
        number = jax.ShapeDtypeStruct((), np.int32)
        added = jax.pure_callback(bad, number, received[0][0].ravel()[0]).astype(jnp.int64) << 50
        first = received[0][0].ravel().at[-1].add(added).reshape(received[0][0].shape)
        return ((first, *received[0][1:]), *received[1:])

    sums._exchanged = wrong
    if not checked:
        sums._trace = lambda arrays: jnp.zeros((), jnp.int64)


def run(given: argparse.Namespace) -> list[str]:
    """Train, and differentiate, and return digests of what comes out."""
    steps = given.steps
    loss, params, batches = {"mlp": mlp, "transformer": transformer}[given.model](steps)
    optimizer, rate = OPTIMIZERS[given.optimizer]
    many = jax.device_count() > 1
    shards = None if given.whole else hg.Shards(PARTS, over="data" if many else None)
    hypers = {"learning_rate": jnp.full(steps, rate, jnp.float32)}
    adjoint = hg.Reversible(segments=given.segments)

    def train(hypers: Any, params: Any, meta: Any, batches: Any, **more: Any) -> Any:
        settings: Any = {"optimizer": optimizer, "adjoint": adjoint, "shards": shards, **more}
        return hg.train(loss, params, hypers, meta, batches, **settings)

    def outer(*arguments: Any) -> Any:
        trained = train(*arguments, steps=steps)
        value = sum(jnp.sum(x**2) for x in jax.tree.leaves(trained.params)) + jnp.mean(trained.losses)
        return value, trained

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh) if many else contextlib.nullcontext():
        whole = jax.NamedSharding(mesh, jax.P())
        put = lambda tree: jax.device_put(tree, whole) if many else tree  # noqa: E731
        meta = jnp.float32(-7)
        if given.forward:
            return forward(given, train, put, (hypers, params, meta, batches))
        # Integers such as labels and tokens get derivatives without bits, which count for nothing.
        program = jax.value_and_grad(outer, (0, 1, 2, 3), has_aux=True, allow_int=True)
        compiled = jax.jit(program, out_shardings=whole if many else None)
        arguments = put((hypers, params, meta, batches))
        try:
            (_, trained), gradient = jax.block_until_ready(compiled(*arguments))
        except jax.errors.JaxRuntimeError as error:
            if not given.spoil:
                raise
            return [said(error)]
        begin = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        seconds = time.process_time() - begin
    named = {"params": trained.params, "state": trained.state, "losses": trained.losses}
    named |= dict(zip(["of hypers", "of params", "of meta", "of batches"], gradient))
    digests = [f"{name} {digest(tree)}" for name, tree in named.items()]
    return [*digests, f"seconds {seconds:.3f}"] if given.seconds else digests


def said(error: Exception) -> str:
    """The kind of an error that was raised by a running program, and its text in one line."""
    kind = "ReversalError" if "ReversalError" in repr(error) else type(error).__name__
    return f"{kind}: {' '.join(str(error).split())[:200]}"


def forward(given: argparse.Namespace, train: Any, put: Any, arguments: Any) -> list[str]:
    """Train only, perhaps up to some step or on from one, with the state in a file."""
    hypers, params, meta, batches = arguments
    first, last = given.since, given.until or given.steps
    state = None
    if first:
        with open(given.state, "rb") as file:
            params, state = pickle.load(file)
    cut = lambda tree: jax.tree.map(lambda x: x[first:last], tree)  # noqa: E731
    train = jax.jit(partial(train, steps=last - first))
    trained = train(*put((cut(hypers), params, meta, cut(batches))), state=put(state))
    if given.until:
        with open(given.state, "wb") as file:
            pickle.dump(jax.tree.map(np.asarray, (trained.params, trained.state)), file)
    return [f"params {digest(trained.params)}", f"state {digest(trained.state)}"]


def in_processes(count: int) -> list[str]:
    """What each of several processes prints, which must be the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "benchmarks.shards", *sys.argv[1:], "--port", str(port), "--process"]
    pipes: Any = {"stdout": subprocess.PIPE, "env": one, "text": True}
    running = [subprocess.Popen([*command, str(k)], **pipes) for k in range(count)]
    said = [process.communicate()[0].splitlines() for process in running]
    said = [[line for line in each if not line.startswith("[Gloo]")] for each in said]
    digests = [[line for line in each if not line.startswith("seconds")] for each in said]
    if any(process.returncode for process in running) or any(each != digests[0] for each in digests):
        raise SystemExit(f"the processes differ or failed: {said}")
    return said[0]


def everything(given: argparse.Namespace) -> None:
    """Make every run on every number of devices, and print and save a table."""
    models, optimizers, counts = ("mlp", "transformer"), tuple(OPTIMIZERS), ("1", "2", "4", "8", "1 + 1")
    if given.fast:
        models, optimizers, counts = models[:1], optimizers[:1], counts[:2]
    steps = 12 if given.fast else 1000
    rows: list[Any] = []
    record = {"machine": describe_machine(), "parts": PARTS, "rows": rows}
    say(f"{'network':>12}  {'optimizer':>9}  {'devices':>7}  {'bits':>10}  {'time':>5}")
    for model, optimizer in itertools.product(models, optimizers):
        whole = elsewhere(1, model, optimizer, "--steps", str(steps), "--seconds", "--whole")
        reference: list[str] = []
        for count in counts:
            flags = ["--processes", "2"] if "+" in count else []
            devices = 1 if flags else int(count)
            *found, seconds = elsewhere(
                devices, model, optimizer, "--steps", str(steps), "--seconds", *flags
            )
            reference = reference or found
            same = [a == b for a, b in zip(found, reference)]
            price = float(seconds.split()[1]) / float(whole[-1].split()[1]) if count == "1" else None
            rows.append({
                "network": model, "optimizer": optimizer, "devices": count, "steps": steps,
                "digests": found, "same": same, "time in whole batches": price,
            })  # fmt: skip
            bits = "all alike" if all(same) else f"{sum(same)} of {len(same)}"
            say(f"{model:>12}  {optimizer:>9}  {count:>7}  {bits:>10}  {show(price, '.2f'):>5}")
            if not given.fast:
                records.write(RESULTS, record)  # at once, so that a run that is stopped loses nothing


def elsewhere(devices: int, *flags: str) -> list[str]:
    """What this program prints in a process of its own with so many devices."""
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "benchmarks.shards", *flags]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
    return done.stdout.splitlines()


def main() -> None:
    """Parse the command line and print."""
    about, how = str(__doc__), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=how)
    parser.add_argument("model", nargs="?", choices=["mlp", "transformer"])
    parser.add_argument("optimizer", nargs="?", choices=list(OPTIMIZERS))
    parser.add_argument("--fast", action="store_true", help="only see that it runs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="on whole batches")
    parser.add_argument("--seconds", action="store_true", help="print the processor time of a second call")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, help="number of this one of several processes")
    parser.add_argument("--port", type=int, help="where they find each other")
    parser.add_argument("--spoil", type=int, default=0, help="number of the collective that goes wrong")
    parser.add_argument("--unchecked", action="store_true", help="which is not noticed at once")
    parser.add_argument("--forward", action="store_true", help="train only")
    parser.add_argument("--since", type=int, default=0, help="go on from this step, with --state")
    parser.add_argument("--until", type=int, help="stop before this step, with --state")
    parser.add_argument("--state", help="file of the state")
    given = parser.parse_args()
    if given.model is None:
        return everything(given)
    if given.processes > 1 and given.process is None:
        return print(*in_processes(given.processes), sep="\n")
    if given.process is not None:
        jax.distributed.initialize(f"127.0.0.1:{given.port}", given.processes, given.process)
    if given.spoil:
        spoil(given.spoil, not given.unchecked)
    return print(*run(given), sep="\n")


if __name__ == "__main__":
    main()
