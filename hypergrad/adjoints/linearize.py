"""Second derivatives of the inner loss: what a step needs to be differentiated.

========  ====================  ==============================================================
symbol    name                  meaning
========  ====================  ==============================================================
``L``     loss                  inner loss, a function of ``w`` and ``θ``
``w``     params                parameters before the step
``θ``     wanted                other inputs to differentiate in: meta, closures, batches
``g``     gradient              ``∂L/∂w``
``S``     observed              what else the optimizer evaluates, also a function of ``w`` and ``θ``
``u``     direction             cotangents of ``g`` and ``S``: ``u_g`` and ``u_S``
``l``     loss_cotangent        cotangent of the loss of the step
========  ====================  ==============================================================
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var

from hypergrad._base.compiler import always_true as known_later
from hypergrad._base.compiler import noinline, prevent_dce
from hypergrad._base.tracing import Static, bound, evaluated, freeze, instantiate, part, perturbed, thaw
from hypergrad._base.trees import Flag, PyTree, Scalar, scatter, split
from hypergrad._base.varying import axes_of
from hypergrad.adjoints.run import Constants, Inputs, Run, Solution, gradients
from hypergrad.program import Leaf, Observed

START = "hypergrad: start of a segment"
Gradient = Callable[..., tuple[Scalar, list[Observed]]]


def gradient_of(run: Run) -> Gradient:
    """A function for loss and gradient whose derivative in reverse mode is that of `linearize`.

    If the optimizer looks at single examples, only ``watch`` uses this gradient.  Without ``watch`` JAX
    drops it, which it would not do if its derivative had a custom rule.
    """
    return run.plain_gradient if run.optimizer.per_example else partial(_gradient, run)


def _gradient(
    run: Run, params: list[Array], loss_constants: list[Array], batch: list[Array]
) -> tuple[Scalar, list[Observed]]:
    """`Run.plain_gradient` with the rule of `linearize`."""

    @jax.custom_vjp
    def evaluate(
        params: list[Array], theta: tuple[list[Array], list[Array]]
    ) -> tuple[Scalar, list[Observed]]:
        return run.plain_gradient(params, *theta)

    def forward(params: Any, theta: Any) -> Any:
        flags = perturbed(theta)
        params, theta = jax.tree.map(lambda x: x.value, (params, theta))
        linearized = linearize(run, params, theta, flags)
        return linearized.primal[:2], (linearized.saved(), freeze(flags))

    def backward(residual: Any, cotangent: Any) -> Any:
        saved, frozen = residual
        loss_cotangent, direction = cotangent
        if isinstance(loss_cotangent, SymbolicZero):
            loss_cotangent = None
        flags = thaw(frozen)
        linearized = Linearized.of(saved) if run.shards is None else InParts(run, flags, *saved)
        products = linearized.transposed(loss_cotangent, instantiate(direction))
        return products.params, scatter(flags, products.wanted)

    evaluate.defvjp(forward, backward, symbolic_zeros=True)
    return evaluate(params, (loss_constants, batch))


class Segments(NamedTuple):
    """The segments of a run, each of which is computed again on the way back.

    Attributes:
      number: how many, at least 1.
      offload: whether their starts are kept in the memory of the host.
    """

    number: int
    offload: bool = False


def in_segments(
    run: Run,
    segments: Segments,
    start: list[Leaf],
    constants: Constants,
    inputs: Inputs,
    gradient: Gradient | None = None,
) -> Solution:
    """A run in segments, each of which is computed again on the way back (rematerialization).

    Args:
      run: the run.
      segments: how many, and where their starts are kept.
      start: the float state before the first step.
      constants: what is the same at every step.
      inputs: what differs from step to step.
      gradient: as for `Run.step`; by default `gradient_of` the run.
    """
    gradient = gradient_of(run) if gradient is None else gradient
    length = -(-run.steps // max(1, min(segments.number, run.steps)))
    whole = run.steps // length

    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[START],
        offload_src="device",
        offload_dst="pinned_host",
    )

    @partial(jax.checkpoint, prevent_cse=False, policy=to_host if segments.offload else None)
    def segment(leaves: list[Leaf], x: Inputs) -> Solution:
        leaves = checkpoint_name(leaves, START) if segments.offload else leaves
        return jax.lax.scan(lambda leaves, x: run.step(leaves, constants, x, gradient), leaves, x)

    cut = jax.tree.map(lambda x: x[: whole * length].reshape(whole, length, *x.shape[1:]), inputs)
    leaves, outputs = jax.lax.scan(segment, start, cut)
    outputs = jax.tree.map(lambda x: x.reshape(whole * length, *x.shape[2:]), outputs)
    if whole * length == run.steps:
        return leaves, outputs
    leaves, rest = segment(leaves, jax.tree.map(lambda x: x[whole * length :], inputs))
    return leaves, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, rest)


class Products(NamedTuple):
    """Cotangents pulled back through loss and gradient.

    Attributes:
      params: of the parameters, by leaf.
      wanted: of the other inputs that are differentiated, flat.
    """

    params: list[Array]
    wanted: list[Array]


class Linearized(NamedTuple):
    """Loss, gradient and whatever else is observed at a point, with their derivatives there.

    Attributes:
      primal: ``(loss, observations, first)``: ``observations`` are ``∂L/∂w`` and ``S``, by leaf, and
        ``first`` is what the first linear map needs besides its argument.
      residuals: what the second linear map needs besides its argument.
      jaxprs: two linear maps: from ``l`` to ``l ∂L/∂θ``, or to ``(l ∂L/∂w, l ∂L/∂θ)`` where that is not
        ``l g``; and from a direction ``(u_g, u_S)``, by leaf, to
        ``(u_g ∂g/∂w + u_S ∂S/∂w,  u_g ∂g/∂θ + u_S ∂S/∂θ)``.
    """

    primal: tuple[Scalar, list[Observed], list[Array]]
    residuals: list[Array]
    jaxprs: tuple[Any, Any]

    @staticmethod
    def of(saved: PyTree) -> "Linearized":
        """Undo `saved`."""
        primal, residuals, jaxprs = saved
        return Linearized(primal, residuals, jaxprs.value)

    def saved(self) -> PyTree:
        """A pytree for the way back."""
        return self.primal, self.residuals, Static(self.jaxprs)

    def transposed(self, loss_cotangent: Scalar | None, direction: Sequence[Observed]) -> Products:
        """Pull cotangents back: ``(l ∂L/∂w + u_g ∂g/∂w + u_S ∂S/∂w,  l ∂L/∂θ + u_g ∂g/∂θ + u_S ∂S/∂θ)``.

        Args:
          loss_cotangent: ``l``, a scalar; None for 0.
          direction: ``(u_g, u_S)``, by leaf.
        """
        first, second = (
            jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, given))
            for jaxpr, given in zip(self.jaxprs, (self.primal[2], self.residuals))
        )
        total = second(*jax.tree.leaves(list(direction)))
        _, observations, _ = self.primal
        if loss_cotangent is not None:
            # At a masked step, ∂L/∂θ need not be finite.
            used = jax.lax.psum(jnp.int32(loss_cotangent != 0), tuple(axes_of(loss_cotangent))) > 0
            along = first(loss_cotangent)
            if len(along) < len(total):
                along = [*(loss_cotangent * g for g in gradients(observations)), *along]
            total = [jnp.where(used, x, 0).astype(y.dtype) + y for x, y in zip(along, total)]
        return Products(total[: len(observations)], total[len(observations) :])


class InParts(NamedTuple):
    """`Linearized` for a step in parts, which are evaluated again for their derivatives.

    Attributes:
      run: with shards.
      flags: which arrays of ``theta`` are wanted.
      primal: ``(loss, observations, [])``, summed over the parts.
      params: flat parameters.
      theta: the other inputs of the loss.
      always_true: see `hypergrad._base.compiler`.
    """

    run: Run
    flags: PyTree
    primal: tuple[Scalar, list[Observed], list[Array]]
    params: list[Array]
    theta: tuple[list[Array], list[Array]]
    always_true: Flag

    @staticmethod
    def at(run: Run, params: list[Array], theta: PyTree, flags: PyTree, always_true: Flag) -> "InParts":
        """Evaluate loss and gradient of every part."""
        assert run.shards is not None
        constants, batch = theta

        def of_part(part: list[Array], same: PyTree) -> tuple[list[Array], list[Array]]:
            params, constants = same
            loss, observations = run.of_part.plain_gradient(params, constants, part)
            return [loss, *gradients(observations)], []

        (loss, *gradient), _ = run.shards.evaluate(always_true, of_part, batch, (params, constants))
        observations = [{"gradient": g} for g in gradient]
        return InParts(run, flags, (loss, observations, []), params, theta, always_true)

    def saved(self) -> PyTree:
        """A pytree for the way back."""
        return self.primal, self.params, self.theta, self.always_true

    def transposed(self, loss_cotangent: Scalar | None, direction: Sequence[Observed]) -> Products:
        """Pull cotangents back through every part; see `Linearized.transposed`."""
        assert self.run.shards is not None
        constants, batch = self.theta
        of_constants, of_batch = self.flags
        cut = [flag and x.ndim > 0 for flag, x in zip(of_batch, batch)]
        wanted = [x for flag, x in zip(of_batch, cut) if flag]

        def of_part(part: list[Array], same: PyTree) -> tuple[list[Array], list[Array]]:
            params, constants, loss_cotangent, direction = same
            linearized = linearize(self.run.of_part, params, (constants, part), self.flags)
            products = linearized.transposed(loss_cotangent, direction)
            first = sum(jax.tree.leaves(of_constants))
            of_part = products.wanted[first:]
            summed = [x for x, apart in zip(of_part, wanted) if not apart]
            apart = [x for x, apart in zip(of_part, wanted) if apart]
            return [*products.params, *products.wanted[:first], *summed], apart

        same = (self.params, constants, loss_cotangent, list(direction))
        summed, apart = self.run.shards.evaluate(self.always_true, of_part, batch, same)
        sides = iter([(x / self.run.shards.count).reshape(-1, *x.shape[2:]) for x in apart])
        count = len(self.params)
        rest = iter(summed[count:])
        first = [next(rest) for flag in jax.tree.leaves(of_constants) if flag]
        return Products(summed[:count], [*first, *(next(sides if x else rest) for x in wanted)])


def linearize(
    run: Run, params: list[Array], theta: PyTree, flags: PyTree, always_true: Flag | None = None
) -> Linearized | InParts:
    """Evaluate loss, gradient and whatever else is observed once, keeping what their derivatives need.

    Second derivatives are symmetric, so the transposed products that reverse mode asks for are the
    directional derivative of ``(∂L/∂w, ∂L/∂θ)`` along ``u_g``: forward over reverse.  If the loss contains
    custom derivative rules of the user, ``g`` need not be a gradient and ``∂g/∂w`` need not be symmetric:
    then it is reverse over reverse.

    Args:
      run: the run.
      params: flat parameters.
      theta: the other inputs of the loss: `Constants.loss` and `Inputs.batch`.
      flags: which arrays of ``theta`` are wanted.
      always_true: true at run time: evaluate in isolation (see `hypergrad._base.compiler`), so that both
        directions find the same bits.  None if that does not matter.
    """
    if run.shards is not None:
        apart = known_later(params) if always_true is None else always_true
        return InParts.at(run, params, theta, flags, apart)
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
        if jax.sharding.get_abstract_mesh().manual_axes:
            # In shard_map every device may have a loss and an ``l`` of its own; ``g`` is the sum's.
            _, pull_all = jax.vjp(loss, params, wanted)
            first = jax.make_jaxpr(lambda bar: jax.tree.leaves(pull_all(bar)))(value)
        elif always_true is None and wanted:
            # What is kept at every step may be smaller: of all examples' weights, those in the batch.
            _, pull = jax.vjp(lambda wanted: loss(params, wanted), wanted)
            other = jax.make_jaxpr(lambda bar: pull(bar)[0])(value)
            given = {id(x) for x in jax.tree.leaves((params, theta))}
            if sum(x.size for x in other.consts if id(x) not in given) < sum(x.size for x in first_theta):
                first = other
        second_map = jax.make_jaxpr(_sums_last(products, observations))(observations)
        linear_maps.append((first.jaxpr, second_map.jaxpr))
        return (value, observations), (list(first.consts), list(second_map.consts))

    if always_true is None:
        primal, (first, residuals) = evaluate(params, theta)
    else:
        primal, (first, residuals) = _first_apart(always_true, evaluate, params, theta)
    return Linearized((*primal, first), residuals, linear_maps[-1])


def _sums_last(function: Callable[..., PyTree], *arguments: PyTree) -> Callable[..., PyTree]:
    """The function with sums of transposed arrays in place of transposed sums.

    A compiler takes the transpose of a product of matrices for the product of the transposed matrices in
    the opposite order, but reads a sum of products across memory if it is to be transposed.

    Args:
      function: of the arguments.
      arguments: pytrees of arrays.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    made = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}

    def transposed(v: Any, axes: tuple[int, ...], read: Callable[[Any], Array]) -> Array:
        eqn = made.get(v) if isinstance(v, Var) else None
        if eqn is None or eqn.primitive.name not in ("add", "add_any"):
            return jax.lax.transpose(read(v), axes)
        # A literal may be a scalar, for all elements.
        first, second = (transposed(x, axes, read) if x.aval.shape else read(x) for x in eqn.invars)
        return first + second

    def equation(eqn: Any, read: Callable[[Any], Array]) -> Any:
        if eqn.primitive.name == "transpose":
            return transposed(eqn.invars[0], eqn.params["permutation"], read)
        return bound(eqn, [read(v) for v in eqn.invars])

    def run(*arguments: PyTree) -> PyTree:
        found = evaluated(closed, jax.tree.leaves(arguments), equation)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return run


def _first_apart(always_true: Flag, function: Callable[..., Any], *arguments: PyTree) -> Any:
    """Evaluate a function that returns ``((loss, observations), second)``, the first part in isolation.

    The isolated computation also returns everything that ``second`` needs, always: if the compiler knew
    that some of it goes unused, it would compile the rest differently.  A gradient keeps everything else
    alive, since it is used in both directions; the loss is not used on the way back.
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
    # An array without elements, such as the gradient of one, would keep nothing alive.
    sizes = [(v not in always, x.dtype.kind != "f", x.size == 0, x.size) for v, x in zip(handed, results)]
    smallest = sizes.index(min(sizes))
    results[smallest] = prevent_dce(always_true, results, results[smallest])
    outputs = part(jaxpr, [*inputs, *handed], reversed(second), jaxpr.outvars)(*given, *results)
    return jax.tree.unflatten(structure, outputs)
