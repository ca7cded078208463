"""Ways to differentiate a training run: the values of ``adjoint=``."""

from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.run import Snapshot
from hypergrad.adjoints.shards import Shards
from hypergrad.adjoints.strategies import Adjoint, Checkpointed, Forward, Stored, Truncated

__all__ = ["Adjoint", "Checkpointed", "Forward", "Reversible", "Shards", "Snapshot", "Stored", "Truncated"]
