"""The hypergradient of the benchmark unrolled in PyTorch, with ``higher`` and with ``TorchOpt``.

Each contestant runs in a process of its own, so that its memory is its own.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def measure(name: str, rates: Any, arrays: Any, momentum: float, repeats: int) -> dict[str, Any]:
    """Times, bytes and hypergradient of a contestant, or why it failed, for a row of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "problem.npz")
        layers = {f"{k}{i}": v for i, layer in enumerate(arrays.params) for k, v in zip("wb", layer)}
        rest = {k: v for k, v in arrays._asdict().items() if k != "params"}
        np.savez(file, rates=rates, **layers, **rest)
        command = f"from benchmarks import pytorch; pytorch.worker{(name, file, momentum, repeats)}"
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"failed: {(done.stderr.strip() or 'killed').splitlines()[-1][:80]}"}
    return json.loads(done.stdout.splitlines()[-1])


def worker(name: str, file: str, momentum: float, repeats: int) -> None:
    """Measure one PyTorch contestant in this process and print the result as a line of JSON."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = {k: torch.from_numpy(v).to(device) for k, v in np.load(file).items()}
    arrays |= {k: v.long() for k, v in arrays.items() if not v.is_floating_point()}
    unroll = {"higher": unroll_higher, "TorchOpt": unroll_torchopt}[name]
    times = []
    # What a first call loads and keeps is not the run's.
    few = arrays | {"indices": arrays["indices"][:2]}
    unroll(net(arrays, device), arrays["rates"][:2].clone().requires_grad_(), few, momentum)
    before = _peak(torch, device, anew=True)
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        rates = arrays["rates"].clone().requires_grad_()
        gradient = unroll(net(arrays, device), rates, arrays, momentum).tolist()  # waits for the device
        times.append(time.perf_counter() - begin)
    grown = _peak(torch, device) - before
    seconds = min(times[1:])
    print(json.dumps({"times": times[1:], "seconds": seconds, "temp_bytes": grown, "gradient": gradient}))


def _peak(torch: Any, device: str, anew: bool = False) -> int:
    """The most bytes that were in use, perhaps from now on.

    The peak that the operating system reports of a process begins at that of its parent, which is larger
    than all that the run needs; Linux forgets it when asked to.
    """
    if device == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/clear_refs"):
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(peak)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def net(arrays: dict[str, Any], device: str) -> Any:
    """The network with the start of the problem as its parameters."""
    import torch

    layers: list[Any] = []
    for i in range(sum(k[0] == "w" for k in arrays)):
        layer = torch.nn.Linear(*arrays[f"w{i}"].shape, device=device)
        with torch.no_grad():
            layer.weight.copy_(arrays[f"w{i}"].T)
            layer.bias.copy_(arrays[f"b{i}"])
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def unroll_higher(net: Any, rates: Any, arrays: dict[str, Any], momentum: float) -> Any:
    """Hypergradient with ``higher``.

    PyTorch's momentum sums gradients, so that scaling the loss by 1 - γ makes it the averaging one.
    """
    import higher
    import torch

    cross_entropy = torch.nn.functional.cross_entropy
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=momentum)
    with higher.innerloop_ctx(net, optimizer) as (fast, differentiable):
        for rate, rows in zip(rates, arrays["indices"]):
            value = cross_entropy(fast(arrays["inputs"][rows]), arrays["labels"][rows])
            differentiable.step((1 - momentum) * value, override={"lr": [rate]})
        outer = cross_entropy(fast(arrays["outer_inputs"]), arrays["outer_labels"])
        return torch.autograd.grad(outer, rates)[0]


def unroll_torchopt(net: Any, rates: Any, arrays: dict[str, Any], momentum: float) -> Any:
    """Hypergradient with TorchOpt's functional optimizer; see `unroll_higher` for the loss."""
    import torch
    import torchopt

    cross_entropy, call = torch.nn.functional.cross_entropy, torch.func.functional_call
    schedule = list(rates)  # cut once: indexing a tensor would cost a (T,) gradient at every step
    optimizer = torchopt.sgd(lr=lambda count: schedule[int(count)], momentum=momentum)
    params = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    state = optimizer.init(params)
    for rows in arrays["indices"]:
        value = cross_entropy(call(net, params, (arrays["inputs"][rows],)), arrays["labels"][rows])
        scaled = (1 - momentum) * value
        gradients = torch.autograd.grad(scaled, tuple(params.values()), create_graph=True)
        updates, state = optimizer.update(dict(zip(params, gradients)), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = cross_entropy(call(net, params, (arrays["outer_inputs"],)), arrays["outer_labels"])
    return torch.autograd.grad(outer, rates)[0]
