"""Fully connected nets, convolutional ones and transformers as pure functions, and their losses.

With a third argument, ``apply(params, inputs, probes)`` of `mlp` and `convnet` is a network as
`hypergrad.layers` expects it: it adds the probes to what its layers compute, and returns the inputs of the
layers next to its outputs.
"""

from hypergrad.nets.attention import causal_attention
from hypergrad.nets.convolutional import Conv, convnet
from hypergrad.nets.losses import chunked_cross_entropy, cross_entropy, error_rate
from hypergrad.nets.perceptrons import Dense, mlp
from hypergrad.nets.transformers import Block, Embedding, Head, Norm, transformer

__all__ = [
    "Block",
    "Conv",
    "Dense",
    "Embedding",
    "Head",
    "Norm",
    "causal_attention",
    "chunked_cross_entropy",
    "convnet",
    "cross_entropy",
    "error_rate",
    "mlp",
    "transformer",
]
