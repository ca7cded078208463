"""What benchmarks have in common: calls that are timed, the machine they run on, numbers in tables."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

MEMORY_SHARE = 0.6  # of the machine's memory that one contestant may take
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
MIB, GIB = 2.0**20, 2.0**30

Row = dict[str, Any]


class Compiled(NamedTuple):
    """A compiled contestant, the row of its results, and its arguments."""

    row: Row
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


def timed_call(contestant: Compiled) -> Any:
    """Call a contestant and note its time; None where it fails."""
    row, begin = contestant.row, time.perf_counter()
    try:
        result = jax.block_until_ready(contestant.call(*contestant.arguments))
    except jax.errors.JaxRuntimeError as error:  # one that fails must not take the others' results along
        row["skipped"] = f"failed: {str(error).strip().splitlines()[0][:80]}"
        return None
    row["times"].append(time.perf_counter() - begin)
    row["seconds"] = min(row["times"])
    return result


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on, as the operating system and JAX name it."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    name = f"{cpu}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return {
        "name": name,
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": machine_memory(),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
    }


def on_one_core(core: int) -> None:
    """Keep everything on one core and in one thread, from before JAX looks for processors.

    NumPy's linear algebra has started its threads by then.  They would wait for work by turning round,
    which counts as processor time.

    Args:
      core: its number among those that the process may use, counted round.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}".strip()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
    if importlib.util.find_spec("threadpoolctl"):
        importlib.import_module("threadpoolctl").threadpool_limits(1)


def machine_memory() -> int:
    """Bytes of memory of the device, or of the machine where that is the device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def slug(name: str) -> str:
    """A machine's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of packages, beside those that `experiments.common.figures.save` adds."""
    found = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **found}


def ratio(a: float | None, b: float | None) -> float | None:
    """Quotient ``a / b`` of what was measured."""
    return a / b if a is not None and b else None


def show(value: float | None, form: str) -> str:
    """A number in a table, or a dash."""
    return "-" if value is None else format(value, form)


def say(text: str) -> None:
    """Print at once, for logs."""
    print(text, flush=True)


def progress(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)
