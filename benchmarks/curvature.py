"""Time and memory of curvature products, in gradients.

Networks grow, twice as wide every time, until a gradient does not fit the budget or the time is up.  Run
it on any machine with

    python -m benchmarks.curvature            # some minutes
    python -m benchmarks.curvature --fast     # in seconds, writes nothing

======================  ==============================================================================
contestant              what it is
======================  ==============================================================================
gradient                of the mean cross-entropy of a batch: the unit of time and memory
forward over reverse    ``∇²L v`` as the derivative of the gradient along ``v``
reverse over forward    as the gradient of the derivative of the loss along ``v``
reverse over reverse    as the gradient of ``∇L · v``
hessian                 `hypergrad.curvature.hessian`
hessian, chunks         the same by a quarter of the batch at a time
hessian, 8 vectors      the same for 8 vectors together; the time is that of one, the memory of all
gauss_newton, fisher    `hypergrad.curvature.gauss_newton` and ``fisher``
gauss_newton, 8         the former for 8 vectors together
moments                 means and variances of all examples' losses, gradients and products with one
                        vector (`hypergrad.curvature.moments`), by chunks of 16
======================  ==============================================================================

Times are the best of some calls of the compiled function; only their ratios to the gradient's mean much.
Memory is what XLA asks for, arguments, results and what it reserves beside them, which is exact, and known
of those too that never ran.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hypergrad as hg
from benchmarks.machine import (
    GIB,
    MEMORY_SHARE,
    MIB,
    Compiled,
    Row,
    describe_machine,
    machine_memory,
    progress,
    ratio,
    say,
    show,
    slug,
    timed_call,
    versions,
)
from experiments.common import figures
from hypergrad import curvature, nets

RESULTS = Path(__file__).parent / "results"
AGREEMENT = 1e-3  # relative difference of products below which contestants did the same
SEED = 0
ENOUGH = 10.0  # seconds of calls after which there are no more than were asked for
MOST = 50  # calls of each, where they are short

PyTree = Any


# ---- the networks


class Network(NamedTuple):
    """A family of networks, one for every width.

    Attributes:
      make: from a width to (init, apply).
      shape: of an input.
      first: the smallest width.
      batch: examples.
    """

    make: Callable[[int], tuple[Callable[..., Any], Callable[..., Any]]]
    shape: tuple[int, ...]
    first: int
    batch: int


CLASSES = 10
NETWORKS = {
    "mlp": Network(lambda width: nets.mlp((784, width, width, width, CLASSES)), (784,), 64, 128),
    "convnet": Network(lambda width: nets.convnet((32, 32, 3), CLASSES, width=width), (32, 32, 3), 8, 64),
}
FAST = {
    "mlp": Network(lambda width: nets.mlp((8, width, CLASSES)), (8,), 8, 16),
    "convnet": Network(
        lambda width: nets.convnet((4, 4, 1), CLASSES, width=width, depth=1), (4, 4, 1), 2, 16
    ),
}


class Problem(NamedTuple):
    """A network of one width as a loss."""

    apply: Callable[..., Any]

    def loss(self, w: PyTree, x: Any, y: Any) -> Any:
        """Mean cross-entropy."""
        return nets.cross_entropy(self.apply(w, x), y)


# ---- the contestants: functions of a problem, parameters, a vector or a stack of them, inputs and labels


def forward_over_reverse(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """``d/dε ∇L(w + ε v)``."""
    return jax.jvp(lambda w: jax.grad(p.loss)(w, x, y), (w,), (v,))[1]


def reverse_over_forward(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """``∇ d/dε L(w + ε v)``."""
    return jax.grad(lambda w: jax.jvp(lambda w: p.loss(w, x, y), (w,), (v,))[1])(w)


def reverse_over_reverse(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """``∇ (∇L(w) · v)``."""

    def along(w: PyTree) -> Any:
        g = jax.grad(p.loss)(w, x, y)
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(v)))

    return jax.grad(along)(w)


def hessian(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any, chunk: int | None = None) -> PyTree:
    """The library's."""
    return curvature.hessian(p.loss, w, x, y, chunk=chunk)(v)


def hessian_in_chunks(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The library's, by quarters of the batch."""
    return hessian(p, w, v, x, y, chunk=len(x) // 4)


def hessians(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The library's, of a stack of vectors."""
    return curvature.batched(curvature.hessian(p.loss, w, x, y))(v)


def gauss_newton(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The library's."""
    return curvature.gauss_newton(p.apply, nets.cross_entropy, w, x, y)(v)


def gauss_newtons(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The library's, of a stack of vectors."""
    return curvature.batched(curvature.gauss_newton(p.apply, nets.cross_entropy, w, x, y))(v)


def fisher(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The library's, exact."""
    return curvature.fisher(p.apply, curvature.categorical(), w, x)(v)


def moments(p: Problem, w: PyTree, v: PyTree, x: Any, y: Any) -> PyTree:
    """The mean product; means and variances of everything else as further results."""
    found = curvature.moments(p.loss, w, x, y, direction=v, chunk=16)
    averages = (found.loss.average, found.gradient.average, found.hvp.average if found.hvp else None)
    return found.hvp.mean if found.hvp else None, found.gradient.mean, averages


class Contestant(NamedTuple):
    """How something is computed.

    Attributes:
      function: of a problem, parameters, a vector, inputs and labels.
      same: the contestant whose result is also this one's; None for the first of its kind.
      vectors: how many there are in the stack, or 1.
    """

    function: Callable[..., PyTree]
    same: str | None = None
    vectors: int = 1


GRADIENT, FORWARD, GAUSS_NEWTON = "gradient", "forward over reverse", "gauss_newton"
CONTESTANTS = {
    GRADIENT: Contestant(lambda p, w, v, x, y: jax.grad(p.loss)(w, x, y)),
    FORWARD: Contestant(forward_over_reverse),
    "reverse over forward": Contestant(reverse_over_forward, FORWARD),
    "reverse over reverse": Contestant(reverse_over_reverse, FORWARD),
    "hessian": Contestant(hessian, FORWARD),
    "hessian, chunks": Contestant(hessian_in_chunks, FORWARD),
    "hessian, 8 vectors": Contestant(hessians, FORWARD, 8),
    GAUSS_NEWTON: Contestant(gauss_newton),
    "fisher": Contestant(fisher, GAUSS_NEWTON),
    "gauss_newton, 8": Contestant(gauss_newtons, GAUSS_NEWTON, 8),
    "moments": Contestant(moments, FORWARD),
}
QUICK = (
    GRADIENT,
    FORWARD,
    "reverse over forward",
    "reverse over reverse",
    "hessian, 8 vectors",
    GAUSS_NEWTON,
)


# ---- measuring


def make_arguments(network: Network, width: int) -> tuple[PyTree, PyTree, Any, Any]:
    """Parameters, a stack of 8 vectors, inputs and labels; under `jax.eval_shape`, their shapes."""
    # Sines take less time to compile than random numbers.
    spread = lambda *shape: jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape)  # noqa: E731
    w = network.make(width)[0](jax.random.key(SEED))
    v = jax.tree.map(lambda a: spread(8, *a.shape), w)
    return w, v, spread(network.batch, *network.shape), jnp.arange(network.batch) % CLASSES


def given(contestant: Contestant, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a contestant: the stack of vectors, or the first of it."""
    w, v, x, y = arguments
    if contestant.vectors == 1:
        of_one = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)  # noqa: E731
        abstract = isinstance(y, jax.ShapeDtypeStruct)
        v = jax.tree.map(of_one if abstract else lambda a: a[0], v)
    return w, v, x, y


def compiled(problem: Problem, name: str, known: Row, shapes: tuple[Any, ...], limit: float) -> Compiled:
    """Compile a contestant, without making its arguments; it will not be called where they do not fit."""
    contestant = CONTESTANTS[name]
    row = known | {"contestant": name, "vectors": contestant.vectors, "times": [], "skipped": None}
    row |= dict.fromkeys(("seconds", "time_ratio", "memory_ratio", "difference"))
    begin = time.perf_counter()
    function = jax.jit(lambda *arguments: contestant.function(problem, *arguments))
    call = function.lower(*given(contestant, shapes)).compile()
    row["compile_seconds"] = time.perf_counter() - begin
    memory = call.memory_analysis()
    for kind in ("argument", "output", "temp"):
        row[f"{kind}_bytes"] = getattr(memory, f"{kind}_size_in_bytes")
    row["bytes"] = sum(row[f"{kind}_bytes"] for kind in ("argument", "output", "temp"))
    if row["bytes"] > limit:
        row["skipped"] = f"skipped: would need {row['bytes'] / GIB:.1f} GiB"
    return Compiled(row, call, ())


def measure(
    network_name: str, network: Network, width: int, names: Sequence[str], repeats: int, limit: float
) -> list[Row]:
    """Rows of all contestants on one network; the first is the gradient.

    Args:
      network_name: for the rows.
      network: the family.
      width: of the network.
      names: keys of `CONTESTANTS`.
      repeats: calls of each, or more where they are short.
      limit: bytes above which a contestant is not called.
    """
    problem = Problem(network.make(width)[1])
    shapes = jax.eval_shape(lambda: make_arguments(network, width))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes[0]))
    known = {"network": network_name, "width": width, "parameters": parameters, "batch": network.batch}
    everyone = []
    for name in dict.fromkeys((GRADIENT, *names)):
        progress(f"compiling {name}, {network_name}, width {width}")
        everyone.append(compiled(problem, name, known, shapes, limit))
        if everyone[0].row["skipped"]:
            return [everyone[0].row]
    # The stack of vectors may be too large itself; a single one then is all that is there.
    stacked = any(CONTESTANTS[c.row["contestant"]].vectors > 1 and not c.row["skipped"] for c in everyone)
    arguments = make_arguments(network, width)
    if not stacked:
        w, v, x, y = arguments
        arguments = (w, jax.tree.map(lambda a: a[:1], v), x, y)
    single = given(CONTESTANTS[GRADIENT], arguments)
    references: dict[str, Any] = {}
    begin = time.perf_counter()
    # Everyone once a round, every other round in the opposite order.
    for k in range(max(repeats, MOST)):
        if k >= repeats and time.perf_counter() - begin > ENOUGH:
            break
        for c in everyone[:: -1 if k % 2 else 1]:
            contestant = CONTESTANTS[c.row["contestant"]]
            if c.row["skipped"] is None:
                result = timed_call(c._replace(arguments=arguments if contestant.vectors > 1 else single))
                if k == 0 and result is not None:
                    compare(c.row, contestant, result, references)
                del result
        references.clear()
    unit = everyone[0].row
    for c in everyone:
        row = c.row
        row["time_ratio"] = ratio(ratio(row["seconds"], row["vectors"]), unit["seconds"])
        row["memory_ratio"] = ratio(row["bytes"], unit["bytes"])
    return [c.row for c in everyone]


def compare(row: Row, contestant: Contestant, result: PyTree, references: dict[str, Any]) -> None:
    """Note how far a result is from that of the contestant which computes the same."""
    if contestant.vectors > 1:
        result = jax.tree.map(lambda a: a[0], result)
    first = jax.tree.leaves(result[0] if row["contestant"] == "moments" else result)
    if contestant.same is None:
        references[row["contestant"]] = first
    elif contestant.same in references:
        size = lambda leaves: math.sqrt(sum(float(jnp.sum(a**2)) for a in leaves))  # noqa: E731
        reference = references[contestant.same]
        row["difference"] = size([a - b for a, b in zip(first, reference)]) / size(reference)


# ---- report


def table(rows: Sequence[Row]) -> str:
    """The rows as text; times are of one vector."""
    head = (
        f"{'network':<9}{'width':>6}{'parameters':>13}  {'contestant':<21}{'seconds':>9}{'/ gradient':>11}"
    )
    lines = [head + f"{'MiB':>10}{'/ gradient':>11}{'MiB temp':>10}{'difference':>12}"]
    for r in rows:
        line = f"{r['network']:<9}{r['width']:>6}{r['parameters']:>13,}  {r['contestant']:<21}"
        line += f"{show(ratio(r['seconds'], r['vectors']), '.4f'):>9}{show(r['time_ratio'], '.2f'):>11}"
        line += f"{r['bytes'] / MIB:>10.1f}{show(r['memory_ratio'], '.2f'):>11}"
        line += f"{r['temp_bytes'] / MIB:>10.1f}{show(r['difference'], '.0e'):>12}"
        lines.append(line + (f"  {r['skipped']}" if r["skipped"] else ""))
    return "\n".join(lines)


def draw(rows: Sequence[Row], machine: str) -> Any:
    """Time and memory in gradients against the number of parameters: a row of axes for each network."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    names = [n for n in dict.fromkeys(r["contestant"] for r in rows) if n != GRADIENT]
    figure, axes = figures.figure(len(networks), 2, width=4.6)
    for places, network in zip(axes, networks):
        for k, name in enumerate(names):
            own = [r for r in rows if (r["network"], r["contestant"]) == (network, name)]
            style = {"marker": "oPDsv^<>Xdph"[k], "label": name, "linewidth": 0.9, "markersize": 4}
            style |= {"color": figures.COLOURS[k // 4], "linestyle": figures.LINES[k % 4]}
            for place, measure in zip(places, ("time_ratio", "memory_ratio")):
                points = [(r["parameters"], r[measure]) for r in own if r[measure] is not None]
                place.loglog(*zip(*points) if points else ((), ()), **style)
        for place, what in zip(places, ("time of a vector", "memory")):
            place.set(
                title=f"{network}: {what}", xlabel="parameters, thousands", ylabel=f"{what}, gradients"
            )
            low, high = place.get_ylim()
            ticks = [t for t in (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50) if low <= t <= high]
            place.set_yticks(ticks, [str(t) for t in ticks])
            sizes = sorted({r["parameters"] for r in rows if r["network"] == network})
            place.set_xticks(sizes, [f"{size / 1000:,.0f}" for size in sizes], fontsize="small")
            place.minorticks_off()
            place.grid(alpha=0.25)
    figure.suptitle(f"Curvature products, {machine}", fontsize="medium")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right upper", fontsize="small", handlelength=4)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="some contestants, tiny; writes nothing")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CONTESTANTS), help="contestants")
    parser.add_argument(
        "--budget-gib",
        type=float,
        help=f"memory of one contestant (default {MEMORY_SHARE} of the machine's)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=5,
        help="after which no larger network of a kind is begun (default 5)",
    )
    parser.add_argument("--repeats", type=int, help="calls of each, at least (default 5)")
    parser.add_argument("--output", type=Path, help=f"folder for the report (default {RESULTS.name})")
    args = parser.parse_args(arguments)
    args.repeats = args.repeats or (2 if args.fast else 5)
    args.output = args.output or (None if args.fast else RESULTS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the report; 1 if contestants disagree."""
    args = parse(arguments)
    # Else a GPU multiplies with 10-bit mantissas, and rounding hides whether the contestants agree.
    jax.config.update("jax_default_matmul_precision", "float32")
    machine = describe_machine()
    limit = args.budget_gib * GIB if args.budget_gib else MEMORY_SHARE * machine_memory()
    say(f"{machine['name']} ({machine['platform']}); jax {jax.__version__}, hypergrad {hg.__version__}")
    names = args.only or list(QUICK if args.fast else CONTESTANTS)
    rows: list[Row] = []
    for name in args.networks:
        network, begin = (FAST if args.fast else NETWORKS)[name], time.perf_counter()
        for k in itertools.count():
            new = measure(name, network, network.first * 2**k, names, args.repeats, limit)
            rows += new
            if args.fast or new[0]["skipped"] or time.perf_counter() - begin > 60 * args.minutes:
                break
    say("\n" + table(rows) + "\n")
    differences = [r["difference"] for r in rows if r["difference"] is not None]
    agreed = all(x < AGREEMENT for x in differences)
    largest = max(differences, default=0.0)
    say(f"products agree: {'yes' if agreed else 'NO'} (largest difference {largest:.1e})")
    if args.output:
        config = {
            "memory_limit_bytes": limit,
            "minutes": args.minutes,
            "repeats": args.repeats,
            "seed": SEED,
        }
        config |= {"about": __doc__, "classes": CLASSES, "networks": args.networks, "contestants": names}
        report = {"config": config, "machine": machine | {"packages": versions(("jaxlib",))}, "rows": rows}
        path = args.output / f"curvature-{slug(machine['name'])}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(draw(rows, machine["name"]), path, report)
        say(f"\nwritten: {path} and {path.with_suffix('.json').name}")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
