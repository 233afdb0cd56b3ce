"""Plans keep what they promise."""

import itertools
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import simple
import torch
import yaml
from live import batch_of, learner_of, measured
from networks import PreAct, ResNet
from settings import Lit, make
from torch import nn
from torch.utils.data import DataLoader

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, Partition, heads, methods, plan_partition
from lightning_local.cli import main
from lightning_local.dividing import additive, divide
from lightning_local.ranges import size
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Setting

ROOT = Path(__file__).parent.parent


def test_divisions_are_the_best_ones():
    generator = np.random.default_rng(0)
    for n, count in ((1, 1), (5, 2), (6, 3), (7, 7), (8, 4)):
        costs = generator.random((n, n)) + additive(generator.random(n))
        found = divide(costs, count)
        assert [k for block in found for k in block] == list(range(n))

        def largest(ends, costs=costs):
            return max(costs[i, j - 1] for i, j in itertools.pairwise(ends))

        every = itertools.combinations(range(1, n), count - 1)
        best = min(largest((0, *ends, n)) for ends in every)
        assert max(costs[block[0], block[-1]] for block in found) == best


@pytest.mark.parametrize("balance", ["memory", "time"])
def test_a_balanced_partition_evens_out(balance):
    """A pre-activation network halves its maps on the way, so equal numbers of units don't."""
    shares = {}
    batch = batch_of(PreAct)
    for kind in ("units", balance):
        learner = learner_of(PreAct, "Greedy", Partition(3, balance=kind))
        learner.planned_batch_size = 64
        learner.build(batch[0][:2])
        modules = learner.modules_in_order()
        if balance == "time":
            shares[kind] = max(module.body_flops + module.head_flops for module in modules)
        else:
            shares[kind] = rehearse(learner, modules, learner.method, Setting(batch, 64)).peak
    assert shares[balance] <= shares["units"]


def test_a_plan_is_the_fewest_local_modules_within_the_budget(quiet):
    batch = batch_of(samples=64)
    learner = learner_of()
    free = plan_partition(learner, batch)
    assert free.rungs[0].local == free.end_to_end
    limit = (free.end_to_end + min(rung.local for rung in free.rungs)) // 2
    plan = plan_partition(learner, batch, memory=limit, reserve=0)
    assert plan.choice.fits
    assert plan.choice.peak <= limit
    fewer = [rung for rung in plan.rungs if rung.parts <= len(plan.choice.points)]
    assert all(rung.local > limit for rung in fewer)
    given = yaml.safe_load(plan.yaml())
    other = learner_of(ResNet, "Greedy", given["partition"])
    assert measured(other, batch, quiet) <= limit
    assert other.split_points == plan.choice.points
    for words in ("budget", "+ checkpointing", "the fewest local modules", "Paste below"):
        assert words in str(plan)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_tight_budget_recomputes(quiet):
    """Where heads are large, their activations and the body's need not be alive together."""
    batch = torch.randn(128, 3, 8, 8), torch.zeros(128).long()

    def made(**options):
        L.seed_everything(0, verbose=False)
        module = LitClassifier(CifarResNet(8))
        return LocalLearner(module, methods.AugLocal(depth=1), **options)

    least = min(rung.local for rung in plan_partition(made(), batch).rungs)
    plan = plan_partition(made(), batch, memory=0.99 * least, reserve=0)
    assert plan.choice.recompute
    assert plan.choice.fits
    found = measured(made(**yaml.safe_load(plan.yaml())), batch, quiet)
    assert found == pytest.approx(plan.choice.peak, rel=0.02)
    assert found < least


@pytest.mark.parametrize(("method", "blocks"), [("Greedy", 1), ("Greedy", 4), ("BackLink", 3)])
def test_only_what_takes_less_memory_is_recomputed(method, blocks):
    """A small local module's peak rises with it, and then nothing comes closer."""
    batch = torch.randn(2, 1, 16, 16), torch.zeros(2).long()
    learner = LocalLearner(simple.Lit(simple.Net(blocks)), method)
    least = min(rung.local for rung in plan_partition(learner, batch, batch_size=64).rungs)

    def peaks(points, recompute):
        made = LocalLearner(learner.module, method, list(points), recompute=recompute)
        made.build(batch[0])
        modules = made.modules_in_order()
        found = rehearse(made, modules, made.method, Setting(batch, 64)).modules
        return [module.peak for module in found]

    for share in (0.95, 0.7, 0.1):
        limit = int(share * least)
        plan = plan_partition(learner, batch, batch_size=64, memory=limit, reserve=0)
        choice = plan.choice
        without, found = peaks(choice.points, "none"), peaks(choice.points, choice.recompute)
        assert max(found) == choice.peak <= least
        assert all(found[k] < without[k] for k in choice.recompute)
        assert choice.fits == (choice.peak <= limit)
        assert ("recomputing" in choice.reason) == bool(choice.recompute)


def test_end_to_end_may_come_closest():
    """Heads that are larger than the network."""
    net = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3))
    batch = torch.randn(4, 7), torch.zeros(4).long()
    learner = LocalLearner(Lit(net), methods.Greedy(head=heads.MLP(hidden=5)))
    choice = plan_partition(learner, batch, memory=100).choice
    assert choice.points == ()
    assert choice.reason.startswith("Nothing fits with this method: end to end comes closest.")


def test_a_balanced_cut_is_kept_in_a_checkpoint(tmp_path, quiet):
    path = tmp_path / "a.ckpt"
    batches = DataLoader([batch_of()], batch_size=None)
    learner = learner_of(PreAct, "Greedy", Partition(2, balance="memory"))
    trainer = L.Trainer(**quiet, max_epochs=1)
    trainer.fit(learner, batches)
    trainer.save_checkpoint(path)
    other = learner_of(PreAct, "Greedy", Partition(3, balance="memory"))
    with pytest.warns(UserWarning, match="are used"):
        L.Trainer(**quiet, max_epochs=2).fit(other, batches, ckpt_path=path)
    assert other.split_points == learner.split_points


class Tied(nn.Module):
    """Its second and third layer are one."""

    def __init__(self, ends=(1, 2)):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(7, 7) for _ in range(5)))
        first, second = ends
        self.layers[second].weight = self.layers[first].weight

    def forward(self, x):
        return self.layers(x)


def test_tied_weights_stay_together():
    x = torch.randn(8, 7)
    batch = x, torch.zeros(8).long()
    plan = plan_partition(LocalLearner(Lit(Tied()), "Greedy"), batch)
    assert plan.rungs[-1].points == ("layers.0", "layers.2", "layers.3")
    learner = LocalLearner(Lit(Tied()), "Greedy", Partition(4, balance="time"))
    learner.build(x)
    assert learner.split_points == ("layers.0", "layers.2", "layers.3")
    with pytest.raises(ValueError, match=r"layers\.4\.weight` is used on both sides"):
        plan_partition(LocalLearner(Lit(Tied((0, 4))), "Greedy"), batch)


def test_stages_get_even_shares_of_time(tmp_path):
    learner = learner_of(PreAct)
    plan = plan_partition(learner, batch_of(PreAct), stages=2, measure="cpu")
    assert len(plan.choice.stages) == len(plan.choice.modules) == 2
    assert plan.measured
    assert sum(part.share for part in plan.choice.modules) == pytest.approx(1)
    assert all(0 < peak < plan.choice.peak for peak in plan.choice.stages)
    tight = plan_partition(learner, batch_of(PreAct), stages=2, memory="1kB")
    assert not tight.choice.fits
    assert tight.choice.stages == plan_partition(learner, batch_of(PreAct), stages=2).choice.stages
    assert plan.save_picture(tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "'8GiB'"),
        ({"memory": -1}, "number of bytes"),
        ({"stages": 1}, "2 or more"),
        ({"stages": 99}, "at most"),
        ({"batch_size": 0}, "1 or more"),
        ({"measure": "gpu"}, "is no device of this machine"),
        ({"measure": "meta"}, "computes nothing"),
        ({"reserve": 2}, "0 to 0.9"),
    ],
)
def test_what_a_plan_can_not_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_partition(learner_of(), batch_of(), **options)


def test_a_plan_needs_a_learner_a_method_and_an_example():
    with pytest.raises(TypeError, match="LocalLearner around"):
        plan_partition(make(ResNet, torch.float32), batch_of())
    with pytest.raises(ValueError, match="no local modules to plan"):
        plan_partition(learner_of(ResNet, "EndToEnd"), batch_of())
    with pytest.raises(ValueError, match="example_input_array"):
        plan_partition(learner_of())
    with pytest.raises(ValueError, match="needs num_modules"):
        Partition(balance="memory")
    assert [size("", "", text) for text in ("1kB", "2 KiB", "1.5MiB", 7)] == [
        1000,
        2048,
        1572864,
        7,
    ]


def test_the_command(capsys, monkeypatch, tmp_path):
    """A configuration of `fit` with a Trainer that this machine can't make."""
    monkeypatch.chdir(ROOT)
    picture = tmp_path / "plan.png"
    config = str(ROOT / "examples/image_classification/digits_parallel.yaml")
    options = ["--memory", "1MB", "--batch_size", "32", "--picture", str(picture)]
    options += ["--trainer.accelerator", "gpu", "--model.init_args.method", "Greedy"]
    options += ["--model.init_args.module.init_args.network.init_args.depth", "8"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", config, *options])
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "Nothing fits" in text
    assert "each unit as a local module" in text
    assert "partition:\n- " in text
    assert picture.exists()
