"""Every optimiser by name: its options, its own defaults, and an exact resume."""

import io
import sys
import types

import pytest
import torch
from torch import nn

from dlb_fast.train.config import OptimConfig, RunConfig, ScheduleConfig, from_dict, override
from dlb_fast.train.flags import parse_flags
from dlb_fast.train.methods import resolve
from dlb_fast.train.optim import find_optimizer, make_optimizer, make_scheduler, resolve_optimizer

OF_TORCH = sorted(
    name.lower()
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)
UNFIT = ("lbfgs", "sparseadam")


def parts(name, **fields):
    torch.manual_seed(0)
    biased = name != "muon"  # which takes matrices only
    model = nn.Sequential(nn.Linear(5, 7, bias=biased), nn.ReLU(), nn.Linear(7, 3, bias=biased))
    optimizer = make_optimizer(model, OptimConfig(name, **fields))
    return model, optimizer, make_scheduler(optimizer, ScheduleConfig(), total_steps=12, steps_per_epoch=4)


def train(model, optimizer, scheduler, steps):
    for step in steps:
        images = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(images), torch.arange(6) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize("name", [name for name in OF_TORCH if name not in UNFIT])
def test_a_resume_of_any_optimiser_of_torch_is_exact(name):
    whole, first, second = parts(name), parts(name), parts(name)
    before = [p.clone() for p in whole[0].parameters()]
    train(*whole, range(8))
    train(*first, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    for part, state in zip(second, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(4, 8))
    for start, one, other in zip(before, whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other) and not torch.equal(start, one)


def test_the_numbers_of_an_optimiser_are_its_own():
    """torch's defaults, except those of SGD, which are the official code's."""
    sgd = resolve_optimizer(OptimConfig())
    assert (sgd.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay, sgd.betas) == (0.05, 0.9, True, 5e-4, None)
    adamw = resolve_optimizer(OptimConfig("AdamW"))
    assert (adamw.lr, adamw.betas, adamw.weight_decay, adamw.momentum) == (1e-3, (0.9, 0.999), 1e-2, None)
    rmsprop = resolve_optimizer(OptimConfig("rmsprop", momentum=0.5))
    assert (rmsprop.lr, rmsprop.momentum, rmsprop.weight_decay) == (0.01, 0.5, 0.0)


def test_another_optimiser_starts_from_its_own_numbers():
    """A rate of SGD, from a preset, would be none of AdamW."""
    sgd = override(RunConfig(), lr=0.1, weight_decay=1e-4, decay_norm_and_bias=False)
    flags = ["--optimizer", "adamw", "--weight-decay", "0.3"]
    for made in (
        override(sgd, optimizer="adamw", weight_decay=0.3),
        from_dict({"optim": {"optimizer": "adamw", "weight_decay": 0.3}}, sgd),
        parse_flags(RunConfig, sgd, flags, "t"),
    ):
        assert made.optim == OptimConfig("adamw", weight_decay=0.3, decay_norm_and_bias=False)
        assert resolve(made).optim.lr == 1e-3
    assert parse_flags(RunConfig, sgd, ["--optimizer", "sgd", "--momentum", "0.5"], "t").optim.lr == 0.1


def test_options_reach_the_optimiser():
    _, optimizer, _ = parts("adamw", optimizer_options=("eps=1e-4", "amsgrad=true"), betas=(0.5, 0.6))
    (group,) = optimizer.param_groups
    assert (group["eps"], group["amsgrad"], group["betas"]) == (1e-4, True, (0.5, 0.6))
    _, other, _ = parts("adamw", optimizer_options=("eps=1e-3",))
    other.load_state_dict(optimizer.state_dict())  # a resumed run has its own numbers
    (group,) = other.param_groups
    assert (group["eps"], group["amsgrad"], group["betas"]) == (1e-3, False, (0.9, 0.999))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "lbfgs"}, "'lbfgs' evaluates the loss several times per step .a closure.*choose another"),
        ({"optimizer": "sparseadam"}, "'sparseadam' cannot take .*does not support dense gradients"),
        ({"optimizer": "adanw"}, "unknown optimizer 'adanw'; did you mean adamw"),
        ({"optimizer": "adamw", "betas": (0.9,)}, r"betas: optimizer 'adamw' has 2, such as \(0.9, 0.999\), got"),
        ({"optimizer": "nadam", "momentum": 0.9}, "momentum=0.9 has no effect with optimizer=nadam, only with an opt"),
        ({"betas": (0.9, 0.99)}, "betas=.* has no effect with optimizer=sgd, only with an optimizer that has betas"),
        ({"optimizer": "rprop", "decay_norm_and_bias": False}, "decay_norm_and_bias=False has no effect"),
        ({"optimizer_options": ("epsilon=1",), "optimizer": "adam"}, "adam has no 'epsilon'; did you mean eps"),
        ({"optimizer_options": ("zzz=1",)}, "sgd has no 'zzz'; it has dampening, differentiable, foreach, fused, max"),
        ({"optimizer_options": ("momentum=0.5",)}, "momentum has a field of its own; use momentum"),
        ({"optimizer_options": ("eps",)}, "optimizer_options must be distinct options NAME=VALUE"),
        ({"optimizer_options": ("eps=small",), "optimizer": "adam"}, "optimizer 'adam': "),
        ({"optimizer_options": ("dampening=0.5",)}, "optimizer 'sgd': Nesterov momentum requires"),
        ({"momentum": 0.0}, "nesterov must be False when momentum is 0"),
    ],
)
def test_what_an_optimiser_cannot_do_is_refused(fields, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    find_optimizer.cache_clear()
    with pytest.raises(ValueError, match=f"config: .*{message}"):
        resolve(override(RunConfig(), **fields))


def test_a_network_that_the_optimiser_refuses():
    with pytest.raises(ValueError, match="optimizer 'muon' refuses this network: .*2D.*choose another"):
        make_optimizer(nn.Linear(2, 2), OptimConfig("muon"))


def test_the_names_of_timm(monkeypatch):
    """Plain where torch has no such name, `timm:` for timm's own; timm's defaults and its default momentum hold."""

    class Lion(torch.optim.SGD):
        def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, momentum=0.0):
            super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    fake = types.ModuleType("timm.optim")
    fake.list_optimizers = lambda: ["lion", "sgd"]
    fake.get_optimizer_class = lambda name, bind_defaults: Lion
    fake.get_optimizer_info = lambda name: types.SimpleNamespace(defaults={"lr": 3e-4}, has_momentum=name == "sgd")
    fake.create_optimizer_v2 = lambda model, momentum=0.9: None
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.optim", fake)
    find_optimizer.cache_clear()
    lion, sgd = resolve_optimizer(OptimConfig("lion")), resolve_optimizer(OptimConfig("timm:sgd"))
    assert (lion.lr, lion.betas, lion.momentum, sgd.momentum) == (3e-4, (0.9, 0.99), 0.0, 0.9)
    assert resolve_optimizer(OptimConfig("sgd")).lr == 0.05
    with pytest.raises(ValueError, match="unknown optimizer 'lyon'; did you mean lion?"):
        resolve_optimizer(OptimConfig("lyon"))
    find_optimizer.cache_clear()
