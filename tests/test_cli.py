"""Command line and YAML: ours, and a LightningCLI of somebody else's."""

import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_local import LocalCLI, methods
from lightning_local.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "image_classification"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """As a user in the root of a checkout; LightningCLI warns about pytest's own arguments."""
    monkeypatch.setattr(sys, "argv", ["lightning-local"])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_prints_its_config(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "lightning_local.LocalLearner"


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_preset_goes_through_the_command_line(name, capsys):
    with pytest.raises(SystemExit):
        main(
            ["fit", "--config", str(EXAMPLES / "digits.yaml"), "--print_config"]
            + ["--model.method", name]
        )
    printed = yaml.safe_load(capsys.readouterr().out)
    method = printed["model"]["init_args"]["method"]
    assert name in (method if isinstance(method, str) else method["class_path"])


QUICK = [
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=null",
    "--trainer.fast_dev_run=1",
]


@pytest.mark.parametrize("cli", ["ours", "foreign"])
def test_the_digits_recipe_runs(cli):
    args = ["fit", "--config", str(EXAMPLES / "digits.yaml"), *QUICK]
    if cli == "ours":
        main(args)
    else:
        import lightning as L

        LightningCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            save_config_callback=None,
        )


def test_a_free_combination_and_a_partition_in_yaml():
    cli = LocalCLI(
        args=[
            *("fit", "--config", str(EXAMPLES / "digits.yaml"), *QUICK),
            "--model.init_args.method=lightning_local.methods.AugLocal",
            "--model.init_args.method.init_args.depth=1",
            "--model.init_args.method.init_args.coupling=lightning_local.couplings.BackwardLink",
            "--model.init_args.method.init_args.coupling.init_args.weight=0.5",
            "--model.init_args.partition=3",
        ]
    )
    learner = cli.model
    assert learner.method.head.depth == 1
    assert learner.method.coupling.weight == 0.5
    assert learner.num_modules == 3


def test_validate_and_test_load_the_file_that_fit_wrote(tmp_path):
    options = ["--config", str(EXAMPLES / "digits.yaml"), *QUICK[:-1]]
    main(
        ["fit", *options, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2"]
        + ["--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    )
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    main(
        ["validate", *options, f"--ckpt_path={checkpoint}"]
        + [f"--trainer.default_root_dir={tmp_path}"]
    )


def test_misspelt_names_get_a_suggestion(capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(EXAMPLES / "digits.yaml"), "--model.method", "Auglocl"])
    text = capsys.readouterr().err + str(stop.value)
    assert "Did you mean 'AugLocal'" in text


def test_the_working_directory_is_importable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert str(tmp_path) in sys.path
