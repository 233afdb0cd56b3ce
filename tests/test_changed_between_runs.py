"""What is changed between two runs of a learner is seen, and what a command line links is kept."""

import inspect
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from simple import CLASSES, Block, Lit, Net, data, fit, greedy
from torch import nn

from lightning_local import LocalLearner, Partition, methods
from lightning_local.cli import LocalCLI
from lightning_local.cli_errors import options_of

if TYPE_CHECKING:
    from decimal import Decimal


def network(learner):
    learner.module.network = Net()


def layer(learner):
    learner.network.blocks.append(Block(6))


def method(learner):
    learner.method = methods.AugLocal(depth=1)


def partition(learner):
    learner.partition = Partition(num_modules=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (network, "another network:"),
        (layer, r"another network, without `blocks.3.bn`"),
        (method, "another method:"),
        (partition, "another partition:"),
    ],
)
def test_local_modules_of_something_else_are_refused(change, words, quiet):
    learner = greedy(Lit())
    fit(learner, quiet, epochs=1)
    change(learner)
    with pytest.raises(ValueError, match=f"was cut before with {words}.*new LocalLearner"):
        fit(learner, quiet, epochs=1)


def test_a_layer_may_be_replaced(quiet):
    learner = greedy(Lit())
    fit(learner, quiet, epochs=1)
    learner.network.fc = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, CLASSES))
    before = learner.network.fc[0].weight.clone()
    fit(learner, quiet, epochs=1)
    assert not torch.equal(learner.network.fc[0].weight, before)


def test_a_learner_keeps_its_module():
    with pytest.raises(ValueError, match="wrap the other one in a new LocalLearner"):
        greedy(Lit()).module = Lit()


class Doubles(Lit):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch if isinstance(batch, torch.Tensor) else batch


class Batches(L.LightningDataModule):
    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data(shuffle=False)


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`:UserWarning")
@pytest.mark.parametrize("given", [data, Batches])
def test_after_a_run_both_find_the_modules_own_hooks(given, quiet):
    learner = greedy(Doubles())
    trainer = L.Trainer(max_epochs=1, **quiet)
    options = {"datamodule": given()}
    if given is data:
        options = {"train_dataloaders": data(), "val_dataloaders": data(shuffle=False)}
    trainer.fit(learner, **options)
    for each in (learner.module, learner):
        assert each._apply_batch_transfer_handler(torch.ones(1)) == 2
    trainer.fit_loop.max_epochs = 2
    trainer.fit(learner, **options)
    assert trainer.current_epoch == 2


class Linked(Lit):
    def __init__(self, width: int = 6, scale: float = 1.0):
        super().__init__(Net(width=width))
        self.save_hyperparameters()


class Derived(Linked):
    def __init__(self, extra: "Decimal | None" = None, **kwargs):
        super().__init__(**kwargs)


class Mine(LocalLearner):
    pass


class Scaled(L.LightningDataModule):
    def __init__(self, scale: float = 3.0):
        super().__init__()
        self.scale = scale


class Scales(LightningCLI):
    """Links an option of the data to one of the module inside."""

    def add_arguments_to_parser(self, parser):
        source = "data.scale" if self.when == "instantiate" else "data.init_args.scale"
        target = "model.init_args.module.init_args.scale"
        parser.link_arguments(source, target, apply_on=self.when)


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])


@pytest.mark.usefixtures("argv")
@pytest.mark.parametrize("learner", ["lightning_local.LocalLearner", f"{__name__}.Mine"])
@pytest.mark.parametrize(
    ("base", "when"),
    [(LocalCLI, "parse"), (LocalCLI, "instantiate"), (LightningCLI, "instantiate")],
)
def test_linked_options_are_hyper_parameters(when, learner, base):
    kind = type("Linking", (Scales, base), {"when": when})
    args = [f"--model={learner}", f"--model.module={__name__}.Linked", "--model.method=Greedy"]
    args += [f"--data={__name__}.Scaled", "--trainer.accelerator=cpu"]
    cli = kind(args=args, run=False, save_config_callback=None)
    assert cli.model.module.hparams["scale"] == 3.0
    assert cli.model.module.hparams["width"] == 6
    assert "module" not in cli.model.module.hparams


def test_inherited_options_and_those_of_type_checkers_are_there():
    assert list(options_of(Derived)) == ["extra", "width", "scale"]
    assert options_of(Derived)["width"].annotation is int
    made = LocalCLI.wrap(Derived)
    assert {"width", "scale", "extra", "method"} <= set(inspect.signature(made).parameters)
    assert isinstance(made(width=8).module.network.fc, nn.Linear)


@pytest.mark.usefixtures("argv")
def test_a_cli_takes_its_arguments_by_position():
    args = ["--model.method=Greedy", "--trainer.accelerator=cpu"]
    cli = LocalCLI(LocalCLI.wrap(Linked), None, None, run=False, args=args)
    assert isinstance(cli.model, LocalLearner)
