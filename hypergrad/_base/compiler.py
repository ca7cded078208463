"""What the library says to the compiler: which computations to keep apart.

Compilers fuse what is side by side, compute again what is used twice, leave out what goes unused, and
round ``a * b + c`` once where they can.  That changes bits, and costs memory and compile time.  Loops and
conditionals whose number of turns and whose condition the compiler does not know are compiled by
themselves.  So every function below takes ``always_true``, a scalar made from the inputs of the run.

===============  ==============================================================================
`noinline`       Floats get the same bits wherever they are computed.  Without it, a fused
                 ``a * b + c`` is rounded once, and twice where the product is used elsewhere too:
                 257 of 1000 random numbers differ, and a run does not return to its start.
`same_bits`      The same, except for arithmetic whose bits do not depend on fusion.
`prevent_dce`    What goes unused is computed all the same.  Without it, the loss, which nobody
                 needs on the way back, is left out, and what remains is compiled differently.
`computed`       What many use is computed once.  Without it, a cheap function of a large array is
                 computed inside each of its users: 8 sines instead of 1.
`seldom`         What is hardly ever wanted is computed only then.  Without it, the range of all
                 integers is looked up at every step and not at every fiftieth.
`compiled_once`  An equal program is not compiled again.  Without it, every call outside of ``jit``
                 compiles both directions of a run, and keeps them in memory.
`in_place`       Integers that change are moved in a computation of their own.  Without it, what is
                 added is computed inside the move, and a run of the authors' of 2015 whose loss
                 explodes does not return to its start.
`hidden`         Numbers that are known when a program is compiled are used like others.
                 Without it, Adam on one device and on two, which is compiled in other ways,
                 differs from the first step on: ``b1`` is folded into one of them only.
`unknown`        Numbers that are known are, like those computed, no part of the instructions.
                 Without it, slices of one array at 300 places are 300 different programs and take
                 4.5 seconds to compile, not 0.3.
`literal`        Operations are made as they are written: ``(a / b) / c`` does not become
                 ``a / (b c)`` in one program and ``(1 / b) a / c`` in another.
===============  ==============================================================================

`same_bits_everywhere` is `noinline` with `literal`.

``tests/test_compiler.py`` tests them, with and without, but for `in_place`; `hidden` and `literal`
need devices, and are tested in ``tests/test_shards.py``.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Var

from hypergrad._base.explicit import on_mesh_of
from hypergrad._base.tracing import bound, evaluated
from hypergrad._base.trees import Flag, PyTree
from hypergrad._base.varying import axes_of, cast, zeros_like


def always_true(*given: PyTree) -> Flag:
    """True, which the compiler cannot know, unless it knows all the arrays that are given."""
    numbers = [x for x in jax.tree.leaves(given) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    firsts = [jax.lax.slice(x, [0] * x.ndim, [1] * x.ndim).reshape(()) for x in numbers]
    return jnp.all(jnp.stack([jnp.asarray(True), *(x * 0 != 1 for x in firsts)]))


@jax.custom_batching.custom_vmap
def in_any_lane(flag: Flag) -> Flag:
    """Whether a flag is true in any lane of `jax.vmap`, which is one flag for all lanes.

    A conditional whose condition differs from lane to lane becomes a choice between what both branches
    compute, and is not kept apart.

    Args:
      flag: bool scalar.
    """
    return flag


@in_any_lane.def_vmap
def _in_any_lane(lanes: int, batched: list[bool], flags: Array) -> tuple[Flag, bool]:
    return in_any_lane(jnp.any(flags, axis=0)), False


def hidden(tree: PyTree) -> PyTree:
    """The same arrays, of which the compiler does not know the numbers.

    Args:
      tree: pytree of arrays.
    """
    return jax.lax.optimization_barrier(tree)


AT_A_TIME = 8  # numbers that `unknown` looks up, each by instructions of its own


def unknown(always_true: Flag, numbers: Sequence[int]) -> list[Array]:
    """Numbers as int32 scalars that no compiler knows, for instructions that are the same for all of them.

    `hidden` constants are put into what uses them, and each that is computed takes a computation of its
    own.  So they are looked up by a loop, a few at each turn, that moves all others on.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      numbers: at most some thousand; the loop makes an eighth as many moves as the square of their number.
    """
    if not numbers:
        return []
    rows = -(-len(numbers) // AT_A_TIME)
    with jax.enable_x64(False):
        table = jnp.asarray(np.resize(np.array(numbers, np.int32), (rows, AT_A_TIME)))

        def turn(k: Array, found: list[Array]) -> list[Array]:
            row = jax.lax.dynamic_index_in_dim(table, k, keepdims=False)
            return [*found[AT_A_TIME:], *(row[j] for j in range(AT_A_TIME))]

        turns = rows * in_any_lane(always_true).astype(jnp.int32)
        blank = [jnp.int32(0)] * (rows * AT_A_TIME)
        return jax.lax.fori_loop(jnp.int32(0), turns, turn, blank)[: len(numbers)]


MOVING = {
    "broadcast_in_dim", "concatenate", "conv_general_dilated", "copy", "dot_general", "dynamic_slice",
    "dynamic_update_slice", "gather", "iota", "pad", "reshape", "rev", "scatter", "scatter-add", "slice",
    "squeeze", "transpose",
}  # fmt: skip
CALLS = {
    "jit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def literal(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function with every operation of arithmetic as it is written, `hidden` from the others.

    What moves numbers may still be put together with what multiplies matrices, and functions that are
    called are written out.

    Args:
      function: a pure function of its arguments.
      arguments: pytrees of arrays.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def equation(eqn: Any, read: Callable[[Any], Any]) -> Any:
        name, operands = eqn.primitive.name, [read(v) for v in eqn.invars]
        if name in CALLS:
            return evaluated(eqn.params[CALLS[name]], operands, equation)
        return bound(eqn, operands if name in MOVING else hidden(operands))

    found = evaluated(closed, jax.tree.leaves(arguments), equation)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def in_place(
    always_true: Array, function: Callable[..., PyTree], state: PyTree, *arguments: PyTree
) -> PyTree:
    """``function(state, *arguments)``, a new state like the old one, in a separate computation.

    Compilers tend to compute what is added to integers inside the move, and these again wherever they are
    used.  The body of a loop is compiled separately, and its carry stays in place; this loop runs once.
    What does not depend on the loop count would be moved out of the loop again, so all arguments are made
    to depend on it.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function.
      state: what it changes.
      arguments: what else it needs.
    """

    def tied(count: Array, x: Array) -> Array:
        number = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype in (jnp.int32, jnp.int64)
        return x + count.astype(x.dtype) if number else x

    axes = axes_of((state, arguments))

    def body(count: Array, state: PyTree) -> PyTree:
        return cast(function(state, *jax.tree.map(lambda x: tied(count, x), arguments)), axes)

    with jax.enable_x64(True):
        once = in_any_lane(always_true).astype(jnp.int32)
        return jax.lax.fori_loop(0, once, body, cast(state, axes))


def seldom(wanted: Flag, function: Callable[..., PyTree], otherwise: PyTree, *arguments: PyTree) -> PyTree:
    """``function(*arguments)`` where that is wanted, which is seldom, and else something like it.

    From a loop that hardly ever turns the compiler takes out what does not depend on the turn.  So it is a
    conditional in a loop.

    Args:
      wanted: bool scalar.
      function: a pure function of its arguments.
      otherwise: what is returned if that is not wanted.
      arguments: pytrees of arrays.
    """

    def body(_: Array, otherwise: PyTree) -> PyTree:
        def as_is(otherwise: PyTree, *_: PyTree) -> PyTree:
            return otherwise

        def changed(_: PyTree, *arguments: PyTree) -> PyTree:
            return cast(function(*arguments), axes)

        found = jax.lax.cond(in_any_lane(wanted), changed, as_is, otherwise, *arguments)
        return _in_each_lane(wanted, found, otherwise)

    axes = axes_of((otherwise, arguments, wanted))
    with jax.enable_x64(True):
        turns = in_any_lane(wanted).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, body, cast(otherwise, axes))


@jax.custom_batching.custom_vmap
def _in_each_lane(wanted: Flag, found: PyTree, otherwise: PyTree) -> PyTree:
    """What was found; in lanes of `jax.vmap` where it was not wanted, what is otherwise."""
    return found


@_in_each_lane.def_vmap
def _in_lanes(
    lanes: int, batched: list[PyTree], wanted: Array, found: PyTree, otherwise: PyTree
) -> tuple[PyTree, PyTree]:
    axes = jax.tree.map(lambda one_by_one: 0 if one_by_one else None, tuple(batched))

    def choice(wanted: Flag, *both: PyTree) -> PyTree:
        return jax.tree.map(partial(jnp.where, wanted), *both)

    chosen = jax.vmap(choice, in_axes=axes, axis_size=lanes)(wanted, found, otherwise)
    return chosen, jax.tree.map(lambda _: True, found)


def computed(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """``function(*arguments)`` as arrays in memory.

    Compilers inline what is cheap to compute into everything that uses it.  For a computation on many
    concatenated arrays, this makes as many copies, each with the instructions for all of them.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function of its arguments, whose results are numbers.
      arguments: pytrees of arrays.
    """
    with jax.enable_x64(True):
        blank = jax.tree.map(zeros_like, jax.eval_shape(function, *arguments))
        return in_place(always_true, lambda _, *given: function(*given), blank, *arguments)


def noinline(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function in a separate compiled computation.

    The same instructions then give the same bits wherever it is called.  A compiler fuses arithmetic with
    its surroundings, and contracts ``a * b + c`` to one rounding where it can, not always in the same way
    forwards and backwards.  A branch of a conditional is compiled separately.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      function: a pure function of its arguments.
      arguments: pytrees of arrays.
    """
    shapes = jax.eval_shape(function, *arguments)

    def never(*_: PyTree) -> PyTree:
        return jax.tree.map(_zeros, shapes)

    return jax.lax.cond(in_any_lane(always_true), function, never, *arguments)


def prevent_dce(always_true: Array, unused: PyTree, value: Array) -> Array:
    """The value, made to depend on arrays that nobody may use, so that they are computed all the same.

    Args:
      always_true: a scalar that is true, which the compiler must not know.
      unused: pytree of arrays.
      value: one of them, or another; comes out unchanged.
    """

    def never(value: Array, unused: PyTree) -> Array:
        numbers = [x for x in jax.tree.leaves(unused) if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
        wholes = [on_mesh_of(jnp.real(x), jax.typeof(value)) for x in numbers]
        firsts = [jnp.sum(x.reshape(-1)[:1].astype(value.dtype)) for x in wholes]  # 0 if there is none
        return value + sum(jax.lax.psum(x, tuple(axes_of(x) - axes_of(value))) for x in firsts)

    return jax.lax.cond(in_any_lane(always_true), lambda value, _: value, never, value, unused)


_COMPILED: OrderedDict[Any, Any] = OrderedDict()
MOST_COMPILED = 8  # programs that are kept, two for a run; those not used for the longest time go first


def compiled_once(function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """``function(*arguments)`` as one program, which is not compiled again if an equal one was recently.

    Programs are equal if all their instructions and constants are.  One that calls back into Python is
    compiled every time, because its instructions do not say whom it calls.

    Args:
      function: a pure function.
      arguments: pytrees of arrays; if any is traced, or what the function closes over, the function becomes
        part of what is traced.
    """
    leaves: list[Any]
    structure: Any
    leaves, structure = jax.tree.flatten(arguments)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return jax.jit(function, inline=True)(*arguments)
    of_result: list[Any] = []

    def flat(*leaves: Array) -> list[Array]:
        result, like = jax.tree.flatten(function(*structure.unflatten(leaves)))
        of_result.append(like)
        return result

    # Were unused arguments dropped, programs could be equal that use different ones.
    traced = jax.jit(flat, keep_unused=True).trace(*leaves)
    if len(traced.jaxpr.in_avals) > len(leaves):  # it closes over what is traced
        return jax.jit(function, inline=True)(*arguments)
    lowered = traced.lower()
    text = lowered.as_text()
    if "callback" in text or "CustomSPMDPartitioning" in text:
        return of_result[-1].unflatten(lowered.compile()(*leaves))
    places = tuple(x.sharding if isinstance(x, jax.Array) else None for x in leaves)
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    settings = (jax.config.read("jax_disable_most_optimizations"), device)
    key = (hashlib.sha256(text.encode()).digest(), str(traced.jaxpr.out_avals), places, settings)
    program = _COMPILED.pop(key, None) or lowered.compile()
    _COMPILED[key] = program
    while len(_COMPILED) > MOST_COMPILED:
        _COMPILED.popitem(last=False)
    return of_result[-1].unflatten(program(*leaves))


# Each is one correctly rounded operation per element, and fusion does not change its bits.
ROUNDED_ALONE = {
    "abs", "broadcast_in_dim", "convert_element_type", "copy", "div", "max", "min", "mul", "neg", "pvary",
    "reshape", "select_n", "sign", "sqrt", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip


def round_alike(equations: Sequence[Any]) -> bool:
    """Whether equations give the same bits however they are compiled, so that they need not be isolated.

    They do if they are single roundings and no addition or subtraction has an operand that comes from a
    product, because ``a * b + c`` in one rounding would differ.

    Args:
      equations: of a jaxpr.
    """
    products = set()
    for eqn in equations:
        name = eqn.primitive.name
        if name not in ROUNDED_ALONE | {"add", "sub"}:
            return False
        from_product = any(v in products for v in eqn.invars if isinstance(v, Var))
        if name in {"add", "sub"} and from_product:
            return False
        if name == "mul" or from_product:
            products.update(eqn.outvars)
    return True


def _zeros(like: Any) -> Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0, impl=str(jax.random.key_impl(like)))
        return cast(jnp.broadcast_to(key, like.shape), axes_of(like))
    return zeros_like(like)


def same_bits_everywhere(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """`same_bits` in every program, such as those for one device and for many."""
    return noinline(always_true, partial(literal, function), *arguments)


def same_bits(always_true: Array, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Evaluate a function so that the same bits come out wherever it is called in a program."""
    if round_alike(jax.make_jaxpr(function)(*arguments).jaxpr.eqns):
        return function(*arguments)
    return noinline(always_true, function, *arguments)
