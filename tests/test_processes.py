"""Outer loops in two processes that work together, and resumed in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.devices

PROGRAM = """
import json, sys
import jax
rank, count, port, steps = map(int, sys.argv[1:5])
folder = sys.argv[5]
jax.config.update("jax_num_cpu_devices", 4 // count)
jax.config.update("jax_disable_most_optimizations", True)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
import jax.numpy as jnp, numpy as np, hypergrad as hg
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
def on_mesh(x):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("data")), lambda part: x[part])
x, y = on_mesh(rng.normal(size=(16, 3)).astype("f")), on_mesh(rng.normal(size=16).astype("f"))
stored = hg.Stored()  # compiles fastest
loss = lambda w, meta, step: jnp.mean((x @ w - y) ** 2)
def objective(hypers, key):
    hypers = {**hypers, "momentum": 0.5}
    return loss(hg.train(loss, jnp.zeros(3), hypers, steps=4, adjoint=stored).params, None, 0)
with jax.set_mesh(mesh):
    best = hg.meta.optimize(
        objective, {"learning_rate": np.full(4, 0.1, "f")}, steps=steps, checkpoint=folder + "/optimize.npz"
    )
    exact = hg.meta.optimize(
        objective, {"learning_rate": np.full(4, 0.1, "f")}, steps=steps, optimizer=hg.meta.LBFGSB(),
        checkpoint=folder + "/exact.npz",
    )
    tuned = hg.tune(
        loss, np.zeros(3, "f"), {"learning_rate": 0.1}, steps=4, meta_steps=steps, trials=0,
        optimizer=hg.sgd(), adjoint=stored, checkpoint=folder + "/tune.npz",
    )
images, labels = rng.normal(size=(40, 4)).astype("f"), np.arange(40) % 2
made = hg.distill(
    hg.nets.mlp((4, 2)), images, labels, hg.Recipe(steps=3), meta_steps=steps,
    adjoint=stored, checkpoint=folder + "/distill.npz",
)
rates = [x for found in (best, exact) for x in found.hypers["learning_rate"].tolist()]
print(json.dumps([rates, float(tuned.hypers["learning_rate"]), made.images.tolist()]))
"""


def run(folder: Path, count: int, steps: int) -> list[tuple[Any, str]]:
    """What every process printed: its result, and its stderr."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    commands = [
        [sys.executable, "-c", PROGRAM, str(rank), str(count), str(port), str(steps), str(folder)]
        for rank in range(count)
    ]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for command in commands
    ]
    told = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, told):
        assert process.returncode == 0, errors
    return [(json.loads(out.splitlines()[-1]), errors) for out, errors in told]


def numbers(result: Any) -> np.ndarray:
    rates, tuned, images = result
    return np.concatenate([rates, [tuned], np.ravel(images)])


def test_one_process_shows_progress_and_writes_checkpoints_and_any_number_goes_on(tmp_path: Path) -> None:
    (first, shown), (second, quiet) = run(tmp_path, 2, steps=2)
    np.testing.assert_array_equal(numbers(first), numbers(second))
    for name in ("optimize", "tune", "distill"):  # both outer loops of `optimize` have its name
        assert f"{name}: " in shown and f"{name}: " not in quiet
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "distill.npz",
        "exact.npz",
        "optimize.npz",
        "tune.npz",
    ]

    ((resumed, _),) = run(tmp_path, 1, steps=3)  # what two processes began, one goes on with
    (again, _), (other, _) = run(tmp_path, 2, steps=4)  # and two with what one did
    np.testing.assert_array_equal(numbers(again), numbers(other))
    whole = tmp_path / "whole"
    whole.mkdir()
    ((straight, _),) = run(whole, 1, steps=4)
    np.testing.assert_allclose(numbers(again), numbers(straight), rtol=1e-5)
    assert not np.allclose(numbers(resumed), numbers(first), rtol=1e-5)
