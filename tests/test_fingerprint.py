"""Digests of traced functions: equal for what computes the same, in every process."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad._base.fingerprint import digest
from hypergrad._base.tracing import closure_convert

ROOT = Path(__file__).resolve().parent.parent

# With a callback, a custom rule, randomness, closed-over data and a set, whose order differs by process.
SOURCE = """
import jax, jax.numpy as jnp, numpy as np
import hypergrad as hg
from hypergrad._base.fingerprint import digest
from hypergrad._base.tracing import closure_convert

data = np.linspace(-1, 1, 3, dtype=np.float32)


def objective(rate, key):
    names = {"a", "b", "c", "long", "velocity"}
    loss = lambda w, meta, step: jnp.sum(jax.nn.relu(w - meta) ** 2)
    start = jax.random.normal(key, (3,))
    trained = hg.train(loss, start, {"learning_rate": rate, "momentum": 0.5}, data, steps=2)
    held = jax.lax.stop_gradient(trained.params)
    scale = jax.pure_callback(lambda x: np.float32(len(names)), jax.ShapeDtypeStruct((), np.float32), held)
    return scale * jnp.sum(trained.params**2)


def found():
    traced, consts, _ = closure_convert(jax.value_and_grad(objective), jnp.float32(0.1), jax.random.key(0))
    return digest(traced.jaxpr, consts)
"""


def test_the_digest_is_the_same_in_another_process_and_file(tmp_path):
    here: dict = {}
    exec(compile(SOURCE, "elsewhere.py", "exec"), here)
    script = tmp_path / "other.py"
    script.write_text("\n\n# moved\n" + SOURCE + "\nprint(found())\n")
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONPATH": os.fspath(ROOT), "PYTHONHASHSEED": seed}
    there = subprocess.run(
        [sys.executable, os.fspath(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert here["found"]() == there.stdout.strip() == here["found"]()


def traced(function):
    hoisted, consts, _ = closure_convert(function, jnp.ones(3))
    return digest(hoisted.jaxpr, consts)


class Factor:
    def __init__(self, number):
        self.number = number

    def __float__(self):
        return float(self.number)


def called(number):
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    return lambda x: jax.pure_callback(lambda x: x * np.float32(number), shape, x)


DATA = np.arange(3, dtype=np.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + DATA, lambda x: x + 2 * DATA),
        (lambda x: x + DATA, lambda x: DATA - x),
        (lambda x: x[::-1], lambda x: x),
        (jnp.sin, jnp.cos),
        (jnp.sum, lambda x: jnp.sum(x, keepdims=True)),
        (jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)),
        (lambda x: jax.lax.map(lambda y: y * 2, x), lambda x: jax.lax.map(lambda y: y * 3, x)),
        (
            lambda x: jax.lax.cond(x[0] > 0, lambda: x, lambda: 2 * x),
            lambda x: jax.lax.cond(x[0] > 0, lambda: x, lambda: 3 * x),
        ),
        (called(1), called(2)),
        (called(Factor(1)), called(Factor(2))),
        (called(jax.jit(lambda: 1)), called(jax.jit(lambda: 2))),
    ],
)
def test_other_functions_have_other_digests(one, other):
    assert traced(one) != traced(other)
    assert traced(one) == traced(one)


def test_equal_functions_have_equal_digests():
    def named(y):
        return jax.jit(lambda z: z * 2)(y) + DATA.copy()

    assert traced(named) == traced(lambda x: jax.jit(lambda y: y * 2)(x) + DATA)
    assert traced(called(1)) == traced(called(1))

    def watched(x):
        jax.debug.callback(print, x)
        return x + 1

    assert traced(watched) == traced(lambda x: x + 1)


def test_parts_do_not_run_together():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest([1], [2]) != digest([1, 2])
    assert digest(np.float32(1)) != digest(np.float64(1))
    assert digest(np.zeros((2, 3))) != digest(np.zeros((3, 2)))
    assert digest(jax.random.key(0)) != digest(jax.random.key(1))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_what_contains_itself_has_a_digest():
    def recursive(n):
        return recursive(n - 1)

    round_and_round = [1]
    round_and_round.append(round_and_round)
    assert digest(recursive) == digest(recursive)
    assert digest(round_and_round) != digest([1, []])
