"""What was learned, in the conventions of the libraries that use it: optax, PyTorch, plain JSON.

Optimizers of one name differ between libraries in what their hyperparameters mean (see
``docs/exports.md``).  What is exported trains as `hypergrad.train` does, up to rounding, or is refused.
`hypergrad.as_optax` hands any optimizer to optax as it is.
"""

from hypergrad.exports.plain import as_json
from hypergrad.exports.to_optax import optax_code, plain_optax
from hypergrad.exports.to_torch import torch_code

__all__ = ["as_json", "optax_code", "plain_optax", "torch_code"]
