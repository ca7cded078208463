"""The benchmark of a large model, compiled but never run."""

import math
from typing import Any

import jax
import pytest

from benchmarks import large

ACCOUNT = """BufferAssignment:
allocation 0: size 64, output shape is |f32[16]|, maybe-live-out:
 value: <1 add @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 6208, preallocated-temp:
 value: <2 copy.1 @0> (size=4096,offset=64): f32[32,32]{1,0}
 value: <3 dot @0> (size=4096,offset=64): f32[32,32]{1,0:T(8,128)}
 value: <4 copy.2 @0> (size=2048,offset=4160): s64[256]{0}
 value: <5 while{1} (phi) @0> (size=1024,offset=4160): f32[256]{0}
 value: <6 tuple.4{} @0> (size=40,offset=0): (s32[], f32[32,32]{1,0})
allocation 2: size 4, constant:
 value: <7 constant @0> (size=9999,offset=0): s32[]
"""


def test_buffers_are_read_from_the_account() -> None:
    first, second = large.buffers(ACCOUNT)
    assert first == {"bytes": 4096, "shapes": ["f32[32,32]"], "values": ["dot", "copy.1"]}
    assert second == {"bytes": 2048, "shapes": ["s64[256]"], "values": ["copy.2"]}
    assert large.buffers("") == []
    row = {"contestant": "x", "steps": 2, "parameters": 1024, "buffers": [first, first, second]}
    assert large.largest(row, 1).splitlines()[1] == "    8.00 bytes per parameter:   2 x f32[32,32]"


def test_model_has_the_parameters_of_gpt2() -> None:
    _, params, *_ = large.shapes(large.Model(), 1)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == pytest.approx(124.4e6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", large.CONTESTANTS)
def test_contestants_are_differentiated(name: str) -> None:
    steps = 5
    arguments = large.shapes(large.TINY, steps)
    found: Any = jax.eval_shape(large.hypergradient(large.TINY, large.CONTESTANTS[name]), *arguments)
    assert found[0].shape == (steps,) and jax.tree.structure(found[1]) == jax.tree.structure(arguments[1])


@pytest.mark.slow
def test_the_command_reports(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    (row,) = large.main(["--fast", "--steps", "2", "--output", str(tmp_path)])
    assert row["temp_bytes"] > row["parameters"] * 4 * 3  # weights, two averages
    assert "the largest buffers" in capsys.readouterr().out
    assert len(list(tmp_path.glob("large-*.json"))) == 1
