"""Where local modules live, and which tensors and states go with them: without processes."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from simple import Lit, Net
from torch import nn

from lightning_local import LocalLearner, holdings
from lightning_local.dividing import additive, divide
from lightning_local.placement import (
    check_placement,
    check_shared,
    extra_states,
    stages_of,
    tensors_per_module,
)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [[1.0] * 5, [1, 9, 1, 1, 1], [5, 4, 3, 2, 1], [0, 0, 0, 0, 7]])
def test_blocks_are_the_best_there_are(costs, stages):
    found = divide(additive(costs), stages)
    assert [k for block in found for k in block] == list(range(5))
    assert all(len(block) > 0 for block in found)

    def largest(cuts):
        edges = [0, *cuts, 5]
        return max(sum(costs[a:b]) for a, b in zip(edges, edges[1:], strict=False))

    best = min(largest(cuts) for cuts in combinations(range(1, 5), stages - 1))
    assert max(sum(costs[k] for k in block) for block in found) == best


def test_blocks_even_out_what_the_largest_leaves_open():
    assert divide(additive([10, 1, 1, 1, 1]), 3) == [range(1), range(1, 3), range(3, 5)]


def learner_of(network=None, partition="units", method="Greedy"):
    learner = LocalLearner(Lit(network), method, partition)
    learner.build(torch.zeros(2, 1, 6, 6))
    return learner


def test_stages_of_a_learner():
    learner = learner_of()
    assert learner.num_modules == 4
    assert stages_of(learner, None, 1) == [range(4)]
    assert stages_of(learner, None, 4) == [range(k, k + 1) for k in range(4)]
    assert stages_of(learner, (0, 1, 1, 2), 3) == [range(1), range(1, 3), range(3, 4)]
    with pytest.raises(ValueError, match=r"5 stages for 4 local modules: pass .*num_stages=4"):
        stages_of(learner, None, 5)
    for placement, stages in (((0, 1, 1), 2), ((0, 0, 1, 1), 3)):
        with pytest.raises(ValueError, match="give one stage per local module, from 0 to"):
            stages_of(learner, placement, stages)


def test_a_placement_is_kept_as_it_is():
    assert check_placement(None) is None
    assert check_placement([0, 0, 1, 2]) == (0, 0, 1, 2)


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "PredSim"])
def test_every_tensor_belongs_to_one_local_module(method):
    learner = learner_of(method=method)
    learner.module.register_buffer("weights", torch.ones(4))
    found = tensors_per_module(learner)
    ids = [id(t) for tensors in found for t in tensors.values()]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(t) for t in (*learner.parameters(), *learner.buffers())}
    for k, module in enumerate(learner.modules_in_order()):
        mine = {id(t) for t in found[k].values()}
        assert {id(p) for p in (*module.body.parameters(), *module.parameters())} <= mine
    assert "module.weights" in found[-1]


def test_a_shared_norm_without_parameters_is_refused_on_two_stages():
    network = Net()
    norm = torch.nn.BatchNorm2d(6, affine=False)
    network.blocks[0].bn = network.blocks[2].bn = norm
    learner = learner_of(network)
    check_shared(learner, [range(4)])
    with pytest.raises(ValueError, match=r"bn.\w+` changes in .* a layer of its own"):
        check_shared(learner, [range(2), range(2, 4)])


class Counted(torch.nn.Identity):
    def get_extra_state(self):
        return 1


def test_extra_states_belong_to_their_local_module():
    network = Net()
    network.blocks[1].add_module("counted", Counted())
    network.fc.register_forward_pre_hook(lambda *args: None)
    learner = learner_of(network)
    learner.module.add_module("outside", Counted())
    names = [[name for name, _ in found] for found in extra_states(learner)]
    inside = "module.network.blocks.1.counted"
    assert sorted(name for found in names for name in found) == [inside, "module.outside"]
    assert "module.outside" in names[-1]


class OfItsWeights(nn.Module):
    """Later layers ask the first weight for its device, and make tensors like it."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(36, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x) + torch.ones(8, device=next(self.parameters()).device)
        return self.fc(x + torch.zeros_like(self.blocks[0].bias))


def test_weights_that_are_asked_for_their_device_are_on_it(monkeypatch):
    learner = learner_of(OfItsWeights())
    stages, names = stages_of(learner, None, 4), {id(t): n for n, t in learner.named_parameters()}
    monkeypatch.setattr(holdings, "_move", lambda module, needed, device: found.append(needed))
    found, there = [], []
    for stage in range(4):
        place = SimpleNamespace(stage=stage)
        holdings.Holdings(learner, place, stages, None).to_device(torch.device("cuda"))
        there.append({names[t] for t in found[-1] if "network" in names.get(t, "")})
    first, second, third, last = there
    assert first == {f"module.network.stem.{name}" for name in ("weight", "bias")}
    asked = {"module.network.stem.weight"}
    assert second == asked | {f"module.network.blocks.0.{n}" for n in ("weight", "bias")}
    # Glue behind the last block is part of its local module.
    asked.add("module.network.blocks.0.bias")
    assert third == asked | {f"module.network.blocks.1.{n}" for n in ("weight", "bias")}
    assert last == {f"module.network.fc.{n}" for n in ("weight", "bias")}
