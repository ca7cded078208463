"""Does a metagradient predict what happens without half of the examples, and who says so beforehand?

A small network that has learned for a while is trained on, by AdamW in minibatches, and the loss on a few
other examples is differentiated in one weight for every training example, through the whole run.  For 50
random halves of the examples the sum of these metagradients over what is left out is the predicted effect;
training without them gives the real one.  Their rank correlation, the linear datamodeling score, depends on
ε under the root of Adam, on the batch size, and on dropout, whose masks are new in every run unless they
are fixed.  `hypergrad.check_leave_out` gives its verdict with other halves, before any of the 50 runs.

What ε does depends on the size of gradients, which are small in large networks.  Here the training loss is
multiplied by a small number, so that networks which are small go from failure to success within the same
range of ε as published ones; for Adam, a loss times ``s`` is the same as ``ε / s²`` under the root.

    python -m experiments.leave_out
    python -m experiments.leave_out --fast
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import hypergrad as hg
from experiments.common import cli, figures
from experiments.common.cli import option
from experiments.transformer import library_codes
from hypergrad import data, nets
from hypergrad.check.leave_out import rank_correlation
from hypergrad.optimizers.adam_family import MOMENTS, decayed, moments, unbiased
from hypergrad.program import Optimizer, Shift

FAILS, WORKS = 0.2, 0.9  # what the verdicts are judged by
MASKS = ("no dropout", "fixed masks", "new masks")


@dataclass(frozen=True)
class Workload:
    """A network, what it is trained on, and how."""

    name: str
    examples: int
    start_steps: int  # on other examples
    start_rate: float
    steps: int
    learning_rate: float
    loss_scale: float  # by which the training loss is multiplied
    batch_sizes: tuple[int, ...]


PERCEPTRON = Workload("perceptron", 512, 300, 1e-3, 64, 1.5e-2, 5e-3, (16, 128))
TRANSFORMER = Workload("transformer", 256, 500, 3e-3, 32, 1.2e-2, 3e-4, (16, 64))


@dataclass(frozen=True)
class Config:
    """What to run; see `--help`."""

    workloads: tuple[Workload, ...] = (PERCEPTRON, TRANSFORMER)
    eps_roots: tuple[float, ...] = option((1e-10, 1e-9, 1e-8, 1e-7, 1e-6), "ε under the root of Adam")
    dropout: float = option(0.1, "rate of dropout")
    hidden: int = option(256, "width of the perceptron")
    width: int = option(32, "of the transformer")
    length: int = option(16, "characters in a window of text")
    targets: int = option(16, "examples of the loss that is differentiated")
    subsets: int = option(50, "runs without half of the examples")
    resamples: int = option(1000, "of the bootstrap")
    seed: int = 0


class Task(NamedTuple):
    """A network that has learned for a while, and examples ``(inputs, labels)``.

    Attributes:
      losses: ``losses(params, (inputs, labels), rate, key)``, of every example, nats.
      start: its parameters.
      examples: to train on, with a weight for each.
      targets: of the loss that is differentiated.
    """

    losses: Callable[..., Array]
    start: Any
    examples: tuple[Array, Array]
    targets: tuple[Array, Array]


class Outcome(NamedTuple):
    """What came out in one setting.

    Attributes:
      network: by name.
      batch_size: rows of a minibatch.
      masks: one of `MASKS`.
      eps_root: of AdamW.
      verdict: of `hypergrad.check_leave_out`.
      estimate: of the correlation, from its runs.
      check_runs: how many it made for the verdict.
      advice: what it says.
      loss: on the targets, after training on all examples, nats.
      correlation: linear datamodeling score.
      low: of its bootstrap interval of 95%.
      high: of the same.
      predicted: ``(subsets,)``.
      real: ``(subsets,)``.
      seconds: of the hypergradient, of the check with its diagnosis, and of all runs.
    """

    network: str
    batch_size: int
    masks: str
    eps_root: float
    verdict: str
    estimate: float
    check_runs: int
    advice: str
    loss: float
    correlation: float
    low: float
    high: float
    predicted: np.ndarray
    real: np.ndarray
    seconds: tuple[float, float, float]


# ---- networks


def dropped(x: Array, rate: Array, key: Array) -> Array:
    """Dropout: zeros by chance, and the rest larger by as much as keeps the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def perceptron(w: Any, inputs: Array, rate: Array, key: Array) -> Array:
    """Logits of `nets.mlp` with one hidden layer, with dropout behind it."""
    first, last = w
    hidden = jnp.tanh(inputs @ first.weights + first.biases[None])
    return dropped(hidden, rate, key) @ last.weights + last.biases[None]


def normalized(norm: nets.Norm, h: Array) -> Array:
    """Layer normalization."""
    return jax.nn.standardize(h, axis=2, epsilon=1e-5) * norm.scale[None, None] + norm.offset[None, None]


def affine(layer: nets.Dense, h: Array) -> Array:
    """One layer at every place of a sequence."""
    return h @ layer.weights + layer.biases[None, None]


def transformer(heads: int, w: Any, tokens: Array, rate: Array, key: Array) -> Array:
    """Logits of `nets.transformer`, with dropout of embeddings and of what is added in every block."""
    embedding, *blocks, head = w
    keys = iter(jax.random.split(key, 1 + 2 * len(blocks)))
    rows = jax.nn.one_hot(tokens, len(embedding.tokens)) @ embedding.tokens
    h = dropped(rows + embedding.positions[None], rate, next(keys))
    for block in blocks:
        seen = normalized(block.attention_norm, h) @ block.attention
        split = jnp.moveaxis(seen.reshape(*seen.shape[:2], 3, heads, -1), 2, 0)
        attended = nets.causal_attention(*split).reshape(h.shape)
        h += dropped(affine(block.projection, attended), rate, next(keys))
        inner = jax.nn.gelu(affine(block.expansion, normalized(block.mlp_norm, h)), approximate=False)
        h += dropped(affine(block.contraction, inner), rate, next(keys))
    return affine(head.dense, normalized(head.norm, h))


def digits(config: Config, work: Workload) -> tuple[Callable[..., Array], Any, list[tuple[Array, Array]]]:
    """Logits, initial weights, and examples: to train on, for the start, targets."""
    loaded = data.digits()
    images, test = (x.reshape(len(x), -1) for x in (loaded.train_images, loaded.test_images))
    n, mean = work.examples, images.mean(axis=0)
    start = slice(n, n + 300)  # few, so that there is something left to learn
    parts = [
        (images[:n] - mean, loaded.train_labels[:n]),
        (images[start] - mean, loaded.train_labels[start]),
        (test[: config.targets] - mean, loaded.test_labels[: config.targets]),
    ]
    init, _ = nets.mlp((images.shape[1], config.hidden, 10))
    return perceptron, init(jax.random.key(config.seed)), jax.tree.map(jnp.asarray, parts)


def text(config: Config, work: Workload) -> tuple[Callable[..., Array], Any, list[tuple[Array, Array]]]:
    """The same, of windows of the source of the standard library."""
    codes, vocabulary = library_codes(200_000)
    inputs, labels = (jnp.asarray(x) for x in data.windows(codes, config.length))
    order = np.random.default_rng(config.seed).permutation(len(inputs))
    cuts = np.cumsum([work.examples, 2048, config.targets])
    parts = [(inputs[rows], labels[rows]) for rows in np.split(order[: cuts[-1]], cuts[:-1])]
    heads = 2
    init, _ = nets.transformer(len(vocabulary), config.length, width=config.width, depth=1, heads=heads)
    return partial(transformer, heads), init(jax.random.key(config.seed)), parts


# ---- training


def adamw() -> Optimizer:
    """AdamW with ε under the root, ``w <- (1 - α λ) w - α m̂ / √(v̂ + ε)``, as optax's ``eps_root``."""

    def moves(h: Any, t: Array) -> Sequence[Any]:
        def step(s: Any) -> Array:
            root = jnp.sqrt(unbiased(s.nu, h.b2, t) + h.eps_root)
            return -h.learning_rate * unbiased(s.mu, h.b1, t) / root

        return [*moments(h), decayed(h), Shift("params", step)]

    hypers = {"learning_rate": None, "b1": 0.9, "b2": 0.999, "eps_root": 1e-8, "weight_decay": 0.01}
    return Optimizer("adamw(eps_root)", moves, MOMENTS, hypers)


def task(config: Config, work: Workload) -> Task:
    """The examples, and the network after its first training on others."""
    logits, start, (examples, others, targets) = {"perceptron": digits, "transformer": text}[work.name](
        config, work
    )

    def losses(w: Any, part: tuple[Array, Array], rate: Any, key: Array) -> Array:
        found = optax.softmax_cross_entropy_with_integer_labels(logits(w, part[0], rate, key), part[1])
        return found.reshape(len(found), -1).mean(axis=1)

    key = jax.random.key(config.seed + 1)
    rows = data.minibatches(key, len(others[1]), min(64, len(others[1])), work.start_steps)

    @jax.jit
    def learned(start: Any, others: Any) -> Any:
        return hg.train(
            lambda w, others, rows: jnp.mean(losses(w, jax.tree.map(lambda x: x[rows], others), 0.0, key)),
            start, {"learning_rate": work.start_rate}, others, rows,
            steps=work.start_steps, optimizer=hg.adam(), adjoint=hg.Stored(),
        ).params  # fmt: skip

    return Task(losses, learned(start, others), examples, targets)


def outer(
    config: Config, work: Workload, t: Task, batch_size: int, adjoint: Any = None
) -> Callable[..., Array]:
    """``f(c, eps_root, rate, key)``: the loss on the targets after training with weights ``c``."""
    n = len(t.examples[1])
    rows = data.minibatches(jax.random.key(config.seed + 2), n, batch_size, work.steps)

    def loss(w: Any, given: tuple[Task, Array, Array], batch: tuple[Array, Array]) -> Array:
        (examples, c, rate), (rows, key) = given, batch
        some = jax.tree.map(lambda x: x[rows], examples)
        return work.loss_scale * jnp.mean(c[rows] * t.losses(w, some, rate, key))

    def final(c: Array, eps_root: Array, rate: Array, key: Array) -> Array:
        batches = (rows, jax.random.split(key, work.steps))
        hypers = {"learning_rate": work.learning_rate, "eps_root": eps_root}
        options = {"steps": work.steps, "optimizer": adamw(), "adjoint": adjoint}
        trained = hg.train(loss, t.start, hypers, (t.examples, c, rate), batches, **options).params
        return jnp.mean(t.losses(trained, t.targets, 0.0, key))

    return final


# ---- what is measured


def outcomes(config: Config, work: Workload) -> Iterator[Outcome]:
    """Every setting of one network; of a batch size, all settings share two compiled programs."""
    t, rng = task(config, work), np.random.default_rng(config.seed + 3)
    n = len(t.examples[1])
    halves = [rng.permutation(n)[: n // 2] for _ in range(config.subsets)]
    for batch_size in work.batch_sizes:
        slope = jax.jit(jax.grad(outer(config, work, t, batch_size)))
        after = jax.jit(outer(config, work, t, batch_size, hg.Stored()))
        key = jax.random.key(config.seed + 4)
        for compiled in (slope, after):
            compiled(jnp.ones(n), jnp.float32(1e-6), jnp.float32(0), key).block_until_ready()
        for masks in MASKS:
            for eps_root in config.eps_roots:
                rate = 0.0 if masks == "no dropout" else config.dropout
                given = jnp.float32(eps_root), jnp.float32(rate)
                run, at = (lambda c, key, f=f, given=given: f(c, *given, key) for f in (after, slope))
                measured = outcome(config, run, at, halves, key, masks == "new masks")
                yield Outcome(work.name, batch_size, masks, eps_root, *measured)


def outcome(
    config: Config, run: Any, slope: Any, halves: Sequence[np.ndarray], key: Array, new: bool
) -> tuple[Any, ...]:
    """First the verdict, then what it is about: the fields of `Outcome` from `verdict` on."""
    ones = jnp.ones(2 * len(halves[0]))
    began = time.perf_counter()
    g = np.asarray(slope(ones, key))
    derived = time.perf_counter()
    report = hg.check_leave_out(
        run if new else (lambda c: run(c, key)),
        ones, g, training_key=key if new else None, key=jax.random.key(config.seed + 5), quiet=True,
    )  # fmt: skip
    checked = time.perf_counter()
    predicted = np.array([-np.sum(g[out]) for out in halves])
    keys = jax.random.split(jax.random.fold_in(key, 1), len(halves)) if new else [key] * len(halves)
    real = np.array([float(run(ones.at[out].set(0), k)) for out, k in zip(halves, keys)])
    ended = time.perf_counter()
    numbers = report.prediction.numbers
    return (
        report.verdict, numbers.get("correlation", np.nan), numbers["runs"],
        " ".join(finding.meaning for finding in report[2:] if finding.verdict in ("warning", "failed")),
        float(run(ones, key)), rank_correlation(predicted, real), *bootstrap(config, predicted, real),
        predicted, real, (derived - began, checked - derived, ended - checked),
    )  # fmt: skip


def bootstrap(config: Config, predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """95% interval of the correlation: percentiles over resampled pairs."""
    rng = np.random.default_rng(config.seed)
    picks = rng.integers(0, len(real), (config.resamples, len(real)))
    low, high = np.nanpercentile([rank_correlation(predicted[k], real[k]) for k in picks], (2.5, 97.5))
    return float(low), float(high)


def judged(found: Sequence[Outcome]) -> dict[str, int]:
    """How many settings there are that fail and that work, and what the verdicts were."""
    fails = [x for x in found if x.correlation < FAILS]
    works = [x for x in found if x.correlation > WORKS]
    return {
        "settings": len(found),
        "fail": len(fails),
        "fail and flagged": sum(x.verdict == "NOT TRUSTED" for x in fails),
        "fail and passed": sum(x.verdict == "trusted" for x in fails),
        "work": len(works),
        "work and passed": sum(x.verdict == "trusted" for x in works),
        "work and flagged": sum(x.verdict == "NOT TRUSTED" for x in works),
        "between and passed": sum(
            x.verdict == "trusted" for x in found if x not in fails and x not in works
        ),
    }


# ---- what is reported


def main(config: Config, output: str | None = None) -> list[Outcome]:
    """Run the grid; write the figure and its record if there is a folder for them."""
    head = f"{'network':<12}{'batch':>6}  {'dropout':<12}{'ε in root':>10}{'correlation':>24}"
    print(f"{head}  verdict before (runs: estimate)")
    found: list[Outcome] = []
    for work in config.workloads:
        for x in outcomes(config, work):
            found.append(x)
            score = f"{x.correlation:.2f} ({x.low:.2f} to {x.high:.2f})"
            print(
                f"{x.network:<12}{x.batch_size:>6}  {x.masks:<12}{x.eps_root:>10.0e}{score:>24}  "
                f"{x.verdict} ({x.check_runs}: {x.estimate:.2f})",
                flush=True,
            )
    print("; ".join(f"{name}: {count}" for name, count in judged(found).items()))
    runs = [x.check_runs for x in found]
    seconds = np.sum([x.seconds for x in found], axis=0)
    print(f"runs for a verdict: mean {np.mean(runs):.1f}, at most {max(runs)}; seconds in hypergradients,")
    print("checks with diagnoses, and runs without half: {:.0f}, {:.0f}, {:.0f}".format(*seconds))
    if output is not None:
        draw(Path(output) / "leave_out.png", config, found)
    return found


MARKS: Mapping[str, Mapping[str, Any]] = {
    "trusted": {"marker": "o", "color": figures.COLOURS[1]},
    "cannot tell": {"marker": "s", "color": figures.COLOURS[3]},
    "NOT TRUSTED": {"marker": "x", "color": figures.COLOURS[2]},
}


def draw(path: Path, config: Config, found: Sequence[Outcome]) -> None:
    """Correlations by ε for each network, and beside the estimates that the verdicts are made from."""
    figure, axes = figures.figure(1, len(config.workloads) + 1)
    for axis, work in zip(axes[0], config.workloads):
        for k, masks in enumerate(MASKS):
            for wide, batch_size in enumerate(work.batch_sizes):
                some = [x for x in found if x[:3] == (work.name, batch_size, masks)]
                look = figures.look(k, linewidth=1 + wide)
                axis.plot(
                    [x.eps_root for x in some], [x.correlation for x in some],
                    label=f"{masks}, batches of {batch_size}", **look,
                )  # fmt: skip
                for x in some:
                    axis.plot(x.eps_root, x.correlation, linestyle="none", **MARKS[x.verdict])
        axis.set(title=f"Without half: {work.name}", xlabel="ε under the root of AdamW", xscale="log",
                 ylabel="rank correlation, predicted and real", ylim=(-0.5, 1.05))  # fmt: skip
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.25)
    last = axes[0, -1]
    for verdict, look in MARKS.items():
        some = [x for x in found if x.verdict == verdict]
        last.errorbar(
            [x.estimate for x in some], [x.correlation for x in some],
            [[x.correlation - x.low for x in some], [x.high - x.correlation for x in some]],
            linestyle="none", linewidth=0.6, label=verdict, **look,
        )  # fmt: skip
    for level in (FAILS, WORKS):
        last.axhline(level, color="0.5", linewidth=0.8, linestyle=":")
    last.set(title="Verdicts before, and what came", xlabel="correlation in the runs of the check",
             ylabel=f"correlation in {config.subsets} runs, 95% interval", ylim=(-0.6, 1.05))  # fmt: skip
    last.legend(fontsize="small")
    last.grid(alpha=0.25)
    figures.save(figure, path, {"config": config, "judged": judged(found), "outcomes": found})


def command(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run as the command line says."""
    tiny = replace(PERCEPTRON, examples=64, start_steps=20, steps=4, batch_sizes=(16,))
    fast = {"workloads": (tiny,), "eps_roots": (1e-10, 1e-6), "hidden": 16, "subsets": 8, "resamples": 20}
    config, run = cli.parse(
        "leave_out", __doc__, Config(), arguments, fast=lambda config: replace(config, **fast)
    )
    return main(config, run.output)


if __name__ == "__main__":
    command()
