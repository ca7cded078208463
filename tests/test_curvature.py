"""Products, and moments of single examples, against dense matrices and loops."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad import curvature, nets

N = 7


class Problem(NamedTuple):
    apply: Callable[..., Any]
    likelihood: curvature.Likelihood
    params: Any
    inputs: Any
    targets: Any

    def output_loss(self, z: Any, y: Any) -> Any:
        return jnp.mean(jax.vmap(self.likelihood.loss)(z, y))

    def loss(self, w: Any, x: Any, y: Any) -> Any:
        return self.output_loss(self.apply(w, x), y)


def softmax_network() -> Problem:
    """Two layers; the parameters are a tuple of NamedTuples."""
    init, apply = nets.mlp((3, 2, 3))
    x = jax.random.normal(jax.random.key(1), (N, 3))
    return Problem(apply, curvature.categorical(), init(jax.random.key(0), 1.0), x, jnp.arange(N) % 3)


def sigmoid_network() -> Problem:
    """Outputs of two axes, inputs that are a dictionary, and a parameter that nothing depends on."""
    w = {"a": jnp.linspace(-1, 1, 8).reshape(2, 4), "b": jnp.float64(0.3), "unused": jnp.ones(2)}
    x = {"x": jax.random.normal(jax.random.key(1), (N, 2)), "shift": jnp.linspace(0.0, 1.0, N)}

    def apply(w: Any, x: Any) -> Any:
        z = jnp.sin(x["x"] @ w["a"]) * w["b"] + x["shift"][:, None]
        return z.reshape(-1, 2, 2)

    y = jax.random.uniform(jax.random.key(2), (N, 2, 2))
    return Problem(apply, curvature.bernoulli(), w, x, y)


def regression() -> Problem:
    """A scalar output, and a parameter that is one array."""
    x = jnp.linspace(-1, 1, N)

    def apply(w: Any, x: Any) -> Any:
        return jnp.tanh(w[0] * x + w[1]) * w[2]

    return Problem(apply, curvature.normal(), jnp.array([0.5, -0.3, 2.0]), x, jnp.cos(3 * x))


PROBLEMS = [softmax_network, sigmoid_network, regression]
KEY = 5


def matrices(p: Problem, chunk: int | None) -> dict[str, Any]:
    """Every product as a dense matrix."""
    w, x, y = p.params, p.inputs, p.targets

    def all_of_them(w: Any) -> dict[str, Any]:
        key = jax.random.key(KEY)
        matvecs = {
            "hessian": curvature.hessian(p.loss, w, x, y, chunk=chunk),
            "gauss_newton": curvature.gauss_newton(p.apply, p.output_loss, w, x, y, chunk=chunk),
            "fisher": curvature.fisher(p.apply, p.likelihood, w, x, chunk=chunk),
            "sampled": curvature.sampled_fisher(p.apply, p.likelihood, w, x, key, chunk=chunk),
            "empirical": curvature.empirical_fisher(p.loss, w, x, y, chunk=chunk),
        }
        return {name: curvature.dense(matvec, w) for name, matvec in matvecs.items()}

    return jax.jit(all_of_them)(w)


def oracle(p: Problem) -> dict[str, Any]:
    """The same from dense Jacobians and Hessians of every example by itself."""
    flat, unravel = ravel_pytree(p.params)
    loss = p.likelihood.loss

    def example(key: Any, x: Any, y: Any) -> dict[str, Any]:
        def output(flat: Any) -> Any:
            return p.apply(unravel(flat), jax.tree.map(lambda a: a[None], x))[0]

        z = output(flat)
        J = jax.jacobian(output)(flat).reshape(z.size, flat.size)
        H = jax.hessian(loss)(z, y).reshape(z.size, z.size)
        gradients = {
            "sampled": jax.grad(loss)(z, p.likelihood.sample(key, z)),
            "empirical": jax.grad(loss)(z, y),
        }
        second = {
            name: jnp.outer(J.T @ g.reshape(-1), J.T @ g.reshape(-1)) for name, g in gradients.items()
        }
        whole = jax.hessian(lambda flat: loss(output(flat), y))(flat)
        return second | {"gauss_newton": J.T @ H @ J, "hessian": whole}

    keys = jax.random.split(jax.random.key(KEY), N)
    found = jax.jit(jax.vmap(example))(keys, p.inputs, p.targets)
    found = {name: sum(matrices) / N for name, matrices in found.items()}
    return found | {"fisher": found["gauss_newton"]}  # natural losses


@pytest.mark.parametrize("make", PROBLEMS)
def test_products_are_those_of_dense_matrices_whatever_the_chunk(make: Any, x64: None) -> None:
    p = make()
    expected = oracle(p)
    for chunk in (None, 3):  # 7 examples: the last chunk has one
        found = matrices(p, chunk)
        assert found.keys() == expected.keys()
        for name, matrix in found.items():
            np.testing.assert_allclose(
                matrix, expected[name], rtol=0, atol=1e-10, err_msg=f"{name} {chunk}"
            )
            assert np.abs(matrix).max() > 1e-2


def test_chunks_of_one_and_of_all(x64: None) -> None:
    p = regression()

    @jax.jit
    def products(v: Any) -> Any:
        make = partial(curvature.hessian, p.loss, p.params, p.inputs, p.targets)
        return [make(chunk=chunk)(v) for chunk in (None, 1, 7, 100)]

    expected, *found = products(p.params)
    np.testing.assert_allclose(found, [expected] * 3, rtol=1e-12)


def test_a_loss_without_data_or_a_mean(x64: None) -> None:
    w = {"a": jnp.array([1.0, 2.0]), "b": jnp.float64(3.0)}
    matvec = curvature.hessian(lambda w: jnp.prod(w["a"]) * w["b"] ** 2, w)
    found = matvec(
        {"a": jnp.array([1.0, 0.0]), "b": 1}
    )  # numbers of other types are taken as the parameters'
    np.testing.assert_allclose(found["a"], [12.0, 9.0 + 6.0])
    np.testing.assert_allclose(found["b"], 12.0 + 4.0)
    assert found["b"].dtype == jnp.float64


@pytest.mark.parametrize("make", PROBLEMS)
def test_the_sampled_fisher_is_right_on_average(make: Any, x64: None) -> None:
    """All targets with their probabilities; for the normal, two with the right mean and variance."""
    p = make()
    x = jax.tree.map(lambda a: a[:1], p.inputs)
    z = p.apply(p.params, x)[0]
    if make is softmax_network:
        chances = list(zip(range(3), jax.nn.softmax(z)))
    elif make is sigmoid_network:
        bits = [jnp.array(b, float).reshape(2, 2) for b in itertools.product((0, 1), repeat=4)]
        q = jax.nn.sigmoid(z)
        chances = [(b, jnp.prod(jnp.where(b == 1, q, 1 - q))) for b in bits]
    else:
        chances = [(z - 1, 0.5), (z + 1, 0.5)]
    v = jax.tree.map(jnp.cos, p.params)

    @jax.jit
    def total(w: Any) -> Any:
        parts = []
        for y, chance in chances:
            always = p.likelihood._replace(sample=lambda key, z, y=y: jnp.asarray(y))
            matvec = curvature.sampled_fisher(p.apply, always, w, x, jax.random.key(0))
            parts.append(jax.tree.map(lambda a, c=chance: c * a, matvec(v)))
        exact = curvature.fisher(p.apply, p.likelihood, w, x)(v)
        return jax.tree.map(lambda *xs: sum(xs), *parts), exact

    found, exact = total(p.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), found, exact)


def test_targets_are_drawn_from_the_predictive_distribution() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    z = jnp.array([0.0, 1.0, -1.0])
    makes = (curvature.categorical, curvature.bernoulli, curvature.normal)
    draw = jax.jit(jax.vmap(lambda key: [make().sample(key, z) for make in makes]))
    classes, bits, values = map(np.asarray, draw(keys))
    np.testing.assert_allclose(np.bincount(classes) / 4000, jax.nn.softmax(z), atol=0.04)
    np.testing.assert_allclose(bits.mean(0), jax.nn.sigmoid(z), atol=0.04)
    np.testing.assert_allclose(values.mean(0), z, atol=0.08)
    np.testing.assert_allclose(np.cov(values.T), np.eye(3), atol=0.1)


def test_derivatives_do_not_go_through_how_targets_are_drawn(x64: None) -> None:
    p, key = regression(), jax.random.key(KEY)
    z = p.apply(p.params, p.inputs)
    drawn = jax.vmap(p.likelihood.sample)(jax.random.split(key, N), z)

    def found(w: Any) -> Any:
        return jnp.sum(curvature.sampled_fisher(p.apply, p.likelihood, w, p.inputs, key)(jnp.ones(3)))

    def expected(w: Any) -> Any:
        return jnp.sum(curvature.empirical_fisher(p.loss, w, p.inputs, drawn)(jnp.ones(3)))

    ours, theirs = jax.jit(lambda w: (jax.grad(found)(w), jax.grad(expected)(w)))(p.params)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_stacks_of_vectors(x64: None) -> None:
    p = regression()
    matvec = curvature.gauss_newton(p.apply, p.output_loss, p.params, p.inputs, p.targets, chunk=3)
    stack = jax.random.normal(jax.random.key(0), (5, 3))
    expected = jnp.stack([matvec(v) for v in stack])
    for chunk in (None, 2):
        np.testing.assert_allclose(curvature.batched(matvec, chunk=chunk)(stack), expected, rtol=1e-12)


def test_products_can_be_differentiated_and_mapped(x64: None) -> None:
    """By parameters, data and vector; third derivatives of the loss, against those of the dense matrix."""
    p = regression()

    def found(w: Any, x: Any, v: Any, chunk: int | None) -> Any:
        return jnp.sum(v * curvature.hessian(p.loss, w, x, p.targets, chunk=chunk)(v) ** 2)

    def expected(w: Any, x: Any, v: Any) -> Any:
        return jnp.sum(v * (jax.hessian(p.loss)(w, x, p.targets) @ v) ** 2)

    @jax.jit
    def gradients(*at: Any) -> Any:
        ours = [jax.grad(found, (0, 1, 2))(*at, chunk) for chunk in (None, 3)]
        return jax.grad(expected, (0, 1, 2))(*at), ours

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def mapped(w: Any, v: Any) -> Any:
        return curvature.hessian(p.loss, w, p.inputs, p.targets, chunk=3)(v)

    v = jnp.array([1.0, -2.0, 0.5])
    oracle, ours = gradients(p.params, p.inputs, v)
    for gradient in ours:
        for a, b in zip(gradient, oracle):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    many = jnp.stack([p.params, 2 * p.params])
    one = curvature.hessian(p.loss, many[1], p.inputs, p.targets)(v)
    np.testing.assert_allclose(mapped(many, v)[1], one, rtol=1e-12)


@pytest.mark.slow
def test_hypergradients_go_through_products(x64: None) -> None:
    """Training on a loss with a penalty on curvature, differentiated in the weight of that penalty."""
    x, v = jnp.linspace(-1, 1, 4), jnp.array([1.0, 2.0])

    def plain(w: Any, x: Any) -> Any:
        return jnp.mean(jnp.cos(w[0] * x + w[1]))

    def end(weight: Any, product: Any, adjoint: Any) -> Any:
        loss = lambda w, meta, t: plain(w, x) + meta * jnp.sum(product(w) ** 2)  # noqa: E731
        hypers = {"learning_rate": 0.1, "momentum": 0.5}
        return jnp.sum(hg.train(loss, v, hypers, weight, steps=3, adjoint=adjoint).params)

    @jax.jit
    @jax.grad
    def ours(weight: Any) -> Any:
        return end(weight, lambda w: curvature.hessian(plain, w, x, chunk=3)(v), hg.Reversible())

    @jax.jit
    @jax.grad
    def dense(weight: Any) -> Any:
        return end(weight, lambda w: jax.hessian(plain)(w, x) @ v, hg.Stored())

    found, expected = ours(0.3), dense(0.3)
    assert found == pytest.approx(float(expected), rel=1e-7) and abs(found) > 1e-3


def test_functions_are_traced_once(x64: None) -> None:
    p, calls = regression(), []

    def loss(w: Any, x: Any, y: Any) -> Any:
        calls.append(len(x))
        return p.loss(w, x, y)

    def apply(w: Any, x: Any) -> Any:
        calls.append(len(x))
        return p.apply(w, x)

    w, data = p.params, (p.inputs, p.targets)

    def use(matvec: Any) -> list[int]:
        jax.eval_shape(lambda w: (matvec(w), matvec(2 * w), curvature.dense(matvec, w)), w)
        found = calls.copy()
        calls.clear()
        return found

    assert use(curvature.hessian(loss, w, *data)) == [7]
    assert use(curvature.hessian(lambda *a: loss(*a), w, *data, chunk=3)) == [3, 1]  # one for each shape
    assert use(curvature.gauss_newton(apply, p.output_loss, w, *data)) == [7]
    assert use(curvature.fisher(lambda *a: apply(*a), p.likelihood, w, p.inputs)) == [7]
    sampled = curvature.sampled_fisher(lambda *a: apply(*a), p.likelihood, w, p.inputs, jax.random.key(0))
    assert use(sampled) == [7]
    assert use(curvature.empirical_fisher(lambda *a: loss(*a), w, *data, chunk=3)) == [1]
    jax.eval_shape(lambda w: curvature.moments(loss, w, *data, direction=w, chunk=3), w)
    assert calls == [1]


def test_a_matvec_is_an_argument_of_compiled_functions(x64: None) -> None:
    p = regression()
    matvec = curvature.hessian(p.loss, p.params, p.inputs, p.targets, chunk=3)
    assert {x.shape for x in jax.tree.leaves(matvec)} >= {(3,), (2, 3), (1,)}
    twice = jax.jit(lambda matvec, v: matvec(matvec(v)))
    np.testing.assert_allclose(twice(matvec, p.params), matvec(matvec(p.params)), rtol=1e-12)


# ---- single examples


def by_example(p: Problem, direction: Any) -> list[np.ndarray]:
    """``(n, 1)`` losses, ``(n, d)`` gradients and products."""
    flat, unravel = ravel_pytree(p.params)

    def one(x: Any, y: Any) -> Any:
        def f(flat: Any) -> Any:
            return p.loss(unravel(flat), x[None], y[None])

        return f(flat)[None], jax.grad(f)(flat), jax.hessian(f)(flat) @ ravel_pytree(direction)[0]

    return [np.asarray(rows) for rows in jax.jit(jax.vmap(one))(p.inputs, p.targets)]


@pytest.mark.parametrize("make", [softmax_network, regression])
def test_examples_and_their_moments_are_those_of_a_loop(make: Any, x64: None) -> None:
    p = make()
    direction = jax.tree.map(jnp.sin, p.params)
    expected = by_example(p, direction)
    arguments = (p.params, p.inputs, p.targets)

    @jax.jit
    def found(direction: Any) -> Any:
        make = partial(curvature.moments, p.loss, *arguments, direction=direction)
        each = partial(curvature.per_example, p.loss, *arguments, direction=direction)
        flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])
        return [[flat(x) for x in each(chunk=c)] for c in (None, 3)], [make(), make(chunk=3)]

    examples, moments = found(direction)
    for columns in examples:
        for column, rows in zip(columns, expected):
            np.testing.assert_allclose(column, rows, atol=1e-10)
    for chunked in moments:
        for moment, rows in zip(chunked, expected):
            mean = sum(rows) / N
            variance = sum((row - mean) ** 2 for row in rows) / (N * (N - 1))
            np.testing.assert_allclose(ravel_pytree(moment.mean)[0], mean, atol=1e-10)
            np.testing.assert_allclose(ravel_pytree(moment.variance)[0], variance, atol=1e-10)
            np.testing.assert_allclose(moment.average, np.mean(variance), atol=1e-10)
            assert moment.average > 1e-3


def test_without_a_direction_there_are_no_products() -> None:
    assert curvature.per_example(mean_product, 1.0, jnp.arange(3.0)).hvp is None
    found = curvature.moments(mean_product, 1.0, jnp.arange(3.0))
    assert found.hvp is None
    assert float(found.gradient.variance) == pytest.approx(1 / 3)


def test_variances_far_below_the_squared_mean() -> None:
    """In float32, with deviations of 1 around 10,000; ``E x² - (E x)²`` is wrong altogether."""
    deviation = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    x = jnp.asarray(10_000 + deviation)
    exact = np.asarray(x, np.float64).var(0, ddof=1) / 16

    def loss(w: Any, x: Any) -> Any:
        return jnp.mean(x @ w**2) / 2  # at 1 all of gradient and product is x

    @jax.jit
    def found(w: Any) -> Any:
        return [curvature.moments(loss, w, x, direction=jnp.ones(4), chunk=chunk) for chunk in (None, 3)]

    for moments in found(jnp.ones(4)):
        for moment in (moments.gradient, moments.hvp):
            np.testing.assert_allclose(moment.variance, exact, rtol=1e-4)
            np.testing.assert_allclose(moment.average, exact.mean(), rtol=1e-4)
    one_pass = (np.mean(x**2, 0) - np.mean(x, 0) ** 2) / 15
    assert np.abs(one_pass / exact - 1).max() > 0.5


def test_moments_can_be_differentiated(x64: None) -> None:
    p = regression()

    def found(w: Any, chunk: int | None) -> Any:
        moments = curvature.moments(p.loss, w, p.inputs, p.targets, direction=p.params, chunk=chunk)
        return moments.gradient.average + moments.hvp.average + moments.loss.variance

    def expected(w: Any) -> Any:
        def one(x: Any, y: Any) -> Any:
            f = partial(p.loss, x=x[None], y=y[None])
            return f(w), jax.grad(f)(w), jax.hessian(f)(w) @ p.params

        columns = jax.vmap(one)(p.inputs, p.targets)
        return sum(jnp.mean(jnp.var(x, axis=0, ddof=1)) / N for x in columns)

    @jax.jit
    def gradients(w: Any) -> Any:
        return jax.grad(expected)(w), [jax.grad(found)(w, chunk) for chunk in (None, 3)]

    oracle, ours = gradients(p.params)
    np.testing.assert_allclose(ours, [oracle] * 2, rtol=1e-9)


# ---- messages


def line(w: Any, x: Any) -> Any:
    return w * x[:, None]


def mean_product(w: Any, x: Any) -> Any:
    return jnp.mean(w * x)


X = np.ones(3, np.float32)
NORMAL = curvature.normal()
REFUSED = {
    "loss": (
        lambda: curvature.hessian(lambda w: w, X),
        r"hessian\(loss, params, \*data\): loss must return one scalar, .* returned float32\[3\]",
    ),
    "integer loss": (
        lambda: curvature.hessian(lambda w: 1, X),
        r"loss must return a real float.*int32\[\]",
    ),
    "example loss": (
        lambda: curvature.moments(lambda w, x: w * x, 1.0, X),
        r"moments\(loss, params, \*data, direction\): loss must return one scalar.*float32\[1\]",
    ),
    "output loss": (
        lambda: curvature.gauss_newton(line, lambda z: z, 1.0, X),
        r"gauss_newton\(.*\): output_loss must return one scalar.*float32\[3, 1\]",
    ),
    "no parameters": (lambda: curvature.hessian(lambda w: 1.0, {}), "params has no arrays in it"),
    "integer parameters": (
        lambda: curvature.hessian(lambda w: jnp.sum(w["a"]), {"a": np.ones(2, int)}),
        r"params\['a'\] is int32; there are derivatives in real floats only",
    ),
    "chunk of 0": (
        lambda: curvature.hessian(mean_product, 1.0, X, chunk=0),
        r"hessian\(loss, params, \*data, chunk=0\): chunk must be a whole number of at least 1",
    ),
    "chunk of 1.5": (
        lambda: curvature.moments(mean_product, 1.0, X, chunk=1.5),
        "chunk must be a whole number",
    ),
    "chunk of True": (
        lambda: curvature.per_example(mean_product, 1.0, X, chunk=True),
        "chunk must be a whole number",
    ),
    "stacks": (
        lambda: curvature.batched(lambda v: v, chunk=-1),
        r"batched\(matvec, chunk=-1\): chunk must be",
    ),
    "no data": (
        lambda: curvature.hessian(lambda w: w, 1.0, chunk=2),
        r"arrays in data have the shapes \[\]; their leading axis must be the examples",
    ),
    "other data": (
        lambda: curvature.empirical_fisher(lambda w, x, y: w, 1.0, X, X[:2]),
        r"arrays in data have the shapes \[\[3\], \[2\]\].*Close over what is the same for all examples",
    ),
    "one example": (
        lambda: curvature.moments(mean_product, 1.0, X[:1]),
        "data has one example, which has no variance",
    ),
    "direction's tree": (
        lambda: curvature.moments(mean_product, 1.0, X, direction=[1.0]),
        r"direction has the tree structure PyTreeDef\(\[\*\]\), params has PyTreeDef\(\*\)",
    ),
    "direction's shape": (
        lambda: curvature.per_example(mean_product, 1.0, X, direction=X),
        r"direction at params has shape \[3\]; the parameters have \[\]",
    ),
    "vector's tree": (
        lambda: curvature.hessian(lambda w: w["a"], {"a": 1.0})(1.0),
        r"matvec = hessian\(loss, params, \*data\); matvec\(vector\): the vector has the tree structure",
    ),
    "vector's shape": (
        lambda: curvature.hessian(lambda w: w["a"], {"a": 1.0})({"a": X}),
        r"the vector at params\['a'\] has shape \[3\]; the parameters have \[\]",
    ),
    "complex vector": (
        lambda: curvature.hessian(lambda w: w, 1.0)(1j),
        "the vector at params is complex64; it must hold real numbers",
    ),
    "outputs": (
        lambda: curvature.fisher(mean_product, NORMAL, 1.0, X),
        r"fisher\(.*\): for 3 examples apply\(params, inputs\) must return .* with a leading axis of 3",
    ),
    "outputs, sampled": (
        lambda: curvature.sampled_fisher(mean_product, NORMAL, 1.0, X, jax.random.key(0)),
        r"sampled_fisher\(.*\): for 3 examples apply\(params, inputs\) must return outputs",
    ),
    "likelihood's Fisher matrix": (
        lambda: curvature.fisher(line, NORMAL._replace(fisher=lambda z, t: jnp.sum(t)), 1.0, X),
        r"for outputs float32\[3, 1\].* likelihood.fisher\(outputs, tangent\) must .* float32\[3\]",
    ),
    "likelihood's loss": (
        lambda: curvature.sampled_fisher(
            line, NORMAL._replace(loss=lambda z, y: z - y), 1.0, X, jax.random.key(0)
        ),
        r"likelihood.loss\(outputs, target\) must return one scalar for an example, and for 3 examples "
        r"returned float32\[3, 1\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
