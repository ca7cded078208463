"""The exact arithmetic of many arrays at once.

A model has many leaves, and most are small: biases, gains, little matrices.  Treated one by one, each needs
its own instructions and their compilation; laid end to end, they need one set.  Large arrays stay by
themselves, since laying them end to end would copy them.

All functions take and return lists with one entry for each array.  All numbers in a list have the same
number of low words.  ``always_true`` is explained in `hypergrad._base.compiler`.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import exact
from hypergrad._base.compiler import computed, in_place
from hypergrad._base.varying import axes_of
from hypergrad.exact import Buffer, Fixed, Growth, Ratio

SMALL = 1 << 14  # arrays with fewer elements are not worth a computation of their own
LARGEST = 1 << 18  # most elements of a bundle, which are copied at a time
NEGLIGIBLE = 2.0**-30  # a part of a number that does not matter at one step
ROWS = 256  # how many sums are kept of an array with many narrow rows
WIDTH = 16  # narrowest row that gets a sum of its own

Shape = tuple[int, ...]


def bundles(shapes: Sequence[Shape], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Which arrays to lay end to end: lists of indices that together hold every index once.

    Args:
      shapes: of the arrays.
      kinds: of the arrays; only arrays of one kind are laid end to end.

    >>> from hypergrad.bundles import bundles
    >>> bundles([(3,), (1000, 1000), (2, 2)], ["float32"] * 3)
    [[0, 2], [1]]
    """
    result: list[list[int]] = []
    filling: dict[Hashable, tuple[list[int], int]] = {}
    for i, (shape, kind) in enumerate(zip(shapes, kinds)):
        size = math.prod(shape)
        bundle, held = filling.get(kind, ([], LARGEST + 1))
        if size >= SMALL or held + size > LARGEST:
            bundle, held = [], 0
            result.append(bundle)
        bundle.append(i)
        if size < SMALL:
            filling[kind] = (bundle, held + size)
    return result


Function = TypeVar("Function", bound=Callable[..., Any])


def _by_axes(function: Function) -> Function:
    """The function of the arrays that vary over the same mesh axes at a time, so that none gets others."""

    @wraps(function)
    def apart(always_true: Array, *lists: Sequence[Any]) -> list[Any]:
        kinds = [axes_of(each) for each in zip(*lists)]
        result: dict[int, Any] = {}
        for kind in dict.fromkeys(kinds):
            places = [i for i, other in enumerate(kinds) if other == kind]
            result |= zip(places, function(always_true, *([each[i] for i in places] for each in lists)))
        return [result[i] for i in range(len(kinds))]

    return cast(Function, apart)


@_by_axes
def shift(always_true: Array, numbers: Sequence[Fixed], amounts: Sequence[Array]) -> list[Fixed]:
    """`exact.shift` of every number by its amount."""

    def fitting(radices: Array, amounts: list[Array]) -> Array:
        largest = jnp.stack([exact.largest(x) for x in amounts])
        return exact.fitted(radices, largest, len(numbers[0].low))

    # If all have their radices, nothing runs and nothing is paid.
    radices = jnp.stack([number.radix for number in numbers])
    radices = in_place(jnp.any(radices == exact.UNSET), fitting, radices, [*amounts])
    settled = [number._replace(radix=radices[i]) for i, number in enumerate(numbers)]
    return _added(always_true, exact.shift_settled, settled, amounts)


@_by_axes
def unshift(always_true: Array, numbers: Sequence[Fixed], amounts: Sequence[Array]) -> list[Fixed]:
    """`exact.unshift` of every number by its amount."""
    return _added(always_true, exact.unshift, numbers, amounts)


def _added(
    always_true: Array,
    move: Callable[[Fixed, Array], Fixed],
    numbers: Sequence[Fixed],
    amounts: Sequence[Array],
) -> list[Fixed]:
    result = [*numbers]
    for bundle in bundles([x.shape for x in amounts], [x.dtype for x in amounts]):
        of_bundle = [numbers[i] for i in bundle]
        moved = in_place(always_true, move, _together(of_bundle), joined([amounts[i] for i in bundle]))
        for i, number in zip(bundle, _apart(moved, of_bundle)):
            result[i] = number
    return result


@_by_axes
def scale(
    always_true: Array,
    numbers: Sequence[Fixed],
    buffers: Sequence[Buffer],
    tapes: Sequence[Array],
    ns: Sequence[Array],
) -> list[tuple[Fixed, Buffer, Array]]:
    """`exact.scale` of every number by its numerator: the number, the buffer and the tape after it."""

    def scaled(state: tuple[Fixed, Array, Array], ratio: Ratio) -> tuple[Fixed, Array, Array]:
        return exact.scaled(*state[:2], ratio)

    grown = _growths(always_true, buffers, ns, undo=False)
    result = [*zip(numbers, buffers, tapes)]
    for bundle in _scaled_alike(buffers):
        before, shapes = [numbers[i] for i in bundle], [numbers[i].high.shape for i in bundle]
        ratio = _repeated([grown[i].ratio for i in bundle], shapes)
        register = joined([buffers[i].register for i in bundle])
        state = (_together(before), register, jnp.zeros(register.shape, jnp.uint8))
        number, register, byte = in_place(always_true, scaled, state, ratio)
        parts = zip(_apart(number, before), parted(register, shapes), parted(byte, shapes))
        for i, state in zip(bundle, parts):
            tape = exact.written(tapes[i], state[2], grown[i].ratio.full, grown[i].before)
            result[i] = (state[0], Buffer(state[1], grown[i].after), tape)
    return result


@_by_axes
def unscale(
    always_true: Array,
    numbers: Sequence[Fixed],
    buffers: Sequence[Buffer],
    tapes: Sequence[Array],
    ns: Sequence[Array],
) -> list[tuple[Fixed, Buffer]]:
    """`exact.unscale` of every number by its numerator: the number and the buffer before it."""

    def unscaled(state: tuple[Fixed, Array], byte: Array, ratio: Ratio) -> tuple[Fixed, Array]:
        return exact.unscaled(*state, byte, ratio)

    grown = _growths(always_true, buffers, ns, undo=True)
    result = [*zip(numbers, buffers)]
    for bundle in _scaled_alike(buffers):
        after, shapes = [numbers[i] for i in bundle], [numbers[i].high.shape for i in bundle]
        ratio = _repeated([grown[i].ratio for i in bundle], shapes)
        register = joined([buffers[i].register for i in bundle])
        rows = [(tapes[i], grown[i].ratio.full, grown[i].before) for i in bundle]
        byte = joined([exact.read(*row, shape) for row, shape in zip(rows, shapes)])
        number, register = in_place(always_true, unscaled, (_together(after), register), byte, ratio)
        for i, x, held in zip(bundle, _apart(number, after), parted(register, shapes)):
            result[i] = (x, Buffer(held, grown[i].before))
    return result


def _growths(
    always_true: Array, buffers: Sequence[Buffer], ns: Sequence[Array], undo: bool
) -> list[Growth]:
    """`exact.growth` of every buffer: together if arrays have one factor each, else one by one."""
    result = [exact.growth(b.bits, n, undo) if b.bits.ndim else None for b, n in zip(buffers, ns)]
    whole = [i for i, each in enumerate(result) if each is None]
    if whole:
        with jax.enable_x64(True):
            bits = jnp.stack([buffers[i].bits for i in whole])
            n = jnp.stack([ns[i] for i in whole])
            of_all = computed(always_true, lambda bits, n: exact.growth(bits, n, undo), bits, n)
            for k, i in enumerate(whole):
                result[i] = jax.tree.map(lambda x, k=k: x[k], of_all)
    return [each for each in result if each is not None]


def _scaled_alike(buffers: Sequence[Buffer]) -> list[list[int]]:
    """`bundles` for scales: arrays with a factor for every element stay by themselves."""
    kinds = [i if buffer.bits.ndim else -1 for i, buffer in enumerate(buffers)]
    return bundles([buffer.register.shape for buffer in buffers], kinds)


@_by_axes
def floats(always_true: Array, numbers: Sequence[Fixed], dtypes: Sequence[Any]) -> list[Array]:
    """`exact.to_float` of every number in its dtype."""
    result: dict[int, Array] = {}
    shapes = [number.high.shape for number in numbers]
    for bundle in bundles(shapes, dtypes):

        def converted(number: Fixed, dtype: Any = dtypes[bundle[0]]) -> Array:
            return exact.to_float(number, dtype)

        together = _together([numbers[i] for i in bundle])
        row = converted(together) if len(bundle) == 1 else computed(always_true, converted, together)
        result |= zip(bundle, parted(row, [shapes[i] for i in bundle]))
    return [result[i] for i in range(len(numbers))]


def coarseness(
    wanted: Array, numbers: Sequence[Fixed], amounts: Sequence[Array], part: float
) -> list[Array]:
    """`exact.coarseness`, summed over the rows of every array.

    Args:
      wanted: bool scalar; if false, zeros are returned without computing anything.
      numbers: to which the amounts are added.
      amounts: as given to `shift`.
      part: of an amount that rounding may take.

    Returns:
      float64 sums, by row, of every array.
    """
    result: dict[int, Array] = {}
    shapes = [x.shape for x in amounts]

    def lost(_: Array, amount: Array, radix: Array) -> Array:
        return exact.coarseness(radix, len(numbers[0].low), amount, part)

    def summed(_: Array, amount: Array, radix: Array) -> Array:
        return _by_row(lost(_, amount, radix))

    for bundle in bundles(shapes, [x.dtype for x in amounts]):
        radices = _repeated([numbers[i].radix for i in bundle], [shapes[i] for i in bundle])
        row = joined([amounts[i] for i in bundle])
        of_one = len(bundle) == 1
        with jax.enable_x64(True):
            like = jax.eval_shape(_by_row, row) if of_one else row
            nothing = jnp.zeros(like.shape, jnp.float64)
            found = in_place(wanted, summed if of_one else lost, nothing, row, radices)
            parts = [found] if of_one else map(_by_row, parted(found, [shapes[i] for i in bundle]))
        result |= zip(bundle, parts)
    return [result[i] for i in range(len(amounts))]


def matters(
    always_true: Array, coarse: Sequence[Array], numbers: Sequence[Fixed], part: float, steps: int
) -> Array:
    """Whether the shifts of each array were too coarse, in sum, for the size of its numbers.

    They were not if ``2**-30`` of the number at every step would be as much: then the loss is negligible.

    Args:
      always_true: see `hypergrad._base.compiler`.
      coarse: sums of `coarseness` over the run so far, by row, of every array.
      numbers: the arrays as they are now.
      part: as given to `coarseness`.
      steps: of the run.

    Returns:
      bool, one for each array.
    """
    with jax.enable_x64(True):
        sizes = [_by_row(jnp.abs(x)) for x in floats(always_true, numbers, [jnp.float64] * len(numbers))]
        found = [jnp.any(c > part * NEGLIGIBLE * steps * size) for c, size in zip(coarse, sizes)]
        return jnp.stack(found)


def _by_row(x: Array) -> Array:
    """Sums over the rows of an array, all axes but the first; or over `ROWS` parts if rows are narrow."""
    rows = x.shape[0] if x.ndim else 1
    if x.size <= ROWS:
        return x.ravel()
    if x.size >= WIDTH * rows:
        return jnp.sum(x.reshape(rows, -1), axis=1)
    return jnp.sum(jnp.pad(x.ravel(), (0, -x.size % ROWS)).reshape(ROWS, -1), axis=1)


def _together(numbers: Sequence[Fixed]) -> Fixed:
    """Numbers end to end, each element with the radix of its array."""
    low = tuple(joined(words) for words in zip(*(x.low for x in numbers)))
    radix = _repeated([x.radix for x in numbers], [x.high.shape for x in numbers])
    return Fixed(joined([x.high for x in numbers]), low, radix)


def _apart(number: Fixed, like: Sequence[Fixed]) -> list[Fixed]:
    """Undo `_together`; shapes and radices are those of ``like``."""
    shapes = [x.high.shape for x in like]
    low = zip(*(parted(word, shapes) for word in number.low))
    return [Fixed(high, words, x.radix) for high, words, x in zip(parted(number.high, shapes), low, like)]


def joined(arrays: Sequence[Array]) -> Array:
    """Arrays of one dtype end to end; a single array as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate([jnp.ravel(x) for x in arrays])


def parted(array: Array, shapes: Sequence[Shape]) -> list[Array]:
    """Undo `joined`."""
    if len(shapes) == 1:
        return [array]
    result, end = [], 0
    for shape in shapes:
        start, end = end, end + math.prod(shape)
        result.append(jax.lax.slice(array, [start], [end]).reshape(shape))
    return result


def _repeated(values: Sequence[Any], shapes: Sequence[Shape]) -> Any:
    """Scalars to go with `joined` arrays of these shapes: those of each array for all its elements."""

    def repeat(*scalars: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(x, (math.prod(s),)) for x, s in zip(scalars, shapes)])

    return values[0] if len(values) == 1 else jax.tree.map(repeat, *values)
