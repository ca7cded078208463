"""What can go wrong in an exact reversal, and its messages."""

import enum
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from hypergrad._base.errors import error_if
from hypergrad._base.trees import Flag, PyTree
from hypergrad.adjoints.integers import LARGEST_LOSS, Trouble
from hypergrad.adjoints.tapes import Taped
from hypergrad.program import PARAMS


class Broken(enum.IntEnum):
    """Where derivatives became NaN or infinite, if not at a step."""

    NOWHERE = -1
    FROM_OUTSIDE = -2  # in the cotangents that came in: nothing on the way back is to blame
    IN_RESULT = -3  # in the cotangents of hyperparameters, meta, batches and closures


class Health(NamedTuple):
    """How a run went.

    Attributes:
      failed: ``(3,)``, int32: the first step that failed or -1, why (an index into `Exact.troubles`), and
        in which leaf; of the user's, if rounding took too much.
      needed: length of tape that was needed, in rows or bytes, for everything that is taped.
      recovered: whether the start was recovered.
      broken: ``(2,)``, int32: the last step whose derivatives were NaN or infinite, or a `Broken`; and in
        which of the user's leaves.
    """

    failed: Int[Array, "3"]
    needed: list[Array]
    recovered: Flag
    broken: Int[Array, "2"]


def unbroken(numbers: Flag) -> Int[Array, "2"]:
    """`Health.broken` before the way back, given whether the cotangents that come in are finite."""
    where = jnp.where(numbers, Broken.NOWHERE, Broken.FROM_OUTSIDE).astype(jnp.int32)
    return jnp.stack([where, jnp.int32(0)])


def _whose(name: str, place: str) -> str:
    """A variable of a leaf, or its parameters, in words."""
    return f"{name!r} of {place}" if name != PARAMS else place


@dataclass(frozen=True)
class Failures:
    """The messages of one call.

    Attributes:
      call: the user's call.
      names: of the leaves, some of which are made of several of the user's.
      users: the names of these.
      growth: how far a variable of a leaf may outgrow its first numbers, in binary digits.
      troubles: see `Exact.troubles`.
      taped: what is taped of every leaf.
      allotted: length of every tape, in rows or bytes; None if there is no way back.
      known: whether that is what the factors cost, and not what was reserved; None likewise.
      radix: as set by the user, by variable.
      bits_per_step: bits reserved per element and step, a function of the variable; and the number of steps
        that a tape is for.
    """

    call: str
    names: Sequence[str]
    users: Sequence[str]
    growth: Callable[[int, str], int]
    troubles: Sequence[Trouble]
    taped: Sequence[Sequence[Taped]]
    allotted: Sequence[Sequence[int]] | None
    known: Sequence[Sequence[bool]] | None
    radix: Mapping[str, int]
    bits_per_step: tuple[Callable[[str], float], int]

    def refuse(self, result: PyTree, health: Health) -> PyTree:
        """Pass the result on, or raise a `ReversalError` if the run failed."""
        allotted = None if self.allotted is None else list(itertools.chain(*self.allotted))
        every = [(i, each) for i, leaf in enumerate(self.taped) for each in leaf]
        told = [False] * len(every) if self.known is None else list(itertools.chain(*self.known))

        def explain(
            step: int, why: int, leaf: int, recovered: bool, broken: int, broken_leaf: int, *needed: int
        ) -> str | None:
            if step >= 0:
                return self.of_step(step, *self.troubles[why], leaf)
            for have, known, need, (i, taped) in zip(*(allotted or needed, told, needed, every)):
                if need > have and known and taped.buffer is None:
                    return f"{self.call}: {self.too_large(taped.variable, i)}"
                if need > have:
                    return self.tape_too_short(taped, need)
            if not recovered:
                return self.not_recovered()
            if broken in (Broken.NOWHERE, Broken.FROM_OUTSIDE):
                return None
            return self.no_numbers(broken, broken_leaf)

        return error_if(explain, result, *health.failed, health.recovered, *health.broken, *health.needed)

    def of_step(self, step: int, kind: str, name: str, leaf: int) -> str:
        """Message for a step that failed."""
        at = f"{self.call}: at step {step} "
        if kind == "loss":
            return (
                f"{at}the loss, or what the optimizer remembers of the step, became NaN or infinite: "
                "either training has diverged, which a lower learning rate cures, or the loss is undefined "
                "there"
            )
        if kind == "factor":
            return (
                f"{at}a factor of {_whose(name, self.names[leaf])} left [2**-7, 1], outside of which it "
                "cannot be undone; keep it inside, or pass adjoint=Checkpointed() (and sgd() if there is "
                "to be no momentum)"
            )
        if kind == "level":
            place = self.names[leaf]
            return f"{at}what the optimizer keeps of {place} was none of the levels that its Keep names"
        return f"{at}{self.too_coarse(name, leaf) if kind == 'rounding' else self.too_large(name, leaf)}"

    def too_coarse(self, name: str, leaf: int) -> str:
        """Message for rounding that takes too large a part of what is added."""
        if name in self.radix:
            advice = f"a larger radix than {self.radix[name]}"
        else:
            advice = (
                f"Reversible(radix={{{name!r}: r}}) with the largest r for which |{name}| < "
                "2**(62 - r) all along"
            )
        whose = _whose(name, self.users[leaf])
        return (
            f"rounding took more than {LARGEST_LOSS:.0e} of what was added to a row of {whose}: "
            "next to the largest numbers in it, those are too small for exact arithmetic. Give them a "
            f"leaf of their own, or pass adjoint=Checkpointed(), or {advice}"
        )

    def too_large(self, name: str, leaf: int) -> str:
        """Message for numbers that leave the range."""
        whose = _whose(name, self.names[leaf])
        if name in self.radix:
            given = self.radix[name]
            return (
                f"{whose} became NaN or left the range of exact arithmetic, |{name}| < "
                f"2**{62 - given}, that radix={{{name!r}: {given}}} asks for; leave the radix to be chosen "
                "from the numbers, or pass a smaller one"
            )
        return (
            f"{whose} became NaN or grew to 2**{self.growth(leaf, name)} times the largest number that "
            "was first in it. Either training has diverged, which a lower learning rate cures, or it began "
            f"with numbers that say nothing of later ones: pass Reversible(radix={{{name!r}: r}}) with "
            f"the largest r for which |{name}| < 2**(62 - r) all along, or adjoint=Checkpointed()"
        )

    def tape_too_short(self, taped: Taped, need: int) -> str:
        """Message for a tape that is too short."""
        reserved, length = self.bits_per_step
        bits = (8 * need / max(1, math.prod(taped.factor_shape)) + 8) / length / max(1, taped.scales)
        enough = {taped.variable: math.ceil(100 * bits) / 100}
        return (
            f"{self.call}: the information buffer of {taped.variable!r} would overflow: its factors "
            f"destroy {bits:.3g} bits per element and step, and room for {reserved(taped.variable):.3g} "
            f"was reserved; pass Reversible(bits={enough}) or more"
        )

    def not_recovered(self) -> str:
        """Message for a run whose start was not recovered."""
        return (
            f"{self.call}: played backwards, the run did not arrive at its start, so that its "
            "hypergradient would be wrong and is withheld. The loss did not give the same gradient bit "
            "for bit when it was evaluated again (a non-deterministic operation or an impure function?); "
            "make it deterministic or pass adjoint=Checkpointed()"
        )

    def no_numbers(self, step: int, leaf: int) -> str:
        """Message for a derivative that is NaN or infinite."""
        where = "in a hyperparameter, meta or batch"
        if step >= 0:
            where = f"of step {step} in {self.users[leaf]}"
        return (
            f"{self.call}: the run was recovered, but on the way back the derivative {where} became "
            "NaN or infinite. Either a second derivative of the loss is undefined there (a norm or a root "
            "at 0, |w|**1.5), which a small constant under the root cures; or hypergradients grow from "
            "step to step until they overflow: take fewer steps or a lower learning rate, where gradients "
            "have died away to rounding a larger eps, or differentiate the last steps only with "
            "adjoint=Truncated(steps)"
        )
