"""Fully connected nets, convolutional ones and transformers as pure functions, and two losses for them.

With a third argument, ``apply(params, inputs, probes)`` of `mlp` and `convnet` is a network as
`hypergrad.layers` expects it: it adds the probes to what its layers compute, and returns the inputs of the
layers next to its outputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad._base.checks import is_whole


class Dense(NamedTuple):
    """One fully connected layer, ``inputs @ weights + biases``.

    Attributes:
      weights: ``(n_in, n_out)``.
      biases: ``(n_out,)``.
    """

    weights: jax.Array
    biases: jax.Array


class Conv(NamedTuple):
    """One block of `convnet`: convolution, instance normalization, ReLU, pooling.

    Attributes:
      weights: ``(3, 3, n_in, n_out)``.
      scale: ``(n_out,)``, by which each normalized channel is multiplied.
      offset: ``(n_out,)``, added to each channel after the scale.
    """

    weights: jax.Array
    scale: jax.Array
    offset: jax.Array


class Embedding(NamedTuple):
    """What a `transformer` adds up for every place of a sequence.

    Attributes:
      tokens: ``(vocabulary, width)``, a row for each token.
      positions: ``(length, width)``, a row for each place.
    """

    tokens: jax.Array
    positions: jax.Array


class Norm(NamedTuple):
    """Layer normalization, over the last axis.

    Attributes:
      scale: ``(width,)``, by which each normalized number is multiplied.
      offset: ``(width,)``, added after the scale.
    """

    scale: jax.Array
    offset: jax.Array


class Block(NamedTuple):
    """One block of a `transformer`.

    Attributes:
      attention_norm: the normalization before attention.
      attention: ``(width, 3 width)``, to queries, keys and values, each with its heads side by side.
      projection: ``width`` to ``width``, from the heads back.
      mlp_norm: the normalization before the perceptron.
      expansion: ``width`` to ``4 width``, before the GELU.
      contraction: ``4 width`` to ``width``, behind it.
    """

    attention_norm: Norm
    attention: jax.Array
    projection: Dense
    mlp_norm: Norm
    expansion: Dense
    contraction: Dense


class Head(NamedTuple):
    """The last layer of a `transformer`.

    Attributes:
      norm: the normalization before it.
      dense: ``width`` to ``vocabulary``.
    """

    norm: Norm
    dense: Dense


def mlp(
    sizes: Sequence[int], activation: Callable[[jax.Array], jax.Array] = jnp.tanh
) -> tuple[Callable[..., tuple[Dense, ...]], Callable[..., Any]]:
    """A multilayer perceptron, as a pair of pure functions ``(init, apply)``.

    ``h_0 = inputs,  h_l = activation(h_{l-1} W_l + b_l),  logits = h_{L-1} W_L + b_L``

    Args:
      sizes: the widths from inputs to logits, two or more positive integers.  With just two,
        ``mlp((n, classes))``, this is multinomial logistic regression.
      activation: the elementwise function after each hidden layer; none follows the logits.

    Returns:
      ``init(key, scale=None)``, which returns a tuple of one `Dense` per layer in JAX's default float type.
      By default weights are ``normal / sqrt(n_in)`` and biases zero; with a float ``scale``, which may be
      traced, both are ``normal * scale``.

      ``apply(params, inputs)``, which returns logits ``(n, sizes[-1])`` for inputs ``(n, ...)`` whose axes
      after the first multiply to ``sizes[0]``, and raises ValueError for others.
      ``apply(params, inputs, probes)`` adds the ``L`` probes to ``h_{l-1} W_l + b_l``, and returns the
      logits and a tuple of all ``h_{l-1}``.

    Raises:
      ValueError: ``sizes`` holds fewer than two widths, or one that is not a positive integer.

    Source: Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, "Efficient BackProp", 1998, for ``1 / sqrt(n_in)``.

    >>> init, apply = mlp((64, 16, 10))
    >>> apply(init(jax.random.key(0)), jnp.zeros((3, 8, 8))).shape
    (3, 10)
    """
    widths = tuple(sizes)
    if len(widths) < 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in widths):
        raise ValueError(
            f"mlp(sizes={sizes!r}): sizes are the widths from inputs to logits. Pass two or more "
            "positive integers, such as (784, 50, 10)."
        )

    def init(key: jax.Array, scale: float | jax.Array | None = None) -> tuple[Dense, ...]:
        def layer(key: jax.Array, n_in: int, n_out: int) -> Dense:
            weights_key, biases_key = jax.random.split(key)
            weights = _normal(weights_key, (n_in, n_out))
            if scale is None:
                return Dense(weights / math.sqrt(n_in), jnp.zeros(n_out))
            return Dense(weights * scale, jax.random.normal(biases_key, (n_out,)) * scale)

        keys = jax.random.split(key, len(widths) - 1)
        return tuple(layer(*args) for args in zip(keys, widths[:-1], widths[1:]))

    def apply(
        params: tuple[Dense, ...], inputs: jax.Array | np.ndarray, probes: Sequence[Any] | None = None
    ) -> Any:
        if inputs.ndim == 0 or math.prod(inputs.shape[1:]) != widths[0]:
            raise ValueError(
                f"apply(params, inputs) with inputs of shape {inputs.shape}: mlp(sizes={widths}) "
                f"takes n examples of {widths[0]} numbers each. Pass inputs (n, {widths[0]}), or "
                "with more axes after the first; inputs[None] makes a batch of one example."
            )
        hidden = jnp.asarray(inputs).reshape(inputs.shape[0], widths[0])
        seen = [hidden]
        for k, (weights, biases) in enumerate(params):
            hidden = _probed(seen[-1] @ weights + biases[None], None if probes is None else probes[k])
            seen.append(activation(hidden))
        return hidden if probes is None else (hidden, tuple(seen[: len(params)]))

    return init, apply


def convnet(
    shape: tuple[int, int, int], classes: int, *, width: int = 128, depth: int = 3
) -> tuple[Callable[..., tuple[Conv | Dense, ...]], Callable[..., Any]]:
    """The ConvNet-D of dataset distillation, as a pair of pure functions ``(init, apply)``.

    ``h <- pool(relu(a (W * h - μ) / sqrt(σ² + ε) + b))``, ``D`` times;  ``logits = h W + b``

    ``W * h`` is a 3x3 convolution with zero padding, ``μ`` and ``σ²`` are the mean and variance over the
    pixels of each channel of each image, and ``ε = 1e-5``.  ``pool`` averages squares of 2x2 pixels and
    drops an odd last row or column.  The convolutions have no biases, because subtracting ``μ`` would undo
    them.

    Args:
      shape: (height, width, channels) of an image.
      classes: the number of logits.
      width: the number of channels of every block.
      depth: ``D``, the number of blocks, at most log2 of the shorter side of the image.

    Returns:
      ``init(key)``, which returns a tuple of ``D`` `Conv` and a `Dense` in JAX's default float type.
      Weights are ``normal / sqrt(n_in)``, with ``9 n_in`` in place of ``n_in`` in convolutions; scales are
      one, offsets and biases zero.

      ``apply(params, inputs)``, which returns logits ``(n, classes)`` for inputs
      ``(n, height, width, channels)``, ``(n, height * width * channels)`` or, with one channel,
      ``(n, height, width)``, and raises ValueError for others.  ``apply(params, inputs, probes)`` takes
      probes structured like the parameters, a tuple of ``D`` `Conv` and one more.  It adds them to
      ``W * h`` (``weights``) and to the results of scale and offset.  It returns the logits and a tuple
      like the probes of the layers' inputs: the 3x3 patches of ``h``, what is multiplied by the scale, and
      ones.

    Raises:
      ValueError: a size is not a positive integer, or the depth is too great.

    Source: S. Gidaris, N. Komodakis, "Dynamic few-shot visual learning without forgetting", 2018; B. Zhao,
    K. Mopuri, H. Bilen, "Dataset condensation with gradient matching", 2021.

    >>> init, apply = convnet((8, 8, 1), 10, width=4, depth=2)
    >>> apply(init(jax.random.key(0)), jnp.zeros((3, 64))).shape
    (3, 10)
    """
    call = f"convnet(shape={shape!r}, classes={classes!r}, width={width!r}, depth={depth!r})"
    sizes = (*shape, classes, width, depth)
    if len(shape) != 3 or not all(isinstance(n, int | np.integer) and n > 0 for n in sizes):
        raise ValueError(
            f"{call}: shape is the (height, width, channels) of an image, such as (28, 28, 1), and "
            "it and the other sizes are positive integers."
        )
    height, breadth, channels = shape
    deepest = min(height, breadth).bit_length() - 1
    if depth > deepest:
        way_out = f"a depth of at most {deepest}" if deepest else "use mlp"
        raise ValueError(
            f"{call}: each block halves the image, and {depth} of them leave nothing of it. Pass "
            f"larger images, or {way_out}."
        )
    pixels = (height >> depth) * (breadth >> depth)
    head_init, head_apply = mlp((pixels * width, classes))

    def init(key: jax.Array) -> tuple[Conv | Dense, ...]:
        def block(key: jax.Array, n_in: int) -> Conv:
            weights = _normal(key, (3, 3, n_in, width)) / math.sqrt(9 * n_in)
            return Conv(weights, jnp.ones(width), jnp.zeros(width))

        head, *keys = jax.random.split(key, 1 + depth)
        widths = (channels, *[width] * (depth - 1))
        return *map(block, keys, widths), *head_init(head)

    def apply(
        params: tuple[Any, ...], inputs: jax.Array | np.ndarray, probes: Sequence[Any] | None = None
    ) -> Any:
        fitting = [tuple(shape), (math.prod(shape),), tuple(shape[:2])][: 3 if channels == 1 else 2]
        if inputs.shape[1:] not in fitting:
            raise ValueError(
                f"apply(params, inputs) with inputs of shape {inputs.shape}: {call} takes n images of "
                f"shape {' or '.join(map(str, fitting))}. inputs[None] makes a batch of one image."
            )
        hidden = jnp.asarray(inputs).reshape(inputs.shape[0], *shape)
        seen = []
        for k, (weights, scale, offset) in enumerate(params[:-1]):
            patches = _patches(hidden)
            of_weights, of_scale, of_offset = (None, None, None) if probes is None else probes[k]
            normal = _normalise(_probed(_convolve(patches, weights), of_weights))
            hidden = normal * scale[None, None, None] + offset[None, None, None]
            hidden = _pool(jax.nn.relu(_probed(_probed(hidden, of_scale), of_offset)))
            seen.append(Conv(patches, normal, jnp.ones_like(normal)))
        if probes is None:
            return head_apply(params[-1:], hidden)
        logits, last = head_apply(params[-1:], hidden, probes[-1:])
        return logits, (*seen, *last)

    return init, apply


def transformer(
    vocabulary: int, length: int, *, width: int = 128, depth: int = 4, heads: int = 4
) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., jax.Array]]:
    """A decoder-only transformer, as a pair of pure functions ``(init, apply)``.

    ``h <- E[token] + P[place]``;  ``h <- h + attend(norm(h))``, ``h <- h + mlp(norm(h))``, ``D`` times;
    ``logits = norm(h) W + b``

    ``attend(x) = concat_heads(softmax(mask(Q Kᵀ / √d)) V) W + b`` with ``Q, K, V = x W`` and
    ``d = width / heads``, where the mask lets no token see later ones.  These three have no biases, because
    those of the keys would change nothing.  ``mlp(x) = gelu(x W + b) W + b`` is four times as wide inside,
    and ``gelu(x) = x Φ(x)``.  ``norm`` scales each token's numbers to mean zero and, up to ``ε = 1e-5``,
    variance one, and then multiplies and shifts them.  The logits have weights of their own, not those of
    ``E``.  There is no dropout.

    Args:
      vocabulary: the number of different tokens.
      length: the greatest length of a sequence.
      width: the number of values that stand for a token between the layers; a multiple of `heads`.
      depth: ``D``, the number of blocks.
      heads: the number of heads of attention.

    Returns:
      ``init(key)``, which returns a tuple of an `Embedding`, ``D`` `Block` and a `Head` in JAX's default
      float type.  Weights are ``normal / sqrt(n_in)``, and those that lead back to ``h`` (`projection` and
      `contraction`) are divided by ``sqrt(2 D)`` too; ``E`` and ``P`` are ``0.02 normal``, scales one,
      offsets and biases zero.

      ``apply(params, tokens)``, which returns logits ``(n, l, vocabulary)`` for integers ``(n, l)`` with
      ``l <= length``, and raises ValueError for others.  Logits ``[:, t]`` depend on tokens up to ``t``,
      and foretell token ``t + 1``.  A token outside [0, vocabulary) makes all logits of its sequence NaN.

    Raises:
      ValueError: a size is not a positive integer, or the width is no multiple of the heads.

    Source: A. Vaswani et al., "Attention is all you need", 2017; A. Radford et al., "Language models are
    unsupervised multitask learners", 2019, for the order of the layers and the initial weights.

    >>> init, apply = transformer(65, 32, width=16, depth=1, heads=2)
    >>> apply(init(jax.random.key(0)), jnp.zeros((3, 20), int)).shape
    (3, 20, 65)
    """
    call = (
        f"transformer(vocabulary={vocabulary!r}, length={length!r}, width={width!r}, depth={depth!r}, "
        f"heads={heads!r})"
    )
    if not all(map(is_whole, (vocabulary, length, width, depth, heads))):
        raise ValueError(f"{call}: all sizes are positive integers. Pass whole numbers of at least 1")
    if width % heads:
        raise ValueError(
            f"{call}: every head takes an equal share of the width. Pass a width that is a multiple of "
            f"{heads}"
        )

    def dense(key: jax.Array, n_in: int, n_out: int, divisor: float = 1.0) -> Dense:
        return Dense(jax.random.normal(key, (n_in, n_out)) / math.sqrt(n_in * divisor), jnp.zeros(n_out))

    def block(key: jax.Array) -> Block:
        attention, projection, expansion, contraction = jax.random.split(key, 4)
        return Block(
            _no_norm(width),
            dense(attention, width, 3 * width).weights,
            dense(projection, width, width, 2 * depth),
            _no_norm(width),
            dense(expansion, width, 4 * width),
            dense(contraction, 4 * width, width, 2 * depth),
        )

    def init(key: jax.Array) -> tuple[Any, ...]:
        tokens, positions, head, *blocks = jax.random.split(key, 3 + depth)
        embedding = Embedding(
            0.02 * jax.random.normal(tokens, (vocabulary, width)),
            0.02 * jax.random.normal(positions, (length, width)),
        )
        return embedding, *map(block, blocks), Head(_no_norm(width), dense(head, width, vocabulary))

    def apply(params: tuple[Any, ...], tokens: jax.Array | np.ndarray) -> jax.Array:
        whole = jnp.issubdtype(tokens.dtype, jnp.integer)
        if tokens.ndim != 2 or not whole or not 1 <= tokens.shape[1] <= length:
            raise ValueError(
                f"apply(params, tokens) with tokens of shape {tokens.shape} and {tokens.dtype}: {call} "
                f"takes (n, l) integers with l from 1 to {length}. tokens[None] makes a batch of one "
                "sequence."
            )
        embedding, *blocks, head = params
        hidden = _one_hot(tokens, vocabulary, embedding.tokens.dtype) @ embedding.tokens
        hidden = hidden + embedding.positions[None, : tokens.shape[1]]
        for each in blocks:
            seen = _layer_norm(each.attention_norm, hidden) @ each.attention
            hidden = hidden + _affine(each.projection, _attend(seen, heads))
            inner = jax.nn.gelu(
                _affine(each.expansion, _layer_norm(each.mlp_norm, hidden)), approximate=False
            )
            hidden = hidden + _affine(each.contraction, inner)
        return _affine(head.dense, _layer_norm(head.norm, hidden))

    return init, apply


def _no_norm(width: int) -> Norm:
    """The scale and offset with which training begins."""
    return Norm(jnp.ones(width), jnp.zeros(width))


def _affine(layer: Dense, inputs: jax.Array) -> jax.Array:
    """The layer on the last of three axes."""
    return inputs @ layer.weights + layer.biases[None, None]


def _layer_norm(norm: Norm, inputs: jax.Array) -> jax.Array:
    """The normalization of the last of three axes."""
    centred = inputs - jnp.mean(inputs, axis=2, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=2, keepdims=True) + 1e-5)
    return normal * norm.scale[None, None] + norm.offset[None, None]


def _attend(seen: jax.Array, heads: int) -> jax.Array:
    """Causal attention, (n, length, 3 width) -> (n, length, width)."""
    n, length, _ = seen.shape
    queries, keys, values = jnp.moveaxis(seen.reshape(n, length, 3, heads, -1), 2, 0)
    scores = jnp.einsum("nqhd,nkhd->nhqk", queries, keys) / math.sqrt(queries.shape[3])
    earlier = jnp.tri(length, dtype=bool)
    shares = jax.nn.softmax(jnp.where(earlier[None, None], scores, -jnp.inf), axis=3)
    return jnp.einsum("nhqk,nkhd->nqhd", shares, values).reshape(n, length, -1)


def _one_hot(integers: jax.Array | np.ndarray, classes: int, dtype: Any) -> jax.Array:
    """Rows of zeros and a one, on a new last axis; NaN for an integer out of range."""
    # A product with one-hot rows is used in place of a gather, because the derivative of a gather is a
    # scatter, which is slow inside scan. An integer out of range would become a row of zeros.
    integers = jnp.asarray(integers)
    valid = (integers >= 0) & (integers < classes)
    return jnp.where(valid[..., None], jax.nn.one_hot(integers, classes, dtype=dtype), jnp.nan)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``jax.random.normal`` with the same numbers, which compiles up to seven times faster for CPUs."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def _probed(computed: jax.Array, probe: jax.Array | None) -> jax.Array:
    """The value with the probe added, if there is one."""
    return computed if probe is None else computed + probe


def _patches(images: jax.Array) -> jax.Array:
    """The 3x3 neighborhoods with zero padding, (n, h, w, n_in) -> (n, h, w, 9 n_in), channels last."""
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=3)


def _convolve(patches: jax.Array, weights: jax.Array) -> jax.Array:
    """Convolution of the patches, (n, h, w, 9 n_in) and (3, 3, n_in, n_out) -> (n, h, w, n_out)."""
    # One matrix product with the nine shifted images side by side. XLA has fast convolutions for CPUs, but
    # does not use them inside a loop, where training runs; there this is 5 to 10 times faster.
    return jnp.tensordot(patches, weights.reshape(-1, weights.shape[3]), axes=1)


def _normalise(images: jax.Array) -> jax.Array:
    """Every channel of every image scaled to mean zero and, up to ε, variance one."""
    centred = images - jnp.mean(images, axis=(1, 2), keepdims=True)
    # The ε is inside the root, so that the derivative is finite where an image is constant.
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + 1e-5)


def _pool(images: jax.Array) -> jax.Array:
    """Means over squares of 2x2 pixels, without an odd last row or column."""
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def cross_entropy(logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> jax.Array:
    """Mean cross-entropy of ``softmax(logits)`` against the labels, in nats.

    ``-1/n sum_i sum_c p_ic log softmax(logits_i)_c``, with ``p_i`` one-hot for integer labels

    Args:
      logits: ``(n, classes)`` floats of any finite size, or ``(n, length, classes)``, of which every place
        counts as an example.
      labels: ``(n,)`` or ``(n, length)`` integers in [0, classes), or probabilities shaped like the logits.
        An integer out of range makes the result NaN.

    Returns:
      A scalar.

    Raises:
      ValueError: the shapes or the labels' type do not fit.

    >>> round(float(cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 1, 2]))), 4)  # log 4
    1.3863
    """
    _check_labels("cross_entropy", logits, labels)
    log_p = jax.nn.log_softmax(jnp.asarray(logits))
    whole = labels.ndim < logits.ndim
    targets = _one_hot(labels, log_p.shape[-1], log_p.dtype) if whole else jnp.asarray(labels)
    return -jnp.mean(jnp.sum(targets * log_p, axis=-1))


def error_rate(logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> jax.Array:
    """The share of examples whose largest logit is not at the label; the first wins a tie.

    Args:
      logits: ``(n, classes)`` floats, or ``(n, length, classes)``, of which every place counts as an
        example.
      labels: ``(n,)`` or ``(n, length)`` integers in [0, classes), or probabilities shaped like the logits,
        of which the largest counts.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: the shapes or the labels' type do not fit.

    >>> float(error_rate(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0])))
    0.5
    """
    _check_labels("error_rate", logits, labels)
    wanted = labels if labels.ndim < logits.ndim else jnp.argmax(labels, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) != wanted, dtype=jnp.result_type(float))


def _check_labels(name: str, logits: jax.Array | np.ndarray, labels: jax.Array | np.ndarray) -> None:
    integers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]
    if logits.ndim not in (2, 3) or not (integers or labels.shape == logits.shape):
        raise ValueError(
            f"{name}(logits, labels) with logits {logits.shape} and labels {labels.shape} of "
            f"{labels.dtype}: they do not fit. Pass logits (n, classes) or (n, length, classes), and "
            "labels either integers without the last axis, or probabilities of the logits' shape."
        )
