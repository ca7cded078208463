"""Whether hypergradients in weights of the examples predict what happens without many of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.checks import is_whole
from hypergrad._base.errors import readable_errors
from hypergrad._base.notebook import short_traceback
from hypergrad._base.progress import Progress
from hypergrad.check.objective import FAILURES, cosine_of, fraction
from hypergrad.check.report import Finding, LeaveOutReport

FAILS, WORKS = 0.2, 0.9  # the correlations between which the test decides
MISTAKES = 0.01  # share of wrong decisions at either of them
FEWEST = 6  # runs, below which ranks are too coarse
SPREAD = 1.06  # of Fisher's z for ranks: a variance of 1.06 / (n - 3)
PART, PARTS, AGAIN = 1 / 8, 4, 6  # of the diagnosis: part of the change, along how many probes; runs again
NAMES = ("leave-out prediction", "training noise", "metasmoothness")


class Training(NamedTuple):
    """What the probes need.

    Attributes:
      value: the outer loss, of weights and the number of a key; NaN where the run fails.
      weights: of the examples.
      hypergradient: ``g``, in the weights.
      keyed: whether runs have a key.
    """

    value: Callable[[np.ndarray, int], float]
    weights: np.ndarray
    hypergradient: np.ndarray
    keyed: bool

    def predicted(self, out: np.ndarray) -> float:
        """``-Σ_{i out} g_i c_i``."""
        return -float(np.sum((self.hypergradient * self.weights)[out]))

    def without(self, out: np.ndarray, part: float = 1.0) -> np.ndarray:
        """The weights, with those of some examples reduced by a part of them."""
        left = self.weights.copy()
        left[out] *= 1 - part
        return left


@short_traceback
def check_leave_out(
    objective: Callable[..., Any],
    weights: Any,
    hypergradient: Any = None,
    *,
    share: float = 0.5,
    probes: int = 24,
    training_key: jax.Array | None = None,
    key: jax.Array | None = None,
    quiet: bool = False,
    progress: bool | None = None,
) -> LeaveOutReport:
    """Check whether a hypergradient in the weights of examples predicts the effect of leaving many out.

    For random halves ``S`` of the examples, the predicted effect ``-Σ_{i in S} c_i ∂f/∂c_i`` and the real
    one, ``f`` after training with ``c_i = 0`` in ``S``, have Spearman's correlation ``ρ``: the linear
    datamodeling score.  Wald's sequential test decides between ``ρ <= 0.2`` and ``ρ >= 0.9`` with 1% of
    mistakes at each, by Fisher's ``z = artanh ρ``, whose variance is ``1.06 / (n - 3)`` after ``n`` runs.
    It makes one run after the other and stops when it is certain, mostly after 6 to 15.  Unless the
    prediction can be trusted, 11 further runs tell what is wrong: noise of the keys, roughness already
    at an eighth of the change, or neither.

    Args:
      objective: ``objective(weights) -> scalar``, which trains and returns the outer loss; with a
        `training_key`, ``objective(weights, key)``.  It is called as it is, so compile it with `jax.jit`.
        If the hypergradient is given, it may train by anything, not only by JAX.
      weights: ``(n,)`` floats ``c``, of every example, or of every group of examples; ``n >= 8``.
      hypergradient: ``(n,)``, ``∂f/∂c`` at the weights; None computes it by `jax.grad`.
      share: of the examples that are left out, in (0, 1).
      probes: how many runs the test may make, at least 6.
      training_key: PRNG key of everything random in training, such as dropout, that will be another in a
        new run.  The hypergradient is that of this key; every probe has a key of its own.  None for
        training in which all that is random is fixed.
      key: PRNG key that draws the examples to leave out, by default ``jax.random.key(0)``.
      quiet: do not print the report.
      progress: show on stderr how many runs are made; by default unless ``quiet``.

    Returns:
      A `LeaveOutReport`, printed unless ``quiet``.  Its verdict is "trusted", "NOT TRUSTED", or "cannot
      tell" if all probes are made and the test is not certain, as between the two correlations.

    Raises:
      ValueError: an argument is invalid; checked before any work starts.

    Source: Park et al., "TRAK: attributing model behavior at scale", ICML 2023, for the linear datamodeling
    score; Ilyas and Engstrom, "MAGIC: near-optimal data attribution for deep learning", arXiv:2504.16430,
    2025, for its prediction by metagradients; Wald, "Sequential tests of statistical hypotheses", Ann.
    Math. Stat., 1945; Fieller, Hartley, Pearson, "Tests for rank correlation coefficients", Biometrika,
    1957, for 1.06.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> x = jnp.sin(jnp.arange(30.0))
    >>> loss = lambda w, c, step: jnp.mean(c * (w - x) ** 2)
    >>> def outer(c):
    ...     hypers = {"learning_rate": 0.1, "momentum": 0.5}
    ...     return (hg.train(loss, jnp.zeros(()), hypers, c, steps=10).params - 1.0) ** 2
    >>> hg.check_leave_out(jax.jit(outer), jnp.ones(30), quiet=True).verdict
    'trusted'
    """
    call = f"check_leave_out(share={share}, probes={probes})"
    weights = _refuse(call, weights, share, probes)
    out = _left_out(call, len(weights), share)

    def keys(k: int) -> tuple[jax.Array, ...]:
        return () if training_key is None else (jax.random.fold_in(training_key, k) if k else training_key,)

    def value(c: np.ndarray, k: int) -> float:
        try:
            with readable_errors():
                return float(objective(jnp.asarray(c), *keys(k)))
        except FAILURES:
            return math.nan

    with Progress("check_leave_out", not quiet if progress is None else progress) as shown:
        if hypergradient is None:
            shown.say("computing the hypergradient ...")
            with readable_errors():
                hypergradient = jax.grad(objective)(jnp.asarray(weights), *keys(0))
        g = _hypergradient(call, hypergradient, weights)
        training = Training(value, weights, g, training_key is not None)
        key = jax.random.key(0) if key is None else key
        chosen = [
            np.asarray(jax.random.permutation(jax.random.fold_in(key, k), len(weights)))[:out]
            for k in range(probes)
        ]
        report = _inspected(training, chosen, share, shown)
    if not quiet:
        print(report)
    return report


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's correlation, of ranks, with the mean rank for ties; NaN where all numbers are equal.

    Args:
      x: ``(n,)`` numbers.
      y: ``(n,)`` numbers.

    >>> round(rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 7.0]), 6)
    0.8
    """

    def centred_ranks(values: Any) -> np.ndarray:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks = np.cumsum(count) - (count - 1) / 2
        return ranks[place] - (len(place) + 1) / 2

    return float(np.clip(cosine_of(centred_ranks(x), centred_ranks(y)), -1, 1))


def fisher_z(correlation: float, runs: int) -> float:
    """``artanh ρ``, where a perfect order counts as half an exchange of two neighbors off."""
    most = 1 - 6 / (runs**3 - runs)
    return math.atanh(min(max(correlation, -most), most))


def evidence(correlation: float, runs: int) -> float:
    """The log-likelihood ratio of ``ρ = 0.9`` to ``ρ = 0.2``, by the normal distribution of Fisher's z."""
    z, bad, good = fisher_z(correlation, runs), math.atanh(FAILS), math.atanh(WORKS)
    return (good - bad) * (z - (good + bad) / 2) * (runs - 3) / SPREAD


def interval(correlation: float, runs: int) -> tuple[float, float]:
    """95% confidence interval of a rank correlation, by Fisher's z."""
    z, half = fisher_z(correlation, runs), 1.96 * math.sqrt(SPREAD / (runs - 3))
    return math.tanh(z - half), math.tanh(z + half)


def decided(predicted: Sequence[float], real: Sequence[float]) -> int:
    """1 where the test is certain that prediction works, -1 where it fails, 0 where it is not."""
    if len(real) < FEWEST or np.ptp(real) == 0:
        return 0
    found = evidence(rank_correlation(predicted, real), len(real))
    bound = math.log((1 - MISTAKES) / MISTAKES)
    return int(found >= bound) - int(found <= -bound)


def _inspected(
    training: Training, chosen: list[np.ndarray], share: float, shown: Progress
) -> LeaveOutReport:
    """Probes until the test is certain, and the diagnosis."""
    subject = f"Leaving out {share:.0%} of {len(training.weights):,} examples"
    looked = "Looked at only if the prediction cannot be trusted."
    unlooked = [Finding(name, "not checked", {}, looked) for name in NAMES[1:]]
    predicted, real, sure = [training.predicted(out) for out in chosen], list[float](), 0
    broken = None
    if not np.all(np.isfinite(training.hypergradient)):
        broken = "The hypergradient is NaN or infinite."
    elif np.ptp(predicted) == 0:
        broken = "The hypergradient predicts the same effect for all examples."
    if broken is not None:
        return LeaveOutReport(subject, Finding(NAMES[0], "failed", {"runs": 0}, broken), *unlooked)
    shown.begin(len(chosen), "run")
    for k, out in enumerate(chosen):
        real.append(training.value(training.without(out), 1 + k))
        shown.advance("leave-out prediction")
        sure = decided(predicted[: k + 1], real)
        if sure or not math.isfinite(real[-1]):
            break
    prediction = _prediction(predicted[: len(real)], real, sure, share)
    if prediction.verdict == "ok" or "correlation" not in prediction.numbers:
        return LeaveOutReport(subject, prediction, *unlooked)
    noise = _noise(training, real)
    smoothness = _smoothness(training, chosen[:PARTS], share, noise.verdict == "warning")
    return LeaveOutReport(subject, prediction, noise, smoothness)


def _prediction(predicted: list[float], real: list[float], sure: int, share: float) -> Finding:
    """The finding of the test."""
    measured: dict[str, Any] = {"runs": len(real), "predicted": predicted, "real": real}
    if not np.all(np.isfinite(real)):
        meaning = f"A run without {share:.0%} of the examples fails. Lower the learning rate."
        return Finding(NAMES[0], "failed", measured, meaning)
    if np.ptp(real) == 0:
        meaning = "Cannot tell: the objective is the same, whichever examples are left out."
        return Finding(NAMES[0], "warning", measured, meaning)
    correlation = rank_correlation(predicted, real)
    low, high = interval(correlation, len(real))
    measured |= {"correlation": correlation, "interval": (low, high)}
    measured |= {"spread": (float(np.std(predicted)), float(np.std(real)))}
    found = (
        f"Predicted and real effects have a rank correlation of {correlation:.2f} "
        f"({low:.2f} to {high:.2f}) in {len(real)} runs."
    )
    if sure > 0:
        return Finding(NAMES[0], "ok", measured, found)
    if sure < 0:
        meaning = f"{found} Sums of the hypergradient do not predict what happens without so many examples."
        return Finding(NAMES[0], "failed", measured, meaning)
    meaning = f"{found} Cannot tell: it is neither clearly above {FAILS} nor clearly below {WORKS}."
    return Finding(NAMES[0], "warning", measured, meaning)


def _noise(training: Training, real: list[float]) -> Finding:
    """How much of the spread of real effects comes from keys, in runs with all examples."""
    if not training.keyed:
        meaning = "Runs have no key. Pass training_key= if something random is not the same in a new run."
        return Finding(NAMES[1], "not checked", {}, meaning)
    values = [training.value(training.weights, len(real) + 1 + k) for k in range(AGAIN)]
    share = min(1.0, fraction(float(np.var(values, ddof=1)), float(np.var(real, ddof=1))))
    ceiling = math.sqrt(1 - share) if math.isfinite(share) else math.nan
    measured = {"values": values, "share": share, "ceiling": ceiling}
    found = (
        f"Keys make {share:.0%} of the variance between runs, which limits correlations to {ceiling:.2f}."
    )
    if ceiling >= WORKS:
        return Finding(NAMES[1], "ok", measured, found)
    meaning = (
        f"{found} Turn dropout off in the runs that are compared, or fix their keys, or average the "
        "objective over several."
    )
    return Finding(NAMES[1], "warning", measured, meaning)


def _smoothness(training: Training, chosen: list[np.ndarray], share: float, noisy: bool) -> Finding:
    """Predicted and real effects of a part of the change, in runs with the key of the hypergradient."""
    start = training.value(training.weights, 0)
    predicted = [PART * training.predicted(out) for out in chosen]
    real = [training.value(training.without(out, PART), 0) - start for out in chosen]
    error = fraction(float(np.linalg.norm(np.subtract(real, predicted))), float(np.linalg.norm(predicted)))
    measured = {"part": PART, "predicted": predicted, "real": real, "relative_error": error}
    found = (
        f"If the weights of {share:.0%} of the examples are only reduced by an eighth, predictions are off "
        f"by {error:.0%}."
    )
    if error < 0.5 and noisy:
        return Finding(NAMES[2], "ok", measured, f"{found} The hypergradient itself is right.")
    if error < 0.5:
        meaning = (
            f"{found} The hypergradient is right, but effects of so many examples do not add up. Leave out "
            "fewer, or lower the learning rate."
        )
        return Finding(NAMES[2], "warning", measured, meaning)
    meaning = (
        f"{found} Training is rough. Raise Adam's ε (to 1e-6 inside the root, or 1e-3 outside of it), use "
        "larger batches, or lower the learning rate."
    )
    return Finding(NAMES[2], "failed", measured, meaning)


def _refuse(call: str, weights: Any, share: Any, probes: Any) -> np.ndarray:
    """The weights, if everything is as it must be."""
    c = np.asarray(weights)
    if c.ndim != 1 or len(c) < 8 or not np.issubdtype(c.dtype, np.floating) or not np.all(np.isfinite(c)):
        raise ValueError(
            f"{call}: weights are {c.dtype}{list(c.shape)}; pass one finite float for every example, of 8 "
            "or more, such as jnp.ones(n)"
        )
    if not is_whole(probes, FEWEST):
        raise ValueError(f"{call}: probes must be a whole number of at least {FEWEST}, of runs to make")
    if not (isinstance(share, float | np.floating) and 0 < share < 1):
        raise ValueError(f"{call}: share must lie in (0, 1): which part of the examples is left out")
    return c


def _left_out(call: str, examples: int, share: float) -> int:
    out = round(share * examples)
    if not 0 < out < examples:
        raise ValueError(
            f"{call}: that leaves out {out} of {examples} examples; pass a share that leaves out one or "
            "more, and not all"
        )
    return out


def _hypergradient(call: str, hypergradient: Any, weights: np.ndarray) -> np.ndarray:
    g = np.asarray(hypergradient).astype(np.float64)
    if g.shape != weights.shape:
        raise ValueError(
            f"{call}: the hypergradient has the shape {g.shape} and the weights {weights.shape}; pass "
            "jax.grad(objective)(weights)"
        )
    return g
