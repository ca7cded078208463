"""Rules of differentiation written by hand are found wherever they stand, and JAX's own are let pass."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental.ode import odeint

from hypergrad._base.rules import has_custom_rule

X = jnp.array([0.3, -0.5, 2.0])


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, bar: (-bar,))


@jax.custom_jvp
def straight_through(x):
    return jnp.sign(x)


straight_through.defjvp(lambda primals, tangents: (jnp.sign(primals[0]), tangents[0]))


@jax.custom_jvp
def by_arguments(x):
    return jnp.sign(x)


by_arguments.defjvps(lambda dot, answer, x: dot)


@jax.custom_gradient
def by_closure(x):
    return x, lambda bar: (jnp.clip(bar, -1, 1),)


def of_jax(function):
    """A rule by hand for a function of JAX's."""
    custom = jax.custom_jvp(function)
    custom.defjvps(lambda dot, answer, x: 2 * dot)
    return custom


def found(function, *arguments):
    return has_custom_rule(jax.make_jaxpr(function)(*arguments))


RULES = [reversed_gradient, straight_through, by_arguments, by_closure]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "within",
    [
        lambda f: f,
        jax.jit,
        jax.vmap,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=2, unroll=2)[0],
        lambda f: lambda x: jax.lax.fori_loop(0, x.shape[0], lambda _, c: f(c), x),
        lambda f: lambda x: jax.lax.while_loop(lambda c: c[0] < 0, f, x),
        lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x),
        lambda f: lambda x: jax.lax.map(f, x),
        lambda f: jax.jit(lambda x: jax.lax.map(jax.checkpoint(lambda x: jax.lax.cond(True, f, f, x)), x)),
        lambda f: lambda x: jax.lax.associative_scan(lambda a, b: a + f(b), x),
    ],
)
def test_rules_written_by_hand_are_found_everywhere(rule, within):
    assert found(within(rule), X)


@pytest.mark.parametrize(
    "function",
    [jax.nn.relu, jax.nn.relu6, jnp.sinc, jnp.sin, jax.scipy.special.logit, jax.nn.softplus, jnp.square],
)
def test_a_rule_by_hand_for_a_function_of_jax_is_by_hand(function):
    assert found(of_jax(function), X)


def test_a_rule_by_hand_around_a_function_with_a_rule_of_jax_is_found():
    assert found(of_jax(lambda x: jax.nn.relu(x)), X)


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.relu,
        jax.nn.relu6,
        jax.nn.silu,
        jax.nn.gelu,
        jax.nn.elu,
        jax.nn.softplus,
        jax.nn.softmax,
        jax.nn.log_softmax,
        jax.nn.logsumexp,
        jax.nn.sigmoid,
        jax.nn.log_sigmoid,
        jnp.sinc,
        jnp.i0,
        lambda x: jnp.logaddexp(x, x),
        lambda x: jnp.logaddexp2(x, x),
        lambda x: jax.scipy.special.xlogy(x, x),
        lambda x: jax.scipy.special.xlog1py(x, x),
        jax.scipy.special.logit,
        jax.scipy.special.log_ndtr,
        jax.scipy.special.entr,
        lambda x: jnp.linalg.slogdet(jnp.outer(x, x)),
        lambda x: jnp.linalg.det(jnp.outer(x, x)),
        lambda x: jnp.linalg.pinv(jnp.outer(x, x)),
        lambda x: jnp.linalg.solve(jnp.eye(3), x),
        lambda x: jax.scipy.sparse.linalg.cg(lambda v: 2 * v, x)[0],
        lambda x: x + jax.lax.stop_gradient(jnp.sign(x) - x),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.int32(1)),
        lambda x: optax.sigmoid_binary_cross_entropy(x, x),
        jax.jit(jax.vmap(jax.checkpoint(jax.nn.relu))),
        lambda x: jax.lax.scan(lambda c, _: (jax.nn.relu(c), None), x, length=2)[0],
        jax.grad(lambda x: jnp.sum(straight_through(x))),  # whose own derivatives are plain
    ],
)
def test_rules_of_jax_pass(function):
    assert not found(function, X)


def test_what_cannot_be_known_counts_as_custom():
    root = lambda x: jax.lax.custom_root(lambda y: y - x, x, lambda f, x: x, lambda g, y: y)  # noqa: E731
    assert found(root, X)
    assert found(lambda x: odeint(lambda y, t: -y, x, jnp.linspace(0, 1, 3)), X)
    linear = partial(jax.custom_derivatives.linear_call, lambda r, x: x, lambda r, x: -x)
    assert found(lambda x: linear((), x), X)


def test_open_and_closed_jaxprs_are_read():
    closed = jax.make_jaxpr(straight_through)(X)
    assert has_custom_rule(closed) and has_custom_rule(closed.jaxpr)


def test_why_it_matters():
    # With a reversed gradient the matrix of second derivatives is not symmetric, so that its products from
    # the left, which reverse mode gives, and from the right differ.
    loss = lambda w: reversed_gradient(w[0]) * w[1]  # noqa: E731
    matrix = jax.jacrev(jax.grad(loss))(jnp.ones(2))
    assert matrix.tolist() == [[0, -1], [1, 0]]
    assert found(loss, jnp.ones(2))
