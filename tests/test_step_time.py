"""benchmarks/step_time: the loops written by hand train what the learner trains."""

import argparse

import lightning as L
import pytest
import torch

from benchmarks.step_time import main
from benchmarks.step_time.authors import check
from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
OPTIONS = argparse.Namespace(network="resnet14", batch=4, steps=4, rounds=1, authors=None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(main.NETWORKS, "resnet14", (lambda: CifarResNet(14), 32, 10))


@pytest.mark.parametrize("method", ["end to end", "Greedy", "AugLocal, d=2", "BackLink"])
def test_by_hand_is_the_learner_bit_for_bit(method, quiet):
    x, y = main._batch(OPTIONS)
    networks = []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(CifarResNet(14))
    L.seed_everything(0, verbose=False)
    loop = main.loop_by_hand(method, networks[0], OPTIONS)
    for _ in range(3):
        loop.step(x, y)
    L.seed_everything(0, verbose=False)
    learner = LocalLearner(LitClassifier(networks[1]), main.METHODS[method]())
    learner.build(x[:2])
    batches = torch.utils.data.DataLoader([(x, y)] * 3, batch_size=None)
    L.Trainer(max_epochs=1, **quiet).fit(learner, batches)
    before = CifarResNet(14).state_dict()
    for name, tensor in networks[0].state_dict().items():
        assert torch.equal(tensor, networks[1].state_dict()[name]), name
        assert "weight" not in name or not torch.equal(tensor, before[name])


def test_rows_have_steps_operations_and_ratios(quiet):
    options = argparse.Namespace(
        **{**vars(OPTIONS), "methods": ["Greedy"], "options": ["recompute"]}
    )
    rows = main.measure(options)
    assert [row["loop"] for row in rows] == ["by hand", "LocalLearner", "LocalLearner, recompute"]
    assert rows[0]["by hand, x"] == 1
    assert rows[2]["operations"] > rows[1]["operations"] > rows[0]["operations"] > 100


def test_a_checkout_is_looked_at_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no networks/resnet.py"):
        check(tmp_path, "resnet32")
    with pytest.raises(ValueError, match="has resnet32, resnet110; got --network vit_b_16"):
        check(tmp_path, "vit_b_16")
