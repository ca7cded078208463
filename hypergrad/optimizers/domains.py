"""Domains of hyperparameters, by the names that optax gives them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Domain = tuple[float, float]

NOT_NEGATIVE = (0.0, float("inf"))
SHARE = (0.0, 1.0)
ANY = (-float("inf"), float("inf"))
NOT_NEGATIVE_NAMES = (
    "learning_rate", "max_learning_rate", "adam_learning_rate", "lr", "eps", "epsilon", "eps_root",
    "adam_eps_root", "weight_decay", "weight_decay_rate", "adam_weight_decay", "trust_coefficient",
    "min_norm", "max_norm", "max_delta", "clip_threshold", "clipping_threshold", "l2_norm_clip",
    "noise_multiplier", "min_step_size", "max_step_size", "initial_accumulator_value", "initial_scale",
    "estim_lr0", "estim_lr_coef", "s_init",
)  # fmt: skip
SHARE_NAMES = (
    "b1", "b2", "b3", "adam_b1", "adam_b2", "beta1", "beta2", "beta3", "momentum", "decay", "rho",
)  # fmt: skip
# Names that say enough wherever they stand.
DOMAINS: Mapping[str, Domain] = {
    **dict.fromkeys(NOT_NEGATIVE_NAMES, NOT_NEGATIVE),
    **dict.fromkeys(SHARE_NAMES, SHARE),
    "eta_minus": SHARE,
    "eta_plus": (1.0, float("inf")),
}
# Names that say enough in functions of optax only.
IN_OPTAX: Mapping[str, Domain] = {
    **dict.fromkeys(
        ("alpha", "beta", "clipping", "decay_rate", "eta", "gamma", "optimism", "scale", "scale_factor",
         "scaling", "smooth_beta", "threshold", "weight_lr_power"),
        NOT_NEGATIVE,
    ),
    "slow_step_size": SHARE,
    "f_min": ANY,
    "lower_bound": ANY,
}  # fmt: skip
# Functions of optax in which beta is a share; in others it may be any number that is not negative.
BETA_IS_A_SHARE = ("signum", "muon", "scale_by_muon", "momo")


def usual_domains(build: Callable[..., Any], names: Iterable[str]) -> dict[str, Domain]:
    """The domains of hyperparameters whose names are known.

    Args:
      build: what is built from them, such as ``optax.adam``, or a `functools.partial` of it.
      names: of the hyperparameters.

    >>> import optax
    >>> usual_domains(optax.contrib.muon, ["learning_rate", "beta", "ns_steps"])
    {'learning_rate': (0.0, inf), 'beta': (0.0, 1.0)}
    >>> usual_domains(lambda learning_rate, beta: optax.sgd(beta * learning_rate), ["beta"])
    {}
    """
    while isinstance(build, functools.partial):
        build = build.func
    known = dict(DOMAINS)
    if str(getattr(build, "__module__", "")).partition(".")[0] == "optax":
        known |= IN_OPTAX
        if build.__name__ in BETA_IS_A_SHARE:
            known["beta"] = SHARE
    return {name: known[name] for name in names if name in known}


def is_rate(name: str) -> bool:
    """Whether a hyperparameter is a learning rate, by its name.

    >>> is_rate("muon.learning_rate"), is_rate("eps")
    (True, False)
    """
    last = name.rpartition(".")[2]
    return last in ("lr", "rate") or last.endswith("learning_rate")


def never_negative(name: str) -> bool:
    """Whether a hyperparameter cannot be negative, by its name.

    >>> never_negative("adamw.weight_decay"), never_negative("f_min")
    (True, False)
    """
    return is_rate(name) or DOMAINS.get(name.rpartition(".")[2], ANY)[0] >= 0
