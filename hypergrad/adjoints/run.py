"""A training run as a pure function, and the second derivatives of its loss.

``train`` turns the user's call into a `Run`, which is static, and three pytrees of arrays that may be
differentiated: the start, the `Constants` and the `Inputs`.  An adjoint maps them to the end.

========  ====================  ==============================================================
symbol    name                  meaning
========  ====================  ==============================================================
``L``     loss                  inner loss, a function of ``w`` and ``θ``
``w``     params                parameters before the step
``θ``     wanted                what else of the loss is differentiated: meta, closures, batches
``g``     gradient              ``∂L/∂w``
``S``     observed              what else the optimizer evaluates, a function of ``w`` and ``θ`` too
``u``     direction             cotangents of ``g`` and ``S``: ``u_g`` and ``u_S``
``l``     loss_cotangent        cotangent of the loss along the run
========  ====================  ==============================================================
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var

from hypergrad import program
from hypergrad._base.compiler import noinline
from hypergrad._base.tracing import (
    Converted,
    Static,
    freeze,
    instantiate,
    part,
    perturbed,
    prevent_dce,
    thaw,
)
from hypergrad._base.trees import PyTree, scatter, split
from hypergrad.program import PARAMS, Examples, GenericOptimizer, Leaf, Observed, Optimizer, StepContext


class Constants(NamedTuple):
    """What is the same at every step.

    Attributes:
      loss: flat list of arrays: what the loss closes over, what `observe` does, and the user's ``meta``.
      hypers: for every leaf of the parameters, the constant hyperparameters by name.
      watch: flat list of arrays that ``watch`` closes over.
      exact: the integers behind the start, where it is the end of another run; see `Outputs`.
    """

    loss: list[Array]
    hypers: list[dict[str, Array]]
    watch: list[Array]
    exact: PyTree = None


class Inputs(NamedTuple):
    """What differs from step to step; every array has the steps as its leading axis.

    Attributes:
      batch: flat list of arrays: the user's ``batches``; then the step, for an optimizer that observes.
      hypers: for every leaf of the parameters, the scheduled hyperparameters by name.
      step: ``(T,)`` int32, ``t, t+1, ...``, from 0 or where another run ended.
    """

    batch: list[Array]
    hypers: list[dict[str, Array]]
    step: Array


class Snapshot(NamedTuple):
    """What ``watch`` sees of a step, before its moves.

    Attributes:
      step: int32 scalar, from 0.
      params: the parameters before the step.
      state: the optimizer's variables before the step, each a tree like the parameters.
      loss: inner loss at ``params``.
      gradient: its gradient.
    """

    step: Array
    params: PyTree
    state: dict[str, PyTree]
    loss: Array
    gradient: PyTree


class Outputs(NamedTuple):
    """What one step gives out: the loss before it, and whatever ``watch`` returned.

    Of a whole run also, where it is played on integers, those behind its end.
    """

    loss: Any
    watched: PyTree
    exact: PyTree = None


Solution = tuple[list[Leaf], Outputs]  # the end of a run, and what its steps gave out


def kept(state: PyTree) -> Leaf:
    """The state of an optimizer that has one for all parameters, as one more leaf beside theirs."""
    return {f"{k}": jnp.asarray(x, jnp.result_type(x)) for k, x in enumerate(jax.tree.leaves(state))}


@dataclass(frozen=True)
class Run:
    """The static part of a training run.

    Attributes:
      call: the user's call, for messages.
      optimizer: a program of moves, or a function of all parameters at once.
      loss: the inner loss, hoisted; of what it closes over and ``[*params, *meta, *batch]``, the batch
        being of one where the optimizer looks at single examples.
      watch: the user's watch, hoisted, or None; of ``constants.watch`` and a flat `Snapshot`.
      structure: tree structure of the parameters.
      state: tree structure of the optimizer's state, where that is one for all parameters.
      steps: ``T``.
      captured: how many of ``constants.loss`` are closed over, first by the loss; the others are ``meta``.
      x64: whether the user's code runs in JAX's 64-bit mode.
      arguments: tree structure of ``(meta, batch)``, for an optimizer of all parameters at once.
      observe: what else the optimizer evaluates, hoisted, or None; of the same arguments as the loss.
      names: of the leaves, for messages.
      labels: of the leaves, where the optimizer has a program for each label.
      custom: whether the loss holds derivative rules of the user's own.
    """

    call: str
    optimizer: Optimizer | GenericOptimizer
    loss: Converted
    watch: Converted | None
    structure: Any
    state: Any
    steps: int
    captured: int
    x64: bool
    arguments: Any = None
    observe: Converted | None = None
    names: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    custom: bool = False

    def moves(
        self,
        constants: Sequence[Mapping[str, Array]],
        inputs: Sequence[Mapping[str, Array]],
        t: Array,
    ) -> list[Sequence[program.Move]]:
        """The moves of every leaf at one step, from its hyperparameters."""
        return [
            self.leaf_moves(i, SimpleNamespace(**fixed, **scheduled), t)
            for i, (fixed, scheduled) in enumerate(zip(constants, inputs))
        ]

    def leaf_moves(self, leaf: int, h: Any, t: Array) -> Sequence[program.Move]:
        """The moves of one leaf at one step, from its hyperparameters."""
        assert isinstance(self.optimizer, Optimizer)
        if self.labels is not None:
            h.label = self.labels[leaf]
        with jax.enable_x64(self.x64):
            return self.optimizer.moves(h, t)

    def transformed(
        self,
        constants: Sequence[Mapping[str, Array]],
        inputs: Sequence[Mapping[str, Array]],
        observations: Sequence[Observed],
    ) -> list[Observed]:
        """What the moves see: the gradient transformed."""
        assert isinstance(self.optimizer, Optimizer)
        if self.optimizer.transform is None:
            return list(observations)
        with jax.enable_x64(self.x64):
            hypers = [SimpleNamespace(**fixed, **each) for fixed, each in zip(constants, inputs)]
            gradient = self.optimizer.transform(hypers, gradients(observations))
        return [{**each, "gradient": g} for each, g in zip(observations, gradient)]

    def observations(
        self,
        constants: Sequence[Mapping[str, Array]],
        inputs: Sequence[Mapping[str, Array]],
        observations: Sequence[Observed],
        always_true: Array,
    ) -> list[Observed]:
        """The same, with the same bits in both directions (see `hypergrad._base.compiler`)."""
        assert isinstance(self.optimizer, Optimizer)
        if self.optimizer.transform is None:
            return list(observations)
        return noinline(always_true, self.transformed, constants, inputs, list(observations))

    @property
    def per_example(self) -> bool:
        """Whether the optimizer looks at single examples; the loss is then the mean of theirs."""
        return isinstance(self.optimizer, GenericOptimizer) and self.optimizer.per_example

    def loss_at(self, params: Sequence[Array], loss_constants: list[Array], batch: list[Array]) -> Array:
        """The inner loss of flat parameters."""
        loss = self.examples(loss_constants, batch).loss
        if not self.per_example:
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
        """What the user watches."""
        if self.watch is None:
            return None
        return self.watch(constants.watch, jax.tree.leaves(snapshot))

    def snapshot(
        self, leaves: Sequence[Leaf], loss: Array, observations: Sequence[Observed], t: Array
    ) -> Snapshot:
        """What `watch` is shown."""
        unflatten = self.structure.unflatten
        params = unflatten(self.params_of(leaves))
        return Snapshot(t, params, self.state_of(leaves), loss, unflatten(gradients(observations)))

    def params_of(self, leaves: Sequence[Leaf]) -> list[Array]:
        """The parameters among the float state, flat."""
        return [leaf[PARAMS] for leaf in leaves[: self.structure.num_leaves]]

    def state_of(self, leaves: Sequence[Leaf]) -> dict[str, PyTree]:
        """The optimizer's variables among the float state: by name, trees like the parameters.

        The state of a `Whole` optimizer is one tree with the name ``state``; see `kept`.
        """
        if isinstance(self.optimizer, GenericOptimizer):
            return {"state": self.state.unflatten([leaves[-1][f"{k}"] for k in range(len(leaves[-1]))])}
        unflatten = self.structure.unflatten
        return {name: unflatten([leaf[name] for leaf in leaves]) for name in self.optimizer.variables}

    def step(
        self,
        leaves: Sequence[Leaf],
        constants: Constants,
        inputs: Inputs,
        gradient_of: Callable[..., tuple[Array, list[Observed]]] | None = None,
    ) -> tuple[list[Leaf], Outputs]:
        """One step in floats, for adjoints that leave differentiation to JAX.

        With `gradient`, the default, only reverse mode can; with `plain_gradient` both modes.
        """
        if gradient_of is None:
            # An optimizer that looks at single examples leaves this gradient to `watch`.  Where nobody
            # watches JAX drops it, which it would not if its derivative had a rule of its own.
            gradient_of = self.plain_gradient if self.per_example else self.gradient
        loss, observations = gradient_of(self.params_of(leaves), constants.loss, inputs.batch)
        if isinstance(self.optimizer, GenericOptimizer):
            new = self._whole(leaves, loss, gradients(observations), constants, inputs)
        else:
            new = self.stepped(leaves, observations, constants.hypers, inputs.hypers, inputs.step)
        snapshot = self.snapshot(leaves, loss, observations, inputs.step)
        return new, Outputs(loss, self.watched(snapshot, constants))

    def stepped(
        self,
        leaves: Sequence[Leaf],
        observations: Sequence[Observed],
        constants: Sequence[Mapping[str, Array]],
        inputs: Sequence[Mapping[str, Array]],
        t: Array,
        kept: Sequence[program.Record] | None = None,
    ) -> list[Leaf]:
        """The moves of one step in floats."""
        observations = self.transformed(constants, inputs, observations)
        return program.step(self.moves(constants, inputs, t), leaves, observations, kept)

    def _whole(
        self,
        leaves: Sequence[Leaf],
        loss: Array,
        gradient: list[Array],
        constants: Constants,
        inputs: Inputs,
    ) -> list[Leaf]:
        assert isinstance(self.optimizer, GenericOptimizer)
        unflatten, arguments = self.structure.unflatten, self.arguments
        given = self.examples(constants.loss, inputs.batch) if self.per_example else unflatten(gradient)
        params, state = unflatten(self.params_of(leaves)), self.state_of(leaves)["state"]
        hypers = {**constants.hypers[0], **inputs.hypers[0]}
        context = StepContext(
            lambda params: self.loss_at(jax.tree.leaves(params), constants.loss, inputs.batch),
            loss,
            *arguments.unflatten([*constants.loss[self.captured :], *inputs.batch]),
        )
        with jax.enable_x64(self.x64):
            new, state = self.optimizer.update(hypers, given, state, params, context)
        moved: list[Leaf] = [{PARAMS: x} for x in jax.tree.leaves(new)]
        return jax.tree.map(lambda x, old: x.astype(old.dtype), [*moved, kept(state)], list(leaves))

    def plain_gradient(
        self, params: list[Array], loss_constants: list[Array], batch: list[Array]
    ) -> tuple[Array, list[Observed]]:
        """Loss, and gradient and what is observed by leaf, with JAX's own derivatives."""
        loss, gradient = jax.value_and_grad(lambda w: self.loss_at(w, loss_constants, batch))(params)
        observed = self.observed_at(params, loss_constants, batch)
        return loss, [{"gradient": g, **each} for g, each in zip(gradient, observed)]

    def gradient(
        self, params: list[Array], loss_constants: list[Array], batch: list[Array]
    ) -> tuple[Array, list[Observed]]:
        """The same; the derivative of the gradient is that of `linearise`."""

        @jax.custom_vjp
        def evaluate(
            params: list[Array], theta: tuple[list[Array], list[Array]]
        ) -> tuple[Array, list[Observed]]:
            return self.plain_gradient(params, *theta)

        def forward(params: Any, theta: Any) -> Any:
            flags = perturbed(theta)
            params, theta = jax.tree.map(lambda x: x.value, (params, theta))
            linearised = linearise(self, params, theta, flags)
            saved = (linearised.primal, linearised.residuals)
            return linearised.primal[:2], (saved, Static(linearised.jaxprs), freeze(flags))

        def backward(residual: Any, cotangent: Any) -> Any:
            saved, jaxprs, flags = residual
            primal, residuals = saved
            loss_cotangent, direction = cotangent
            if isinstance(loss_cotangent, SymbolicZero):
                loss_cotangent = None
            linearised = Linearised(primal, residuals, jaxprs.value)
            products = linearised.transposed(loss_cotangent, instantiate(direction))
            return products.params, scatter(thaw(flags), products.wanted)

        evaluate.defvjp(forward, backward, symbolic_zeros=True)
        return evaluate(params, (loss_constants, batch))


def in_segments(
    run: Run,
    segments: int,
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
    gradient_of: Callable[..., Any] | None = None,
) -> Solution:
    """A run in so many segments, each of which is computed again on the way back; see `Run.step`."""
    length = -(-run.steps // max(1, min(segments, run.steps)))
    whole = run.steps // length

    @partial(jax.checkpoint, prevent_cse=False)
    def segment(leaves: list[Leaf], x: Inputs) -> Solution:
        return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x, gradient_of), leaves, x)

    cut = jax.tree.map(lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:]), inputs)
    leaves, outputs = jax.lax.scan(segment, start, cut)
    outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
    if whole * length == run.steps:
        return leaves, outputs
    leaves, rest = segment(leaves, jax.tree.map(lambda x: x[whole * length :], inputs))
    return leaves, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)


def gradients(observations: Sequence[Observed]) -> list[Array]:
    """The gradient, by leaf."""
    return [each["gradient"] for each in observations]


class Products(NamedTuple):
    """Cotangents that pass through loss and gradient: of the parameters and of what else is wanted."""

    params: list[Array]
    wanted: list[Array]


class Linearised(NamedTuple):
    """Loss, gradient and what is observed at a point, with what is needed for their derivatives there.

    Attributes:
      primal: ``(loss, observations, first)``: ``observations`` are ``∂L/∂w`` and ``S``, by leaf, and ``first`` is
        what the first linear map needs besides its argument.
      residuals: what the second needs.
      jaxprs: the linear maps from ``l`` to ``l ∂L/∂θ``; and from a direction ``(u_g, u_S)`` by leaf to
        ``(u_g ∂g/∂w + u_S ∂S/∂w,  u_g ∂g/∂θ + u_S ∂S/∂θ)``.
    """

    primal: tuple[Array, list[Observed], list[Array]]
    residuals: list[Array]
    jaxprs: tuple[Any, Any]

    def transposed(self, loss_cotangent: Array | None, direction: Sequence[Observed]) -> Products:
        """``(l ∂L/∂w + u_g ∂g/∂w + u_S ∂S/∂w,  l ∂L/∂θ + u_g ∂g/∂θ + u_S ∂S/∂θ)``; None is ``l = 0``."""
        first, second = (
            jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, given))
            for jaxpr, given in zip(self.jaxprs, (self.primal[2], self.residuals))
        )
        total = second(*jax.tree.leaves(list(direction)))
        _, observations, _ = self.primal
        if loss_cotangent is not None:
            used = loss_cotangent != 0  # at a step that is masked, ∂L/∂θ need not be a number
            along = [*(loss_cotangent * g for g in gradients(observations)), *first(loss_cotangent)]
            total = [jnp.where(used, x, 0).astype(y.dtype) + y for x, y in zip(along, total)]
        return Products(total[: len(observations)], total[len(observations) :])


def linearise(
    run: Run, params: list[Array], theta: PyTree, flags: PyTree, always_true: Array | None = None
) -> Linearised:
    """Evaluate loss, gradient and what is observed once, keeping what their derivatives need.

    Second derivatives are symmetric, so the transposed products that reverse mode asks for are the
    directional derivative of ``(∂L/∂w, ∂L/∂θ)`` along ``u_g``: forward over reverse.  Where the loss holds
    derivative rules of the user's own, ``g`` need be no gradient and ``∂g/∂w`` not symmetric: then reverse
    over reverse.

    Args:
      run: the run.
      params: flat parameters.
      theta: what else the loss is a function of: `Constants.loss` and `Inputs.batch`.
      flags: which arrays of ``theta`` are wanted.
      always_true: true, at run time: evaluate apart (see `hypergrad._base.compiler`), so that the same bits
        come out in both directions.  None where that does not matter.
    """
    linear_maps: list[tuple[Any, Any]] = []

    def evaluate(params: list[Array], theta: PyTree) -> Any:
        wanted, merge = split(flags, theta)

        def loss(w: list[Array], wanted: list[Array]) -> Array:
            return run.loss_at(w, *merge(wanted))

        second: Callable[[list[Array]], Any]
        if run.custom:
            value_and_gradient = jax.value_and_grad(loss)
            gradient, second, value = jax.vjp(
                lambda w, wanted: value_and_gradient(w, wanted)[::-1], params, wanted, has_aux=True
            )
            first_theta = jax.grad(loss, argnums=1)(params, wanted)
        else:

            def both(w: list[Array]) -> tuple[Array, list[Array], list[Array]]:
                value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(w, wanted)
                return value, *gradients

            (value, gradient, first_theta), linear = jax.linearize(both, params)
            second = lambda u: linear(u)[1:]  # noqa: E731
        observed, pull_back = jax.vjp(
            lambda params, wanted: run.observed_at(params, *merge(wanted)), params, wanted
        )
        observations = [{"gradient": g, **each} for g, each in zip(gradient, observed)]

        def products(direction: list[Observed]) -> list[Array]:
            along = jax.tree.leaves(second(gradients(direction)))
            if run.observe is None:
                return along
            leaf_cotangents = [{name: u[name] for name in each} for u, each in zip(direction, observed)]
            return jax.tree.map(jnp.add, along, jax.tree.leaves(pull_back(leaf_cotangents)))

        first = jax.make_jaxpr(lambda bar: [bar * x for x in first_theta])(value)
        if always_true is None and wanted:
            # What is kept at every step may be less: of the weights of examples, those in the batch.
            _, pull = jax.vjp(lambda wanted: loss(params, wanted), wanted)
            other = jax.make_jaxpr(lambda bar: pull(bar)[0])(value)
            given = {id(x) for x in jax.tree.leaves((params, theta))}
            if sum(x.size for x in other.consts if id(x) not in given) < sum(x.size for x in first_theta):
                first = other
        second_map = jax.make_jaxpr(products)(observations)
        linear_maps.append((first.jaxpr, second_map.jaxpr))
        return (value, observations), (list(first.consts), list(second_map.consts))

    if always_true is None:
        primal, (first, residuals) = evaluate(params, theta)
    else:
        primal, (first, residuals) = _first_apart(always_true, evaluate, params, theta)
    return Linearised((*primal, first), residuals, linear_maps[-1])


def _first_apart(always_true: Array, function: Callable[..., Any], *arguments: PyTree) -> Any:
    """Evaluate a function that returns ``((loss, seen), second)``, the first in isolation.

    Its computation hands out what ``second`` needs too, and hands out all of that always: a compiler
    that is let know what goes unused makes another computation of what is left.  A gradient keeps all else
    alive, as it is used in both directions; the loss is not on the way back.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)
    split_at = len(jax.tree.leaves(shapes[0]))
    first_outputs, second_outputs = jaxpr.outvars[:split_at], jaxpr.outvars[split_at:]
    _, observations = jax.tree.unflatten(jax.tree.structure(shapes[0]), first_outputs)
    always = gradients(observations)

    needed = {v for v in first_outputs if isinstance(v, Var)}
    first, second = [], []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            first.append(eqn)
            needed |= {v for v in eqn.invars if isinstance(v, Var)}
        else:
            second.append(eqn)
    made = {v for eqn in first for v in eqn.outvars}
    used = [*first_outputs, *(v for eqn in second for v in eqn.invars), *second_outputs]
    handed = list(dict.fromkeys(v for v in used if isinstance(v, Var) and v in made))

    inputs = [*jaxpr.constvars, *jaxpr.invars]
    given = [*closed.consts, *jax.tree.leaves(arguments)]
    results = noinline(always_true, part(jaxpr, inputs, reversed(first), handed), *given)
    # An array of no elements, such as the gradient of one, would keep nothing alive.
    sizes = [(v not in always, x.dtype.kind != "f", x.size == 0, x.size) for v, x in zip(handed, results)]
    smallest = sizes.index(min(sizes))
    results[smallest] = prevent_dce(always_true, results, results[smallest])
    outputs = part(jaxpr, [*inputs, *handed], reversed(second), jaxpr.outvars)(*given, *results)
    return jax.tree.unflatten(structure, outputs)


@contextlib.contextmanager
def closures_refused(call: str) -> Iterator[None]:
    """A readable error where a function with a derivative of its own closes over what is differentiated."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise TypeError(
            f"{call}: the optimizer closes over a value that is being traced (differentiated, compiled or "
            "vmapped), in which this adjoint could not differentiate; make it a hyperparameter of the "
            "optimizer (Optimizer(hypers=...)), or pass adjoint=Checkpointed() or Stored()"
        ) from error
