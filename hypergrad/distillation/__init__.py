"""Dataset distillation: learn a few examples such that networks trained on them do well on real ones.

======  =====================  ==========================================================
symbol  name                   meaning
======  =====================  ==========================================================
``x``   images                 learned images or rows of a table, ``(n, ...)``, normalized
``y``   labels                 their labels, ``(n,)`` integers or ``(n, C)`` probabilities
``w``   params                 weights of the network ``f``
``α``   learning_rate          ``(T,)``, one for every step
``γ``   momentum               of the inner training
``λ``   l2                     penalty ``λ Σ w²`` of the inner training
``T``   steps                  of the inner training
======  =====================  ==========================================================

``w_0 ~ init,   v <- γ v - (1-γ) ∇_w [H(f(w, x), y) + λ Σ w²],   w <- w + α_t v``  for ``T`` steps, and
``minimize E H(f(w_T, x_real), y_real)``  over all that is learned, where ``H`` is the cross-entropy.
"""

from hypergrad.distillation.augment import Augmentation
from hypergrad.distillation.baselines import class_means, rows_like
from hypergrad.distillation.distilled import Distilled, centred, load_distilled, standardised
from hypergrad.distillation.evaluation import (
    Evaluation,
    Score,
    condensation_recipe,
    evaluate,
    full_recipe,
    plain_recipe,
)
from hypergrad.distillation.outer_loop import ChaosWarning, distill
from hypergrad.distillation.ranking import Ranking
from hypergrad.distillation.recipe import Network, Recipe
from hypergrad.distillation.trial import recipe_for
from hypergrad.distillation.windows import WindowCosines, window_cosines

__all__ = [
    "Augmentation",
    "ChaosWarning",
    "Distilled",
    "Evaluation",
    "Network",
    "Ranking",
    "Recipe",
    "Score",
    "WindowCosines",
    "centred",
    "class_means",
    "condensation_recipe",
    "distill",
    "evaluate",
    "full_recipe",
    "load_distilled",
    "plain_recipe",
    "recipe_for",
    "rows_like",
    "standardised",
    "window_cosines",
]
