"""Training problems whose expected loss and its derivatives are known exactly.

`noisy_quadratic` is a diagonal quadratic with gradient noise, on which linear optimizers have second
moments in closed form.  `power_law` is a regression on features with a power-law spectrum, whose best
schedules have known shapes.
"""

from hypergrad.problems.power_law import (
    PowerLaw,
    Regression,
    Shape,
    best_shape,
    excess_loss,
    expect_power_law,
    power_law,
    sample_power_law,
    sampled_power_law_loss,
)
from hypergrad.problems.quadratic import (
    Expected,
    Method,
    NoisyQuadratic,
    Sample,
    Update,
    expect,
    expected_loss,
    heavy_ball,
    information_bound,
    iterate_average,
    least_loss,
    noisy_quadratic,
    optimal_learning_rates,
    preconditioned,
    propagate,
    sample,
    sampled_loss,
    sgd,
    sgd_after,
    sgd_hypergradient,
    transported_average,
)

__all__ = [
    "Expected",
    "Method",
    "NoisyQuadratic",
    "PowerLaw",
    "Regression",
    "Sample",
    "Shape",
    "Update",
    "best_shape",
    "excess_loss",
    "expect",
    "expect_power_law",
    "expected_loss",
    "heavy_ball",
    "information_bound",
    "iterate_average",
    "least_loss",
    "noisy_quadratic",
    "optimal_learning_rates",
    "power_law",
    "preconditioned",
    "propagate",
    "sample",
    "sample_power_law",
    "sampled_loss",
    "sampled_power_law_loss",
    "sgd",
    "sgd_after",
    "sgd_hypergradient",
    "transported_average",
]
