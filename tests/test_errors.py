"""Errors from inside compiled code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad._base.errors import ConvergenceError, out_of_memory, raised_inside, readable_errors


def compiled(error):
    def check(x):
        raise error

    shape = jax.ShapeDtypeStruct((), np.float32)
    return jax.jit(lambda x: x + jax.pure_callback(check, shape, x))


class StrangeError(Exception):
    """Of somebody else."""


@pytest.mark.parametrize(
    "error",
    [
        hg.ReversalError("train(steps=3): at step 0 the loss: became\nNaN"),
        ConvergenceError("a residual of 3"),
        KeyboardInterrupt(),
        ZeroDivisionError("1 / 0"),
        ValueError(""),
        MemoryError("too much"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_callbacks_come_out_as_what_they_are(error, caplog):
    with pytest.raises(BaseException) as hidden:
        jax.block_until_ready(compiled(error)(jnp.float32(1)))
    assert type(hidden.value) is jax.errors.JaxRuntimeError
    caplog.clear()
    with pytest.raises(type(error)) as found, readable_errors():
        jax.block_until_ready(compiled(error)(jnp.float32(1)))
    assert type(found.value) is type(error)
    assert str(found.value) == str(error)
    assert isinstance(found.value.__cause__, jax.errors.JaxRuntimeError)
    assert not caplog.records


def test_errors_that_come_with_the_use_of_a_result_are_found_too():
    def check(x):
        raise hg.ReversalError("late")

    program = jax.jit(lambda x: jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), x))
    for use in (float, np.asarray, jax.device_get, jax.block_until_ready):
        with pytest.raises(hg.ReversalError, match="late"), readable_errors():
            use(program(jnp.float32(1)))


@pytest.mark.parametrize("error", [StrangeError("mine"), SystemExit(3), StopIteration("end")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(jax.errors.JaxRuntimeError, match=type(error).__name__), readable_errors():
        jax.block_until_ready(compiled(error)(jnp.float32(1)))
    with pytest.raises(type(error)), readable_errors():
        raise error


def test_errors_of_a_compiled_program_inside_a_callback_are_found():
    inner = compiled(hg.ReversalError("lost"))

    def nested(x):
        return np.asarray(inner(jnp.float32(x)))

    try:
        nested(1.0)
    except jax.errors.JaxRuntimeError as error:
        frames = "Traceback (most recent call last):\n  File, in f\n"
        text = f"INTERNAL: callback: {frames}JaxRuntimeError: {error}"
    found = raised_inside(jax.errors.JaxRuntimeError(text))
    assert isinstance(found, hg.ReversalError)
    assert str(found) == "lost"


def test_no_error_is_made_up():
    assert raised_inside(jax.errors.JaxRuntimeError("INTERNAL: ValueError: no traceback")) is None
    assert raised_inside(jax.errors.JaxRuntimeError("")) is None


def test_it_decorates():
    @readable_errors()
    def outer(x):
        return jax.block_until_ready(compiled(hg.ReversalError("again"))(x))

    for _ in range(2):
        with pytest.raises(hg.ReversalError, match="again"):
            outer(jnp.float32(1))


def test_running_out_of_memory_is_recognised():
    assert out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    assert not out_of_memory(ValueError("memory"))
