"""Training as a differentiable function: the inner loop."""

from hypergrad.training.accumulation import accumulated
from hypergrad.training.inner_loop import Trained, train
from hypergrad.training.planner import Estimate, Plan, plan

__all__ = ["Estimate", "Plan", "Trained", "accumulated", "plan", "train"]
