"""Training as a differentiable function: the inner loop."""

from hypergrad.training.accumulation import accumulated
from hypergrad.training.inner_loop import Trained, train
from hypergrad.training.planner import Estimate, Plan, plan
from hypergrad.training.problem import Problem

__all__ = ["Estimate", "Plan", "Problem", "Trained", "accumulated", "plan", "train"]
