"""Find wrong labels: the hypergradient of the validation loss in one weight per training example.

Logistic regression on labels of which a part was replaced by other ones: ``w`` minimises
``f(w, s) = 1/n Σ_i weight(s_i) loss_i(w) + penalty/2 |w|²``, ``weight(s) = 2 sigmoid(s)``, 1 at the start.
At the minimum one linear system gives the derivative of the loss on a few clean examples in all weights.
A positive one says that the example does harm.  Then the weights are learned, by HOAG.  Hypergradients are
compared with the training loss of an example, which needs no clean ones.

    python -m experiments.data_weights                  # MNIST: 60,000 weights
    python -m experiments.data_weights --data digits    # 1,437, in seconds
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

from experiments.common import cli, figures, workloads
from experiments.common.workloads import NoisyLabels as Examples
from experiments.common.workloads import linear
from hypergrad import implicit, nets


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    data: str = "mnist"
    wrong: float = cli.option(0.3, "share of the training labels that are replaced by another one")
    penalty: float = 1e-3
    tolerance: float = 1e-3  # of the norm of the gradient of f, and relative, of the linear system
    outer_steps: int = 10
    outer_step: float = 1.0  # of gradient descent in s, times n
    seed: int = 0


class Found(NamedTuple):
    """What came out; a score says how much an example is suspected.

    Attributes:
      wrong: ``(n,)``, whether the label was replaced.
      scores: by name, ``(n,)``.
      area: by name, area under the ROC curve, 0.5 by chance.
      test_error: by name of the weights, share of wrong answers on examples that nothing else has seen.
      test_loss: the same, nats.
      outer_loss: ``(K,)``, nats, while the weights are learned.
    """

    wrong: np.ndarray
    scores: dict[str, np.ndarray]
    area: dict[str, float]
    test_error: dict[str, float]
    test_loss: dict[str, float]
    outer_loss: np.ndarray


losses = partial(workloads.losses, linear)


def inner(config: Config, e: Examples, w: Any, s: Array) -> Array:
    """``f(w, s)``."""
    square = sum(jnp.sum(x**2) for x in jax.tree.leaves(w))
    weights = 2 * jax.nn.sigmoid(s)
    return jnp.mean(weights * losses(w, e.images, e.labels)) + config.penalty / 2 * square


def outer(e: Examples, w: Any, s: Array) -> Array:
    """Mean loss on the clean examples."""
    return jnp.mean(losses(w, e.clean_images, e.clean_labels))


def solver(objective: Callable[[Any, Array], Array]) -> Callable[[Any, Array, Any], Any]:
    """L-BFGS until the gradient is small."""
    optimizer = optax.lbfgs()

    def solve(w: Any, s: Array, tolerance: Any) -> Any:
        value_of = lambda w: objective(w, s)  # noqa: E731
        value_and_grad = optax.value_and_grad_from_state(value_of)

        def going(carry: Any) -> Array:
            w, state, count = carry
            _, gradient = value_and_grad(w, state=state)
            return (optax.tree.norm(gradient) > tolerance) & (count < 1000)

        def step(carry: Any) -> Any:
            w, state, count = carry
            value, gradient = value_and_grad(w, state=state)
            updates, state = optimizer.update(
                gradient, state, w, value=value, grad=gradient, value_fn=value_of
            )
            return optax.apply_updates(w, updates), state, count + 1

        return jax.lax.while_loop(going, step, (w, optimizer.init(w), 0))[0]

    return solve


@partial(jax.jit, static_argnums=0)
def suspicions(config: Config, e: Examples, w: Any) -> tuple[Any, Array]:
    """The minimum with all weights 1, and the hypergradient of the outer loss in the weights, times n."""
    objective = partial(inner, config, e)
    solve = solver(objective)
    linear = implicit.ConjugateGradients(tolerance=config.tolerance)

    @implicit.minimizer(objective, linear=linear, tolerance=config.tolerance)
    def fit(init: Any, s: Array) -> Any:
        return solve(init, s, config.tolerance)

    def loss(s: Array) -> tuple[Array, Any]:
        minimum = fit(w, s)
        return outer(e, minimum, s), minimum

    n = len(e.labels)
    gradient, minimum = jax.grad(loss, has_aux=True)(jnp.zeros(n))
    return minimum, 2 * n * gradient  # d weight / ds = 1/2 at s = 0


@partial(jax.jit, static_argnums=0)
def learn(config: Config, e: Examples, w: Any) -> implicit.Hoag:
    """Learn the weights from a start of 1."""
    objective = partial(inner, config, e)
    return implicit.hoag(
        objective,
        partial(outer, e),
        jnp.zeros(len(e.labels)),
        w,
        solve=solver(objective),
        tolerances=jnp.geomspace(10 * config.tolerance, config.tolerance, config.outer_steps),
        optimizer=optax.sgd(len(e.labels) * config.outer_step),
    )


@partial(jax.jit, static_argnums=0)
def retrain(config: Config, e: Examples, w: Any, s: Array) -> Any:
    """The minimum for other weights."""
    return solver(partial(inner, config, e))(w, s, config.tolerance)


def main(config: Config, directory: str | None = None, output: str | None = None) -> Found:
    """Run the experiment; write the figure and its record if there is a folder for it."""
    e, wrong = workloads.wrong_labels(config.data, directory, config.wrong, config.seed)
    pixels, classes = e.images.shape[1], int(e.test_labels.max()) + 1
    zero = nets.Dense(jnp.zeros((pixels, classes)), jnp.zeros(classes))
    minimum, gradient = suspicions(config, e, zero)
    scores = {
        "hypergradient": np.asarray(gradient),
        "training loss": np.asarray(losses(minimum, e.images, e.labels)),
    }
    learned = learn(config, e, minimum)
    scores["learned weight"] = np.asarray(-learned.hypers)
    weights = {"learned": learned.hypers, "1 for right labels, else 0": jnp.where(wrong, -jnp.inf, 0.0)}
    models = {"all 1": minimum} | {name: retrain(config, e, minimum, s) for name, s in weights.items()}
    found = Found(
        wrong=wrong,
        scores=scores,
        area={name: float(metrics.roc_auc_score(wrong, score)) for name, score in scores.items()},
        test_error={
            name: float(nets.error_rate(linear(w, e.test_images), e.test_labels))
            for name, w in models.items()
        },
        test_loss={
            name: float(jnp.mean(losses(w, e.test_images, e.test_labels))) for name, w in models.items()
        },
        outer_loss=np.asarray(learned.values),
    )
    print(f"{len(wrong)} weights; {wrong.sum()} labels are wrong")
    for name, area in found.area.items():
        print(f"found by {name}: area under the ROC curve {area:.3f}")
    for name, error in found.test_error.items():
        print(f"weights {name}: test error {error:.4f}, test loss {found.test_loss[name]:.3f} nats")
    if output is not None:
        suffix = "" if config.data == "mnist" else f"_{config.data}"
        draw(Path(output) / f"data_weights{suffix}.png", config, found)
    return found


def draw(path: Path, config: Config, found: Found) -> None:
    """Hypergradients of right and wrong labels, ROC curves, and the learning of the weights."""
    figure, axes = figures.figure(1, 3)
    gradient = found.scores["hypergradient"]
    edges = np.linspace(*np.quantile(gradient, (0.005, 0.995)), 80)
    for k, (name, chosen) in enumerate((("right labels", ~found.wrong), ("wrong labels", found.wrong))):
        style = figures.look(k, label=name)
        axes[0, 0].hist(gradient[chosen], edges, density=True, histtype="step", **style)
    axes[0, 0].set(title="Hypergradients, all weights 1", ylabel="density",
                   xlabel="n × d(validation loss)/d(weight), nats")  # fmt: skip
    axes[0, 0].legend(fontsize="small")
    for k, (name, score) in enumerate(found.scores.items()):
        false, true, _ = metrics.roc_curve(found.wrong, score)
        axes[0, 1].plot(false, true, **figures.look(k, label=f"{name}: area {found.area[name]:.3f}"))
    axes[0, 1].set(title="Wrong labels found", xlabel="share of the right labels suspected",
                   ylabel="share of the wrong labels suspected")  # fmt: skip
    axes[0, 1].grid(alpha=0.25)
    axes[0, 1].legend(fontsize="small", loc="lower right")
    figures.lines(axes[0, 2], {"on clean examples": found.outer_loss})
    axes[0, 2].set(title="Learning the weights", xlabel="outer step", ylabel="validation loss, nats")
    axes[0, 2].xaxis.get_major_locator().set_params(integer=True)
    kept = ("area", "test_error", "test_loss", "outer_loss")
    figures.save(figure, path, {"config": config} | {name: getattr(found, name) for name in kept})


def command(arguments: Sequence[str] | None = None) -> Found:
    """Run as the command line says."""
    config, run = cli.parse(
        "data_weights", __doc__, {"mnist": Config(), "digits": Config("digits")}, arguments,
        fast=lambda config: replace(config, data="digits", outer_steps=5), flags=("data_dir",),
    )  # fmt: skip
    return main(config, run.data_dir, run.output)


if __name__ == "__main__":
    command()
