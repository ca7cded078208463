"""The decoder-only transformer, and losses of sequences."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf, log_softmax

import hypergrad as hg
from hypergrad import nets
from tests.problems import relative_error

VOCABULARY, LENGTH = 7, 5


def network(depth: int = 1) -> tuple[Any, Any]:
    return nets.transformer(VOCABULARY, LENGTH, width=6, depth=depth, heads=2)


def parameters(init: Any) -> Any:
    """Random ones, of a size at which every part of the network matters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape), x.dtype), shapes)


def tokens(n: int = 3, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, (n, length))


def numpy_transformer(params: Any, sequence: np.ndarray, heads: int) -> np.ndarray:
    """One sequence, one head and one token after the other."""

    def norm(layer: Any, x: np.ndarray) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * layer.scale + layer.offset

    def dense(layer: Any, x: np.ndarray) -> np.ndarray:
        return x @ layer.weights + layer.biases

    embedding, *blocks, head = jax.tree.map(np.asarray, params)
    hidden = [embedding.tokens[token] + embedding.positions[k] for k, token in enumerate(sequence)]
    size = len(hidden[0]) // heads
    for block in blocks:
        queries, keys, values = np.split(
            np.stack([norm(block.attention_norm, x) @ block.attention for x in hidden]), 3, axis=1
        )
        for t in range(len(hidden)):
            joined = []
            for columns in np.split(np.arange(size * heads), heads):
                scores = np.array([queries[t, columns] @ keys[s, columns] for s in range(t + 1)])
                shares = np.exp(scores / np.sqrt(size))
                joined.append(shares / shares.sum() @ values[: t + 1, columns])
            hidden[t] = hidden[t] + dense(block.projection, np.concatenate(joined))
            inner = dense(block.expansion, norm(block.mlp_norm, hidden[t]))
            inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
            hidden[t] = hidden[t] + dense(block.contraction, inner)
    return np.stack([dense(head.dense, norm(head.norm, x)) for x in hidden])


@pytest.mark.usefixtures("x64")
def test_transformer_is_the_numpy_forward() -> None:
    init, apply = network(depth=2)
    params = parameters(init)
    for given in (tokens(), tokens(length=3)):
        expected = [numpy_transformer(params, sequence, heads=2) for sequence in given]
        np.testing.assert_allclose(jax.jit(apply)(params, given), expected, rtol=1e-9, atol=1e-12)


def test_a_later_token_changes_no_earlier_logits() -> None:
    init, apply = network()
    params, apply = parameters(init), jax.jit(apply)
    first = tokens(1)
    for t in range(LENGTH):
        second = first.copy()
        second[0, t] = (first[0, t] + 1) % VOCABULARY
        changed = np.any(np.asarray(apply(params, first) != apply(params, second)), axis=2)[0]
        assert changed.tolist() == [s >= t for s in range(LENGTH)]


def test_transformer_init() -> None:
    init, _ = nets.transformer(50, 40, width=64, depth=2, heads=4)
    embedding, *blocks, head = init(jax.random.key(0))
    assert embedding.tokens.shape == (50, 64) and embedding.positions.shape == (40, 64)
    assert float(embedding.tokens.std()) == pytest.approx(0.02, rel=0.05)
    assert float(embedding.positions.std()) == pytest.approx(0.02, rel=0.05)
    assert len(blocks) == 2 and not np.allclose(blocks[0].attention, blocks[1].attention)
    for block in blocks:
        assert block.attention.shape == (64, 192) and float(block.attention.std() * 8) == pytest.approx(
            1, rel=0.05
        )
        assert block.expansion.weights.shape == (64, 256) and block.contraction.weights.shape == (256, 64)
        for layer, n_in in (
            (block.expansion, 64),
            (block.projection, 4 * 64),
            (block.contraction, 4 * 256),
        ):
            assert float(layer.weights.std()) == pytest.approx(n_in**-0.5, rel=0.05)
            assert (layer.biases == 0).all()
    for norm in (blocks[0].attention_norm, blocks[0].mlp_norm, head.norm):
        assert (norm.scale == 1).all() and (norm.offset == 0).all()
    assert head.dense.weights.shape == (64, 50) and (head.dense.biases == 0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_transformer_is_differentiated_through_training() -> None:
    """Rates by layer, momentum and start, against plain JAX."""
    init, apply = network()
    start = parameters(init)
    given, steps = tokens(2), 3
    rates = tuple(jnp.linspace(0.1, 0.3, steps) * (k + 1) for k in range(len(start)))

    def loss(params: Any, meta: Any, step: Any) -> Any:
        return nets.cross_entropy(apply(params, given[:, :-1]), given[:, 1:])

    def ours(start: Any, rates: Any, gamma: Any) -> Any:
        hypers = {"learning_rate": rates, "momentum": gamma}
        trained = hg.train(
            loss, start, hypers, steps=steps, optimizer=hg.heavy_ball(), adjoint=hg.Reversible()
        )
        return loss(trained.params, None, 0)

    def plain(start: Any, rates: Any, gamma: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            params, velocity = state
            gradient = jax.grad(loss)(params, None, 0)
            velocity = jax.tree.map(lambda v, g: gamma * v + g, velocity, gradient)
            params = tuple(
                jax.tree.map(lambda w, v, a=rate: w - a * v, *pair)
                for rate, *pair in zip(now, params, velocity)
            )
            return (params, velocity), None

        (params, _), _ = jax.lax.scan(step, (start, jax.tree.map(jnp.zeros_like, start)), rates)
        return loss(params, None, 0)

    everything = (start, rates, 0.5)
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*everything) for f in (ours, plain))
    errors = relative_error(found, expected)
    assert max(errors.values()) < 1e-7, errors
    assert min(float(jnp.linalg.norm(x)) for x in jax.tree.leaves(expected)) > 0


def test_transformer_follows_x64() -> None:
    init, apply = network()
    with jax.enable_x64(True):
        logits = jax.eval_shape(lambda key: apply(init(key), tokens()), jax.random.key(0))
    assert logits.shape == (3, LENGTH, VOCABULARY) and logits.dtype == jnp.float64


def test_a_token_out_of_range_makes_its_sequence_nan() -> None:
    init, apply = network()
    given = tokens()
    given[1, 2], given[2, 4] = -1, VOCABULARY
    nan = np.isnan(jax.jit(apply)(parameters(init), given)).all(axis=(1, 2))
    assert nan.tolist() == [False, True, True]


@pytest.mark.parametrize(
    "sizes", [(0, 5, 6, 1, 2), (7, 5.0, 6, 1, 2), (7, 5, -6, 1, 2), (7, 5, 6, True, 2)]
)
def test_error_transformer_sizes(sizes: tuple[Any, ...]) -> None:
    vocabulary, length, width, depth, heads = sizes
    with pytest.raises(ValueError, match="all sizes are positive integers") as caught:
        nets.transformer(vocabulary, length, width=width, depth=depth, heads=heads)
    call = f"transformer(vocabulary={vocabulary}, length={length}, width={width}, depth={depth}, "
    assert str(caught.value).startswith(f"{call}heads={heads}): ")


def test_error_transformer_heads() -> None:
    with pytest.raises(ValueError, match=r"transformer\(.*heads=4\): every head .* a multiple of 4"):
        nets.transformer(7, 5, width=6)


@pytest.mark.parametrize(
    "given",
    [
        np.zeros(5, int),
        np.zeros((2, 6), int),
        np.zeros((2, 0), int),
        np.zeros((2, 5)),
        np.zeros((2, 5, 7), int),
    ],
)
def test_error_transformer_tokens(given: np.ndarray) -> None:
    _, apply = network()
    with pytest.raises(ValueError, match=r"takes \(n, l\) integers with l from 1 to 5") as caught:
        apply((), given)
    assert f"tokens of shape {given.shape} and {given.dtype}: transformer(" in str(caught.value)


# ---- losses of sequences


def test_losses_of_sequences_count_every_place() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (2, 3))
    each = [-log_softmax(logits[i, t])[labels[i, t]] for i in range(2) for t in range(3)]
    wrong = [logits[i, t].argmax() != labels[i, t] for i in range(2) for t in range(3)]
    for given in (labels, np.eye(4, dtype=np.float32)[labels]):
        assert float(nets.cross_entropy(logits, given)) == pytest.approx(np.mean(each), rel=1e-6)
        assert float(nets.error_rate(logits, given)) == pytest.approx(np.mean(wrong))
    labels[1, 2] = 4
    assert np.isnan(nets.cross_entropy(logits, labels))


@pytest.mark.parametrize("function", [nets.cross_entropy, nets.error_rate])
@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3, 4), (2,)), ((2, 3, 4), (2, 4)), ((1, 2, 3, 4), (1, 2, 3))]
)
def test_error_labels_of_sequences(function: Any, shape: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"they do not fit. Pass logits .* or \(n, length, classes\)"):
        function(np.zeros(shape), np.zeros(labels, int))


# ---- memory: layers scanned, blocks computed again, logits in chunks


def hessian_product(loss: Any, params: Any) -> Any:
    """Value, gradient and a Hessian-vector product along ones."""
    along = jax.tree.map(jnp.ones_like, params)
    gradient = jax.value_and_grad(loss)
    return jax.jvp(gradient, (params,), (along,))


@pytest.mark.usefixtures("x64")
@pytest.mark.quick("value-True")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compared", ["value", "derivatives"])
def test_options_for_memory_change_nothing(tied: bool, compared: str) -> None:
    given = tokens()
    init, apply = nets.transformer(VOCABULARY, LENGTH, width=6, depth=2, heads=2, tied=tied)
    params = parameters(init)
    _, scanned = nets.transformer(
        VOCABULARY,
        LENGTH,
        width=6,
        depth=2,
        heads=2,
        tied=tied,
        scan_layers=True,
        remat=True,
        query_chunk=3,
    )

    def plain(params: Any) -> Any:
        return nets.cross_entropy(apply(params, given[:, :-1]), given[:, 1:])

    def lean(params: Any) -> Any:
        embedding, *blocks, head = params
        params = embedding, jax.tree.map(lambda *x: jnp.stack(x), *blocks), head
        return nets.chunked_cross_entropy(
            *scanned(params, given[:, :-1], logits=False), given[:, 1:], chunks=5
        )

    of = (lambda f: f) if compared == "value" else (lambda f: partial(hessian_product, f))
    expected, found = (jax.jit(of(loss))(params) for loss in (plain, lean))
    errors = relative_error(found, expected)
    assert max(errors.values()) < 1e-10, errors


def test_scanned_layers_start_alike() -> None:
    sizes = {"width": 6, "depth": 2, "heads": 2}
    (plain, _), (stacked, _) = (nets.transformer(7, 5, scan_layers=each, **sizes) for each in (False, True))
    _, *expected, _ = plain(jax.random.key(0))
    _, found, _ = stacked(jax.random.key(0))
    np.testing.assert_array_equal(found.attention, [block.attention for block in expected])


def test_a_large_vocabulary_is_looked_up_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    init, apply = network()
    params, given = parameters(init), tokens()
    expected = jax.jit(apply)(params, given)
    monkeypatch.setattr("hypergrad.nets.transformers.ONE_HOT", 4 * VOCABULARY)
    np.testing.assert_allclose(jax.jit(lambda *x: apply(*x))(params, given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_chunked_cross_entropy_is_that_of_optax(chunks: int) -> None:
    rng = np.random.default_rng(0)
    hidden, labels = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32), rng.integers(0, 7, (2, 5))
    last = nets.Dense(jnp.asarray(rng.normal(size=(3, 7)), jnp.float32), jnp.ones(7))

    def whole(at: Any) -> Any:
        hidden, last = at
        logits = hidden @ last.weights + last.biases[None, None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def ours(at: Any) -> Any:
        return nets.chunked_cross_entropy(*at, labels, chunks=chunks)

    expected, found = (jax.jit(partial(hessian_product, loss))((hidden, last)) for loss in (whole, ours))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_chunked_cross_entropy_holds_few_logits() -> None:
    """Temporaries of a Hessian-vector product, with 64 rows of 20,000 logits at once and with 8."""
    shapes = jax.eval_shape(
        lambda: (jnp.zeros((64, 4)), nets.Dense(jnp.zeros((4, 20_000)), jnp.zeros(20_000)))
    )
    labels = np.zeros(64, int)

    def temporaries(chunks: int) -> int:
        loss = lambda at: nets.chunked_cross_entropy(*at, labels, chunks=chunks)  # noqa: E731
        compiled = jax.jit(partial(hessian_product, loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights = 4 * 4 * 20_000
    assert temporaries(8) < temporaries(1) / 4 + 4 * weights


def test_a_label_out_of_range_makes_chunks_nan() -> None:
    last = nets.Dense(jnp.ones((3, 7)), jnp.zeros(7))
    for label, nan in ((6, False), (7, True), (-1, True)):
        labels = np.array([0, 1, label])
        assert bool(jnp.isnan(nets.chunked_cross_entropy(jnp.ones((3, 3)), last, labels, chunks=2))) == nan


def test_error_chunked_cross_entropy() -> None:
    last = nets.Dense(jnp.ones((3, 7)), jnp.zeros(7))
    with pytest.raises(ValueError, match=r"chunked_cross_entropy\(.*chunks=0\): chunks is how many pieces"):
        nets.chunked_cross_entropy(jnp.ones((2, 3)), last, np.zeros(2, int), chunks=0)
    for shape, labels in (((2, 4), np.zeros(2, int)), ((2, 3), np.zeros(2)), ((2, 3), np.zeros(3, int))):
        with pytest.raises(ValueError, match=r"they do not fit. Pass hidden \(n, 3\)"):
            nets.chunked_cross_entropy(jnp.ones(shape), last, labels)


def random_heads(length: int, dtype: Any = np.float64) -> Any:
    """Queries, keys and values."""
    return tuple(
        jnp.asarray(np.random.default_rng(k).normal(size=(2, length, 2, 3)), dtype) for k in range(3)
    )


def plain_attention(queries: Any, keys: Any, values: Any) -> Any:
    """The whole matrix at once."""
    scores = jnp.einsum("nqhd,nkhd->nqkh", queries, keys) / np.sqrt(queries.shape[3])
    shares = jnp.exp(scores) * np.tri(queries.shape[1])[None, :, :, None]
    return jnp.einsum("nqkh,nkhd->nqhd", shares / jnp.sum(shares, axis=2, keepdims=True), values)


@pytest.mark.usefixtures("x64")
@pytest.mark.quick("3")
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_attention_is_plain_attention(chunk: int) -> None:
    """Value, gradient and Hessian-vector product in float64."""
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 7, 2, 3)))
    plain = lambda x: jnp.sum(weights * plain_attention(*x) ** 2)  # noqa: E731
    ours = lambda x: jnp.sum(weights * nets.causal_attention(*x, query_chunk=chunk) ** 2)  # noqa: E731
    expected, found = (jax.jit(partial(hessian_product, f))(random_heads(7)) for f in (plain, ours))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_memory_of_chunked_attention_is_linear_in_the_length() -> None:
    """Temporaries of a Hessian-vector product at two lengths."""

    def temporaries(length: int, chunk: int | None) -> int:
        loss = lambda x: jnp.sum(nets.causal_attention(*x, query_chunk=chunk) ** 2)  # noqa: E731
        shapes = jax.eval_shape(partial(random_heads, length, np.float32))
        compiled = jax.jit(partial(hessian_product, loss)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(512, None) > 3 * temporaries(256, None)
    assert temporaries(512, 16) < 2.2 * temporaries(256, 16) < temporaries(256, None)


def test_error_attention() -> None:
    x = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"causal_attention\(.*query_chunk=0\): it is how many places"):
        nets.causal_attention(x, x, x, query_chunk=0)
    with pytest.raises(ValueError, match=r"they do not fit. Pass arrays \(n, length, heads, d\)"):
        nets.causal_attention(x, x[:, :2], x)


def test_transformer_in_bfloat16() -> None:
    """Narrow numbers in and out; softmax and normalization inside are wider."""
    init, apply = network()
    params = init(jax.random.key(0))
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    found, expected = (jax.jit(apply)(x, tokens()) for x in (narrow, params))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, atol=0.05 * float(jnp.abs(expected).max())
    )
