"""The scores by which distilled sets are ranked: what they recover of all the data, and gain on random."""

import math
from typing import NamedTuple


class Ranking(NamedTuple):
    """The label-robust score of a set on one network, and what it is made of; prints as a line.

    ``HLR = acc(all data) - acc(set, hard labels)``, ``IOR = acc(set) - acc(random real examples)``,
    ``α = IOR / 2 - HLR / 2``, ``LRS = (exp α - 1/e) / (e - 1/e)``, all as shares of 1.

    Attributes:
      network: its name.
      recovery: HLR, the hard label recovery in [-1, 1]; small is good.
      improvement: IOR, the improvement over random in [-1, 1]; large is good.
      recipe: by which networks were trained on the set and on random real examples for IOR.
      inits: origin of the initial weights of these.
      hard_recipe: by which networks were trained on the set with hard labels for HLR.

    Source: Z. Li et al., "DD-Ranking: rethinking the evaluation of dataset distillation", 2025 (version
    0.2), with the weight 1/2 of its leaderboard.  Other than there, no learning rate and no epoch is
    chosen on the test set, which makes these numbers lower.

    >>> print(Ranking("mlp", 0.109, 0.470, "own", "random", "plain SGD"))
    mlp: HLR 10.90 points (plain SGD), IOR 47.00 points (own, inits random), LRS 0.353
    """

    network: str
    recovery: float
    improvement: float
    recipe: str = "own"
    inits: str = "random"
    hard_recipe: str = "own"

    @property
    def alpha(self) -> float:
        """Half of the improvement less half of the recovery, in [-1, 1]."""
        return self.improvement / 2 - self.recovery / 2

    @property
    def score(self) -> float:
        """LRS, in [0, 1]; (1 - 1/e) / (e - 1/e) = 0.269 where the two weigh the same."""
        return (math.exp(self.alpha) - math.exp(-1)) / (math.e - math.exp(-1))

    def __str__(self) -> str:
        return (
            f"{self.network}: HLR {100 * self.recovery:.2f} points ({self.hard_recipe}), "
            f"IOR {100 * self.improvement:.2f} points ({self.recipe}, inits {self.inits}), "
            f"LRS {self.score:.3f}"
        )
