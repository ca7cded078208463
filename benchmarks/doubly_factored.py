"""Time of the inverse of a large layer's Fisher matrix, doubly factored, beside that of the plain factors.

The layer is the first fully connected one of AlexNet, 9216 by 4096, whose inputs are 256 channels of 6 by 6
places: factors of widths 256, 36 and 4096 in the place of 9217 and 4096.  Timed is what K-FAC does at a
refresh: damping, inversion of all factors, and their product with a gradient.  Times are the best of a few
calls of the compiled function.

    python -m benchmarks.doubly_factored            # the plain one from the time of its smaller factor
    python -m benchmarks.doubly_factored --plain    # the plain one too: some 4 GiB, minutes
    python -m benchmarks.doubly_factored --fast     # a small layer, in seconds

Source: Ba, Grosse, Martens, "Distributed second-order optimization using Kronecker-factored
approximations", ICLR 2017.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad.optimizers.kfac.damping import damped, inverse, precondition


@dataclass(frozen=True)
class Config:
    """The layer, and what is timed."""

    rows: int = 256
    columns: int = 36
    outputs: int = 4096
    repeats: int = 2
    plain: bool = False  # whether the plain factors are inverted too


def factor(key: Array, width: int) -> Array:
    """The second moment of as many normal vectors as they are wide."""
    x = jax.random.normal(key, (width, width))
    return x.T @ x / width


def problem(widths: Sequence[int]) -> tuple[list[Array], Array]:
    """Factors of these widths, and a gradient."""
    *keys, last = jax.random.split(jax.random.key(0), len(widths) + 1)
    return [factor(*each) for each in zip(keys, widths)], jax.random.normal(last, tuple(widths))


def refresh(factors: Sequence[Array], gradient: Array) -> Array:
    """The gradient, preconditioned by the inverses of the damped factors."""
    with_damping = damped(factors, jnp.float32(1e-2), jnp.float32(1))
    return precondition([inverse(x) for x in with_damping], gradient)


def seconds(function: Callable[..., Any], arguments: Sequence[Any], repeats: int) -> float:
    """The best of some calls, after one that compiles."""
    compiled, times = jax.jit(function), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(config: Config) -> dict[str, float]:
    """Run, print and return seconds."""
    doubly = (config.rows, config.columns, config.outputs)
    plain = (config.rows * config.columns + 1, config.outputs)
    results = {"doubly factored": seconds(refresh, problem(doubly), config.repeats)}
    if config.plain:
        results["plain"] = seconds(refresh, problem(plain), config.repeats)
        how = "measured"
    else:
        of_outputs = seconds(inverse, [factor(jax.random.key(1), config.outputs)], config.repeats)
        results["plain"] = of_outputs * (1 + (plain[0] / config.outputs) ** 3)
        how = "inverses only, by the cube of the widths"
    for name, widths, about in (("doubly factored", doubly, "measured"), ("plain", plain, how)):
        numbers = sum(width**2 for width in widths)
        size = " x ".join(map(str, widths))
        print(
            f"{name:<16} {size:<18} {4 * numbers / 2**20:7.1f} MiB of factors "
            f"{results[name]:8.2f} s ({about})"
        )
    ratio = results["plain"] / results["doubly factored"]
    print(f"a refresh takes the plain factors {ratio:.1f} times as long")
    return results


def command(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doubly_factored", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--fast", action="store_true", help="a small layer, to see that it runs")
    parser.add_argument("--plain", action="store_true", help="invert the plain factors too")
    given = parser.parse_args(arguments)
    return main(Config(16, 9, 64, plain=True) if given.fast else Config(plain=given.plain))


if __name__ == "__main__":
    command()
