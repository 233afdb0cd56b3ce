"""The recipes of examples/image_classification: YAML that composes and runs, and its schedules."""

from __future__ import annotations

import functools
import io
import math
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from image_files import arrays, image_folder, npz

from examples.image_classification import DigitsDataModule, LitClassifier, TinyViT
from lightning_local import LocalCLI, LocalLearner, methods
from lightning_local.cli import main

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "image_classification"
RECIPES = sorted(p.stem for p in (FOLDER / "recipes").glob("*.yaml"))
METHODS = sorted(p.stem for p in (FOLDER / "methods").glob("*.yaml"))
SPLIT = FOLDER / "partitions" / "resnet110_16.yaml"
QUICK = [
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=1",
    "--data.batch_size=2",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """As a user in the root of a checkout; LightningCLI warns about pytest's own arguments."""
    monkeypatch.setattr(sys, "argv", ["lightning-local"])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def configs(recipe, method=None, *more):
    paths = [FOLDER / "recipes" / f"{recipe}.yaml"]
    if method:
        paths.append(FOLDER / "methods" / f"{method}.yaml")
    return [word for path in (*paths, *more) for word in ("--config", str(path))]


@functools.cache
def printed(recipe, method=None):
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["fit", *configs(recipe, method), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


# YAML


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prints_its_config(recipe):
    config = printed(recipe)
    assert config["model"]["init_args"]["method"]["class_path"].endswith(".EndToEnd")
    # What is printed and saved beside checkpoints can be run again.
    assert "Unable to serialize" not in str(config)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_top_of_a_recipe(method):
    alone, config = printed("cifar10_160"), printed("cifar10_160", method)
    given = yaml.safe_load((FOLDER / "methods" / f"{method}.yaml").read_text())
    given, got = given["model"]["init_args"], config["model"]["init_args"]
    assert got["method"]["class_path"] == given["method"]["class_path"]
    for name, value in given["method"].get("init_args", {}).items():
        assert got["method"]["init_args"][name] == value
    assert got["partition"] == given["partition"]
    assert got["module"] == alone["model"]["init_args"]["module"]
    assert {**config, "model": None} == {**alone, "model": None}


def test_every_preset_has_a_method_file():
    texts = [(FOLDER / "methods" / f"{name}.yaml").read_text() for name in METHODS]
    found = {re.search(r"lightning_local\.methods\.(\w+)", text)[1] for text in texts}
    assert found == set(methods.METHODS) - {"EndToEnd"}


def test_files_that_are_named_exist():
    for path in (*FOLDER.rglob("*.yaml"), FOLDER / "README.md"):
        for name in re.findall(r"examples/image_classification/[\w/]+\.yaml", path.read_text()):
            assert (ROOT / name).is_file(), f"{path.name} names {name}"


@pytest.mark.parametrize("method", ["infopro_svhn", "infopro_stl10", "greedy"])
def test_resnet_110_is_cut_into_16(method):
    more = (SPLIT,) if method == "greedy" else ()
    args = [*configs("svhn", method, *more), "--data.path=unread.npz"]
    points = LocalCLI(args=args, run=False).model.partition.split_points
    assert points == tuple(yaml.safe_load(SPLIT.read_text())["model"]["init_args"]["partition"])
    assert len(points) == 15


# Runs: recipe, method, what the command line changes, local modules, parameters of the network.
SMALL = ["--model.module.network.depth=14", "--model.partition=units"]
RUNS = [
    ("cifar10_160", None, [], 1, 466_906),
    ("cifar10_400", "auglocal", [], 14, 466_906),
    ("svhn", "infopro_svhn", [], 16, 1_730_714),
    ("stl10", "infopro_stl10", SMALL, 7, 175_258),
    *(
        (f"cifar10_{epochs}", name, SMALL, 7, 175_258)
        for epochs, name in (
            (160, "backlink"),
            (400, "dgl"),
            (160, "greedy"),
            (160, "infopro_cifar10"),
            (400, "predsim"),
        )
    ),
    ("imagenet_resnet50", None, [], 1, 25_557_032),
    ("imagenet_resnet101", "infopro_imagenet", [], 2, 44_549_160),
    ("imagenet_vit_s", "sgr", [], 13, 22_050_664),
]


def test_the_runs_cover_every_file():
    assert {run[0] for run in RUNS} == set(RECIPES)
    assert {run[1] for run in RUNS if run[1]} == set(METHODS)


@pytest.mark.parametrize(
    ("recipe", "method", "changes", "modules", "parameters"),
    RUNS,
    ids=[f"{recipe}-{method}" for recipe, method, *_ in RUNS],
)
def test_every_recipe_and_method_runs(recipe, method, changes, modules, parameters, tmp_path):
    if recipe.startswith("imagenet"):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
        source = ["--data.root", str(image_folder(tmp_path, pixels)), "--data.num_workers=0"]
    else:
        source = ["--data.path", npz(tmp_path, **arrays(96 if recipe == "stl10" else 32))]
    cli = LocalCLI(args=["fit", *configs(recipe, method), *QUICK, *source, *changes])
    assert cli.trainer.global_step == 1
    assert cli.model.num_modules == modules
    assert sum(p.numel() for p in cli.model.network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("digits_vit_auglocal", ("patches", "blocks.0", "blocks.1")),
        ("digits_vit_sgr", ("patches", "blocks.0", "blocks.1", "blocks.2")),
    ],
)
def test_the_digits_recipes_with_a_vit_run(name, points):
    cli = LocalCLI(args=["fit", "--config", str(FOLDER / f"{name}.yaml"), *QUICK])
    assert cli.model.split_points == points


# Schedules and the small transformer


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_cosine_and_its_warm_up(quiet):
    def train(**given):
        rates = Rates()
        module = LitClassifier(TinyViT(layers=1, width=8), lr=0.4, schedule="cosine", **given)
        trainer = L.Trainer(
            max_epochs=5, limit_train_batches=1, limit_val_batches=1, callbacks=rates, **quiet
        )
        trainer.fit(module, datamodule=DigitsDataModule())
        return rates.seen, trainer.optimizers[0]

    seen, optimizer = train()
    assert seen == pytest.approx([0.2 * (1 + math.cos(math.pi * e / 5)) for e in range(5)])
    assert type(optimizer) is torch.optim.SGD
    seen, optimizer = train(optimizer="adamw", warmup_epochs=2, weight_decay=0.3)
    top = [0.2 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert seen == pytest.approx([0.4 / 3, 0.8 / 3, *top])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam"}, "optimizer='adam' is unknown"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: pass 0 or more"),
        ({"warmup_epochs": 3}, "warmup_epochs=3 with schedule='none'"),
        ({"warmup_epochs": -1, "schedule": "cosine"}, "warmup_epochs=-1"),
    ],
)
def test_arguments_of_the_classifier_are_checked(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LitClassifier(TinyViT(), **given)


def test_the_small_transformer():
    network = TinyViT(image_size=12, patch_size=3, in_channels=3, width=16, layers=3, num_classes=7)
    images = torch.randn(5, 3, 12, 12)
    assert network(images).shape == (5, 7)
    learner = LocalLearner(LitClassifier(network, num_classes=7), "SGR")
    learner.build(images)
    assert learner.split_points == ("patches", "blocks.0", "blocks.1")
    # Without positions the tokens' mean does not know their order.
    torch.nn.init.zeros_(network.position)
    mixed = images.unfold(2, 3, 3)[:, :, [2, 0, 3, 1]].permute(0, 1, 2, 4, 3).flatten(2, 3)
    torch.testing.assert_close(network(mixed), network(images))
    for given, message in (
        ({"patch_size": 3}, "image_size=8 is no multiple of patch_size=3"),
        ({"width": 66}, "width=66 is no multiple of heads=4: pass 68"),
        ({"layers": 0}, "layers=0: pass at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TinyViT(**given)
