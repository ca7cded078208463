"""What is exported trains as `hypergrad.train` does, in optax and in PyTorch."""

import inspect
import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import exports, schedules
from hypergrad.program import Optimizer

STEPS, MORE = 9, 3  # of the schedules, and after their end
RANGES = {
    "momentum": (0.5, 0.95),
    "decay": (0.5, 0.95),
    "rho": (0.5, 0.95),
    "beta": (0.5, 0.95),
    "b1": (0.5, 0.95),
    "b2": (0.8, 0.99),
    "b3": (0.9, 0.99),
    "eps": (1e-3, 1e-1),
    "eps_root": (1e-3, 1e-2),
    "weight_decay": (0.1, 1.0),
    "alpha": (1.0, 3.0),
    "learning_rate": (0.01, 0.05),
}
IN_OPTAX = {
    "momentum": hg.momentum(),
    "heavy_ball": hg.heavy_ball(),
    "adamw": hg.adamw(),
    "lion": hg.lion(),
    "signum": hg.signum(),
    "sgd": hg.sgd(),
    "nesterov": hg.nesterov(),
    "adam": hg.adam(),
    "radam": hg.radam(),
    "adabelief": hg.adabelief(),
    "yogi": hg.yogi(),
    "ademamix": hg.ademamix(),
    "lamb": hg.lamb(),
    "novograd": hg.novograd(),
    "muon": hg.muon(),
    "adagrad": hg.adagrad(),
    "adagrad_momentum": hg.adagrad_momentum(),
    "adadelta": hg.adadelta(),
    "sm3": hg.sm3(),
    **{f"rmsprop{k}": hg.rmsprop(*options) for k, options in enumerate([(), (True,), (False, False)])},
    **{
        f"rmsprop_momentum{k}": hg.rmsprop_momentum(*o) for k, o in enumerate([(), (True,), (False, False)])
    },
}
IN_TORCH = {
    "momentum": hg.momentum(),
    "adamw": hg.adamw(),
    "heavy_ball": hg.heavy_ball(),
    "nesterov": hg.nesterov(),
    "sgd": hg.sgd(),
    "adam": hg.adam(),
    "amsgrad": hg.amsgrad(),
    "adadelta": hg.adadelta(),
    **{f"rmsprop{k}": hg.rmsprop(k == 1, eps_in_sqrt=False) for k in range(2)},
    **{f"rmsprop_momentum{k}": hg.rmsprop_momentum(k == 1, eps_in_sqrt=False) for k in range(2)},
}


def start() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"first": {"weights": (3, 2), "bias": (2,)}, "last": {"weights": (2, 2), "bias": (2,)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def loss(w: Any, meta: Any, t: Any) -> Any:
    """With gradients of all sizes and signs."""
    return sum(jnp.sum(jnp.cos(3 * x + t) + 0.3 * x**2) for x in jax.tree.leaves(w))


def slope(x: Any, t: int) -> Any:
    return 0.6 * x - 3 * np.sin(3 * x + t)


def drawn(optimizer: Any, scheduled: bool = True) -> dict[str, Any]:
    """Every hyperparameter, as a schedule or a number that reversal does not round."""
    rng = np.random.default_rng(1)
    size = STEPS if scheduled else None
    return {name: np.round(rng.uniform(*RANGES[name], size) * 2**20) / 2**20 for name in optimizer.hypers}


def held(hypers: Any) -> Any:
    """Schedules whose last value is held for some more steps."""
    return jax.tree.map(lambda x: x if np.ndim(x) == 0 else np.append(x, [x[-1]] * MORE), hypers)


def by_us(optimizer: Any, hypers: Any, params: Any) -> Any:
    options: dict[str, Any] = {"steps": STEPS + MORE, "optimizer": optimizer, "adjoint": hg.Stored()}
    return hg.train(loss, params, hypers, **options).params


def by_source_of_optax(source: str, params: Any) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    transformation = names["optimizer"]

    def step(carry: Any, t: Any) -> Any:
        w, state = carry
        updates, state = transformation.update(jax.grad(loss)(w, None, t), state, w)
        return (optax.apply_updates(w, updates), state), None

    end, _ = jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(STEPS + MORE))
    return end[0]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected
    )


def cut(optimizer: Any) -> Any:
    """Parameters that an optimizer takes: only matrices for Muon."""
    params = start()
    return jax.tree.map(
        jnp.asarray, {"m": params["first"]["weights"]} if "muon" in optimizer.name else params
    )


@pytest.mark.quick("True-momentum", "False-momentum", "True-adamw")
@pytest.mark.parametrize("name", IN_OPTAX)
@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.usefixtures("x64")
def test_optax_trains_alike(name: str, scheduled: bool) -> None:
    """Constants, and schedules of everything at once, which are held after their end."""
    optimizer = IN_OPTAX[name]
    hypers, params = drawn(optimizer, scheduled), cut(optimizer)
    source = exports.optax_code(optimizer, hypers, STEPS)
    assert "hypergrad." not in source  # nothing of ours is needed
    found = by_source_of_optax(source, params)
    # Reversal rounds 1 - αλ to a multiple of 2^-32.
    tolerance = 1e-8 if "weight_decay" in hypers else 1e-11
    assert_same(found, by_us(optimizer, held(hypers), params), tolerance)


# A stand-in for PyTorch, written from the updates in its documentation.


class Tensor(np.ndarray):
    def mul_(self, factor: float) -> None:
        self *= factor


class Parameter:
    def __init__(self, value: Any):
        self.value, self.grad = np.array(value), None


class Documented:
    """An optimizer of PyTorch: groups of parameters, hooks, and an update by the documentation."""

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Any, **arguments: Any):
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [self.defaults | arguments | group for group in groups]
        self.state: dict[int, dict[str, Any]] = {}
        self.hooks: list[Any] = []

    def register_step_pre_hook(self, hook: Any) -> None:
        self.hooks.append(hook)

    def step(self) -> None:
        for hook in self.hooks:
            hook(self, (), {})
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state.setdefault(id(p), {"step": 0})
                    state["step"] += 1
                    self.update(p, np.asarray(p.grad), SimpleNamespace(**group), state)


class SGD(Documented):
    defaults: ClassVar[dict[str, Any]] = {"lr": 1e-3, "momentum": 0, "dampening": 0, "nesterov": False}

    def update(self, p: Any, g: Any, h: Any, s: Any) -> None:
        if h.momentum != 0:
            if "buffer" in s:
                s["buffer"] = h.momentum * s["buffer"] + (1 - h.dampening) * g
            else:
                s["buffer"] = g
            g = g + h.momentum * s["buffer"] if h.nesterov else s["buffer"]
        p.value = p.value - h.lr * g


class Adam(Documented):
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0,
        "amsgrad": False,
    }

    def update(self, p: Any, g: Any, h: Any, s: Any) -> None:
        (b1, b2), n = h.betas, s["step"]
        assert h.weight_decay == 0 or isinstance(self, AdamW)
        p.value = p.value - h.lr * h.weight_decay * p.value
        s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
        s["largest"] = np.maximum(s.get("largest", 0), s["v"])
        square = s["largest"] if h.amsgrad else s["v"]
        p.value = p.value - h.lr * (s["m"] / (1 - b1**n)) / (np.sqrt(square / (1 - b2**n)) + h.eps)


class AdamW(Adam):
    defaults: ClassVar[dict[str, Any]] = Adam.defaults | {"weight_decay": 1e-2}


class Adadelta(Documented):
    defaults: ClassVar[dict[str, Any]] = {"lr": 1.0, "rho": 0.9, "eps": 1e-6}

    def update(self, p: Any, g: Any, h: Any, s: Any) -> None:
        s["v"] = h.rho * s.get("v", 0) + (1 - h.rho) * g**2
        change = np.sqrt(s.get("u", 0) + h.eps) / np.sqrt(s["v"] + h.eps) * g
        s["u"] = h.rho * s.get("u", 0) + (1 - h.rho) * change**2
        p.value = p.value - h.lr * change


class RMSprop(Documented):
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "momentum": 0,
        "centered": False,
    }

    def update(self, p: Any, g: Any, h: Any, s: Any) -> None:
        s["v"] = h.alpha * s.get("v", 0) + (1 - h.alpha) * g**2
        s["mean"] = h.alpha * s.get("mean", 0) + (1 - h.alpha) * g
        variance = s["v"] - s["mean"] ** 2 if h.centered else s["v"]
        step = g / (np.sqrt(variance) + h.eps)
        if h.momentum > 0:
            step = s["buffer"] = h.momentum * s.get("buffer", 0) + step
        p.value = p.value - h.lr * step


class LambdaLR:
    def __init__(self, optimizer: Any, functions: Any):
        self.groups, self.count = optimizer.param_groups, 0
        self.functions = functions if isinstance(functions, list) else [functions] * len(self.groups)
        self.base = [group["lr"] for group in self.groups]
        self._set()

    def step(self) -> None:
        self.count += 1
        self._set()

    def _set(self) -> None:
        for group, base, function in zip(self.groups, self.base, self.functions):
            group["lr"] = base * function(self.count)


def clip_grad_value_(parameters: Any, bound: float) -> None:
    for p in parameters:
        p.grad = np.clip(p.grad, -bound, bound)


def documented() -> ModuleType:
    torch = ModuleType("torch")
    kinds = {kind.__name__: kind for kind in (SGD, Adam, AdamW, Adadelta, RMSprop)}
    torch.optim = SimpleNamespace(**kinds, lr_scheduler=SimpleNamespace(LambdaLR=LambdaLR))  # type: ignore[attr-defined]
    torch.nn = SimpleNamespace(utils=SimpleNamespace(clip_grad_value_=clip_grad_value_))  # type: ignore[attr-defined]
    torch.sqrt = np.sqrt  # type: ignore[attr-defined]
    return torch


@pytest.fixture(params=["documented", "installed"])
def torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PyTorch, or what its documentation says about it."""
    if request.param == "installed":
        yield pytest.importorskip("torch")
    else:
        monkeypatch.setitem(sys.modules, "torch", documented())
        yield None


def by_source_of_torch(torch: Any, source: str, params: Any) -> dict[str, Any]:
    """The parameters at the end, by name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    values = {jax.tree_util.keystr(k, simple=True, separator="."): np.array(x) for k, x in flat}
    if torch is None:
        named = {name: Parameter(x) for name, x in values.items()}
    else:
        named = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in values.items()}
    names: dict[str, Any] = {}
    exec(source, names)
    optimizer, scheduler = names["make_optimizer"](named.items())
    for t in range(STEPS + MORE):
        for p in named.values():
            if torch is None:
                p.grad = slope(p.value, t).view(Tensor)
            else:
                p.grad = torch.tensor(slope(p.detach().numpy(), t))
        optimizer.step()
        scheduler.step()
    return {name: p.value if torch is None else p.detach().numpy() for name, p in named.items()}


def by_name(params: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(x) for k, x in flat}


QUICK = [f"{kind}-True-{name}" for kind in ("documented", "installed") for name in ("momentum", "adamw")]


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", IN_TORCH)
@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.usefixtures("x64")
def test_torch_trains_alike(torch: Any, name: str, scheduled: bool) -> None:
    """Constants, and schedules of everything at once, which are held after their end."""
    optimizer = IN_TORCH[name]
    hypers = drawn(optimizer, scheduled)
    found = by_source_of_torch(torch, exports.torch_code(optimizer, hypers, STEPS), start())
    expected = by_us(optimizer, held(hypers), jax.tree.map(jnp.asarray, start()))
    assert_same(found, by_name(expected), 1e-8 if "weight_decay" in hypers else 1e-11)


# Parts of the parameters.


def in_groups() -> tuple[Any, dict[str, Any]]:
    """Clipping, a rate for each layer, one of them a schedule, and decay of matrices only."""
    rates = {"first": 0.03125, "last": np.linspace(0.5, 0.25, STEPS)}
    decay = jax.tree.map(lambda x: 0.25 * (x.ndim == 2), start())
    hypers = {"learning_rate": rates, "weight_decay": decay, "b1": 0.75, "max_norm": 2.0}
    return hg.clip_by_global_norm(hg.adamw()), hypers


def in_parts() -> tuple[Any, dict[str, Any]]:
    """A part that is not trained, whose gradient counts in the norm, and two with their own momentum."""
    kinds = {"slow": hg.momentum(), "fast": hg.momentum(), "fixed": hg.frozen()}
    labels = {"first": {"weights": "slow", "bias": "fixed"}, "last": "fast"}
    hypers = {
        "slow.learning_rate": np.linspace(0.1, 0.05, STEPS),
        "slow.momentum": np.linspace(64, 96, STEPS) / 128,
        "fast.learning_rate": schedules.WarmupCosine(0.0, 0.25, 2.5, STEPS - 1.0, 0.125),
        "fast.momentum": 0.5,
        "max_norm": np.append(np.linspace(3.0, 2.0, STEPS - 1), 2.0),
        "max_delta": 1.5,
    }
    return hg.clip_by_global_norm(hg.clip(hg.partition(kinds, labels))), hypers


@pytest.mark.parametrize("case", [in_groups, in_parts])
@pytest.mark.usefixtures("x64")
def test_groups_train_alike(torch: Any, case: Any) -> None:
    """In optax and in PyTorch."""
    optimizer, hypers = case()
    params = jax.tree.map(jnp.asarray, start())
    expected = by_us(optimizer, held(schedules.values(hypers, STEPS)), params)
    found = by_source_of_torch(torch, exports.torch_code(optimizer, hypers, STEPS, params), params)
    assert_same(found, by_name(expected), 1e-8)
    if torch is None:
        assert_same(
            by_source_of_optax(exports.optax_code(optimizer, hypers, STEPS, params), params), expected, 1e-8
        )


def test_torch_is_told_which_names_do_not_fit(torch: Any) -> None:
    source = exports.torch_code(*in_groups(), STEPS, start())
    with pytest.raises(
        ValueError, match=r"names in one of model and GROUPS only: \['last.bias', 'other'\]"
    ):
        by_source_of_torch(
            torch, source, {"first": start()["first"], "last": {"weights": np.ones(2)}, "other": 1.0}
        )


# Numbers as they are written.

CLOSED = [
    schedules.WarmupCosine(0.125, 0.5, 2.5, 7.25, 0.25),
    schedules.WarmupCosine(0.125, 0.5, 0.0, 7.25, 0.25),
    schedules.WarmupCosine(0.125, 0.5, 3.0, 3.0, 0.25),
    schedules.OneCycle(9.0, 0.75, 0.3, 0.8),
    schedules.Triangular(0.25, 0.5, 5.5),
    schedules.PiecewiseLinear(np.array([0.5, 3.0, 3.0, 6.0]), np.array([0.25, 0.5, 0.125, 0.75])),
]


@pytest.mark.quick("WarmupCosine0", "PiecewiseLinear")
@pytest.mark.parametrize("schedule", CLOSED, ids=lambda each: type(each).__name__)
@pytest.mark.usefixtures("x64")
def test_schedules_keep_their_form(monkeypatch: pytest.MonkeyPatch, schedule: Any) -> None:
    """Also after the end of the run, and times a number."""
    monkeypatch.setitem(sys.modules, "torch", documented())
    hypers = {"learning_rate": schedule, "momentum": 0.75}
    names: dict[str, Any] = {}
    exec(exports.optax_code(hg.momentum(), hypers, STEPS), names)
    exec(exports.torch_code(hg.momentum(), hypers, STEPS), names)
    assert not {"learning_rate_values", "lr_values"} & set(names)
    counts = jnp.arange(2 * STEPS)
    expected = 0.25 * jax.vmap(schedule)(counts)
    np.testing.assert_allclose(jax.vmap(names["learning_rate"])(counts), expected, rtol=1e-10)
    np.testing.assert_allclose([names["lr"](int(count)) for count in counts], expected, rtol=1e-10)


def test_numbers_are_as_short_as_they_can_be() -> None:
    """In their own precision; and a schedule that never changes is a number."""
    hypers = {"learning_rate": jnp.float32(0.1), "momentum": jnp.full(STEPS, 0.9, jnp.float32)}
    assert "optax.sgd(learning_rate=0.01, momentum=0.9)" in exports.optax_code(hg.momentum(), hypers, STEPS)
    assert "optax.sgd(learning_rate=0.1, momentum=0.9)" in exports.optax_code(
        hg.heavy_ball(), hypers, STEPS
    )


def test_plain_optax_is_what_the_source_builds() -> None:
    hypers = {"learning_rate": jnp.array([0.5, 0.25]), "momentum": 0.75}
    transformation = exports.plain_optax(hg.momentum(), hypers, 2)
    w, gradient = jnp.ones(2), jnp.ones(2)
    state, velocity = transformation.init(w), 0.0
    for rate in (0.125, 0.0625, 0.0625):
        updates, state = transformation.update(gradient, state, w)
        velocity = 0.75 * velocity + 1
        np.testing.assert_allclose(updates, -rate * velocity, rtol=1e-6)


def test_json_names_its_convention() -> None:
    rate, gamma = np.linspace(0.5, 0.25, STEPS), np.linspace(0.5, 0.9, STEPS)
    hypers = {"learning_rate": rate, "momentum": gamma}
    ours = json.loads(exports.as_json(hg.momentum(), hypers, STEPS))
    assert ours["convention"] == "hypergrad" and ours["steps"] == STEPS
    (group,) = ours["groups"]
    assert group["paths"] is None and group["hypers"] == {k: x.tolist() for k, x in hypers.items()}
    assert "v <- γ v - (1 - γ) g;  w <- w + α v" in group["update"]
    theirs = json.loads(exports.as_json(hg.momentum(), hypers, STEPS, convention="torch"))
    assert theirs["convention"] == "torch" and theirs["constructor"] == "torch.optim.SGD"
    arguments = theirs["groups"][0]["arguments"]
    np.testing.assert_allclose(arguments["lr"], rate * (1 - gamma), rtol=1e-14)
    expected = [gamma[0], *gamma[1:] * (1 - gamma[:-1]) / (1 - gamma[1:]), gamma[-1]]
    np.testing.assert_allclose(arguments["momentum"], expected, rtol=1e-14)


def test_json_takes_every_optimizer() -> None:
    """Those of a user, those of optax, averages, parts, and numbers for every weight."""
    own = Optimizer("own", hg.heavy_ball().moves, hypers={"rate": None})
    rates = np.full((STEPS, 2), 0.5) * np.arange(1, STEPS + 1)[:, None]
    told = json.loads(exports.as_json(own, {"rate": rates}, STEPS))["groups"][0]
    assert told["hypers"]["rate"] == rates.tolist() and told["update"] == ""
    for optimizer in (hg.from_optax(optax.adan, {"learning_rate": None}), hg.with_average(hg.adam())):
        group = json.loads(exports.as_json(optimizer, {"learning_rate": 0.5}, STEPS))["groups"][0]
        assert group["hypers"]["learning_rate"] == 0.5
    optimizer, hypers = in_parts()
    groups = json.loads(exports.as_json(optimizer, hypers, STEPS, start()))["groups"]
    assert [group["optimizer"] for group in groups] == ["frozen()", "momentum()", "momentum()"]
    assert groups[2]["paths"] == ["last.bias", "last.weights"] and groups[2]["hypers"]["momentum"] == 0.5
    theirs = json.loads(exports.as_json(optimizer, hypers, STEPS, start(), convention="torch"))
    assert theirs["frozen"] == ["first.bias"] and theirs["clipping"][1] == {
        "clipping": "clip",
        "bound": 1.5,
    }


# Refusals.

RATE = {"learning_rate": 0.5}
ZERO = {"learning_rate": np.array([0.5, 0.0]), "momentum": 0.5}
REFUSED: dict[str, tuple[Any, str]] = {
    "elsewhere otherwise": (
        lambda: exports.optax_code(hg.nadam(), RATE, 2),
        r"optax_code\(nadam\(\), hypers, steps=2\): optax has no optimizer that moves as nadam.*as_optax",
    ),
    "not in PyTorch": (
        lambda: exports.torch_code(hg.lion(), RATE, 2),
        r"PyTorch has no optimizer that moves as lion\(\) does\. hypergrad.exports.as_json has the numbers",
    ),
    "a name that is taken": (
        lambda: exports.optax_code(Optimizer("adam()", lambda h, t: [], hypers=RATE), RATE, 2),
        r"optax has no optimizer that moves as adam\(\) does",
    ),
    "an average": (
        lambda: exports.torch_code(hg.with_average(hg.adam()), RATE, 2),
        "an average of the parameters is no part of an optimizer",
    ),
    "two kinds": (
        lambda: exports.torch_code(
            hg.partition({"a": hg.adam(), "b": hg.momentum()}, {"first": "a", "last": "b"}),
            {"a.learning_rate": 0.5, "b.learning_rate": 0.5},
            2,
            start(),
        ),
        r"parts of this one are of \['Adam', 'SGD'\]; export each part by itself",
    ),
    "parts without parameters": (
        lambda: exports.optax_code(in_parts()[0], in_parts()[1], STEPS),
        "the optimizer depends on the leaf; pass params= too",
    ),
    "layers without parameters": (
        lambda: exports.optax_code(hg.adam(), {"learning_rate": {"a": 0.5}}, 2),
        r"hypers\['learning_rate'\] depends on the leaf; pass params= too",
    ),
    "another tree": (
        lambda: exports.optax_code(hg.adam(), {"learning_rate": {"a": 0.5}}, 2, start()),
        r"hypers\['learning_rate'\] must be one number or array, or a tree of them that is a prefix",
    ),
    "one path twice": (
        lambda: exports.optax_code(hg.adam(), RATE, 2, {"a.b": np.ones(2), "a": {"b": np.ones(2)}}),
        "two leaves of params have one path",
    ),
    "numbers for every weight": (
        lambda: exports.optax_code(hg.adam(), {"learning_rate": np.full((2, 3), 0.5)}, 2),
        r"hypers\['learning_rate'\] differs within a leaf.*as_json",
    ),
    "bounds by leaf": (
        lambda: exports.optax_code(
            hg.clip(hg.adam()), {**RATE, "max_delta": {"first": 1.0, "last": 2.0}}, 2, start()
        ),
        "max_delta depends on the leaf, and elsewhere one bound clips all gradients",
    ),
    "another length": (
        lambda: exports.as_json(hg.adam(), {"learning_rate": np.ones(3)}, 2),
        r"has shape \[3\]; a schedule's leading axis is the step and must have length steps=2",
    ),
    "no number": (
        lambda: exports.as_json(hg.adam(), {"learning_rate": np.nan}, 2),
        "numbers in it that are not finite",
    ),
    "traced": (
        lambda: jax.jit(lambda x: exports.as_json(hg.adam(), {"learning_rate": x}, 2))(0.5),
        r"hypers\['learning_rate'\] is traced; export what was learned outside jax.jit",
    ),
    "no momentum": (
        lambda: exports.torch_code(hg.heavy_ball(), {**RATE, "momentum": np.array([0.0, 0.5])}, 2),
        "momentum is 0 at some steps, at which PyTorch leaves the velocity out",
    ),
    "no rate": (
        lambda: exports.torch_code(hg.rmsprop_momentum(eps_in_sqrt=False), ZERO, 2),
        "learning_rate is 0 at some steps, and PyTorch multiplies the whole velocity by the rate",
    ),
    "no convention": (
        lambda: exports.as_json(hg.adam(), RATE, 2, convention="keras"),
        r"as_json\(convention='keras'\): it must be one of \['hypergrad', 'torch'\]",
    ),
    "no steps": (lambda: exports.as_json(hg.adam(), RATE, 0), "steps must be a whole number of at least 1"),
    "no such name": (lambda: exports.as_json(hg.adam(), {**RATE, "beta": 1}, 2), r"unknown: \['beta'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"as_json\(adam, hypers, steps\): the first argument is the optimizer"
    ):
        exports.as_json(hg.adam, RATE, 2)  # type: ignore[arg-type]


# What `docs/optimizers.md` lists, in names or defaults.
OTHERWISE = {
    "sm3": {"eps"},
    "signum": {"weight_decay"},
    "adafactor": {"momentum", "weight_decay_rate"},
    "adadelta": {"learning_rate"},
    "prodigy": {"b1", "b2"},
    "dadapt_adamw": {"b1", "b2"},
}


OF_OTHERS = {
    "sophia",
    "partition",
    "clip",
    "clip_by_global_norm",
}  # which take other optimizers or functions


@pytest.mark.parametrize("where", [optax, optax.contrib], ids=["optax", "contrib"])
def test_names_and_defaults_are_those_of_optax(where: Any) -> None:
    seen = 0
    for name in sorted(set(hg.optimizers.__all__) & set(dir(where)) - OF_OTHERS):
        ours = getattr(hg, name)()
        theirs = inspect.signature(getattr(where, name)).parameters
        for key, default in ours.hypers.items():
            if key not in OTHERWISE.get(name, ()):
                expected = theirs[key].default
                assert default == (None if expected is inspect.Parameter.empty else expected), (name, key)
                seen += 1
    assert seen > 10
