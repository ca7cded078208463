"""A step in parts: one after the other, on several devices, or in several processes, to the same bits.

The batch of a step is cut into ``V`` parts.  Every part is evaluated by the same small program, and what it
finds is added up by `hypergrad.sums`, whose bits do not depend on the order.  So a run is the same wherever
its parts are evaluated, and takes the memory of one part on each device.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from hypergrad import sums
from hypergrad._base.checks import is_whole
from hypergrad._base.compiler import same_bits_everywhere
from hypergrad._base.trees import Flag, PyTree, Scalar, Step, of_real_parts, real_parts
from hypergrad.bundles import bundles, joined, parted

# From a part of the batch and what all parts have in common: what is averaged over the parts, and what is
# put side by side.
Evaluate = Callable[[list[Array], PyTree], tuple[list[Array], list[Array]]]


@dataclass(frozen=True)
class Shards:
    """How the batch of a step is cut, and where its parts are evaluated.

    ``loss = 1/V Σ_i loss(params, meta, part_i)``, whose gradient and second derivatives are summed exactly:
    the run has the same bits on any number of devices that ``V`` is a multiple of, and on a single one.

    Args:
      count: ``V``, parts of a batch, 1 to 256.
      over: names of the axes of the mesh over which the parts are spread, one or several; the mesh is that
        of ``jax.set_mesh``.  None for one part after the other on every device that takes part.

    Raises:
      ValueError: the number of parts is no whole number in that range.
      TypeError: the axes are not names.

    >>> import hypergrad as hg
    >>> hg.Shards(8, over="data")
    Shards(count=8, over=('data',))
    """

    count: int
    over: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.count) or self.count > sums.MOST:
            raise ValueError(
                f"Shards({self.count!r}): the number of parts is a whole number from 1 to {sums.MOST}; "
                "take larger parts, or means over microbatches inside the loss (hypergrad.accumulated)"
            )
        over = (self.over,) if isinstance(self.over, str) else self.over
        if over is not None and not _are_names(over):
            raise TypeError(
                f"Shards({self.count}, over={self.over!r}): over takes names of axes of the mesh, such as "
                '"data", or None'
            )
        object.__setattr__(self, "over", None if over is None else tuple(over))

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes over which the parts are spread."""
        return () if self.over is None else tuple(self.over)

    def without_mesh(self) -> AbstractContextManager[Any]:
        """The context in which a part is traced and evaluated: that of a program for one device."""
        if self.over is None:
            return nullcontext()
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))

    def numbers(self) -> Int32[Array, " parts"]:
        """The numbers of the parts."""
        return jnp.arange(self.count, dtype=jnp.int32)

    def cut(self, batch: Sequence[Array]) -> list[Array]:
        """The arrays of a batch, ``(n, ...)``, as parts ``(V, n / V, ...)``; without scalars."""
        return [x.reshape(self.count, -1, *x.shape[1:]) for x in batch if x.ndim]

    def mean(self, loss: Callable[[list[Array]], Array], batch: Sequence[Array]) -> Scalar:
        """The mean of a loss over the parts, one after the other, as JAX differentiates it."""
        scalars = [x for x in batch if not x.ndim]

        @jax.checkpoint
        def of_part(at: tuple[Step, list[Array]]) -> Array:
            return loss(_part(batch, scalars, *at))

        return jnp.mean(jax.lax.map(of_part, (self.numbers(), self.cut(batch))))

    def evaluate(
        self, always_true: Flag, function: Evaluate, batch: Sequence[Array], same: PyTree
    ) -> tuple[list[Array], list[Array]]:
        """Evaluate a function of every part, to the same bits wherever the parts are.

        Args:
          always_true: see `hypergrad._base.compiler`.
          function: from a part and what all parts have in common to what is averaged and what is put side
            by side.  It closes over no arrays.
          batch: the whole batch, flat.
          same: what all parts have in common.

        Returns:
          The averages, ``1/V Σ_i``, and what is put side by side, ``(V, ...)``.  If numbers were lost or
          changed on the way between devices, the averages are NaN.
        """
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in batch]
        scalars = [x for x in batch if not x.ndim]

        def of_part(number: Step, cut: list[Array], scalars: list[Array], same: PyTree) -> Any:
            with self.without_mesh():
                return function(_part(shapes, scalars, number, cut), same)

        given = (always_true, (self.numbers(), self.cut(batch)), scalars, same)
        found, _ = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], given[1]), *given[2:])
        rows = _Rows(jax.eval_shape(_real, found))

        def of_device(always_true: Flag, at: Any, *others: PyTree) -> Any:
            def add(totals: list[sums.Sum], at: Any) -> Any:
                # In isolation, so that a part has the same bits whatever surrounds it.
                found, apart = same_bits_everywhere(always_true, of_part, *at, *others)
                return [sums.add(total, x) for total, x in zip(totals, rows.joined(_real(found)))], apart

            return jax.lax.scan(add, [sums.zero(x) for x in jax.eval_shape(rows.joined, rows.like)], at)

        def of_all(*arguments: PyTree) -> Any:
            totals, apart = of_device(*arguments)
            merged = [sums.merged(total, self.axes) for total in totals]
            return [total for total, _ in merged], [sound for _, sound in merged], apart

        if self.over is None:
            (totals, apart), sound = of_device(*given), None
        else:
            alike, spread = PartitionSpec(), PartitionSpec(self.over)
            totals, sound, apart = jax.shard_map(
                of_all,
                in_specs=(alike, spread, alike, alike),
                out_specs=(alike, alike, spread),
                check_vma=False,
            )(*given)
        means = [sums.value(total, dtype, self.count) for total, dtype in zip(totals, rows.dtypes())]
        if sound is not None:
            means = [jnp.where(ok, x, jnp.nan) for ok, x in zip(sound, means)]
        return _unreal(rows.parted(means), found), apart


class _Rows(NamedTuple):
    """Small arrays laid end to end, so that there are few to be summed.

    Attributes:
      like: the shapes of the arrays.
    """

    like: list[Any]

    def groups(self) -> list[list[int]]:
        """Which arrays lie end to end."""
        return bundles([x.shape for x in self.like], [x.dtype for x in self.like])

    def dtypes(self) -> list[Any]:
        """Of the rows."""
        return [self.like[group[0]].dtype for group in self.groups()]

    def joined(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays end to end; a single one as it is."""
        return [joined([arrays[i] for i in group]) for group in self.groups()]

    def parted(self, rows: Sequence[Array]) -> list[Array]:
        """Undo `joined`."""
        found: dict[int, Array] = {}
        for group, row in zip(self.groups(), rows):
            found |= zip(group, parted(row, [self.like[i].shape for i in group]))
        return [found[i] for i in range(len(self.like))]


def _part(like: Sequence[Any], scalars: Sequence[Array], number: Step, cut: Sequence[Array]) -> list[Array]:
    """One part of a batch.

    Args:
      like: the whole batch, or its shapes.
      scalars: of the batch, which every part gets.  Random keys are folded with the number of the part.
      number: of the part.
      cut: the arrays of this part.
    """
    rest, mine = iter(scalars), iter(cut)
    return [next(mine) if x.ndim else _own(next(rest), number) for x in like]


def _are_names(over: Any) -> bool:
    return isinstance(over, tuple | list) and len(over) > 0 and all(isinstance(axis, str) for axis in over)


def _own(x: Array, number: Step) -> Array:
    """What a part gets of a scalar: the scalar, or a random key of its own."""
    return jax.random.fold_in(x, number) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _real(arrays: Sequence[Array]) -> list[Array]:
    """Arrays, with complex ones as real and imaginary parts."""
    return [part for x in arrays for part in real_parts(x)]


def _unreal(parts: Sequence[Array], like: Sequence[Any]) -> list[Array]:
    """Undo `_real`."""
    rest = iter(parts)
    return [of_real_parts([next(rest) for _ in range(1 + jnp.iscomplexobj(x))]) for x in like]
