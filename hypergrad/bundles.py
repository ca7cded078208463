"""The exact arithmetic of many arrays at once.

A model has many leaves, and most are small: biases, gains, little matrices.  Treated one by one, each needs
its own instructions and their compilation; laid end to end, they need one set.  Large arrays stay by
themselves, since laying them end to end would copy them.

All functions take and return lists with one entry for each array.  ``always_true`` is explained in
`hypergrad._base.compiler`.
"""

import math
import typing
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from hypergrad import exact
from hypergrad._base.compiler import computed, in_place, seldom
from hypergrad._base.trees import PyTree
from hypergrad._base.varying import axes_of, cast
from hypergrad.exact import Buffer, Digits, Fixed, Growth, Ratio

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
        return _by_kind(function, [()] * len(lists[0]), always_true, *lists)

    return typing.cast(Function, apart)


@partial(jax.tree_util.register_dataclass, data_fields=["arguments"], meta_fields=["function"])
@dataclass(frozen=True)
class Later:
    """An amount that is evaluated where it is added, in one pass over memory.

    Attributes:
      function: of the arguments, gives the amount, to the same bits wherever it is evaluated.
      arguments: pytrees of arrays.
    """

    function: Callable[..., Array]
    arguments: tuple[PyTree, ...]


def shift(
    always_true: Array, numbers: Sequence[Fixed], amounts: Sequence[Array], tapes: Sequence[Array | None]
) -> list[tuple[Fixed, Array | None, Array]]:
    """`exact.shift` of every number by its amount; numbers with a tape make room on it if they have to.

    Returns:
      The number, its tape, and how many bytes it dropped, int32.
    """
    return _by_kind(_shift, [tape is None for tape in tapes], always_true, numbers, amounts, tapes)


def _shift(
    always_true: Array, numbers: Sequence[Fixed], amounts: Sequence[Array], tapes: Sequence[Any]
) -> list[tuple[Fixed, Any, Array]]:
    """`shift` of numbers that all have a tape or not."""
    words, most = [len(x.low) for x in numbers], 0 if tapes[0] is None else exact.MOST_BYTES
    with jax.enable_x64(True):
        exponents, parts, tops, sizes = _of_shift(numbers, amounts)
        added, largest = _in_units(parts, sizes)
        room, enough = exact.room_as_is(tops, exponents[0], added, largest)
        enough &= (exponents[0] < exact.UNSET) | (added <= exact.NOTHING)

        def made(highs: list[Array], exponents: Any, parts: Any, tops: Array, sizes: list[Array]) -> Any:
            exponents, parts = _fitted(exponents, parts, tops, sizes, words)
            tops = jnp.stack([exact.magnitude(x) for x in highs])
            return exponents, parts, exact.room_made(tops, exponents, *_in_units(parts, sizes), most)

        # The bound of a sum is the sum of bounds: only where that is too large, numbers are looked at.
        as_is = exponents, parts, room
        given = [x.high for x in numbers], exponents, parts, tops, sizes
        exponents, parts, (drop, tops) = seldom(~jnp.all(enough), made, as_is, *given)
        numbers = _with_exponents(numbers, exponents, parts, tops)
        if most:
            numbers, tapes = _dropped(numbers, tapes, drop)
    moved = _added(always_true, exact.plus, numbers, amounts)
    return [(number, tape, drop[i]) for i, (number, tape) in enumerate(zip(moved, tapes))]


def _of_shift(numbers: Sequence[Fixed], amounts: Sequence[Array]) -> tuple[Any, Any, Array, list[Array]]:
    """Exponents and floors, parts and bounds of numbers, and the `exact.size` of what is added to each."""
    exponents = _exponents(numbers), jnp.stack([x.floor for x in numbers])
    tops, parts = jnp.stack([x.top for x in numbers]), [x.parts for x in numbers]
    return exponents, parts, tops, [exact.size(x, each is not None) for x, each in zip(amounts, parts)]


def _fitted(
    exponents: exact.Exponents,
    parts: Sequence[exact.Parts | None],
    tops: Array,
    sizes: Sequence[Array],
    words: Sequence[int],
) -> tuple[exact.Exponents, list[exact.Parts | None]]:
    """Exponents and parts of arrays, chosen for those that are all zero so far; see `exact.fitted`."""
    exponents = exact.fitted(exponents, tops, jnp.stack([jnp.max(x) for x in sizes]), words)
    found = [*parts]
    for i, each in enumerate(parts):
        if each is not None:
            found[i] = exact.with_offsets(each, (exponents[0][i], exponents[1][i]), sizes[i], words[i])
    return exponents, found


def _with_exponents(
    numbers: Sequence[Fixed], exponents: exact.Exponents, parts: Sequence[exact.Parts | None], tops: Array
) -> list[Fixed]:
    """Numbers with other exponents and floors, parts and bounds."""
    return [
        x._replace(exponent=exponents[0][i], floor=exponents[1][i], top=tops[i], parts=parts[i])
        for i, x in enumerate(numbers)
    ]


@_by_axes
def rounded(always_true: Array, zeros: Sequence[Fixed], amounts: Sequence[Array]) -> list[Fixed]:
    """`shift` of numbers that are all zero: amounts as numbers, with exponents that suit them."""
    with jax.enable_x64(True):
        exponents, parts, tops, sizes = _of_shift(zeros, amounts)
        exponents, parts = _fitted(exponents, parts, tops, sizes, [len(x.low) for x in zeros])
        room = exact.room_made(tops, exponents, *_in_units(parts, sizes), most=0)
        return _added(always_true, exact.plus, _with_exponents(zeros, exponents, parts, room.top), amounts)


@_by_axes
def rounded_like(always_true: Array, numbers: Sequence[Fixed], amounts: Sequence[Array]) -> list[Fixed]:
    """Amounts as numbers, with the exponents of others."""
    zeros = [exact.with_digits(x, jax.tree.map(jnp.zeros_like, x[:2])) for x in numbers]
    return _added(always_true, exact.plus, zeros, amounts)


def _in_units(parts: Sequence[exact.Parts | None], sizes: Sequence[Array]) -> tuple[Array, Array]:
    """The sizes of what is added to arrays, in units of ``2**-e``, and how large ``e`` may be.

    Args:
      parts: of the arrays.
      sizes: of what is added, of the array, or by row if it has parts.
    """
    found, most = [], []
    for each, size in zip(parts, sizes):
        offset = jnp.int32(0)
        if each is not None:
            size = jnp.max(exact.size_in_units(each, size))
            offset = jnp.max(each.offset, initial=0)
        found.append(size)
        most.append(exact.LARGEST_RADIX - offset)
    return jnp.stack(found), exact.BIT * jnp.stack(most).astype(jnp.int64)


def unshift(
    always_true: Array,
    numbers: Sequence[Fixed],
    amounts: Sequence[Array | Later],
    tapes: Sequence[Array | None],
    drops: Sequence[Array],
) -> list[Fixed]:
    """Undo `shift`.

    Args:
      always_true: see `hypergrad._base.compiler`.
      numbers: after the shift.
      amounts: as given to `shift`, or to be evaluated later.
      tapes: of the numbers that have one.
      drops: how many bytes each number dropped.
    """
    kinds = [tape is None for tape in tapes]
    return _by_kind(_unshift, kinds, always_true, numbers, amounts, tapes, drops)


def _unshift(
    always_true: Array,
    numbers: Sequence[Fixed],
    amounts: Sequence[Array | Later],
    tapes: Sequence[Any],
    drops: Sequence[Array],
) -> list[Fixed]:
    before = _added(always_true, exact.minus, numbers, amounts)
    return before if tapes[0] is None else _regained(before, tapes, jnp.stack(drops))


def _dropped(
    numbers: Sequence[Fixed], tapes: Sequence[Array], drop: Array
) -> tuple[list[Fixed], list[Array]]:
    """Numbers without the bytes that they drop, which are the next rows of their tapes."""

    def one(count: Array, state: Any) -> Any:
        result = []
        for (digits, row, tape), most in zip(state, drop):
            shorter, byte = exact.dropped(digits)
            there = jax.lax.dynamic_index_in_dim(tape, row, axis=0, keepdims=False)
            new, byte = _where(count < most, ((shorter, row + 1), byte), ((digits, row), there), len(state))
            result.append((*new, jax.lax.dynamic_update_index_in_dim(tape, byte, row, axis=0)))
        return result

    state = [(x[:2], x.rows, tape) for x, tape in zip(numbers, tapes)]
    state = jax.lax.fori_loop(0, jnp.max(drop), one, cast(state, axes_of((state, drop))))
    gone = 8 * exact.BIT * drop.astype(jnp.int64)
    left = [
        exact.with_digits(x, digits)._replace(exponent=x.exponent - gone[i], rows=rows)
        for i, (x, (digits, rows, _)) in enumerate(zip(numbers, state))
    ]
    return left, [tape for _, _, tape in state]


def _regained(numbers: Sequence[Fixed], tapes: Sequence[Array], drop: Array) -> list[Fixed]:
    """Undo `_dropped`."""

    def one(count: Array, state: Any) -> Any:
        result = []
        for (digits, row), tape, most in zip(state, tapes, drop):
            byte = jax.lax.dynamic_index_in_dim(tape, row - 1, axis=0, keepdims=False)
            longer = exact.regained(digits, byte)
            result.append(_where(count < most, (longer, row - 1), (digits, row), len(state)))
        return result

    with jax.enable_x64(True):
        state = [(x[:2], x.rows) for x in numbers]
        state = jax.lax.fori_loop(0, jnp.max(drop), one, cast(state, axes_of((state, tapes, drop))))
        gone = 8 * exact.BIT * drop.astype(jnp.int64)
        return [
            exact.with_digits(x, digits)._replace(exponent=x.exponent + gone[i], rows=rows)
            for i, (x, (digits, rows)) in enumerate(zip(numbers, state))
        ]


def _where(wanted: Array, new: PyTree, old: PyTree, arrays: int) -> PyTree:
    """The new state of one of so many arrays if that is wanted; of a single one it always is."""
    return new if arrays == 1 else jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new, old)


def _by_kind(
    function: Callable[..., list[Any]], kinds: Sequence[Hashable], always_true: Array, *lists: Sequence[Any]
) -> list[Any]:
    """A function of the arrays of one kind at a time that vary over the same mesh axes."""
    kinds = [(kind, axes_of(each)) for kind, each in zip(kinds, zip(*lists))]
    result: dict[int, Any] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        result |= zip(places, function(always_true, *([each[i] for i in places] for each in lists)))
    return [result[i] for i in range(len(kinds))]


def _added(
    always_true: Array,
    move: Callable[[Digits, Array, Array], Digits],
    numbers: Sequence[Fixed],
    amounts: Sequence[Array | Later],
) -> list[Fixed]:
    """`exact.plus` or `exact.minus` of every amount."""
    result, up = [*numbers], scales(numbers, 1)
    kinds: list[Hashable] = [
        (Later, i) if isinstance(x, Later) else (x.dtype, len(number.low), i if up[i].ndim else -1)
        for i, (x, number) in enumerate(zip(amounts, numbers))
    ]
    for bundle in bundles([x.high.shape for x in numbers], kinds):
        digits, shapes = [numbers[i][:2] for i in bundle], [numbers[i].high.shape for i in bundle]
        later = amounts[bundle[0]]
        if not isinstance(later, Later):
            later = Later(jnp.asarray, (joined([jnp.asarray(amounts[i]) for i in bundle]),))

        def moved(digits: Digits, up: Array, *given: PyTree, amount: Any = later.function) -> Digits:
            return move(digits, amount(*given), up)

        up_here = _repeated([up[i] for i in bundle], shapes)
        new = in_place(always_true, moved, _together(digits), up_here, *later.arguments)
        for i, each in zip(bundle, _apart(new, shapes)):
            result[i] = exact.with_digits(numbers[i], each)
    return result


def _exponents(numbers: Sequence[Fixed]) -> Array:
    """The exponents of numbers, as one array."""
    with jax.enable_x64(True):
        return jnp.stack([x.exponent for x in numbers])


def scales(numbers: Sequence[Fixed], sign: int) -> list[Array]:
    """``2**(sign e)`` of every number, or of each of its parts."""
    return _powers(_exponents(numbers), [x.parts for x in numbers], sign)


def _powers(exponents: Array, parts: Sequence[exact.Parts | None], sign: int) -> list[Array]:
    """`scales` of numbers with these exponents."""
    with jax.enable_x64(True):
        powers = exact.power(sign * exponents)
    return [exact.raised(x, powers[i], sign) for i, x in enumerate(parts)]


@_by_axes
def scale_whole(always_true: Array, numbers: Sequence[Fixed], ns: Sequence[Array]) -> list[Fixed]:
    """Multiply every number by one ratio, ``n / 2**32``: only exponents change."""
    with jax.enable_x64(True):
        exponents = exact.lowered(_exponents(numbers), computed(always_true, exact.decay, jnp.stack(ns)))
        return [x._replace(exponent=exponents[i]) for i, x in enumerate(numbers)]


@_by_axes
def unscale_whole(always_true: Array, numbers: Sequence[Fixed], ns: Sequence[Array]) -> list[Fixed]:
    """Undo `scale_whole`."""
    with jax.enable_x64(True):
        exponents = exact.lowered(_exponents(numbers), -computed(always_true, exact.decay, jnp.stack(ns)))
        return [x._replace(exponent=exponents[i]) for i, x in enumerate(numbers)]


@_by_axes
def scale(
    always_true: Array,
    numbers: Sequence[Fixed],
    buffers: Sequence[Buffer],
    tapes: Sequence[Array],
    ns: Sequence[Array],
) -> list[tuple[Fixed, Buffer, Array]]:
    """`exact.scale` of every number by its numerator: the number, the buffer and the tape after it."""

    def scaled(state: tuple[Digits, Array, Array], ratio: Ratio) -> tuple[Digits, Array, Array]:
        return exact.scaled(*state[:2], ratio)

    grown = _growths(always_true, buffers, ns, undo=False)
    result = [*zip(numbers, buffers, tapes)]
    for bundle in _scaled_alike(numbers, buffers):
        before, shapes = [numbers[i][:2] for i in bundle], [numbers[i].high.shape for i in bundle]
        ratio = _repeated([grown[i].ratio for i in bundle], shapes)
        register = joined([buffers[i].register for i in bundle])
        state = (_together(before), register, jnp.zeros(register.shape, jnp.uint8))
        digits, register, byte = in_place(always_true, scaled, state, ratio)
        parts = zip(_apart(digits, shapes), parted(register, shapes), parted(byte, shapes))
        for i, state in zip(bundle, parts):
            tape = exact.written(tapes[i], state[2], grown[i].ratio.full, grown[i].before)
            result[i] = (exact.with_digits(numbers[i], state[0]), Buffer(state[1], grown[i].after), tape)
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

    def unscaled(state: tuple[Digits, Array], byte: Array, ratio: Ratio) -> tuple[Digits, Array]:
        return exact.unscaled(*state, byte, ratio)

    grown = _growths(always_true, buffers, ns, undo=True)
    result = [*zip(numbers, buffers)]
    for bundle in _scaled_alike(numbers, buffers):
        after, shapes = [numbers[i][:2] for i in bundle], [numbers[i].high.shape for i in bundle]
        ratio = _repeated([grown[i].ratio for i in bundle], shapes)
        register = joined([buffers[i].register for i in bundle])
        rows = [(tapes[i], grown[i].ratio.full, grown[i].before) for i in bundle]
        byte = joined([exact.read(*row, shape) for row, shape in zip(rows, shapes)])
        digits, register = in_place(always_true, unscaled, (_together(after), register), byte, ratio)
        for i, x, held in zip(bundle, _apart(digits, shapes), parted(register, shapes)):
            result[i] = (exact.with_digits(numbers[i], x), Buffer(held, grown[i].before))
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


def _scaled_alike(numbers: Sequence[Fixed], buffers: Sequence[Buffer]) -> list[list[int]]:
    """`bundles` for scales: arrays with a factor for every element stay by themselves."""
    kinds = [(i if b.bits.ndim else -1, len(x.low)) for i, (x, b) in enumerate(zip(numbers, buffers))]
    return bundles([buffer.register.shape for buffer in buffers], kinds)


@_by_axes
def floats(always_true: Array, numbers: Sequence[Fixed], dtypes: Sequence[Any]) -> list[Array]:
    """`exact.to_float` of every number in its dtype."""
    result: dict[int, Array] = {}
    shapes = [number.high.shape for number in numbers]
    down = scales(numbers, -1)
    kinds = [(dtypes[i], len(x.low), i if down[i].ndim else -1) for i, x in enumerate(numbers)]
    for bundle in bundles(shapes, kinds):

        def converted(digits: Digits, down: Array, dtype: Any = dtypes[bundle[0]]) -> Array:
            return exact.float_of(digits, down, dtype)

        given = (
            _together([numbers[i][:2] for i in bundle]),
            _repeated([down[i] for i in bundle], [shapes[i] for i in bundle]),
        )
        row = converted(*given) if len(bundle) == 1 else computed(always_true, converted, *given)
        result |= zip(bundle, parted(row, [shapes[i] for i in bundle]))
    return [result[i] for i in range(len(numbers))]


def coarseness(numbers: Sequence[Fixed], amounts: Sequence[Array], part: float) -> list[Array]:
    """`exact.coarseness` of adding amounts to numbers, summed over the rows of every array.

    Args:
      numbers: to which the amounts are added.
      amounts: as given to `shift`.
      part: of an amount that rounding may take.

    Returns:
      float64 sums, by row, of every array.
    """
    words, parts = [len(number.low) for number in numbers], [number.parts for number in numbers]
    return _lost(words, part, amounts, _exponents(numbers), parts)


def _lost(
    words: Sequence[int],
    part: float,
    amounts: Sequence[Array],
    exponents: Array,
    parts: Sequence[exact.Parts | None],
) -> list[Array]:
    """`coarseness` of adding amounts to numbers of so many low words, with these exponents and parts."""
    with jax.enable_x64(True):
        down = _powers(exponents, parts, -1)
        found = [exact.coarseness(*each, part) for each in zip(down, words, amounts)]
        return [_by_row(x).astype(jnp.float64) for x in found]


def coarseness_so_far(
    wanted: Array,
    totals: Sequence[Array],
    left: Sequence[Array] | None,
    numbers: Sequence[Fixed],
    amounts: Sequence[Array],
    part: float,
) -> list[Array]:
    """Totals of `coarseness` with that of one more shift.

    Args:
      wanted: bool scalar; if false, the totals are returned without computing anything.
      totals: the sums so far.
      left: the part of each total that is left, float64 scalars; None if all is.
      numbers: to which the amounts are added.
      amounts: as given to `shift`.
      part: of an amount that rounding may take.
    """
    words, parts = [len(number.low) for number in numbers], [number.parts for number in numbers]

    def more(totals: list[Array], left: list[Array] | None, *given: Any) -> list[Array]:
        kept = totals if left is None else [x * part for x, part in zip(totals, left)]
        return [x + y for x, y in zip(kept, _lost(words, part, *given))]

    with jax.enable_x64(True):
        given = ([*amounts], _exponents(numbers), parts)
        return seldom(wanted, more, [*totals], [*totals], left, *given)


def matters(
    coarse: Sequence[Array], numbers: Sequence[Fixed], part: float, steps: int
) -> tuple[Array, Array]:
    """Whether the shifts of each array were too coarse, in sum, for the size of its numbers.

    They were not if ``2**-30`` of the number at every step would be as much: then the loss is negligible.

    Args:
      coarse: sums of `coarseness` over the run so far, by row, of every array.
      numbers: the arrays as they are now.
      part: as given to `coarseness`.
      steps: of the run.

    Returns:
      bool, one for each array; and int32, of which part the first such row is, -1 if there are no parts.
    """
    with jax.enable_x64(True):
        sizes = [_by_row(jnp.abs(exact.to_float(x, jnp.float64))) for x in numbers]
        found = [c > part * NEGLIGIBLE * steps * size for c, size in zip(coarse, sizes)]
        owners = []
        for flags, x in zip(found, numbers):
            row = jax.lax.argmax(flags, 0, jnp.int32) if flags.size else jnp.int32(0)
            sums = max(1, flags.size)
            owners.append(jnp.int32(-1) if x.parts is None else x.parts.owner[row * len(x.high) // sums])
        return jnp.stack([jnp.any(flags) for flags in found]), jnp.stack(owners)


def _by_row(x: Array) -> Array:
    """Sums over the rows of an array, all axes but the first; or over `ROWS` parts if rows are narrow."""
    rows = x.shape[0] if x.ndim else 1
    if x.size <= ROWS:
        return x.ravel()
    if x.size >= WIDTH * rows:
        return jnp.sum(x.reshape(rows, -1), axis=1)
    return jnp.sum(jnp.pad(x.ravel(), (0, -x.size % ROWS)).reshape(ROWS, -1), axis=1)


def _together(numbers: Sequence[Digits]) -> Digits:
    """Words of numbers end to end."""
    low = tuple(joined(words) for words in zip(*(low for _, low in numbers)))
    return joined([high for high, _ in numbers]), low


def _apart(digits: Digits, shapes: Sequence[Shape]) -> list[Digits]:
    """Undo `_together`."""
    low = [*zip(*(parted(word, shapes) for word in digits[1]))] or [()] * len(shapes)
    return [*zip(parted(digits[0], shapes), low)]


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
