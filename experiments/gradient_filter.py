"""The curvature-aware gradient filter: what it promises, where it fails, and whether learning it helps.

Chen, Choi, Balles, Duvenaud and Hennig (2020).  Four parts:

1. The noisy quadratic, where the filter is exact: final losses beside those of gradient descent, the gain
   ``1 / (t + 1)``, and the error of the gradient.
2. A network on digits at constant rates: the gradient is much better, the loss is not.
3. The same with steps by probability of improvement, switched on during the run, with and without a cap;
   the filter's own series (curvature along the step, gradient variance, gain) tell what goes wrong.
4. Is that a short-horizon bias, as the authors suspect, and do hypergradients over long horizons cure it?
   All knobs of the filter are learned on digits with noise drawn anew for every example: for the loss a few
   steps ahead, from anywhere in a run, and for the loss at the end of whole runs.

    python -m experiments.gradient_filter                    # some minutes on two cores
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures, workloads
from experiments.common.statistics import Difference, paired, plus_minus, standard_error
from experiments.common.workloads import Examples
from hypergrad import constraints, data, meta, nets
from hypergrad.optimizers.kalman_filter import Diagnosis
from hypergrad.optimizers.step_rules import probability_of_improvement
from hypergrad.program import GenericOptimizer

PyTree = Any
SIZES = (64, 32, 10)
FAR = 1e6  # a cap that is none
GUESSING = math.log(math.log(10))  # log loss of giving every digit the same probability
UNSEEN = 10_000  # keys from here on judge what was learned


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    methods: tuple[str, ...] = (
        "SGD, α = 0.5",
        "SGD, α = 0.02",
        "SGD, steps by PI",
        "without noise, α = 1",
        "filter, α = 0.5",
        "filter, α = 1",
        "filter, steps by PI",
        "filter, PI, β = 0.999",
    )
    quadratic_steps: int = 5000
    network_steps: int = 1500
    rates: tuple[float, ...] = (0.1, 0.3, 0.5, 1.0, 2.0)
    runs: int = 3
    switches: tuple[int, ...] = (0, 300, 700)
    caps: tuple[float, ...] = (FAR, 2.0)
    steps: int = cli.option(320, "of the runs whose knobs are learned")
    horizons: tuple[int, ...] = cli.option((1, 5, 20, 80), "of the learning, beside the whole run")
    tried: tuple[float, ...] = cli.option((0.1, 0.2, 0.4, 0.8, 1.6), "caps and rates set by hand")
    controls: tuple[str, ...] = ("gradient descent", "filter")
    meta_steps: int = 30
    learners: int = 4
    seeds: int = cli.option(2, "runs for a hypergradient")
    judged: int = 16
    seed: int = 0


# ---- 1. the noisy quadratic


class Quadratic(NamedTuple):
    """``½ (w - ξ)ᵀ H (w - ξ)`` with ``ξ ~ N(0, I)``, eight examples in a step."""

    hessian: Array  # (20, 20), eigenvalues from 1/2000 to 1
    start: Array  # (20,)
    points: Array  # (T, 8, 20)


def quadratic(steps: int, dimensions: int = 20, examples: int = 8) -> Quadratic:
    """The draws of the reference's numbers."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    start = 10 * rng.normal(size=dimensions)
    keys = jax.random.split(jax.random.key(0), steps)
    points = jax.vmap(lambda key: jax.random.normal(key, (examples, dimensions)))(keys)
    spectrum = np.geomspace(1 / 2000, 1, dimensions)
    return Quadratic(jnp.asarray((basis * spectrum) @ basis.T), jnp.asarray(start), points)


def unfiltered(optimizer: GenericOptimizer) -> GenericOptimizer:
    """A filter that forgets everything before each step: it believes the minibatch."""

    def update(h: Any, examples: Any, state: Any, params: Any, here: Any) -> Any:
        forgotten = state.gradient._replace(variance=jnp.full_like(state.gradient.variance, 1e30))
        return optimizer.update(h, examples, state._replace(gradient=forgotten), params, here)

    return replace(optimizer, update=update)


BY_PROBABILITY = hg.filtered(probability_of_improvement)
METHODS: dict[str, tuple[Any, dict[str, float], float]] = {  # and the final loss that is to be reproduced
    "SGD, α = 0.5": (hg.sgd(), {"learning_rate": 0.5}, 0.0378),
    "SGD, α = 0.02": (hg.sgd(), {"learning_rate": 0.02}, 1.09),
    "SGD, steps by PI": (unfiltered(BY_PROBABILITY), {"max_step": FAR}, 0.23),
    "without noise, α = 1": (hg.sgd(), {"learning_rate": 1.0}, 6.6e-6),
    "filter, α = 0.5": (hg.filtered(), {"learning_rate": 0.5}, 7.9e-4),
    "filter, α = 1": (hg.filtered(), {"learning_rate": 1.0}, 8.5e-6),
    "filter, steps by PI": (BY_PROBABILITY, {"max_step": FAR}, 2.7e-6),
    "filter, PI, β = 0.999": (BY_PROBABILITY, {"max_step": FAR, "step_decay": 0.999}, math.inf),
}


class Series(NamedTuple):
    """Of a run on the quadratic, ``(T,)`` each; NaN without a filter but for the loss."""

    loss: np.ndarray  # before each step
    ratio: np.ndarray  # error of the minibatch's gradient by that of the filter
    gain: np.ndarray


def quadratic_run(problem: Quadratic, optimizer: Any, hypers: Mapping[str, float]) -> Series:
    """Train, and look at the exact loss and gradient."""
    H = problem.hessian

    def loss(w: Array, meta: Any, batch: Array) -> Array:
        away = w[None] - batch
        return 0.5 * jnp.mean(jnp.sum(away @ H * away, 1))

    def watch(s: hg.Snapshot) -> Any:
        exact = 0.5 * s.params @ H @ s.params
        if optimizer.by_moves:
            return exact, jnp.nan, jnp.nan, jnp.nan
        state = s.state["state"]
        mine = jnp.linalg.norm(state.gradient.mean - H @ (s.params - state.displacement))
        return exact, jnp.linalg.norm(s.gradient - H @ s.params), mine, state.diagnosis.gain

    options = {"steps": len(problem.points), "optimizer": optimizer, "adjoint": hg.Stored(), "watch": watch}
    trained = hg.train(loss, problem.start, hypers, None, problem.points, **options)
    losses, theirs, mine, gain = map(np.asarray, trained.watched)
    return Series(losses, theirs[:-1] / mine[1:], gain[1:])  # the state is that of the step before


# ---- 2. and 3. a network on digits


class Digits(NamedTuple):
    """A network, its data, and draws of starts and minibatches."""

    start: Callable[[Array], PyTree]
    apply: Callable[..., Array]
    examples: Examples

    def loss(self, w: PyTree, meta: Any, rows: Array) -> Array:
        """Of a minibatch."""
        return workloads.minibatch_loss(self.apply, w, self.examples, rows)

    def full(self, w: PyTree) -> Array:
        """Of all training data."""
        return nets.cross_entropy(self.apply(w, self.examples.images), self.examples.labels)

    def error(self, w: PyTree) -> Array:
        """Share of the test images taken for another digit."""
        return nets.error_rate(self.apply(w, self.examples.test_images), self.examples.test_labels)

    def rows(self, key: Array, steps: int, examples: int = 64) -> Array:
        """Minibatches, every row drawn by itself."""
        return jax.random.randint(key, (steps, examples), 0, len(self.examples.labels))


def digits() -> Digits:
    """scikit-learn's digits and a network of 32 hidden units."""
    flat = workloads.flat(data.digits(), centred=False)
    return Digits(*nets.mlp(SIZES), Examples(*map(jnp.asarray, flat)))


class Constant(NamedTuple):
    """Runs at a constant rate, ``(runs, T)`` each."""

    descent: np.ndarray  # full training loss of gradient descent
    filtered: np.ndarray  # and of the filter
    theirs: np.ndarray  # error of the minibatch's gradient in the filter's run
    mine: np.ndarray  # and of the filter's


def distance(a: PyTree, b: PyTree) -> Array:
    """Euclidean, over all leaves."""
    squares = [jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def constant(config: Config, problem: Digits) -> list[Constant]:
    """Gradient descent and the filter with every rate, on the same minibatches."""

    def watch(s: hg.Snapshot) -> Any:
        if "state" not in s.state:
            return problem.full(s.params)
        state = s.state["state"]
        loss, gradient = jax.value_and_grad(problem.full)(s.params)
        before = jax.grad(problem.full)(jax.tree.map(jnp.subtract, s.params, state.displacement))
        return loss, distance(s.gradient, gradient), distance(state.gradient.mean, before)

    def run(optimizer: Any, rate: Array, key: Array) -> Any:
        first, second = jax.random.split(key)
        steps = config.network_steps
        options = {"steps": steps, "optimizer": optimizer, "adjoint": hg.Stored(), "watch": watch}
        rows = problem.rows(second, steps)
        return hg.train(
            problem.loss, problem.start(first), {"learning_rate": rate}, None, rows, **options
        ).watched

    keys = jax.random.split(jax.random.key(config.seed), config.runs)
    each = [
        jax.jit(jax.vmap(lambda rate, key, o=o: run(o, rate, key), in_axes=(None, 0)))
        for o in (hg.sgd(), hg.filtered())
    ]
    found = []
    for rate in config.rates:
        descent, (mine, theirs, ours) = (jax.tree.map(np.asarray, f(rate, keys)) for f in each)
        found.append(Constant(descent, mine, theirs[:, :-1], ours[:, 1:]))
    return found


class Switched(NamedTuple):
    """Runs that take steps by probability of improvement from some step on."""

    cap: float
    switch: int
    losses: np.ndarray  # (runs,), of the full training data, after training
    errors: np.ndarray  # (runs,), on the test data
    diagnosis: Diagnosis  # (runs, T) each


def switched(config: Config, problem: Digits) -> list[Switched]:
    """Before the switch the cap is 0.1, which the rule would exceed: the steps are constant."""
    steps = config.network_steps

    @jax.jit
    @jax.vmap
    def run(cap: Array, key: Array) -> Any:
        first, second = jax.random.split(key)
        options = {"steps": steps, "optimizer": BY_PROBABILITY, "adjoint": hg.Stored()}
        trained = hg.train(
            problem.loss,
            problem.start(first),
            {"max_step": cap},
            None,
            problem.rows(second, steps),
            watch=lambda s: s.state["state"].diagnosis,
            **options,
        )
        return problem.full(trained.params), problem.error(trained.params), trained.watched

    keys = jax.random.split(jax.random.key(config.seed), config.runs)
    found = []
    for cap, switch in [*((c, s) for c in config.caps for s in config.switches), (0.1, steps)]:
        caps = jnp.where(jnp.arange(steps) < switch, 0.1, cap)
        result = run(jnp.broadcast_to(caps, (config.runs, steps)), keys)
        found.append(Switched(cap, switch, *jax.tree.map(np.asarray, result)))
    return found


# ---- 4. knobs learned over short and long horizons


class Judged(NamedTuple):
    """Knobs of one or more learners, and whole runs with them on keys that nothing was learned on."""

    hypers: dict[str, np.ndarray]  # (learners,)
    log_losses: np.ndarray  # (learners, judged), after training; no worse than guessing
    steps: np.ndarray  # (learners, judged), mean size of the step, ``η α``

    @property
    def mean(self) -> float:
        """Of the log losses."""
        return float(self.log_losses.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean: over learners or, where there is one, over runs."""
        each = self.log_losses.mean(axis=1) if len(self.log_losses) > 1 else self.log_losses[0]
        return float(standard_error(each))


class Learning(NamedTuple):
    """Knobs by how they were found, in the order of the table."""

    by_hand: dict[float, Judged]  # by cap
    learned: dict[int, Judged]  # by horizon
    controls: dict[str, Judged]  # constant rates learned over whole runs


# All but the variance at the start, which later parts of a run do not know of.
KNOBS = {
    "learning_rate": constraints.positive,
    "max_step": constraints.positive,
    "loss_inflation": constraints.positive,
    "gradient_inflation": constraints.positive,
    "curvature_inflation": constraints.positive,
    "gradient_decay": constraints.unit,
    "loss_decay": constraints.unit,
    "step_decay": constraints.unit,
}


class Noisy(NamedTuple):
    """Digits of which no image comes twice: normal noise on every pixel, drawn anew."""

    digits: Digits
    judge: Array  # the training images with noise of their own: the loss in expectation
    scale: float = 0.3
    examples: int = 16

    def loss(self, w: PyTree, meta: Any, batch: tuple[Array, Array]) -> Array:
        """Of a minibatch: rows, and noise."""
        rows, noise = batch
        examples = self.digits.examples
        return nets.cross_entropy(
            self.digits.apply(w, examples.images[rows] + noise), examples.labels[rows]
        )

    def batches(self, key: Array, steps: int) -> tuple[Array, Array]:
        """Minibatches."""
        rows, noise = jax.random.split(key)
        shape = (steps, self.examples, self.judge.shape[1])
        return self.digits.rows(rows, steps, self.examples), self.scale * jax.random.normal(noise, shape)

    def log_loss(self, w: PyTree) -> Array:
        """What is to be small."""
        return jnp.log(nets.cross_entropy(self.digits.apply(w, self.judge), self.digits.examples.labels))


def noisy(problem: Digits) -> Noisy:
    """With the judging noise drawn."""
    images = problem.examples.images
    return Noisy(problem, images + 0.3 * jax.random.normal(jax.random.key(UNSEEN), images.shape))


def go(
    problem: Noisy,
    optimizer: Any,
    hypers: Any,
    key: Array,
    steps: int,
    watch: Any = None,
    start: Any = None,
) -> hg.Trained:
    """Train from the beginning, or from given parameters and state."""
    first, second = jax.random.split(key)
    params, state = (problem.digits.start(first), None) if start is None else start
    options = {"steps": steps, "optimizer": optimizer, "state": state, "watch": watch}
    batches = problem.batches(second, steps)
    return hg.train(problem.loss, params, hypers, None, batches, adjoint=hg.Checkpointed(), **options)


def judge(config: Config, problem: Noisy, optimizer: Any) -> Callable[[Mapping[str, Any]], Judged]:
    """From knobs of one learner or more to whole runs with them, on unseen keys."""

    def size(s: hg.Snapshot) -> Array:
        return jnp.ones(()) if optimizer.by_moves else s.state["state"].diagnosis.step

    def outcome(hypers: Any, key: Array) -> tuple[Array, Array]:
        trained = go(problem, optimizer, hypers, key, config.steps, size)
        return problem.log_loss(trained.params), hypers["learning_rate"] * jnp.mean(trained.watched[1:])

    keys = jax.random.split(jax.random.key(UNSEEN + config.seed), config.judged)
    many = jax.jit(jax.vmap(outcome, in_axes=(None, 0)))

    def judged(hypers: Mapping[str, Any]) -> Judged:
        values = {name: np.atleast_1d(np.asarray(x, np.float32)) for name, x in hypers.items()}
        learners = (dict(zip(values, each)) for each in zip(*values.values()))
        log_losses, steps = zip(*(many(each, keys) for each in learners))
        return Judged(values, np.fmin(np.asarray(log_losses, np.float64), GUESSING), np.asarray(steps))

    return judged


def learn(config: Config, objective: Any, hypers: Mapping[str, float]) -> dict[str, Any]:
    """All learners at once, each with keys of its own: every knob has one value for each."""

    def together(hypers: Any, key: Array) -> Array:
        return jnp.mean(jax.vmap(objective)(hypers, jax.random.split(key, config.learners)))

    return meta.optimize(
        together,
        {name: jnp.full(config.learners, x, jnp.float32) for name, x in hypers.items()},
        # Where a run is chaotic its hypergradient is huge and says nothing.
        optimizer=optax.chain(optax.clip(0.3 / config.learners), optax.adam(0.1)),
        steps=config.meta_steps,
        constraints={name: KNOBS[name] for name in hypers},
        key=jax.random.key(config.seed),
        seeds=config.seeds,
        progress=False,
        explosion=math.inf,
    ).hypers


def learning(config: Config, problem: Noisy) -> Learning:
    """Knobs by hand and by hypergradients, each judged after whole runs on the same unseen keys."""

    def whole(optimizer: Any) -> Callable[[Any, Array], Array]:
        return lambda hypers, key: problem.log_loss(
            go(problem, optimizer, hypers, key, config.steps).params
        )

    judged = judge(config, problem, BY_PROBABILITY)
    defaults = {name: BY_PROBABILITY.hypers[name] for name in KNOBS}
    by_hand = {cap: judged(defaults | {"max_step": cap}) for cap in config.tried}
    begin = defaults | {"max_step": config.tried[1]}

    # Where short horizons begin: anywhere in runs with the knobs that all begin with.
    def along(key: Array) -> PyTree:
        return go(problem, BY_PROBABILITY, begin, key, config.steps, lambda s: (s.params, s.state)).watched

    every = max(1, config.steps // 8)
    pool = jax.jit(jax.vmap(along))(jax.random.split(jax.random.key(config.seed + 1), 4))
    pool = jax.tree.map(lambda x: x[:, ::every].reshape(-1, *x.shape[2:]), pool)
    size = len(jax.tree.leaves(pool)[0])

    def ahead(horizon: int) -> Callable[[Any, Array], Array]:
        def objective(hypers: Any, key: Array) -> Array:
            which, key = jax.random.split(key)
            start = jax.tree.map(lambda x: x[jax.random.randint(which, (), 0, size)], pool)
            trained = go(problem, BY_PROBABILITY, hypers, key, horizon, start=start)
            return problem.log_loss(trained.params)

        return objective

    learned = {h: judged(learn(config, ahead(h), begin)) for h in config.horizons}
    learned[config.steps] = judged(learn(config, whole(BY_PROBABILITY), begin))
    controls = {}
    for control in config.controls:
        optimizer = {"gradient descent": hg.sgd(), "filter": hg.filtered()}[control]
        names = [name for name in KNOBS if name in optimizer.hypers]
        own = {k: optimizer.hypers[k] for k in names} | {"learning_rate": config.tried[1]}
        controls[control] = judge(config, problem, optimizer)(learn(config, whole(optimizer), own))
    return Learning(by_hand, learned, controls)


# ---- all of it


def compared(a: Judged, b: Judged) -> tuple[Difference, str]:
    """Difference of the log losses on the same keys, its standard error over learners, and in words.

    Different is what is 3 standard errors apart.  Since one learner whose runs diverge can hide everything
    in the mean, it is also what every learner of the one does better than every learner of the other.
    """
    mine, theirs = a.log_losses.mean(axis=1), b.log_losses.mean(axis=1)
    found = paired(np.mean(a.log_losses - b.log_losses, axis=1), 0.0)
    apart = len(theirs) > 1 and (mine.max() < theirs.min() or mine.min() > theirs.max())
    if not (apart or found.sign(errors=3)):
        return found, "as good as"
    return found, "better than" if found.mean < 0 else "worse than"


def answer(config: Config, found: Learning) -> list[str]:
    """What part 4 says, in words."""
    long = found.learned[config.steps]
    hand = min(found.by_hand.values(), key=lambda judged: judged.mean)
    lines = []

    def verdict(name: str, other: Judged) -> str:
        difference, word = compared(long, other)
        lines.append(f"  learned over {config.steps} steps: {word} {name} ({difference})")
        return word

    short = {h: verdict(f"learned over {h}", found.learned[h]) for h in config.horizons}
    verdict(f"the best cap by hand ({hand.hypers['max_step'][0]:g})", hand)
    constant = {
        name: verdict(f"{name} at a constant rate, learned", one) for name, one in found.controls.items()
    }
    if biased := [h for h, word in short.items() if word == "better than"]:
        longer = all(found.learned[h].steps.mean() > long.steps.mean() for h in biased)
        lines.append(
            f"  So there is a short-horizon bias, at horizons of {', '.join(map(str, biased))} steps"
            + (", to steps that are too long" if longer else "")
            + "; learning over whole runs cures it."
        )
    if "filter" in constant:
        sizes = long.steps.mean(), found.controls["filter"].steps.mean()
        lines.append(
            f"  Cured, the steps by probability of improvement are {constant['filter']} constant ones: "
            f"their mean size is {sizes[0]:.2f}, the constant one {sizes[1]:.2f}."
        )
    return lines


def first_part(config: Config) -> dict[str, Series]:
    """On the noisy quadratic, with what is to be reproduced."""
    print(
        f"1. Noisy quadratic: loss before step {config.quadratic_steps}; beside it the reference's at 5000"
    )
    runs = {}
    with jax.enable_x64(True):
        problem = quadratic(config.quadratic_steps)
        for name in config.methods:
            optimizer, hypers, expected = METHODS[name]
            here = problem._replace(points=0 * problem.points) if name.startswith("without") else problem
            runs[name] = quadratic_run(here, optimizer, hypers)
            print(f"  {name:<24} {runs[name].loss[-1]:>10.3g} {expected:>10.3g}", flush=True)
    slow = runs["filter, PI, β = 0.999"].loss
    above = np.flatnonzero(~(slow <= slow[0]))
    print(f"  with β = 0.999 it is above that of the start after {above[0] if len(above) else 'no'} steps")
    exact = runs["filter, α = 0.5"]
    print(
        f"  gain times t + 1 at the end: {exact.gain[-1] * len(exact.gain):.4f}; error of the gradient "
        f"{np.mean(exact.ratio[-500:]):.0f} times below the minibatch's"
    )
    return runs


def second_part(config: Config, problem: Digits) -> list[Constant]:
    """On digits, at constant rates."""
    last = slice(-(config.network_steps // 3), None)
    print(f"2. Digits, {config.network_steps} steps: training loss, mean of the last third; how many times")
    print(
        "   below the minibatch's the error of the filter's gradient is, in steps 10 to 100 and at the end"
    )
    print("      rate   descent    filter     early      late")
    found = constant(config, problem)
    for rate, runs in zip(config.rates, found):
        early, late = (
            np.mean(runs.theirs[:, p]) / np.mean(runs.mine[:, p]) for p in (slice(10, 100), last)
        )
        numbers = [np.mean(runs.descent[:, last]), np.mean(runs.filtered[:, last]), early, late]
        print(f"  {rate:>8g} " + " ".join(f"{x:>9.4g}" for x in numbers), flush=True)
    return found


def third_part(config: Config, problem: Digits) -> list[Switched]:
    """On digits, with adaptive steps from some step on."""
    print(
        "3. Digits, steps by probability of improvement from some step on, before that 0.1: training loss"
    )
    print("   and test error at the end; the filter's own series, as means over 100 steps after the switch")
    print("       cap  switch      loss  error, %  curvature  variance      gain")
    found = switched(config, problem)
    for runs in found:
        begin = min(runs.switch, config.network_steps - 101) + 1
        series = [float(np.mean(x[:, begin : begin + 100])) for x in runs.diagnosis[:3]]
        numbers = [np.mean(runs.losses), 100 * np.mean(runs.errors), *series]
        cap = "none" if runs.cap == FAR else f"{runs.cap:g}"
        print(f"  {cap:>8} {runs.switch:>7} " + " ".join(f"{x:>9.3g}" for x in numbers), flush=True)
    return found


def fourth_part(config: Config, problem: Noisy) -> tuple[Learning, dict[str, Judged], list[str]]:
    """On noisy digits, with what was learned."""
    knobs = learning(config, problem)
    rows = {
        **{f"by hand, cap {cap:g}": judged for cap, judged in knobs.by_hand.items()},
        **{f"learned, horizon {h}": judged for h, judged in knobs.learned.items()},
        **{f"{name}, constant rate learned": judged for name, judged in knobs.controls.items()},
    }
    print(
        f"4. Noisy digits: log loss after {config.steps} steps, {config.judged} runs for each learner; mean"
    )
    print("   size of the steps; where they were learned, geometric means of the knobs; last, differences")
    for name, judged in rows.items():
        knob = {k: float(np.exp(np.mean(np.log(x)))) for k, x in judged.hypers.items()}
        shown = ", ".join(f"{k} {x:.3g}" for k, x in knob.items()) if "learned" in name else ""
        print(
            f"  {name:<31} {plus_minus(judged.mean, judged.error, '.3f'):>15} "
            f"{np.mean(judged.steps):>6.3f}  {shown}"
        )
    lines = answer(config, knobs)
    print("\n".join(lines), flush=True)
    return knobs, rows, lines


def main(config: Config, output: str | None = None) -> dict[str, Any]:
    """Run all parts, print, and where there is an output write figure and record."""
    on_quadratic = first_part(config)
    mlp = digits()
    at_rates = second_part(config, mlp)
    on_switch = third_part(config, mlp)
    knobs, rows, lines = fourth_part(config, noisy(mlp))
    if output is not None:
        record = {
            "config": config,
            "quadratic": {name: s.loss[-1] for name, s in on_quadratic.items()},
            "digits": [
                {"rate": rate, "descent": each.descent[:, -1], "filter": each.filtered[:, -1]}
                for rate, each in zip(config.rates, at_rates)
            ],
            "switched": [
                {"cap": f.cap, "switch": f.switch, "losses": f.losses, "errors": f.errors}
                for f in on_switch
            ],
            "knobs": {
                name: {"hypers": j.hypers, "log losses": j.log_losses, "steps": j.steps.mean(1)}
                for name, j in rows.items()
            },
            "answer": lines,
        }
        draw(Path(output) / "gradient_filter.png", config, on_quadratic, at_rates, on_switch, knobs, record)
    return {"quadratic": on_quadratic, "constant": at_rates, "switched": on_switch, "knobs": knobs}


def draw(
    path: Path,
    config: Config,
    on_quadratic: Mapping[str, Series],
    at_rates: Sequence[Constant],
    on_switch: Sequence[Switched],
    knobs: Learning,
    record: Mapping[str, Any],
) -> None:
    """Losses on the quadratic, gradient errors, the filter's own series, and losses by horizon."""
    figure, axes = figures.figure(2, 3)
    (losses, gains, errors), (curvature, variance, horizons) = axes
    for k, (name, series) in enumerate(on_quadratic.items()):
        every = np.unique(np.geomspace(1, len(series.loss), 300).astype(int)) - 1
        losses.loglog(every + 1, series.loss[every], **figures.look(k, label=name, linewidth=1.2))
    losses.set(title="Noisy quadratic", xlabel="training step", ylabel="loss", ylim=(1e-7, 1e4))
    gain = on_quadratic["filter, α = 0.5"].gain
    t = np.arange(1, len(gain) + 1)
    gains.loglog(t, gain, **figures.look(3, linestyle="-", linewidth=4, label="filter, variance estimated"))
    gains.loglog(t, 1 / t, ":", color="0", label="1 / (t + 1)")
    gains.set(title="Gain on the noisy quadratic", xlabel="t + 1, steps", ylabel="gain $K_t$")
    for rate, found in list(zip(config.rates, at_rates))[:1]:
        figures.lines(errors, {"minibatch": found.theirs[0], "filter": found.mine[0]}, linewidth=0.8)
        errors.set(title=f"Digits, constant steps of {rate:g}", xlabel="training step", yscale="log")
        errors.set(ylabel="error of the gradient, norm")
    draw_series(curvature, config, on_switch, "curvature")
    curvature.set(title="Digits, adaptive steps from the line on", ylim=(3e-4, 3.0))
    curvature.set(ylabel="curvature along the step, δᵀBδ / δᵀδ")
    draw_series(variance, config, on_switch, "gradient_variance")
    variance.set(title="The same", ylabel="gradient variance, one example")
    draw_horizons(horizons, config, knobs)
    for part in axes.flat:
        part.grid(alpha=0.25)
        part.legend(fontsize="x-small", handlelength=3)
    figures.save(figure, path, record)


def draw_series(part: Any, config: Config, on_switch: Sequence[Switched], name: str) -> None:
    """What the filter says of itself, in runs with the last switch and without one."""
    shown = [f for f in on_switch if f.switch in (config.switches[-1], config.network_steps)]
    width = max(1, config.network_steps // 60)
    for k, f in enumerate(shown):
        series = np.median(getattr(f.diagnosis, name), axis=0)[1:]
        series = series[: len(series) // width * width].reshape(-1, width)
        label = "no cap" if f.cap == FAR else f"cap {f.cap:g}"
        label = "constant" if f.switch == config.network_steps else label
        middle = np.arange(len(series)) * width + width / 2
        part.semilogy(middle, np.median(series, axis=1), **figures.look(k, label=label))
    part.axvline(config.switches[-1], color="0.8", linewidth=1)
    part.set(xlabel="training step")


def draw_horizons(part: Any, config: Config, knobs: Learning) -> None:
    """Losses by the horizon over which the knobs were learned."""
    for h, judged in knobs.learned.items():
        every = judged.log_losses.mean(axis=1)
        part.plot(np.full(len(every), h), every, "o", color="0", fillstyle="none", markersize=5)
    means = [judged.mean for judged in knobs.learned.values()]
    part.plot(list(knobs.learned), means, "-", color="0", label="knobs learned over the horizon, mean")
    best = min(knobs.by_hand.values(), key=lambda judged: judged.mean)
    others = {"best cap by hand": best.mean}
    others |= {f"{name}, constant rate learned": judged.mean for name, judged in knobs.controls.items()}
    for k, (name, mean) in enumerate((others | {"guessing": GUESSING}).items()):
        part.axhline(mean, **figures.look(k + 1, label=name))
    part.set(title=f"Noisy digits after {config.steps} steps", xscale="log", ylabel="log loss")
    part.set(xlabel="horizon over which the knobs were learned, steps")


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    config, run = cli.parse("gradient_filter", __doc__, Config(), arguments, fast=lambda _: FAST)
    return main(config, run.output)


FAST = Config(
    methods=("filter, α = 0.5", "filter, PI, β = 0.999"),
    quadratic_steps=600,
    network_steps=150,
    rates=(),
    runs=2,
    switches=(50,),
    steps=9,
    horizons=(),
    tried=(0.1, 0.2),
    controls=(),
    meta_steps=3,
    learners=2,
    seeds=1,
    judged=4,
)


if __name__ == "__main__":
    command()
