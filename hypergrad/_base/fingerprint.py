"""What a traced function computes, as a digest that is the same in every process.

Two functions with the same digest give the same numbers.  The digest covers operations, shapes, dtypes and
constants, but not names, files, line numbers or addresses, so that it survives an edit that changes
nothing. Another version of JAX or Python may trace the same function differently.
"""

import dataclasses
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax.extend.core
import jax.numpy as jnp
import numpy as np

from hypergrad._base.processes import on_host

Feed = Callable[[str | bytes], None]
Memo = dict[int, tuple[Any, str]]  # by id: the object, kept alive so that no other gets its id; its digest
# Parameters that do not change what is computed.
_IDLE = {"name", "debug_info", "source_info", "name_and_src_info", "ctx_mesh"}
# Rules for derivatives that were not requested when the function was traced.
_RULES = {"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_thunk", "transpose_jaxpr_thunk"}
_UNWATCHED = {"debug_callback", "debug_print"}  # nothing depends on them
_OPAQUE = {"builtins", "jax", "jaxlib"}  # objects of these packages are identified by their repr
_SHARED = (  # what may occur often, or contain itself
    jax.Array,
    np.ndarray,
    jax.extend.core.ClosedJaxpr,
    jax.extend.core.Jaxpr,
    types.FunctionType,
    Mapping,
    list,
)


def digest(*things: Any) -> str:
    """Sixteen hexadecimal digits that identify what things are.

    Args:
      things: arrays, jaxprs, and containers of them; numbers and strings; functions, by their code and what
        they close over, not by globals (the jaxpr of a traced function contains its globals, a callback
        does not); other objects by their type, repr and attributes.

    >>> digest(np.arange(3)) == digest(np.arange(3)) != digest(np.arange(4))
    True
    """
    return _digest(things, {})


def _digest(x: Any, memo: Memo) -> str:
    sha = hashlib.sha256()

    def feed(part: str | bytes) -> None:
        data = part.encode(errors="replace") if isinstance(part, str) else part
        sha.update(f"{len(data)}:".encode())  # so that the parts stay separable
        sha.update(data)

    _content(feed, x, memo)
    return sha.hexdigest()[:16]


def _value(feed: Feed, x: Any, memo: Memo) -> None:
    if not isinstance(x, jax.core.Tracer) and (isinstance(x, _SHARED) or dataclasses.is_dataclass(x)):
        if id(x) not in memo:
            memo[id(x)] = x, "itself"
            memo[id(x)] = x, _digest(x, memo)
        feed(memo[id(x)][1])
    else:
        _content(feed, x, memo)


def _content(feed: Feed, x: Any, memo: Memo) -> None:
    kind = type(x)
    inner = functools.partial(_value, feed, memo=memo)
    if isinstance(x, jax.core.Tracer):
        feed(_plain(str(x.aval)))
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        _array(feed, x)
    elif isinstance(x, jax.extend.core.ClosedJaxpr):
        inner(list(x.consts))
        _program(feed, x.jaxpr, memo)
    elif isinstance(x, jax.extend.core.Jaxpr):
        _program(feed, x, memo)
    elif isinstance(x, type | types.ModuleType | types.BuiltinFunctionType):
        feed(str(getattr(x, "__qualname__", x.__name__)))
    elif isinstance(x, types.FunctionType):
        inner(x.__code__)
        inner((x.__defaults__, x.__kwdefaults__))
        inner(tuple(_held(cell) for cell in x.__closure__ or ()))
    elif isinstance(x, types.CodeType):
        feed(x.co_code)
        inner((x.co_names, x.co_consts))
    elif isinstance(x, types.MethodType):
        inner((x.__func__, x.__self__))
    elif isinstance(x, functools.partial):
        inner((x.func, x.args, x.keywords))
    else:
        feed(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(x, enum.Enum):
            feed(x.name)
        elif isinstance(x, Mapping):
            for key, part in sorted(x.items(), key=lambda item: digest(item[0])):
                inner((key, part))
        elif isinstance(x, set | frozenset):
            for name in sorted(digest(part) for part in x):
                feed(name)
        elif isinstance(x, tuple | list):
            feed(str(len(x)))
            for part in x:
                inner(part)
        elif dataclasses.is_dataclass(x):
            for field in dataclasses.fields(x):
                inner(getattr(x, field.name, None))
        elif hasattr(x, "__wrapped__"):  # such as what jax.jit returns
            inner(x.__wrapped__)
        else:
            if kind.__repr__ is not object.__repr__:  # type: ignore[comparison-overlap]
                feed(_plain(repr(x)))
            if hasattr(x, "__dict__") and kind.__module__.partition(".")[0] not in _OPAQUE:
                inner(vars(x))


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain(text: str) -> str:
    """The text without addresses."""
    return re.sub(r"0x[0-9a-f]+", "", text)


def _array(feed: Feed, x: Any) -> None:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        feed(str(jax.random.key_impl(x)))
        x = jax.random.key_data(x)
    x = on_host(x)
    feed(f"{x.dtype}{x.shape}")
    feed(np.ascontiguousarray(x).tobytes())


def _program(feed: Feed, jaxpr: Any, memo: Memo) -> None:
    """Feed a jaxpr, with its variables by number."""
    numbers: dict[Any, int] = {}

    def variable(v: Any) -> None:
        if isinstance(v, jax.extend.core.Literal):
            _value(feed, v.val, memo)
            feed(_kind(v.aval))
        else:
            feed(str(numbers.setdefault(v, len(numbers))))

    def made(v: Any) -> None:
        variable(v)
        feed(_kind(v.aval))

    for v in (*jaxpr.constvars, *jaxpr.invars):
        made(v)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _UNWATCHED:
            continue
        feed(eqn.primitive.name)
        for v in eqn.invars:
            variable(v)
        for name in sorted(set(eqn.params) - _IDLE - _RULES):
            feed(name)
            _value(feed, eqn.params[name], memo)
        for v in eqn.outvars:
            made(v)
    feed("returns")
    for v in jaxpr.outvars:
        variable(v)


def _kind(aval: Any) -> str:
    return f"{_plain(str(aval))}{'*' if getattr(aval, 'weak_type', False) else ''}"
