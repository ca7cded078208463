"""Ways to differentiate a training run: the values of ``adjoint=``."""

from hypergrad.adjoints.reversible import Reversible
from hypergrad.adjoints.run import Snapshot
from hypergrad.adjoints.strategies import Adjoint, Checkpointed, Forward, Stored, Truncated

__all__ = ["Adjoint", "Checkpointed", "Forward", "Reversible", "Snapshot", "Stored", "Truncated"]
