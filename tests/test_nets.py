import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import nets
from tests.problems import relative_error


def numpy_cross_entropy(logits, probabilities):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -(probabilities * log_p).sum(axis=1).mean()


@pytest.fixture
def batch():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(7, 4)).astype(np.float32) * 3
    labels = np.array([0, 1, 2, 3, 3, 1, 0], np.int32)
    return logits, labels


# ---- mlp


def test_mlp_init_default():
    init, _ = nets.mlp((400, 300, 300))
    params = init(jax.random.key(0))
    assert [layer.weights.shape for layer in params] == [(400, 300), (300, 300)]
    assert [layer.biases.shape for layer in params] == [(300,), (300,)]
    assert all((layer.biases == 0).all() for layer in params)
    # 120,000 draws: the standard deviation is known to 0.2%.
    assert float(params[0].weights.std()) == pytest.approx(1 / 20, rel=0.01)
    assert float(params[0].weights.mean()) == pytest.approx(0, abs=5e-4)


def test_mlp_init_scale():
    init, _ = nets.mlp((400, 300, 300))
    default, scaled = init(jax.random.key(0)), init(jax.random.key(0), 0.1)
    for layer in scaled:
        assert float(layer.weights.std()) == pytest.approx(0.1, rel=0.01)
        assert float(layer.biases.std()) == pytest.approx(0.1, rel=0.2)
    np.testing.assert_allclose(scaled[0].weights, default[0].weights * 20 * 0.1, rtol=1e-6)
    # Layers of one shape draw apart.
    assert (scaled[0].biases != scaled[1].biases).all()


def test_mlp_apply_is_the_numpy_forward():
    init, apply = nets.mlp((6, 5, 3))
    params = init(jax.random.key(1), 0.7)
    inputs = np.random.default_rng(1).normal(size=(8, 2, 3)).astype(np.float32)
    (w1, b1), (w2, b2) = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.tanh(inputs.reshape(8, 6) @ w1 + b1) @ w2 + b2
    logits = apply(params, inputs)
    assert logits.shape == (8, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(apply)(params, inputs), expected, rtol=1e-5, atol=1e-6)


def test_mlp_activation_is_on_hidden_layers_only():
    init, apply = nets.mlp((2, 3), activation=lambda x: x * jnp.nan)
    params = init(jax.random.key(0), 1.0)
    inputs = jnp.ones((4, 2))
    expected = np.ones((4, 2)) @ np.asarray(params[0].weights) + np.asarray(params[0].biases)
    np.testing.assert_allclose(apply(params, inputs), expected, rtol=1e-6)
    init, apply = nets.mlp((1, 1, 1), activation=jax.nn.relu)
    params = (nets.Dense(jnp.array([[2.0]]), jnp.array([-1.0])),) * 2
    assert apply(params, jnp.array([0.0, 1.0])).tolist() == [[-1.0], [1.0]]


def test_mlp_init_is_differentiable_in_scale():
    init, apply = nets.mlp((3, 2))
    inputs = jnp.ones((4, 3))
    loss = jax.value_and_grad(lambda scale: apply(init(jax.random.key(0), scale), inputs).sum())
    value, gradient = jax.jit(loss)(0.3)
    # One linear layer is linear in the scale.
    assert float(value) != 0
    assert float(value) == pytest.approx(0.3 * float(gradient), rel=1e-5)


def test_mlp_follows_x64():
    init, apply = nets.mlp((3, 4, 2))
    with jax.enable_x64(True):
        logits = jax.eval_shape(lambda key: apply(init(key), np.ones((5, 3))), jax.random.key(0))
    assert logits.dtype == jnp.float64


@pytest.mark.parametrize("sizes", [(), (5,), (5, 0), (5, -1, 2), (5, 2.0)])
def test_error_mlp_sizes(sizes):
    with pytest.raises(ValueError, match="widths from inputs to logits") as caught:
        nets.mlp(sizes)
    assert str(caught.value).startswith(f"mlp(sizes={sizes!r}): ")


@pytest.mark.parametrize("shape", [(), (64,), (8, 8), (2, 8, 7)])
def test_error_mlp_inputs(shape):
    _, apply = nets.mlp((64, 3))
    with pytest.raises(ValueError, match=r"mlp\(sizes=\(64, 3\)\) takes n examples of 64") as caught:
        apply((), np.zeros(shape))
    assert f"inputs of shape {shape}" in str(caught.value)


def test_error_mlp_scalar_input_to_one_wide_net():
    # A scalar has one element, as many as the net takes, but no axis of examples.
    _, apply = nets.mlp((1, 3))
    with pytest.raises(ValueError, match="takes n examples of 1 numbers"):
        apply((), np.zeros(()))


# ---- convnet


def equinox_convnet(params, images):
    """One image (height, width, channels) through Equinox's layers, which put channels first."""
    hidden = images.transpose(2, 0, 1)
    key = jax.random.key(0)
    for weights, scale, offset in params[:-1]:
        n_in, n_out = weights.shape[2:]
        conv = eqx.nn.Conv2d(n_in, n_out, 3, padding=1, use_bias=False, key=key)
        conv = eqx.tree_at(lambda layer: layer.weight, conv, weights.transpose(3, 2, 0, 1))
        norm = eqx.nn.GroupNorm(groups=n_out, channels=n_out)
        norm = eqx.tree_at(lambda layer: (layer.weight, layer.bias), norm, (scale, offset))
        hidden = eqx.nn.AvgPool2d(2, 2)(jax.nn.relu(norm(conv(hidden))))
    return hidden.transpose(1, 2, 0).ravel() @ params[-1].weights + params[-1].biases


def randomised(params, seed=0):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return structure.unflatten([x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves])


@pytest.mark.slow
@pytest.mark.quick("shape1-2")
@pytest.mark.parametrize(("shape", "depth"), [((8, 8, 1), 3), ((9, 12, 3), 2)])
@pytest.mark.usefixtures("x64")
def test_convnet_is_equinoxs(shape, depth):
    init, apply = nets.convnet(shape, 10, width=5, depth=depth)
    params = randomised(init(jax.random.key(0)))
    images = jax.random.normal(jax.random.key(1), (3, *shape))
    direction = randomised(jax.tree.map(jnp.zeros_like, params), seed=1)

    def results(network):
        def loss(params, images):
            return nets.cross_entropy(network(params, images), jnp.array([2, 5, 1]))

        # Logits, gradient, and what a hypergradient needs: the gradients' derivative along a direction.
        along = jax.jvp(lambda p: jax.grad(loss, (0, 1))(p, images), (params,), (direction,))
        return network(params, images), *along

    ours = jax.jit(lambda: results(apply))()
    with jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(lambda: results(jax.vmap(equinox_convnet, (None, 0))))()
    errors = relative_error(ours, theirs)
    assert max(errors.values()) < 1e-9, errors


def test_convnet_init():
    init, _ = nets.convnet((28, 28, 3), 10)
    params = init(jax.random.key(0))
    shapes = [(3, 3, 3, 128), (3, 3, 128, 128), (3, 3, 128, 128), (3 * 3 * 128, 10)]
    assert [layer.weights.shape for layer in params] == shapes
    for layer, n_in in zip(params, [27, 9 * 128, 9 * 128, 9 * 128]):
        assert float(layer.weights.std()) == pytest.approx(n_in**-0.5, rel=0.03)
    for block in params[:-1]:
        assert (block.scale == 1).all() and (block.offset == 0).all()
        assert block.scale.shape == block.offset.shape == (128,)
    assert (params[-1].biases == 0).all()
    assert not np.allclose(params[1].weights, params[2].weights)


def test_convnet_takes_flat_and_grey_images():
    init, apply = nets.convnet((6, 4, 1), 3, width=2, depth=2)
    params = init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(5, 6, 4, 1)).astype(np.float32)
    expected = apply(params, images)
    assert expected.shape == (5, 3) and expected.dtype == jnp.float32
    for shape in [(5, 6, 4), (5, 24)]:
        np.testing.assert_array_equal(apply(params, images.reshape(shape)), expected)


@pytest.mark.slow
def test_convnet_has_finite_derivatives_at_constant_images():
    init, apply = nets.convnet((4, 4, 1), 2, width=3, depth=2)
    params = init(jax.random.key(0))

    @jax.jit
    def derivatives(params, images):
        gradient = jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2), (0, 1))
        return jax.jvp(gradient, (params, images), (params, jnp.ones_like(images)))

    for images in (jnp.zeros((2, 4, 4, 1)), jnp.full((2, 4, 4, 1), 1e4)):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(derivatives(params, images)))


@pytest.mark.slow
def test_convnet_trains_reversibly():
    init, apply = nets.convnet((8, 8, 1), 3, width=8, depth=2)
    start = init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (12, 8, 8, 1))
    labels = jnp.arange(12) % 3
    hypers = {"learning_rate": jnp.full(20, 0.1), "momentum": jnp.full(20, 0.9)}

    def outer(everything, adjoint):
        start, hypers, images = everything

        def loss(params, images, step):
            return nets.cross_entropy(apply(params, images), labels)

        trained = hg.train(loss, start, hypers, images, steps=20, adjoint=adjoint)
        return jnp.mean(apply(trained.params, images[::-1]) ** 2) + trained.losses[-1]

    everything = (start, hypers, images)
    found, expected = (
        jax.jit(jax.grad(lambda e, a=adjoint: outer(e, a)))(everything)
        for adjoint in (hg.Reversible(), hg.Stored())
    )
    errors = relative_error(found, expected)
    assert max(errors.values()) < 1e-3, errors
    assert min(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(expected)) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ((8, 8), 10, 4, 1),
        ((8, 8, 0), 10, 4, 1),
        ((8, 8, 1), 0, 4, 1),
        ((8, 8, 1), 10, 4.0, 1),
        ((8, 8, 1), 10, 4, 0),
    ],
)
def test_error_convnet_sizes(arguments):
    shape, classes, width, depth = arguments
    with pytest.raises(ValueError, match="the other sizes are positive integers") as caught:
        nets.convnet(shape, classes, width=width, depth=depth)
    call = f"convnet(shape={shape!r}, classes={classes!r}, width={width!r}, depth={depth!r})"
    assert str(caught.value).startswith(call)


@pytest.mark.parametrize(
    ("shape", "depth", "way_out"),
    [
        ((8, 9, 1), 4, "a depth of at most 3"),
        ((28, 28, 1), 5, "a depth of at most 4"),
        ((1, 8, 1), 1, "use mlp"),
    ],
)
def test_error_convnet_too_deep_for_the_images(shape, depth, way_out):
    with pytest.raises(ValueError, match=f"{depth} of them leave nothing .* larger images, or {way_out}"):
        nets.convnet(shape, 10, depth=depth)


@pytest.mark.parametrize("shape", [(), (5,), (8, 8), (2, 1, 8, 8), (2, 8, 8, 3), (2, 63)])
def test_error_convnet_inputs(shape):
    _, apply = nets.convnet((8, 8, 1), 3, width=2, depth=1)
    with pytest.raises(ValueError, match=r"takes n images of shape \(8, 8, 1\) or \(64,\)") as caught:
        apply((), np.zeros(shape))
    assert f"inputs of shape {shape}" in str(caught.value)


# ---- cross_entropy


def test_cross_entropy_is_numpys(batch):
    logits, labels = batch
    expected = numpy_cross_entropy(logits, np.eye(4)[labels])
    assert float(nets.cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-6)
    soft = np.random.default_rng(1).dirichlet(np.ones(4), size=7).astype(np.float32)
    expected = numpy_cross_entropy(logits, soft)
    assert float(nets.cross_entropy(logits, soft)) == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_of_integers_is_that_of_one_hot_rows(batch):
    logits, labels = batch
    assert nets.cross_entropy(logits, labels) == nets.cross_entropy(logits, np.eye(4)[labels])


def test_cross_entropy_is_stable():
    logits = jnp.array([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    assert float(nets.cross_entropy(logits, jnp.array([0, 0]))) == 0
    assert float(nets.cross_entropy(logits, jnp.array([1, 2]))) == pytest.approx(1.5e4)
    gradient = jax.grad(nets.cross_entropy)(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(gradient, [[0.5, -0.5, 0], [0, 0, 0]], atol=1e-7)


def test_cross_entropy_gradient(batch):
    logits, labels = batch
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = jax.jit(jax.grad(nets.cross_entropy))(logits, labels)
    np.testing.assert_allclose(gradient, (softmax - np.eye(4)[labels]) / 7, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 4])
def test_cross_entropy_of_a_label_out_of_range_is_nan(batch, label):
    logits, labels = batch
    labels[3] = label
    assert np.isnan(nets.cross_entropy(logits, labels))


# ---- error_rate


def test_error_rate(batch):
    logits, labels = batch
    expected = np.mean(logits.argmax(axis=1) != labels)
    assert 0 < expected < 1
    assert float(nets.error_rate(logits, labels)) == pytest.approx(expected)
    assert float(nets.error_rate(logits, np.eye(4)[labels])) == pytest.approx(expected)
    assert float(nets.error_rate(logits, logits.argmax(axis=1))) == 0
    assert float(nets.error_rate(logits, (logits.argmax(axis=1) + 1) % 4)) == 1


@pytest.mark.parametrize("function", [nets.cross_entropy, nets.error_rate])
@pytest.mark.parametrize(
    ("logits_shape", "labels_shape", "dtype"),
    [
        ((5,), (5,), "int32"),
        ((5, 3), (), "int32"),
        ((5, 3), (4,), "int32"),
        ((5, 3), (5,), "float32"),
        ((5, 3), (5, 1), "int32"),
        ((5, 3), (3, 5), "float32"),
    ],
)
def test_error_labels(function, logits_shape, labels_shape, dtype):
    with pytest.raises(ValueError, match="they do not fit") as caught:
        function(np.zeros(logits_shape), np.zeros(labels_shape, dtype))
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}(logits, labels) with logits {logits_shape}")
    assert f"labels {labels_shape} of {dtype}" in message


@pytest.mark.slow
def test_bfloat16_inside_the_loss_is_reversed_exactly():
    """Parameters and the optimizer in float32; exact, and near the hypergradient of float32."""
    (init, apply), steps = nets.mlp((8, 32, 4)), 20
    x = jax.random.normal(jax.random.key(0), (steps, 64, 8))
    y = jnp.argmax(x[..., :4] + x[..., 4:] ** 2, axis=2)

    def final(rates, dtype, adjoint):
        def loss(params, meta, batch):
            params = jax.tree.map(lambda w: w.astype(dtype), params)
            return nets.cross_entropy(apply(params, batch[0].astype(dtype)), batch[1])

        given = {"steps": steps, "optimizer": hg.adam(), "adjoint": adjoint}
        start = init(jax.random.key(1))
        trained = hg.train(loss, start, {"learning_rate": rates}, None, (x, y), **given)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained.params))
        return jnp.mean(trained.losses)

    narrow, oracle, wide = (
        jax.grad(final)(jnp.full(steps, 0.02), dtype, adjoint)
        for dtype, adjoint in (
            (jnp.bfloat16, hg.Reversible()),
            (jnp.bfloat16, hg.Checkpointed()),
            (jnp.float32, hg.Reversible()),
        )
    )
    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))  # noqa: E731
    assert error(narrow, oracle) < 1e-5 and 1e-5 < error(narrow, wide) < 1e-2
