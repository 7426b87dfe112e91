"""Every optimizer against its formula, written once more; what is said where one is not there; warm-up."""

import io
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from fastadvisor.config import Config, OptimizerConfig
from fastadvisor.errors import UserError
from fastadvisor.runtime.environment import optional_parts
from fastadvisor.runtime.state import load_optimizer_state
from fastadvisor.training import optimizers
from fastadvisor.training.optimizers import build_optimizer, check_optimizer
from fastadvisor.training.schedule import learning_rate

ON_CPU = ["sgd", "nesterov", "adam", "adamw", "lars", "lamb"]
BETA1, BETA2 = 0.9, 0.999


def need(name):
    if name in optimizers.TIMM:
        pytest.importorskip("timm.optim")


def config_of(name, **settings):
    return OptimizerConfig(**{"optimizer": name, "lr": 0.1, "momentum": 0.8, "weight_decay": 0.02, **settings})


def sgd(w, g, state, step, lr, momentum, decay, nesterov=False):
    g = g + decay * w
    state["v"] = g if step == 1 else momentum * state["v"] + g
    return w - lr * (g + momentum * state["v"] if nesterov else state["v"])


def adam_direction(g, state, step, eps):
    state["m"] = BETA1 * state.get("m", 0) + (1 - BETA1) * g
    state["v"] = BETA2 * state.get("v", 0) + (1 - BETA2) * g * g
    return state["m"] / (1 - BETA1**step) / ((state["v"] / (1 - BETA2**step)).sqrt() + eps)


def lars(w, g, state, step, lr, momentum, decay):
    # You et al. 2017, algorithm 1, with the rate outside the momentum, as in timm (the same while the rate is constant).
    if decay and w.norm() and g.norm():
        trust = 0.001 * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
        g = trust * (g + decay * w)
    state["v"] = g if step == 1 else momentum * state["v"] + g
    return w - lr * state["v"]


def lamb(w, g, state, step, lr, decay):
    # You et al. 2019, algorithm 2, phi the identity; without decay no trust ratio, in timm as in apex.
    update = adam_direction(g, state, step, 1e-6) + decay * w
    trust = w.norm() / update.norm() if decay and w.norm() and update.norm() else 1
    return w - lr * trust * update


def plain_step(name, w, g, state, step, lr, momentum, decay):
    match name.removeprefix("apex-"):
        case "sgd" | "nesterov":
            return sgd(w, g, state, step, lr, momentum, decay, name == "nesterov")
        case "adam" if name == "adam":
            return w - lr * adam_direction(g + decay * w, state, step, 1e-8)
        case "adam" | "adamw":
            return w * (1 - lr * decay) - lr * adam_direction(g, state, step, 1e-8)
        case "lars":
            return lars(w, g, state, step, lr, momentum, decay)
        case "lamb":
            return lamb(w, g, state, step, lr, decay)


def compare(name, settings, dtype=torch.float64, device="cpu", rtol=1e-12):
    """Hold three steps, with two rates, weights of zeros and a parameter without gradient, against the formulas."""
    config = config_of(name, **settings)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, 3, 3), (37,), (5, 4), (2,))]
    weights[1].zero_()
    parameters = [nn.Parameter(w.to(device, dtype, copy=True)) for w in weights]
    rates = [config.lr, config.lr, config.lr / 4, config.lr]
    groups = [{"params": parameters[:2] + parameters[3:], "lr": rates[0]}, {"params": parameters[2:3], "lr": rates[2]}]
    optimizer = build_optimizer(config, groups)
    states = [{} for _ in weights]
    for step in range(1, 4):
        gradients = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights[:3]]
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient.to(device, dtype, copy=True)  # some steps overwrite it
        optimizer.step()
        for at, gradient in enumerate(gradients):
            momentum, decay = config.momentum, config.weight_decay
            weights[at] = plain_step(name, weights[at], gradient, states[at], step, rates[at], momentum, decay)
    for parameter, w in zip(parameters, weights, strict=True):
        torch.testing.assert_close(parameter.detach().cpu().double(), w, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0}], ids=["decay", "no decay"])
@pytest.mark.parametrize("name", ON_CPU)
def test_steps_are_those_of_the_formula(name, settings):
    need(name)
    compare(name, settings)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_steps_without_momentum(name):
    need(name)
    compare(name, {"momentum": 0.0})


def test_nesterov_wants_momentum():
    with pytest.raises(UserError, match="nesterov needs --momentum above 0, or take --optimizer sgd"):
        check_optimizer(Config(optimizer="nesterov", momentum=0.0))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_float32_is_near_the_formula(name):
    compare(name, {}, torch.float32, rtol=1e-5)


@pytest.mark.parametrize("name", list(optimizers.APEX))
def test_apex_takes_the_same_steps(name):
    if not {part: active for part, active, _ in optional_parts()}["apex"] or find_spec("amp_C") is None:
        pytest.skip("no NVIDIA apex here")
    compare(name, {}, torch.float32, "cuda", rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_laid_out_otherwise_than_their_parameters(name):
    w, g = torch.randn(2, 8, 4, 3, 3, dtype=torch.float64)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(w.clone(memory_format=memory_format))
        optimizer = build_optimizer(config_of(name), [{"params": [parameter], "lr": 0.1}])
        for _ in range(2):
            parameter.grad = g.clone()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ON_CPU)
def test_an_optimizer_goes_on_where_it_was_saved(name):
    need(name)

    def fresh():
        parameters = [nn.Parameter(torch.linspace(-1, 1, 40).view(8, 5)), nn.Parameter(torch.ones(3))]
        groups = [{"params": [p], "lr": 0.1, "lr_scale": 1.0} for p in parameters]
        return parameters, build_optimizer(config_of(name), groups)

    def run(parameters, optimizer, steps):
        for step in steps:
            for parameter in parameters:
                parameter.grad = torch.cos(parameter.detach() + step)
            optimizer.step()

    whole, optimizer = fresh()
    run(whole, optimizer, range(5))
    first, optimizer = fresh()
    run(first, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in first]}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    for parameter, saved in zip(second, state["weights"], strict=True):
        parameter.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    run(second, optimizer, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize("name", list(optimizers.TIMM))
def test_without_timm_one_learns_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=rf"--optimizer {name} is timm's: pip install 'fastadvisor\[timm\]', or take"):
        check_optimizer(Config(optimizer=name))


@pytest.mark.parametrize(("name", "instead"), [("apex-sgd", "sgd"), ("apex-adam", "adamw"), ("apex-lamb", "lamb")])
def test_without_apex_one_learns_what_to_take_instead(name, instead, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")  # PyPI's: no optimizers in it
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"NVIDIA apex and a CUDA device .*unrelated one.*NVIDIA/apex.* --optimizer {instead},"):
        check_optimizer(Config(optimizer=name))
    with pytest.raises(UserError, match=f"CUDA device: take --optimizer {instead}, or drop --device cpu"):
        check_optimizer(Config(optimizer=name, device="cpu"))
    monkeypatch.setattr(optimizers, "optional_parts", lambda: [("apex", True, "0.1")])
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"without its CUDA extensions.* --optimizer {instead}"):
        check_optimizer(Config(optimizer=name))


@pytest.mark.parametrize(("name", "kind"), [("apex-sgd", "FusedSGD"), ("apex-adam", "FusedAdam"), ("apex-lamb", "FusedLAMB")])
def test_apex_gets_its_settings(name, kind, monkeypatch):
    class Recorder(torch.optim.Optimizer):
        def __init__(self, groups, **settings):
            super().__init__(groups, settings)

    fake = SimpleNamespace(optimizers=SimpleNamespace(**{kind: Recorder}))
    monkeypatch.setitem(sys.modules, "apex", fake)
    monkeypatch.setattr(optimizers, "optional_parts", lambda: [("apex", True, "0.1")])
    monkeypatch.setattr(optimizers, "find_spec", lambda name: object())
    check_optimizer(Config(optimizer=name))
    built = build_optimizer(config_of(name), [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}])
    assert isinstance(built, Recorder)
    own = {"apex-sgd": {"momentum": 0.8}, "apex-adam": {}, "apex-lamb": {"max_grad_norm": float("inf")}}
    assert built.defaults == {"lr": 0.1, "weight_decay": 0.02, **own[name]}


def test_torchs_are_always_there():
    for name in optimizers.TORCH:
        check_optimizer(Config(optimizer=name))


@pytest.mark.parametrize("warmup", [2, 5, 20])
def test_warm_up_is_torchs_linear_one(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    config = OptimizerConfig(lr=0.3, schedule="constant")
    for step in range(25):
        assert learning_rate(config, step, 25, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert learning_rate(config, 0, 25, 0) == learning_rate(config, 0, 25, 1) == 0.3


@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_state_is_loaded_into_the_implementation_that_is_here(before, after):
    """As where a run is watched in another way, or goes on on another machine."""

    def stepped(fused):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([parameter], lr=0.1, fused=fused)
        parameter.grad = torch.ones(3)
        optimizer.step()
        return parameter, optimizer

    _, old = stepped(before)
    parameter, optimizer = stepped(after)
    load_optimizer_state(optimizer, old.state_dict())
    assert optimizer.param_groups[0]["fused"] == after
    assert float(optimizer.state[parameter]["step"]) == 1
    if after:
        optimizer.found_inf = torch.ones(())
        kept = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter, kept)
