"""Early exit: every sample gets the output of the first head that is sure of it."""

import lightning as L
import pytest
import torch
from networks import Cnn, Tagger, Vit
from settings import Lit, batches, make
from torch import nn
from torch.utils.data import DataLoader

from lightning_local import EarlyExit, LocalLearner, methods


class Predicting(Lit):
    """Has the steps that exit early."""

    def test_step(self, batch, batch_idx):
        self.log("seen", self.net(batch[0]).sum())

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def learner_of(network=Cnn, method="Greedy", quiet=None, steps=20, **options):
    """A learner that has seen a few batches, so that heads differ in how sure they are."""
    L.seed_everything(0, verbose=False)
    module = Predicting(make(network, torch.float32).net, lr=0.1)
    learner = LocalLearner(module, method, **options)
    if quiet is not None:
        loader = DataLoader(batches(network, steps, dtype=torch.float32), batch_size=None)
        L.Trainer(**quiet, max_epochs=1).fit(learner, loader)
        for module in learner.local_modules:
            for parameter in module.parameters():
                parameter.data *= 3  # heads that are sure of something
    return learner


def data(network=Cnn, size=40):
    return DataLoader(batches(network, 2, size, torch.float32), batch_size=None)


def predictions(learner, quiet, *callbacks, network=Cnn):
    trainer = L.Trainer(**quiet, callbacks=list(callbacks))
    return trainer.predict(learner, data(network))


@torch.no_grad()
def by_hand(learner, x, threshold):
    """Outputs, and the local module that each sample leaves at, sample by sample."""
    modules = learner.eval().modules_in_order()
    rows, exits = [], []
    for sample in x:
        values = (sample[None],)
        for k, module in enumerate(modules):
            out = module(*values)
            logits = out if module.head is None else module.predict(out[0])
            if module.head is None or logits.softmax(-1).max() > threshold:
                rows.append(logits[0])
                exits.append(k)
                break
            values = out
    return torch.stack(rows), exits


@torch.no_grad()
def first_confidence(learner, network=Cnn, share=0.5):
    """A threshold that this share of the samples stays below at the first head."""
    first = learner.eval().modules_in_order()[0]
    sure = [first.predict(first(x)[0]).softmax(-1).amax(-1) for x, _ in data(network)]
    return float(torch.cat(sure).quantile(share)) - 1e-4


@pytest.mark.parametrize("network", [Cnn, Vit])
def test_threshold_1_is_the_whole_network(network, quiet):
    learner = learner_of(network, quiet=quiet)
    callback = EarlyExit(1)
    plain = predictions(learner, quiet, network=network)
    found = predictions(learner, quiet, callback, network=network)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a, b)
    assert callback.counts == [0] * (learner.num_modules - 1) + [80]
    assert callback.mean_units == len(learner.cutting.units)
    assert "forward" not in vars(learner.network)


@pytest.mark.parametrize("network", [Cnn, Vit])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_each_sample_leaves_at_the_first_sure_head(network, share, quiet):
    learner = learner_of(network, quiet=quiet)
    threshold = first_confidence(learner, network, share)
    callback = EarlyExit(threshold)
    found = predictions(learner, quiet, callback, network=network)
    exits = []
    for (x, _), output in zip(data(network), found, strict=True):
        expected, taken = by_hand(learner, x, threshold)
        exits += taken
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # other batch sizes
    assert callback.counts == [exits.count(k) for k in range(learner.num_modules)]
    units = [last + 1 for last in learner.cutting.last_unit]
    assert callback.mean_units == pytest.approx(sum(units[k] for k in exits) / len(exits))
    assert len(set(exits)) > 1


def test_a_test_shows_what_thresholds_give(quiet, tmp_path, capsys):
    learner = learner_of(quiet=quiet)
    threshold = first_confidence(learner)
    callback = EarlyExit(threshold)
    logging = {**quiet, "logger": L.pytorch.loggers.CSVLogger(tmp_path)}
    trainer = L.Trainer(**logging, callbacks=[callback])
    (result,) = trainer.test(learner, data())
    outputs, targets, exits = [], [], []
    for x, y in data():
        rows, taken = by_hand(learner, x, threshold)
        outputs.append(rows)
        targets.append(y)
        exits += taken
    assert result["local/mean_units"] == pytest.approx(callback.mean_units)
    assert callback.counts == [exits.count(k) for k in range(learner.num_modules)]
    # What the step saw: the outputs of this threshold.
    wanted = sum(rows.sum() for rows in outputs) / len(outputs)
    assert result["seen"] == pytest.approx(float(wanted), rel=1e-4)
    point = next(point for point in callback.curve if point.threshold == threshold)
    right = torch.cat(outputs).argmax(1) == torch.cat(targets)
    assert point.accuracy == pytest.approx(float(right.double().mean()))
    assert point.mean_units == pytest.approx(callback.mean_units)
    units = [point.mean_units for point in callback.curve]
    assert units == sorted(units)
    modules = learner.modules_in_order()
    whole = sum(module.body_flops for module in modules)
    heads = sum(module.head_flops for module in modules)
    assert callback.curve[-1].flops == pytest.approx(1 + heads / whole)
    spent = sum(
        sum(module.body_flops + module.head_flops for module in modules[: k + 1]) for k in exits
    )
    assert point.flops == pytest.approx(spent / len(exits) / whole)
    assert "mean units" in capsys.readouterr().out
    assert (tmp_path / "lightning_logs/version_0/early_exit.png").stat().st_size > 5000


def test_a_checkpoint_is_enough_to_predict(quiet, tmp_path):
    trained = learner_of(quiet=quiet)
    expected = predictions(trained, quiet, EarlyExit(0.4))
    trainer = L.Trainer(**quiet, max_epochs=1)
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = learner_of()
    trainer = L.Trainer(**quiet, callbacks=[EarlyExit(0.4)])
    found = trainer.predict(fresh, data(), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_heads_that_predict_nothing_are_no_exits(quiet):
    learner = learner_of(method=methods.PredSim(), quiet=quiet, steps=2)
    learner.local_modules[0].objective.predicts = False
    callback = EarlyExit(0)
    predictions(learner, quiet, callback)
    assert callback.counts[:2] == [0, 80]


def test_a_confidence_of_ones_own(quiet):
    learner = learner_of(quiet=quiet)
    callback = EarlyExit(0.5, confidence=lambda logits: torch.ones(len(logits)))
    predictions(learner, quiet, callback)
    assert callback.counts[0] == 80


def test_an_exception_leaves_the_network_as_it_was(quiet):
    learner = learner_of(quiet=quiet)
    with pytest.raises(ZeroDivisionError):
        predictions(learner, quiet, EarlyExit(0.5, confidence=lambda logits: 1 / 0))
    assert "forward" not in vars(learner.network)


class OneOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 1))

    def forward(self, x):
        return self.layers(x)


def test_what_can_not_leave_early_is_refused(quiet):
    for threshold in (-0.1, 1.1, "high", None):
        with pytest.raises(ValueError, match="threshold.*0 to 1"):
            EarlyExit(threshold)
    with pytest.raises(TypeError, match="EarlyExit is for a LocalLearner"):
        predictions(Predicting(make(Cnn, torch.float32).net), quiet, EarlyExit())
    with pytest.raises(ValueError, match="heads that predict"):
        predictions(learner_of(partition=1), quiet, EarlyExit())
    with pytest.raises(ValueError, match="one prediction per sample"):
        predictions(learner_of(Tagger), quiet, EarlyExit(), network=Tagger)
    learner = LocalLearner(Predicting(OneOutput()), "Greedy", criterion=nn.MSELoss())
    batch = DataLoader([(torch.randn(4, 7), torch.randn(4, 1))], batch_size=None)
    with pytest.raises(ValueError, match="pass confidence"):
        L.Trainer(**quiet, callbacks=[EarlyExit()]).predict(learner, batch)
    learner = learner_of(quiet=quiet)
    learner.links.alone = False
    with pytest.raises(ValueError, match="one device"):
        EarlyExit().on_predict_start(None, learner)
