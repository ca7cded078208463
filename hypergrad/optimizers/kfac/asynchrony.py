"""Asynchrony as integers: statistics and inverses that reach the optimizer some steps late.

Workers that compute statistics and inverses alongside the training, as fast as they can, make runs that
differ from one another.  Here the delay is part of the problem, so a run is a function that can be
evaluated again and differentiated.

========  ==================  =====================================================================
symbol    name                meaning
========  ==================  =====================================================================
``τ_s``   statistics_delay    steps until statistics enter the running averages, ``>= 0``
``τ_i``   inverse_delay       steps until inverses are used, ``>= 0``
``P``     refresh             steps from one inversion to the next, ``>= 1``
``x_t``                       statistics of the parameters before step ``t = 0, 1, ...``
``B_t``                       inverses of the averages in step ``t``, a multiple of ``P``
========  ==================  =====================================================================

Step ``t`` adds ``x_{max(t - τ_s, 0)}`` to the averages, and uses ``B_r`` with
``r = P ⌊max(t - τ_i, 0) / P⌋``: the run waits for the first statistics and inverses.

Source: Ba, Grosse, Martens, "Distributed second-order optimization using Kronecker-factored
approximations", ICLR 2017, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hypergrad._base.devices import Evaluate, in_turn, spread


@dataclass(frozen=True)
class Asynchrony:
    """How late statistics and inverses are, and where they are computed; see the module docstring.

    With the defaults nothing is late, and a run is bit for bit the same as without it.

    Attributes:
      refresh: ``P``, steps between inversions.
      statistics_delay: ``τ_s``.
      inverse_delay: ``τ_i``.
      mesh: a mesh of at least two devices.  The first half computes statistics and the second half
        inverses, those of one layer on one device; None computes them where everything else is.

    Raises:
      ValueError: a period or delay is not such an integer, or the mesh has only one device.

    >>> Asynchrony(refresh=5, inverse_delay=5)
    Asynchrony(refresh=5, statistics_delay=0, inverse_delay=5)
    """

    refresh: int = 1
    statistics_delay: int = 0
    inverse_delay: int = 0
    mesh: Mesh | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        least = {"refresh": 1, "statistics_delay": 0, "inverse_delay": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(
                    f"Asynchrony({name}={value!r}): counted in steps, and not differentiable; pass an "
                    f"integer of at least {low}"
                )
        if self.mesh is not None and self.mesh.size < 2:
            raise ValueError(
                "Asynchrony(mesh=...): statistics and inverses are put on separate devices, and the mesh "
                "has one; pass more devices, or None"
            )

    @property
    def keeps_inverses(self) -> bool:
        """Whether inverses are kept from step to step."""
        return self.refresh > 1 or self.inverse_delay > 0 or self.mesh is not None

    @property
    def statistics(self) -> Evaluate:
        """What evaluates statistics."""
        return in_turn if self.mesh is None else spread(self.mesh, range(self.mesh.size // 2))

    @property
    def inverses(self) -> Evaluate:
        """What evaluates inverses."""
        return (
            in_turn if self.mesh is None else spread(self.mesh, range(self.mesh.size // 2, self.mesh.size))
        )


def ring(like: Array, delay: int, period: int = 1) -> Array:
    """Zeros for all arrays that are made, one per period, until the first of them is no longer used.

    >>> import jax.numpy as jnp
    >>> ring(jnp.zeros(7), 4, 3).shape
    (3, 7)
    """
    return jnp.zeros((1 - (-delay // period), *like.shape), like.dtype)


def written(ring: Array, t: Array, value: Callable[[], Array], period: int = 1) -> Array:
    """The ring after step ``t``; the value is evaluated and added where ``t`` is a multiple of the period.

    >>> import jax.numpy as jnp
    >>> written(jnp.zeros((2, 1)), jnp.int32(3), lambda: jnp.ones(1))[:, 0]
    Array([0., 1.], dtype=float32)
    """

    def add() -> Array:
        return ring.at[t // period % len(ring)].set(value())

    return add() if period == 1 else jax.lax.cond(t % period == 0, add, lambda: ring)


def read(ring: Array, t: Array, delay: int, period: int = 1) -> Array:
    """The value made at step ``max(t - delay, 0)``, read in step ``t`` after its own value was written.

    >>> import jax.numpy as jnp
    >>> read(jnp.array([[3.0], [4.0], [5.0]]), jnp.int32(5), 2)
    Array([3.], dtype=float32)
    """
    return ring[jnp.maximum(t - delay, 0) // period % len(ring)]
