"""Learn how to train a small GPT: rates by kind of parameter, betas, ε and weight decay over the steps.

A character-level transformer with 0.8 million parameters in 4 layers is trained by AdamW for 300 steps on
the source text of Python's standard library, which every Python brings along.  Two grids of constants are
searched first: with a constant learning rate, and with linear warm-up and a cosine decay to 0.  From the
best of the second, hypergradients of the loss on other files go on: there is a learning rate for every kind
of parameter, and like the betas and the weight decay it may change over the steps, in a few knots between
which its logarithm is linear.  Weights and minibatches are drawn anew at every meta-iteration.  The results
are judged on files and seeds that none of them has seen.

    python -m experiments.transformer
    python -m experiments.transformer --fast
"""

import math
import sysconfig
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
from experiments.common import cli, figures, records, statistics
from experiments.common.cli import option
from hypergrad import constraints, data, files, meta, nets

UNSEEN = 10_000  # seeds from here on are used by neither the learning nor the searches
KINDS = ("embedding", "attention", "perceptron", "gains and biases", "last layer")
EPS, WEIGHT_DECAY = 1e-8, 0.1
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
BETAS = {"b1": (0.9,), "b2": (0.95, 0.99)}
WARMUPS = (0.05, 0.2)  # shares of the steps
FLOOR = 0.02  # of the peak, with which learning begins where the cosine is 0

Hypers = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    steps: int = 300
    batch_size: int = 4
    length: int = option(32, "characters in a window")
    width: int = 128
    depth: int = 4
    heads: int = 4
    characters: int = option(2_000_000, "of the text")
    knots: int = option(8, "of everything that is learned over the steps")
    meta_step: float = option(0.2, "of Adam in logarithms and log-odds, decayed to 0")
    meta_iterations: int = 10
    grid: int = option(20, "runs of each search at most")
    held_out: int = option(64, "windows of the loss that is minimized")
    judged_on: int = option(8, "unseen seeds")
    judged_windows: int = 512
    seed: int = 0


class Setting(NamedTuple):
    """Windows of text, and the network."""

    train: Array  # (n, length + 1)
    held_out: Array  # of other files
    test: Array  # of others again
    init: Callable[[Array], Any]
    apply: Callable[..., Array]

    def loss(self, params: Any, windows: Array) -> Array:
        """Of predicting the next character, nats."""
        return nets.cross_entropy(self.apply(params, windows[:, :-1]), windows[:, 1:])


def library_text(characters: int) -> str:
    """Source of the standard library, its files in an order by chance, cut after so many characters.

    It is the same for the same version of Python.
    """
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen: list[str] = []
    for k in np.random.default_rng(0).permutation(len(paths)):
        text = paths[k].read_text(encoding="utf-8", errors="replace")
        chosen.append("".join(c for c in text if c == "\n" or " " <= c <= "~"))
        if sum(map(len, chosen)) >= characters:
            break
    return "".join(chosen)[:characters]


def library_codes(characters: int) -> tuple[np.ndarray, str]:
    """`library_text` as integers, and the characters that they stand for."""
    text = library_text(characters)
    vocabulary = "".join(sorted(set(text)))
    nothing = np.empty(0, np.int32)
    return data.Text(nothing, nothing, vocabulary, "library").encode(text), vocabulary


def setting(config: Config) -> Setting:
    """Cut the text into windows, of which 80 % are trained on, and make the network."""
    codes, vocabulary = library_codes(config.characters)
    cuts = len(codes) * 8 // 10, len(codes) * 9 // 10
    parts = [
        jnp.asarray(np.concatenate([inputs, targets[:, -1:]], axis=1))
        for inputs, targets in (data.windows(part, config.length) for part in np.split(codes, cuts))
    ]
    sizes = {"width": config.width, "depth": config.depth, "heads": config.heads}
    network = nets.transformer(len(vocabulary), config.length, **sizes, scan_layers=True)
    return Setting(*parts, *network)


# ---- hyperparameters


def kinds(params: Any) -> Any:
    """The kind of every leaf, in a tree like the parameters."""
    embedding, *blocks, head = params
    gains = jax.tree.map(lambda _: KINDS[3], nets.Norm(0, 0))

    def block(_: nets.Block) -> nets.Block:
        attention, inside = KINDS[1], nets.Dense(KINDS[2], KINDS[3])
        return nets.Block(gains, attention, nets.Dense(attention, KINDS[3]), gains, inside, inside)

    return (
        jax.tree.map(lambda _: KINDS[0], embedding),
        *map(block, blocks),
        head._replace(norm=gains, dense=nets.Dense(KINDS[4], KINDS[3])),
    )


def between(knots: Array, steps: int) -> Array:
    """Values at every step of what is linear in its logarithm between knots, ``(K,) -> (T,)``."""
    places = jnp.linspace(0, len(knots) - 1, steps)
    return jnp.exp(jnp.interp(places, jnp.arange(len(knots)), jnp.log(knots)))


def expanded(learned: Hypers, steps: int) -> Hypers:
    """Hyperparameters of AdamW at every step, from their knots; rates by kind of parameter."""
    return {
        "learning_rate": {kind: between(x, steps) for kind, x in learned["learning_rate"].items()},
        "b1": 1 - between(1 - learned["b1"], steps),
        "b2": 1 - between(1 - learned["b2"], steps),
        "eps": jnp.asarray(learned["eps"]),
        "weight_decay": between(learned["weight_decay"], steps),
    }


def constant_rate(tried: Mapping[str, float], steps: int) -> Hypers:
    """A point of the first grid, for all kinds of parameters."""
    return _alike(tried, jnp.full(steps, tried["learning_rate"]), steps)


def warmup_cosine(tried: Mapping[str, float], steps: int) -> Hypers:
    """A point of the second grid: linear from 0 to the rate, then half a cosine to 0."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, tried["learning_rate"], round(tried["warmup"] * steps), steps
    )
    return _alike(tried, schedule(jnp.arange(steps) + 0.5), steps)


def _alike(tried: Mapping[str, float], rates: Array, steps: int) -> Hypers:
    full = {name: jnp.full(steps, tried[name]) for name in BETAS}
    decay = {"eps": jnp.asarray(EPS), "weight_decay": jnp.full(steps, WEIGHT_DECAY)}
    return {"learning_rate": dict.fromkeys(KINDS, rates)} | full | decay


def first_knots(config: Config, best: Mapping[str, float]) -> Hypers:
    """Where learning begins: the best warm-up and cosine decay."""
    places = np.linspace(0, config.steps - 1, config.knots).round().astype(int)
    rates = warmup_cosine(best, config.steps)["learning_rate"][KINDS[0]][places]
    rates = jnp.maximum(rates, FLOOR * best["learning_rate"])
    full = {name: jnp.full(config.knots, best[name]) for name in BETAS}
    decay = {"eps": jnp.asarray(EPS), "weight_decay": jnp.full(config.knots, WEIGHT_DECAY)}
    return {"learning_rate": dict.fromkeys(KINDS, rates)} | full | decay


# ---- training, search, learning


def trainer(config: Config, s: Setting, adjoint: Any = None) -> Callable[..., hg.Trained]:
    """Training as a function of windows, hyperparameters, and a key for weights and minibatches."""

    def run(windows: Array, hypers: Hypers, key: Array) -> hg.Trained:
        weights, order = jax.random.split(key)
        params = s.init(weights)
        rows = data.minibatches(order, len(windows), config.batch_size, config.steps)
        rates = jax.tree.map(lambda kind: hypers["learning_rate"][kind], kinds(params))
        return hg.train(
            lambda w, windows, rows: s.loss(w, windows[rows]),
            params, {**hypers, "learning_rate": rates}, windows, rows,
            steps=config.steps, optimizer=hg.adamw(), adjoint=adjoint,
        )  # fmt: skip

    return run


def held_out_loss(config: Config, s: Setting, adjoint: Any = None) -> Callable[..., Array]:
    """The loss on some windows of the held-out files after training."""
    run = trainer(config, s, adjoint)

    def final(s: Setting, hypers: Hypers, key: Array) -> Array:
        training, choice = jax.random.split(key)
        rows = jax.random.randint(choice, (config.held_out,), 0, len(s.held_out))
        return s.loss(run(s.train, hypers, training).params, s.held_out[rows])

    return lambda hypers, key: final(s, hypers, key)


def search(config: Config, s: Setting) -> dict[str, dict[str, float]]:
    """The best points of both grids, on one seed."""
    grids = {
        "best constants": (constant_rate, statistics.grid(learning_rate=RATES, **BETAS)),
        "best cosine": (warmup_cosine, statistics.grid(learning_rate=RATES, **BETAS, warmup=WARMUPS)),
    }
    final = jax.jit(held_out_loss(config, s, hg.Stored()))  # a run that diverges just loses
    key, found = jax.random.key(config.seed), {}
    for name, (shape, tried) in grids.items():
        few = tried[:: math.ceil(len(tried) / config.grid)]
        order = statistics.ranked(few, lambda one, f=shape: final(f(one, config.steps), key))
        found[name] = order[0] | {"runs": len(few)}
        edges = statistics.edges({"learning_rate": order[0]["learning_rate"]}, few)
        print(f"{name}: {order[0]}" + (", the edge of the grid" if edges else ""), flush=True)
    return found


DOMAINS = {
    "learning_rate": constraints.positive,
    "b1": constraints.unit,
    "b2": constraints.unit,
    "eps": constraints.positive,
    "weight_decay": constraints.positive,
}


def learn(config: Config, s: Setting, start: Hypers, checkpoint: Path | None) -> dict[str, Any]:
    """Follow hypergradients of the held-out loss, with a new key at every meta-iteration."""
    # 300 steps take half a gigabyte; a reversal takes less, but minutes more to compile.
    final = held_out_loss(config, s, hg.Checkpointed())
    found = meta.optimize(
        lambda learned, key: final(expanded(learned, config.steps), key),
        start,
        optimizer=optax.adam(optax.cosine_decay_schedule(config.meta_step, config.meta_iterations)),
        steps=config.meta_iterations,
        constraints=DOMAINS,
        key=jax.random.key(config.seed + 1),
        checkpoint=checkpoint,
        retries=2,
    )
    return {"hypers": found.hypers, "loss": found.history.loss}


def judge(config: Config, s: Setting) -> Callable[[Hypers], dict[str, np.ndarray]]:
    """A function of hyperparameters: the test losses of runs with them from unseen seeds."""
    run = trainer(config, s, hg.Stored())

    @jax.jit
    def loss(train: Array, test: Array, hypers: Hypers, key: Array) -> Array:
        return s.loss(run(train, hypers, key).params, test)

    keys = [jax.random.key(UNSEEN + k) for k in range(config.judged_on)]
    few = s.test[:: max(1, len(s.test) // config.judged_windows)][: config.judged_windows]
    return lambda hypers: {"loss": np.array([loss(s.train, few, hypers, key) for key in keys], np.float64)}


# ---- what is reported


def main(config: Config, checkpoints: str | None = None, output: str | None = None) -> dict[str, Any]:
    """Search, learn, judge and print; where there is an output, write figure, record and schedule."""
    s = setting(config)
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(s.init, jax.random.key(0))))
    print(f"{parameters:,} parameters, {config.steps} steps", flush=True)
    saved = None if checkpoints is None else Path(checkpoints)
    same = replace(config, meta_iterations=0, meta_step=0.0, judged_on=0, judged_windows=0)
    asked = [same, RATES, BETAS, WARMUPS]
    found = records.remembered(saved and saved / "search.json", asked, lambda: search(config, s))
    best = found["best cosine"]
    start = first_knots(config, best)
    learned = records.remembered(
        saved and saved / "learned.json",
        [config, start],
        lambda: learn(config, s, start, saved and saved / "learning.npz"),
    )
    hypers = jax.tree.map(lambda _, x: jnp.asarray(x, jnp.float32), start, learned["hypers"])
    contestants = {
        "best constants": constant_rate(found["best constants"], config.steps),
        "best cosine": warmup_cosine(best, config.steps),
        "learned": expanded(hypers, config.steps),
    }
    losses, judging = {}, judge(config, s)
    for name, hypers in contestants.items():
        place = saved and saved / f"judged {name}.json"
        judged = records.remembered(place, [config, hypers], lambda h=hypers: judging(h))
        losses[name] = np.asarray(judged["loss"])
    differences = {
        name: statistics.paired(losses["learned"], each)
        for name, each in losses.items()
        if name != "learned"
    }
    report(config, losses, differences, found)
    record = {"config": config, "parameters": parameters, "searches": found, "loss": losses}
    record |= {"differences": differences, "learned": learned}
    if output is not None:
        draw(Path(output) / "transformer.png", contestants, record)
        files.save(Path(output) / "transformer.npz", contestants["learned"], config=records.plain(config))
    return record


def report(
    config: Config,
    losses: Mapping[str, np.ndarray],
    differences: Mapping[str, statistics.Difference],
    found: Mapping[str, Mapping[str, float]],
) -> None:
    """A line for every schedule."""
    print(f"loss on unseen files, nats per character: mean ± standard error of {config.judged_on} seeds")
    print(f"{'schedule':<18}{'loss':>18}{'learned less it':>22}{'runs':>12}")
    runs = {name: str(each["runs"]) for name, each in found.items()}
    runs["learned"] = f"{runs['best cosine']} + {config.meta_iterations}"
    for name, each in losses.items():
        loss = statistics.plus_minus(each.mean(), statistics.standard_error(each), ".4f")
        less = str(differences[name]) if name in differences else ""
        print(f"{name:<18}{loss:>18}{less:>22}{runs[name]:>12}")
    print(
        "'learned' begins at the best cosine; its own runs are hypergradients, which take as long as 4 to 5"
    )


def draw(
    path: Path,
    contestants: Mapping[str, Hypers],
    record: Mapping[str, Any],
) -> None:
    """Learned rates, betas and decay; the outer loss; the losses from unseen seeds."""
    figure, axes = figures.figure(2, 2)
    ours, cosine = (contestants[name] for name in ("learned", "best cosine"))
    rates = ours["learning_rate"] | {"best cosine": cosine["learning_rate"][KINDS[0]]}
    figures.lines(axes[0, 0], rates)
    axes[0, 0].set(title="Learned learning rates", xlabel="training step", ylabel="learning rate")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(bottom=0.3 * min(float(jnp.min(x)) for x in ours["learning_rate"].values()))
    others = {"1 - b1": 1 - ours["b1"], "1 - b2": 1 - ours["b2"], "weight decay": ours["weight_decay"]}
    figures.lines(axes[0, 1], others)
    axes[0, 1].set(title="Learned betas and decay", xlabel="training step", ylabel="value")
    axes[0, 1].set_yscale("log")
    figures.lines(axes[1, 0], {"each with a new seed": record["learned"]["loss"]}, marker="o")
    axes[1, 0].set(title="Learning", xlabel="meta-iteration", ylabel="held-out loss, nats")
    figures.lines(axes[1, 1], record["loss"], marker="o")
    axes[1, 1].set(title="Judged on unseen files", xlabel="unseen seed", ylabel="test loss, nats")
    figures.save(figure, path, record)


def command(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run as the command line says."""
    small = {"width": 16, "depth": 1, "heads": 2, "length": 8, "characters": 50_000, "steps": 10}
    fast = small | {"meta_iterations": 2, "grid": 2, "knots": 3, "judged_on": 2, "judged_windows": 16}
    config, run = cli.parse(
        "transformer", __doc__, Config(), arguments,
        fast=lambda config: replace(config, **fast), flags=("checkpoints",),
    )  # fmt: skip
    return main(config, run.checkpoints, run.output)


if __name__ == "__main__":
    command()
