"""Hyperparameters over the steps as plain numbers, and as the source text that gives them."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hypergrad import schedules
from hypergrad.schedules import OneCycle, PiecewiseLinear, Triangular, WarmupCosine


@dataclass(frozen=True, eq=False)
class Series:
    """One hyperparameter over the steps.

    Attributes:
      values: float64, ``()`` for a constant, else ``(T, ...)``; the last one is held after the end.
      formula: an expression in ``count`` and in the functions of ``xp``, a module like NumPy, or None.
    """

    values: np.ndarray
    formula: str | None = None

    @property
    def constant(self) -> bool:
        """Whether it is the same at every step."""
        return self.values.ndim == 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal series."""
        return self.values.shape, self.values.tobytes(), self.formula

    def times(self, factor: float) -> "Series":
        """The series times a number."""
        formula = None if self.formula is None else f"{factor!r} * {self.formula}"
        return Series(_tidy(self.values * factor), formula)

    def plain(self) -> float | list[Any]:
        """As JSON has it: a number, or a list with one entry for each step."""
        return self.values.tolist()


def series(call: str, name: str, given: Any, steps: int) -> Series:
    """A hyperparameter, as `hypergrad.train` takes it for one leaf, over the steps.

    Args:
      call: the user's call, for messages.
      name: of the hyperparameter.
      given: a number, a schedule, or an array whose leading axis is the step.
      steps: ``T``.

    Raises:
      ValueError: it is traced, is not finite, or has another length.

    >>> from hypergrad.schedules import Constant
    >>> series("as_json(...)", "learning_rate", Constant(0.5), 3).plain()
    0.5
    """
    where = f"{call}: hypers[{name!r}]"
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
        raise ValueError(f"{where} is traced; export what was learned outside jax.jit and jax.grad")
    values = _decimal(np.asarray(schedules.values(given, steps)))
    if not np.isfinite(values).all():
        raise ValueError(f"{where} has numbers in it that are not finite; such a run has no result")
    if values.ndim and len(values) not in (1, steps):
        raise ValueError(
            f"{where} has shape {list(values.shape)}; a schedule's leading axis is the step and must have "
            f"length steps={steps} (or 1, for the same at every step)"
        )
    if values.ndim == 1 and (values == values[0]).all():
        return Series(values[0])
    return Series(values, _formula(given))


def _decimal(x: np.ndarray) -> np.ndarray:
    """In float64, as the shortest decimals that give the same numbers in their own precision."""
    return np.asarray(x.astype(str) if x.dtype == np.float32 else x, np.float64)


def _tidy(x: np.ndarray) -> np.ndarray:
    """Without the last digit, in which rounding shows: 0.1 for 1 - 0.9."""
    return np.reshape([float(f"{each:.15g}") for each in np.ravel(x)], np.shape(x))


def _formula(schedule: Any) -> str | None:
    """The closed form of a schedule, if it has a short one."""
    match schedule:
        case PiecewiseLinear():
            return _interpolated("count", schedule.positions, schedule.values)
        case OneCycle():
            steps, peak, start, final, div, final_div = _numbers(schedule)
            low = peak / div
            return _interpolated(
                "count", [0.0, start * steps, final * steps, steps], [low, peak, low, low / final_div]
            )
        case Triangular():
            base, top, cycle = _numbers(schedule)
            return _interpolated(f"count % {cycle!r}", [0.0, cycle / 2, cycle], [base, top, base])
        case WarmupCosine():
            return _warmup_cosine(*_numbers(schedule))
    return None


def _numbers(schedule: Any) -> list[float]:
    return [float(np.asarray(x)) for x in schedule]


def _interpolated(x: str, positions: Any, values: Any) -> str:
    knots = [np.float64(each).tolist() for each in (positions, values)]
    return f"xp.interp({x}, xp.array({knots[0]}), xp.array({knots[1]}))"


def _warmup_cosine(init: float, peak: float, warmup: float, decay: float, end: float) -> str:
    rising, falling = f"{init!r} + ({peak!r} - {init!r}) * count / {warmup!r}", f"{end!r}"
    if decay > warmup:
        way = f"xp.clip((count - {warmup!r}) / ({decay!r} - {warmup!r}), 0, 1)"
        falling += f" + ({peak!r} - {end!r}) * (1 + xp.cos(xp.pi * {way})) / 2"
    branches = "".join(f"\n        {each}," for each in (f"count < {warmup!r}", rising, falling))
    return f"xp.where({branches}\n    )" if warmup else f"({falling})"


def velocity_of_sums(momentum: Series, weight: Series) -> Series:
    """The momentum of a sum of gradients that moves as an average or as a sum of steps does.

    ``v_t = γ_t v_{t-1} + c_t g_t`` is ``c_t u_t`` with ``u_t = γ'_t u_{t-1} + g_t`` and
    ``γ'_t = γ_t c_{t-1} / c_t``.  One value follows after the last step, because ``c`` is constant from
    there on, and ``γ'`` is ``γ`` again.

    Args:
      momentum: ``γ``.
      weight: ``c``.

    Returns:
      ``γ'``; not finite if a weight is 0.

    >>> velocity_of_sums(Series(np.array([0.5, 0.75])), Series(np.array([0.5, 0.25]))).plain()
    [0.5, 1.5, 0.75]
    """
    if weight.constant:
        return momentum
    c = np.append(weight.values, weight.values[-1])
    gamma = np.broadcast_to(momentum.values, weight.values.shape)
    gamma = np.append(gamma, gamma[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return Series(_tidy(gamma * np.append(1.0, c[:-1] / c[1:])))


def product(a: Series, b: Series) -> Series:
    """The product of two series, with a formula if one of them is a number."""
    if b.constant:
        return a.times(float(b.values))
    return b.times(float(a.values)) if a.constant else Series(_tidy(a.values * b.values))


def summed_velocity(rate: Series, momentum: Series) -> tuple[Series, Series]:
    """Rate and momentum with which `hypergrad.heavy_ball` moves as `hypergrad.momentum` does.

    ``α'_t = α_t (1 - γ_t)``, and ``γ'_t = γ_t (1 - γ_{t-1}) / (1 - γ_t)``, which is ``γ`` if that is
    constant.

    >>> [each.plain() for each in summed_velocity(Series(np.array(0.5)), Series(np.array(0.75)))]
    [0.125, 0.75]
    """
    weight = Series(_tidy(1 - momentum.values))
    return product(rate, weight), velocity_of_sums(momentum, weight)
