"""Clones of the user's optimizer and schedulers equal those built fresh for each module."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_local import optim

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, betas=(0.8, 0.95)),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, 0.01, momentum=0.5),
}
SCHEDULERS = {
    "none": None,
    "onecycle": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=12),
    "step": lambda o: schedulers.StepLR(o, 2),
    "lambda": lambda o: schedulers.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e]),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda e: 0.7),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)], o
    ),
}


def network():
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(3))


def groups(modules):
    parameters = [p for module in modules for p in module.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
    ]


def train(optimizer, scheduler, parameters, steps=6):
    generator = torch.Generator().manual_seed(3)
    rates = []
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_a_clone_trains_like_one_built_fresh(kind, schedule):
    cloned, fresh = network(), network()
    optimizer = OPTIMIZERS[kind](groups(cloned))
    configured = {"optimizer": optimizer}
    if SCHEDULERS[schedule]:
        configured["lr_scheduler"] = SCHEDULERS[schedule](optimizer)
    recipe = optim.read_recipe(configured)
    own = [list(module.parameters()) for module in cloned]
    for k, (clone, configs) in enumerate(optim.clone_per_module(recipe, own, [[], [], []])):
        reference = OPTIMIZERS[kind](groups([fresh[k]]))
        scheduler = SCHEDULERS[schedule](reference) if SCHEDULERS[schedule] else None
        a = train(clone, configs[0].scheduler if configs else None, own[k])
        b = train(reference, scheduler, list(fresh[k].parameters()))
        assert a == b
    for name, parameter in cloned.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name
    assert not optimizer.state


def test_heads_join_the_first_group_that_has_parameters_of_their_module():
    modules = network()
    norms = [p for module in modules for p in module[1].parameters()]
    weights = [p for module in list(modules)[1:] for p in module[0].parameters()]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": norms, "lr": 0.5}], 0.1)
    head = [nn.Parameter(torch.zeros(2))]
    own = [list(module.parameters()) for module in modules]
    clones = optim.clone_per_module((optimizer, []), own, [head, [], []])
    first, second = clones[0][0].param_groups
    assert first["params"] == []
    assert second["params"][-1] is head[0]
    assert second["lr"] == 0.5
    held = [p for clone, _ in clones for g in clone.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(weights) + len(norms) + 1


def test_named_parameters_keep_their_names():
    modules = network()
    optimizer = torch.optim.SGD(modules.named_parameters(), 0.1)
    own = [list(module.parameters()) for module in modules]
    head = nn.Parameter(torch.zeros(1))
    clones = optim.clone_per_module((optimizer, []), own, [[head], [], []])
    for k, (clone, _) in enumerate(clones):
        (group,) = clone.param_groups
        assert len(group["params"]) == len(group["param_names"])
        assert group["param_names"][0] == f"{k}.0.weight"


def test_what_lies_outside_the_module_goes_with_the_last_one():
    modules, outside = network(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*modules.parameters(), outside], 0.1)
    own = [list(module.parameters()) for module in modules]
    clones = optim.clone_per_module((optimizer, []), own, [[], [], []])
    assert clones[-1][0].param_groups[0]["params"][-1] is outside


def test_a_recipe_needs_one_optimizer():
    with pytest.raises(ValueError, match="returned None"):
        optim.read_recipe(None)
    parameters = [nn.Parameter(torch.zeros(1))]
    several = [torch.optim.SGD(copy.copy(parameters), 0.1) for _ in range(3)]
    with pytest.raises(ValueError, match="returned 3 optimizers"):
        optim.read_recipe(several)
