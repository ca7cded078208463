"""How a network is trained on a distilled set."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree

from hypergrad import constraints, data, nets
from hypergrad._base.checks import is_whole
from hypergrad._base.trees import PyTree
from hypergrad.adjoints.strategies import Adjoint, Stored
from hypergrad.distillation.augment import Augmentation
from hypergrad.optimizers.momentum_family import momentum as momentum_optimizer
from hypergrad.training.inner_loop import train

Network = tuple[Callable[[Array], PyTree], Callable[[PyTree, Array], Array]]
NUMBERS = {  # the numbers of a recipe that can be learned, and their domains
    "learning_rate": constraints.positive,
    "momentum": constraints.unit,
    "l2": constraints.positive,
}
BASES = ("bases", "coefficients")
UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # for what runs once, and compiles longer than it runs


@dataclass(frozen=True)
class Recipe:
    """How to train on a small set of examples; a distilled set is worth little without its own.

    ``v <- γ v - (1-γ) g,  w <- w + α_t v``, which is ``optax.sgd(α_t (1-γ), momentum=γ)``.

    Attributes:
      steps: ``T``, at least 1.
      learning_rate: ``α``, a number or one for every step, > 0.
      momentum: ``γ``, in [0, 1).
      l2: ``λ`` of a penalty ``λ Σ w²`` on all parameters, >= 0.
      batch_size: examples in a step; None for all.
      shuffled: whether every epoch has its own order; otherwise each step takes the next ``batch_size``
        rows, starting over after the last.
      augmentation: augmentation of the examples at every step; None for none.
      inits: size of the pool of initial weights from which a run draws: 1 always starts from the same
        weights, None from new ones every time.
      seed: seed of that pool; unused if ``inits`` is None.

    Raises:
      ValueError: a setting is out of its range.

    >>> Recipe(steps=3, learning_rate=0.5).rates().tolist()
    [0.5, 0.5, 0.5]
    """

    steps: int = 20
    learning_rate: Any = 0.1
    momentum: Any = 0.9
    l2: Any = 0.0
    batch_size: int | None = None
    shuffled: bool = False
    augmentation: Augmentation | None = None
    inits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "inits"):
            value = getattr(self, name)
            if name != "steps" and value is None:
                continue
            if not is_whole(value):
                raise ValueError(f"Recipe({name}={value!r}): it must be a whole number, at least 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer):
            raise ValueError(f"Recipe(seed={self.seed!r}): it must be a whole number")
        for name, low, high in (("learning_rate", 0, np.inf), ("momentum", 0, 1), ("l2", 0, np.inf)):
            value = getattr(self, name)
            if isinstance(value, jax.core.Tracer):
                continue
            shape = np.shape(value)
            if shape != () and not (name == "learning_rate" and shape == (self.steps,)):
                wanted = f"a number or of shape ({self.steps},)" if name == "learning_rate" else "a number"
                raise ValueError(f"Recipe({name}=...) of shape {shape}: it must be {wanted}")
            numbers = np.asarray(value)
            if not np.all((numbers >= low) & (numbers < high)) or (
                name == "learning_rate" and 0 in numbers
            ):
                domain = {"learning_rate": "above 0", "momentum": "in [0, 1)", "l2": "0 or more"}[name]
                raise ValueError(f"Recipe({name}={value!r}): it must be {domain}")

    def rates(self) -> Array:
        """``(T,)`` learning rates."""
        return jnp.broadcast_to(jnp.asarray(self.learning_rate, jnp.result_type(float)), (self.steps,))

    def rows(self, key: Array, examples: int) -> Array:
        """``(T, batch)`` int32 rows of the examples in every step.

        Args:
          key: PRNG key, for a shuffled order.
          examples: number of examples.
        """
        size = min(examples, self.batch_size or examples)
        if self.shuffled and size < examples:
            return data.minibatches(key, examples, size, self.steps)
        return (jnp.arange(self.steps * size, dtype=jnp.int32) % examples).reshape(self.steps, size)

    def weights(self, init: Callable[[Array], PyTree], key: Array) -> PyTree:
        """Initial weights for a run.

        Args:
          init: the network's function from a key to parameters.
          key: PRNG key of the run.
        """
        if self.inits is None:
            return init(key)
        member = 0 if self.inits == 1 else jax.random.randint(key, (), 0, self.inits)
        return init(jax.random.fold_in(jax.random.key(self.seed), member))

    def train(
        self, network: Network, inputs: Array, labels: Array, key: Array, adjoint: Adjoint | None = None
    ) -> PyTree:
        """Parameters of a network trained by this recipe.

        Args:
          network: ``(init, apply)``: from a key to parameters, and from parameters and inputs to logits.
          inputs: ``(n, ...)`` examples, normalized.
          labels: ``(n,)`` integers or ``(n, C)`` probabilities.
          key: PRNG key of the run: initial weights, order, augmentation.
          adjoint: how to differentiate the run, by default with everything stored.
        """
        return train_with(self, network, inputs, labels, key, Stored() if adjoint is None else adjoint)

    def optax(self) -> optax.GradientTransformation:
        """The inner optimizer for plain optax; the penalty is part of it."""
        alpha = np.asarray(self.rates()) * (1 - float(self.momentum))
        return optax.chain(
            optax.add_decayed_weights(2 * float(self.l2)),
            optax.sgd(lambda t: jnp.asarray(alpha)[jnp.minimum(t, self.steps - 1)], float(self.momentum)),
        )


def with_numbers(recipe: Recipe, numbers: Mapping[str, Any]) -> Recipe:
    """The recipe with some numbers replaced."""
    return dataclasses.replace(recipe, **numbers)


def numbers_of(recipe: Recipe) -> dict[str, np.ndarray]:
    """The numbers of a recipe by name."""
    return {name: np.asarray(getattr(recipe, name)) for name in NUMBERS}


def in_words(recipe: Recipe) -> str:
    """A recipe in one line for people; of a schedule only its ends.

    >>> in_words(Recipe(steps=10, learning_rate=0.3))
    '10 steps, learning rate 0.3, momentum 0.9, all examples in a step, new initial weights every time'
    """
    rates = np.asarray(recipe.learning_rate)
    parts = [
        f"{recipe.steps} steps",
        f"learning rate {rates:.3g}"
        if rates.ndim == 0
        else f"learning rates {rates[0]:.3g} ... {rates[-1]:.3g}",
        f"momentum {float(recipe.momentum):.3g}",
        f"l2 {float(recipe.l2):.3g}" if recipe.l2 != 0 else "",
        "all examples in a step" if recipe.batch_size is None else f"batches of {recipe.batch_size}",
        "shuffled" if recipe.shuffled else "",
        "augmented" if recipe.augmentation is not None else "",
        {None: "new initial weights every time", 1: "fixed initial weights"}.get(
            recipe.inits, f"one of {recipe.inits} initial weights"
        ),
    ]
    return ", ".join(part for part in parts if part)


def train_with(
    recipe: Recipe,
    network: Network,
    inputs: Array,
    labels: Array,
    key: Array,
    adjoint: Adjoint,
    length: Array | None = None,
) -> PyTree:
    """Parameters after the recipe's steps, or after the first ``length`` of them.

    A traced length must not change the shape of the computation, so the run begins with ``T - length``
    steps that change nothing, with ``γ = 1`` and ``α = 0``.
    """
    init_key, order_key, augment_key = jax.random.split(key, 3)
    start, unraveled = _end_to_end(recipe.weights(network[0], init_key))
    steps = recipe.steps
    hypers = {"learning_rate": recipe.rates(), "momentum": recipe.momentum}
    optimizer = momentum_optimizer()
    rows = recipe.rows(order_key, len(inputs))
    keys = jax.random.split(augment_key, steps)
    if length is not None:
        t = jnp.arange(steps) - (steps - length)
        place = jnp.maximum(t, 0)
        hypers = {
            "learning_rate": jnp.where(t < 0, 0.0, hypers["learning_rate"][place]),
            "momentum": jnp.where(t < 0, 1.0, hypers["momentum"]),
        }
        still = (0.0, 1.0 + 1e-6)  # so that a momentum of 1 is admitted
        optimizer = dataclasses.replace(optimizer, domains={**optimizer.domains, "momentum": still})
        rows = rows[place]
    whole = rows.shape[1] == len(inputs)
    if jnp.ndim(labels) == 1:
        labels = jax.nn.one_hot(labels, logits_of(network, inputs).shape[1], dtype=inputs.dtype)
    meta = inputs, labels, recipe.l2
    penalised = isinstance(recipe.l2, jax.core.Tracer) or recipe.l2 != 0

    def loss(params: PyTree, meta: tuple[Array, Array, Array], batch: tuple[Array, Array]) -> Array:
        (x, y, l2), (rows, key) = meta, batch
        if not whole:
            x, y = x[rows], y[rows]
        if recipe.augmentation is not None:
            x = recipe.augmentation(key, x)
        value = nets.cross_entropy(network[1](unraveled(params), x), y)
        if penalised:
            value += l2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return value

    end = train(
        loss,
        start,
        hypers,
        meta,
        (rows, keys),
        steps=steps,
        optimizer=optimizer,
        adjoint=adjoint,
    ).params
    return unraveled(end)


def _end_to_end(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Parameters as one vector, and the way back; as they are if their types differ.

    Every array that moves needs instructions of its own, and the exact arithmetic many: the hypergradient
    of a small convolutional net compiles in two thirds of the time if there is only one.
    """
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    if len(set(dtypes)) != 1 or not jnp.issubdtype(dtypes[0], jnp.floating):
        return params, lambda params: params  # `train` refuses what it cannot move, by name
    return ravel_pytree(params)


def logits_of(network: Network, inputs: Any) -> jax.ShapeDtypeStruct:
    """The shape of a network's outputs for given inputs."""
    init, apply = network
    return jax.eval_shape(lambda key, x: apply(init(key), x), jax.random.key(0), inputs)
