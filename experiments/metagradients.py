"""What every training example is worth to a whole training run, exactly, beside estimates by influence.

A network of one hidden layer learns from labels of which a part was replaced by other ones, by momentum in
minibatches, and stops long before it is at a minimum.  The loss of example ``i`` counts ``c_i`` times, with
``c_i = 1``.  One pass backwards through the run, bit for bit, gives the derivative of the loss ``L`` on a
few clean examples, after the run, in all ``c_i``: the metagradient.  Influence functions estimate the same
from the end of the run alone, as if it were a minimum: ``-1/n ∇L · (H + λ I)⁻¹ ∇loss_i``, with ``H`` the
Gauss-Newton matrix.  Four questions:

- does either foretell what happens to ``L`` in runs where some examples are left out, drawn at random?
- which wrong labels are found?  An example is suspected if its derivative is positive.
- what is the test error after the most suspected examples are left out?
- what, after all weights are learned by following metagradients on half of the clean examples, up to where
  the loss on the other half is least?

    python -m experiments.metagradients                  # MNIST: 60,000 weights
    python -m experiments.metagradients --data digits    # 1,437, in a minute
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn import metrics

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.cli import option
from experiments.common.workloads import NoisyLabels as Examples
from experiments.common.workloads import losses
from hypergrad import constraints, curvature, data, implicit, meta, nets


@dataclass(frozen=True)
class Config:
    """What to run."""

    data: str = "mnist"
    wrong: float = option(0.3, "share of the training labels that are replaced by another one")
    hidden: int = 100
    steps: int = 600
    batch_size: int = 500
    learning_rate: float = option(0.1, "at first; by a cosine to 0")
    momentum: float = 0.9
    dampings: tuple[float, ...] = option((1e-3, 1e-2, 1e-1), "λ; influence is given the best")
    curvature_examples: int = option(10_000, "for H")
    retrained: int = option(24, "runs with examples left out")
    left_out: float = option(0.1, "share of the examples")
    removed: tuple[float, ...] = option((0.1, 0.2, 0.3, 0.4), "shares of the most suspected")
    meta_iterations: int = 10
    meta_step: float = option(0.1, "of Adam, in the logarithms of the weights")
    seed: int = 0


DIGITS = Config("digits", steps=100, batch_size=100, curvature_examples=1437, meta_iterations=8)


class Found(NamedTuple):
    """What came out.

    Attributes:
      area: by score, area under the ROC curve of finding wrong labels, 0.5 by chance.
      damping: that influence was given, for foretelling and for finding.
      actual: ``(retrained,)``, change of ``L`` where examples are left out.
      foretold: by score, ``(retrained,)``.
      test_error: by score, for every share that was removed, ``(removed,)``.
      trained_on: by name of the weights, test error after training with them.
      learning: ``(meta_iterations,)``, ``L`` on the half that is followed, while the weights are learned.
      choosing: by iterations made, ``L`` on the other half.
      slope: of ``L`` along a random direction: the metagradient's, and a finite difference.
    """

    area: dict[str, float]
    damping: tuple[float, float]
    actual: np.ndarray
    foretold: dict[str, np.ndarray]
    test_error: dict[str, np.ndarray]
    trained_on: dict[str, float]
    learning: np.ndarray
    choosing: dict[int, float]
    slope: tuple[float, float]


def network(config: Config, e: Examples) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """``init(key)`` and ``apply(params, images)``."""
    return nets.mlp((e.images.shape[1], config.hidden, 10))


def training(config: Config, e: Examples) -> Callable[..., Any]:
    """The run, ``run(e, c)``: from weights of the examples to the network's parameters; always the same."""
    init, apply = network(config, e)
    start_key, rows_key = jax.random.split(jax.random.key(config.seed))
    rows = data.minibatches(rows_key, len(e.labels), config.batch_size, config.steps)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)

    def run(e: Examples, c: Array, adjoint: Any = None) -> Any:
        def loss(w: Any, c: Array, rows: Array) -> Array:
            return jnp.mean(c[rows] * losses(apply, w, e.images[rows], e.labels[rows]))

        hypers = {"learning_rate": rate, "momentum": config.momentum}
        options = {"steps": config.steps, "optimizer": hg.heavy_ball(), "adjoint": adjoint}
        return hg.train(loss, init(start_key), hypers, c, rows, **options).params

    return run


def influence(config: Config, e: Examples, w: Any, damping: float) -> Array:
    """``-1/n ∇L · (H + λ I)⁻¹ ∇loss_i`` for every example: one linear system, and one product forwards."""
    _, apply = network(config, e)
    few = e.images[: config.curvature_examples], e.labels[: config.curvature_examples]
    H = curvature.gauss_newton(apply, nets.cross_entropy, w, *few)
    slope = jax.grad(lambda w: jnp.mean(losses(apply, w, e.clean_images, e.clean_labels)))(w)
    linear = implicit.ConjugateGradients(tolerance=1e-2, damping=damping)
    u = implicit.linear_solve(H, slope, linear=linear)
    along = jax.jvp(lambda w: losses(apply, w, e.images, e.labels), (w,), (u,))[1]
    return -along / len(e.labels)


def slopes(
    after: Callable[..., Array], e: Examples, metagradient: Array, rng: np.random.Generator
) -> tuple[float, float]:
    """Of ``L`` along a random direction: the metagradient's, and a finite difference."""
    direction = jnp.asarray(rng.choice([-0.02, 0.02], len(metagradient)), jnp.float32)
    ends = [float(after(e, 1 + sign * direction)) for sign in (1, -1)]
    return float(jnp.vdot(metagradient, direction)), (ends[0] - ends[1]) / 2


def main(
    config: Config, directory: str | None = None, checkpoint: str | None = None, output: str | None = None
) -> Found:
    """Run the experiment; write the figure and its record if there is a folder for it."""
    e, wrong = workloads.wrong_labels(config.data, directory, config.wrong, config.seed)
    n, rng = len(wrong), np.random.default_rng(config.seed + 1)
    _, apply = network(config, e)
    run = training(config, e)
    trained = jax.jit(run)
    clean = jax.jit(lambda e, w: jnp.mean(losses(apply, w, e.clean_images, e.clean_labels)))
    error = jax.jit(lambda e, w: nets.error_rate(apply(w, e.test_images), e.test_labels))

    def outer(e: Examples, c: Array) -> Array:
        return clean(e, run(e, c))

    ones = jnp.ones(n)
    after = jax.jit(outer)
    value, metagradient = jax.jit(jax.value_and_grad(outer, argnums=1))(e, ones)
    w = trained(e, ones)
    slope = slopes(after, e, metagradient, rng)
    out = [rng.permutation(n)[: round(config.left_out * n)] for _ in range(config.retrained)]
    actual = np.array([float(after(e, ones.at[rows].set(0))) - float(value) for rows in out])
    tell = lambda scores: np.array([-float(np.sum(scores[rows])) for rows in out])  # noqa: E731
    right = lambda scores: float(np.corrcoef(actual, tell(scores))[0, 1])  # noqa: E731
    area = lambda scores: float(metrics.roc_auc_score(wrong, scores))  # noqa: E731
    by_damping = {λ: np.asarray(jax.jit(partial(influence, config))(e, w, λ)) for λ in config.dampings}
    damping = (
        max(by_damping, key=lambda λ: right(by_damping[λ])),
        max(by_damping, key=lambda λ: area(by_damping[λ])),
    )
    foretold = {"metagradient": tell(np.asarray(metagradient)), "influence": tell(by_damping[damping[0]])}
    scores = {
        "metagradient": np.asarray(metagradient),
        "influence": by_damping[damping[1]],
        "training loss": np.asarray(losses(apply, w, e.images, e.labels)),
    }
    learned = learn(config, e, outer, checkpoint)
    scores["learned weight"] = -np.asarray(learned.hypers)

    def without(score: np.ndarray, share: float) -> float:
        worst = np.argsort(-score)[: round(share * n)]
        return float(error(e, trained(e, ones.at[worst].set(0))))

    weights = {"all 1": ones, "1 for right labels, else 0": jnp.where(wrong, 0.0, 1.0)}
    weights["learned"] = learned.hypers
    found = Found(
        area={name: area(score) for name, score in scores.items()},
        damping=damping,
        actual=actual,
        foretold=foretold,
        test_error={
            name: np.array([without(score, share) for share in config.removed])
            for name, score in scores.items()
        },
        trained_on={name: float(error(e, trained(e, c))) for name, c in weights.items()},
        learning=np.asarray(learned.history.loss),
        choosing=learned.scores,
        slope=slope,
    )
    report(config, wrong, found)
    if output is not None:
        suffix = "" if config.data == "mnist" else f"_{config.data}"
        draw(Path(output) / f"metagradients{suffix}.png", config, found)
    return found


def learn(
    config: Config, e: Examples, outer: Callable[..., Array], checkpoint: str | None
) -> meta.Optimized:
    """Weights of all examples, by Adam in their logarithms, whose steps are alike for all of them."""
    half = len(e.clean_labels) // 2
    followed, other = (
        e._replace(clean_images=e.clean_images[part], clean_labels=e.clean_labels[part])
        for part in (slice(half), slice(half, None))
    )
    return meta.optimize(
        lambda c, key: outer(followed, c),
        jnp.ones(len(e.labels)),
        select=lambda c: outer(other, c),
        select_every=1,
        optimizer=optax.adam(config.meta_step),
        steps=config.meta_iterations,
        constraints=constraints.positive,
        checkpoint=checkpoint,
    )


def report(config: Config, wrong: np.ndarray, found: Found) -> None:
    """Tables."""
    print(f"{len(wrong)} weights; {wrong.sum()} labels are wrong; {config.steps} steps")
    print(
        "slope along a random direction: metagradient {:.5f}, finite difference {:.5f}".format(*found.slope)
    )
    print(
        f"leaving out {config.left_out:.0%} of the examples, {config.retrained} times: correlation of the"
    )
    for name, values in found.foretold.items():
        correlation = np.corrcoef(found.actual, values)[0, 1]
        factor = np.vdot(found.actual, values) / np.vdot(values, values)
        print(
            f"  change of L with that foretold by {name}: {correlation:.3f}; regression slope {factor:.2f}"
        )
    head = "".join(f"{share:>8.0%}" for share in config.removed)
    print(f"{'area under ROC; test error without':<40}{head}")
    for name, errors in found.test_error.items():
        row = "".join(f"{error:8.4f}" for error in errors)
        print(f"  {name:<28}{found.area[name]:10.3f}{row}")
    for name, value in found.trained_on.items():
        print(f"trained with weights {name}: test error {value:.4f}")


def draw(path: Path, config: Config, found: Found) -> None:
    """What was foretold and what came; what removing the suspected is worth; the learning."""
    figure, axes = figures.figure(1, 3)
    for k, (name, values) in enumerate(found.foretold.items()):
        correlation = np.corrcoef(found.actual, values)[0, 1]
        axes[0, 0].scatter(
            1e3 * values,
            1e3 * found.actual,
            marker="ox"[k],
            color=figures.COLOURS[k],
            label=f"{name}: correlation {correlation:.2f}",
        )
    axes[0, 0].axline((0, 0), slope=1, color="0.6", linewidth=1)
    axes[0, 0].set(title=f"Runs without {config.left_out:.0%} of the examples",
                   xlabel="foretold change of the validation loss, 10⁻³ nats",
                   ylabel="actual change, 10⁻³ nats")  # fmt: skip
    axes[0, 0].legend(fontsize="small")
    axes[0, 0].grid(alpha=0.25)
    figures.lines(
        axes[0, 1],
        {f"{n}: area {found.area[n]:.3f}": 100 * x for n, x in found.test_error.items()},
        marker="o",
    )
    shares = [f"{share:.0%}" for share in config.removed]
    axes[0, 1].set(title="The most suspected examples left out", xlabel="share left out",
                   ylabel="test error, %", xticks=range(len(shares)), xticklabels=shares)  # fmt: skip
    chosen = np.array(list(found.choosing.values()))
    figures.lines(axes[0, 2], {"on the clean examples followed": found.learning, "on others": chosen})
    axes[0, 2].set(title="Learning all weights", xlabel="metagradient step", ylabel="validation loss, nats")
    axes[0, 2].xaxis.get_major_locator().set_params(integer=True)
    figures.save(figure, path, {"config": config} | found._asdict())


def command(arguments: Sequence[str] | None = None) -> Found:
    """Run as the command line says."""
    fast = {"steps": 20, "retrained": 4, "meta_iterations": 2, "dampings": (0.1,), "removed": (0.3,)}
    config, run = cli.parse(
        "metagradients", __doc__, {"mnist": Config(), "digits": DIGITS}, arguments,
        fast=lambda _: replace(DIGITS, **fast), flags=("data_dir", "checkpoint"),
    )  # fmt: skip
    return main(config, run.data_dir, run.checkpoint, run.output)


if __name__ == "__main__":
    command()
