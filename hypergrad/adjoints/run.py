"""A training run as a pure function.

``train`` turns the user's call into a `Run`, which is static, and three pytrees of arrays that may be
differentiated: the start, the `Constants` and the `Inputs`.  An adjoint maps them to the end of the run.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array

from hypergrad._base.tracing import (
    Converted,
)
from hypergrad._base.trees import PyTree, Scalar, Step
from hypergrad._base.varying import axes_of, settled
from hypergrad.adjoints.shards import Shards
from hypergrad.program import (
    PARAMS,
    AnyOptimizer,
    Examples,
    FloatStep,
    Layout,
    Leaf,
    Move,
    Observed,
    Optimizer,
    StepContext,
)


class Constants(NamedTuple):
    """What is the same at every step.

    Attributes:
      loss: flat list: the arrays that the loss closes over, those that `observe` closes over, and the
        user's ``meta``.
      hypers: for every leaf of the parameters, the constant hyperparameters by name.
      watch: flat list of the arrays that ``watch`` closes over.
      exact: the integers behind the start, if it is the end of another run; see `Outputs`.
    """

    loss: list[Array]
    hypers: list[dict[str, Array]]
    watch: list[Array]
    exact: PyTree = None


class Inputs(NamedTuple):
    """What differs from step to step; the leading axis of every array is the step.

    Attributes:
      batch: flat list of arrays: the user's ``batches``; then the step, if the optimizer observes.
      hypers: for every leaf of the parameters, the scheduled hyperparameters by name.
      step: ``(T,)``, int32: ``t, t + 1, ...``, from 0 or from where another run ended.
    """

    batch: list[Array]
    hypers: list[dict[str, Array]]
    step: Step


class Snapshot(NamedTuple):
    """What ``watch`` sees of a step, before its moves.

    Attributes:
      step: int32 scalar, from 0.
      params: the parameters before the step, a tree.
      state: the optimizer's variables before the step, by name, each a tree like the parameters.
      loss: scalar, the inner loss at ``params``.
      gradient: of the inner loss at ``params``, a tree like the parameters, or like what is trained of a
        module.
      model_state: the state of the model before the step; None if none was given.
    """

    step: Step
    params: PyTree
    state: dict[str, PyTree]
    loss: Scalar
    gradient: PyTree
    model_state: PyTree = None


class Outputs(NamedTuple):
    """The outputs of one step, or of a whole run, with the step as leading axis.

    Attributes:
      loss: the inner loss before the step.
      watched: what ``watch`` returned.
      exact: of a whole run that is played on integers: the integers behind its end; else None.
    """

    loss: Any
    watched: PyTree
    exact: PyTree = None


Hypers = tuple[Sequence[Mapping[str, Array]], Sequence[Mapping[str, Array]]]  # by leaf: constant, scheduled
Solution = tuple[list[Leaf], Outputs]  # the end of a run, and what its steps gave out


@dataclass(frozen=True)
class Run:
    """The static part of a training run.

    Attributes:
      call: the user's call, for messages.
      optimizer: a program of moves, or a function of all parameters at once.
      loss: the inner loss after closure conversion: a function of the arrays that it closes over and of
        ``[*params, *meta, *batch]``, a batch of one if the optimizer looks at single examples.
      watch: the user's watch after closure conversion, a function of ``constants.watch`` and of a flat
        `Snapshot`; or None.
      layout: how trees are laid out in the flat state.
      steps: ``T``, at least 1.
      captured: how many of ``constants.loss`` are closed over, first by the loss; the others are ``meta``.
      x64: whether the user's code runs in JAX's 64-bit mode.
      arguments: tree structure of ``(meta, batch)``, for an optimizer of all parameters at once.
      observe: what else the optimizer evaluates, after closure conversion, with arguments like those of the
        loss; or None.
      names: of the leaves, for messages.
      custom: whether the loss contains custom derivative rules of the user.
      shards: how the batch of a step is cut, for a loss of one part; or None.
    """

    call: str
    optimizer: AnyOptimizer
    loss: Converted
    watch: Converted | None
    layout: Layout
    steps: int
    captured: int
    x64: bool
    arguments: Any = None
    observe: Converted | None = None
    names: tuple[str, ...] = ()
    custom: bool = False
    shards: Shards | None = None

    @property
    def of_part(self) -> "Run":
        """The run as one part of a batch has it."""
        return replace(self, shards=None)

    @property
    def program(self) -> Optimizer:
        """The optimizer as a program of moves; a `ReversalError` if it is none."""
        return self.optimizer.program(self.call)

    def moves(
        self,
        constants: Sequence[Mapping[str, Array]],
        inputs: Sequence[Mapping[str, Array]],
        t: Step,
    ) -> list[Sequence[Move]]:
        """The moves of every leaf at one step.

        Args:
          constants: for every leaf, the constant hyperparameters by name.
          inputs: for every leaf, the scheduled hyperparameters of the step by name.
          t: int32, the step.
        """
        return [
            self.leaf_moves(i, SimpleNamespace(**fixed, **scheduled), t)
            for i, (fixed, scheduled) in enumerate(zip(constants, inputs))
        ]

    def leaf_moves(self, leaf: int, h: Any, t: Step) -> Sequence[Move]:
        """The moves of one leaf at one step, from its hyperparameters."""
        if self.layout.labels is not None:
            h.label = self.layout.labels[leaf]
        with jax.enable_x64(self.x64):
            return self.program.moves(h, t)

    def transformed(self, hypers: Hypers, observations: Sequence[Observed]) -> list[Observed]:
        """The observations with the gradient transformed, as the moves see them."""
        if self.optimizer.transform is None:
            return list(observations)
        with jax.enable_x64(self.x64):
            given = [SimpleNamespace(**fixed, **each) for fixed, each in zip(*hypers)]
            gradient = self.optimizer.transform(given, gradients(observations))
        return [{**each, "gradient": g} for each, g in zip(observations, gradient)]

    def loss_at(self, params: Sequence[Array], loss_constants: list[Array], batch: list[Array]) -> Scalar:
        """The inner loss at flat parameters: a mean over parts, or over examples if those are looked at."""
        if self.shards is not None:
            part = self.of_part
            return self.shards.mean(lambda batch: part.loss_at(params, loss_constants, batch), batch)
        loss = self.examples(loss_constants, batch).loss
        if not self.optimizer.per_example:
            return loss(params, batch)
        return jnp.mean(jax.vmap(lambda example: loss(params, [x[None] for x in example]))(batch))

    def examples(self, loss_constants: list[Array], batch: list[Array]) -> Examples:
        """The minibatch as an optimizer that looks at single examples sees it."""
        count, meta = len(self.loss.jaxpr.constvars), loss_constants[self.captured :]

        def loss(params: PyTree, batch: list[Array]) -> Array:
            return self.loss(loss_constants[:count], [*jax.tree.leaves(params), *meta, *batch])

        return Examples(loss, batch)

    def observed_at(
        self, params: Sequence[Array], loss_constants: list[Array], batch: list[Array]
    ) -> list[Observed]:
        """What else the optimizer evaluates at flat parameters, by leaf."""
        if self.observe is None:
            return [{} for _ in params]
        first, meta = len(self.loss.jaxpr.constvars), loss_constants[self.captured :]
        observed = self.observe(loss_constants[first : self.captured], [*params, *meta, *batch])
        trees = {name: jax.tree.leaves(tree) for name, tree in observed.items()}
        return [{name: tree[i] for name, tree in trees.items()} for i in range(len(params))]

    def watched(self, snapshot: Snapshot, constants: Constants) -> PyTree:
        """What the user's ``watch`` returns for a snapshot; None without one."""
        if self.watch is None:
            return None
        return self.watch(constants.watch, jax.tree.leaves(snapshot))

    def snapshot(
        self, leaves: Sequence[Leaf], loss: Scalar, observations: Sequence[Observed], t: Step
    ) -> Snapshot:
        """What ``watch`` sees of a step."""
        unflatten = self.layout.params.unflatten
        params = unflatten(self.params_of(leaves))
        return Snapshot(t, params, self.state_of(leaves), loss, unflatten(gradients(observations)))

    def params_of(self, leaves: Sequence[Leaf]) -> list[Array]:
        """The parameters in the float state, flat."""
        return [leaf[PARAMS] for leaf in leaves[: self.layout.params.num_leaves]]

    def state_of(self, leaves: Sequence[Leaf]) -> dict[str, PyTree]:
        """The optimizer's variables in the float state, by name."""
        return self.optimizer.state_of(leaves, self.layout)

    def step(
        self,
        leaves: Sequence[Leaf],
        constants: Constants,
        inputs: Inputs,
        gradient_of: Callable[..., tuple[Array, list[Observed]]],
    ) -> tuple[list[Leaf], Outputs]:
        """One step in floats, for adjoints that leave differentiation to JAX.

        Args:
          leaves: the float state before the step.
          constants: what is the same at every step.
          inputs: of this step.
          gradient_of: loss and observations.  With `plain_gradient` the step is differentiable in both
            modes; with `hypergrad.adjoints.linearize.gradient_of` in reverse mode only, at a lower cost.

        Returns:
          The float state after the step, and its outputs.
        """
        loss, observations = gradient_of(self.params_of(leaves), constants.loss, inputs.batch)
        loss_of = partial(self.loss_of, constants, inputs)
        at = FloatStep(
            leaves,
            loss,
            self.transformed((constants.hypers, inputs.hypers), observations),
            lambda: self.moves(constants.hypers, inputs.hypers, inputs.step),
            {**constants.hypers[0], **inputs.hypers[0]},
            lambda: self.examples(constants.loss, inputs.batch),
            lambda: StepContext(loss_of, loss, *self.arguments_of(constants, inputs)),
        )
        with jax.enable_x64(self.x64):
            new = self.optimizer.advance(at, self.layout)
        snapshot = self.snapshot(leaves, loss, observations, inputs.step)
        return new, Outputs(loss, self.watched(snapshot, constants))

    def settled(self, start: list[Leaf], constants: Constants, inputs: Inputs) -> list[Leaf]:
        """The start, whose variables count as varying over all mesh axes over which steps make them vary.

        Raises:
          TypeError: steps make parameters vary that do not; the loss is another function if they do.
        """

        def step(leaves: list[Leaf]) -> list[Leaf]:
            first = jax.tree.map(lambda x: x[0], inputs)
            new, _ = self.step(leaves, constants, first, self.plain_gradient)
            for name, before, after in zip(self.names, self.params_of(leaves), self.params_of(new)):
                more = sorted(axes_of(after) - axes_of(before))
                if more:
                    raise TypeError(
                        f"{self.call}: a step makes {name} vary over the mesh axis {more[0]!r}, over "
                        "which it does not vary at the start, because a hyperparameter or the update of "
                        "another parameter does; if every device is to train parameters of its own, pass "
                        f"jax.lax.pcast(params, {more[0]!r}, to='varying'), else hyperparameters that are "
                        "the same on all devices"
                    )
            return new

        return settled(step, start)

    def loss_of(self, constants: Constants, inputs: Inputs, params: PyTree) -> Scalar:
        """The inner loss of a step as a function of the parameters."""
        return self.loss_at(jax.tree.leaves(params), constants.loss, inputs.batch)

    def arguments_of(self, constants: Constants, inputs: Inputs) -> tuple[PyTree, PyTree]:
        """``meta`` and ``batch`` of a step, as the loss has them."""
        return self.arguments.unflatten([*constants.loss[self.captured :], *inputs.batch])

    def plain_gradient(
        self, params: list[Array], loss_constants: list[Array], batch: list[Array]
    ) -> tuple[Scalar, list[Observed]]:
        """Loss, and by leaf the gradient and whatever else is observed, with JAX's own derivatives."""
        loss, gradient = jax.value_and_grad(lambda w: self.loss_at(w, loss_constants, batch))(params)
        observed = self.observed_at(params, loss_constants, batch)
        return loss, [{"gradient": g, **each} for g, each in zip(gradient, observed)]


def gradients(observations: Sequence[Observed]) -> list[Array]:
    """The gradient, by leaf."""
    return [each["gradient"] for each in observations]


@contextlib.contextmanager
def closures_refused(call: str) -> Iterator[None]:
    """Raise a readable error if a function with a custom derivative closes over a traced value."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise TypeError(
            f"{call}: the optimizer closes over a value that is being traced (differentiated, compiled or "
            "vmapped), in which this adjoint could not differentiate; make it a hyperparameter of the "
            "optimizer (Optimizer(hypers=...)), or pass adjoint=Checkpointed() or Stored()"
        ) from error
