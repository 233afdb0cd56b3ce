"""Command line and YAML: ours, and a LightningCLI of somebody else's."""

import functools
import re
import sys
import traceback
from argparse import ArgumentError
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_local import LocalCLI, arguments, heads, methods
from lightning_local.cli import main

HERE, STEM = Path(__file__), Path(__file__).stem
ROOT = HERE.parent.parent
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


def test_classes_in_yaml_arrive_as_what_is_called():
    given = {
        "criterion": "torch.nn.MSELoss",
        "optimizer": "torch.optim.SGD",
        "lr_scheduler": "{class_path: StepLR, init_args: {step_size: 2}}",
    }
    options = [f"--model.init_args.{key}={value}" for key, value in given.items()]
    args = ["--config", str(EXAMPLES / "digits.yaml"), *QUICK, *options]
    learner = LocalCLI(args=args, run=False).model
    assert isinstance(learner._criterion[0], torch.nn.MSELoss)
    optimizer = learner.optimizer_callable(learner.network.parameters())
    assert learner.lr_scheduler_callable(optimizer).step_size == 2


def test_misspelt_names_get_a_suggestion(capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        main(["fit", "--config", str(EXAMPLES / "digits.yaml"), "--model.method", "Auglocl"])
    text = capsys.readouterr().err + str(stop.value)
    assert "Did you mean 'AugLocal'" in text


def by_path(kind, **options):
    return {"class_path": f"lightning_local.{kind}", "init_args": options}


METHOD, PARTITION = "model.init_args.method", "model.init_args.partition"
# Key, value, and words of the message in their order.
REFUSED = {
    "depth": (METHOD, by_path("methods.AugLocal", depth=-1))
    + (f"{METHOD} (AugLocal):", "depth=-1", "0 or more"),
    "number": (PARTITION, by_path("Partition", num_modules=0))
    + (f"{PARTITION} (Partition):", "num_modules=0", "pass a positive int"),
    "stages": ("trainer.strategy", by_path("LocalParallelStrategy", num_stages=0))
    + ("trainer.strategy (LocalParallelStrategy):", "num_stages=0", "1 or more"),
    "callback": ("trainer.callbacks", by_path("EarlyExit", threshold=1.5))
    + ("trainer.callbacks (EarlyExit):", "threshold=1.5", "0 to 1"),
    "callbacks": ("trainer.callbacks", [by_path("LocalSummary"), by_path("EarlyExit", threshold=2)])
    + ("trainer.callbacks.1 (EarlyExit):", "threshold=2", "0 to 1"),
    "head": (METHOD, by_path("methods.Greedy", head=by_path("heads.Conv", widen=0)))
    + (f"{METHOD}.init_args.head (Conv):", "widen=0", "above 0"),
    "recompute": ("model.init_args.recompute", "wrong")
    + ("model (LocalLearner):", "recompute='wrong'", "pass one of ('none', 'blocks', 'body')"),
    "name": (METHOD, "AugLoca")
    + ("model (LocalLearner):", "method='AugLoca'", "'SGR']", "Did you mean 'AugLocal'?"),
    "no method": (METHOD, None)
    + ("model (LocalLearner):", "method=None", "pass one of", "instance of LocalMethod"),
    "no partition": (PARTITION, None)
    + (
        "model (LocalLearner):",
        "partition=None",
        "'units'",
        "number",
        "list of names",
        "Partition",
    ),
    "split point": (PARTITION, ["block1"])
    + ("model (LocalLearner):", "`block1` is no submodule of CifarResNet", "closest names are"),
    "misspelt": ("model.init_args.recomput", "body")
    + ("lightning_local.LocalLearner", "'recomput' is not accepted", "Did you mean 'recompute'"),
    "misspelt inside": (METHOD, by_path("methods.AugLocal", dept=2))
    + ('"method"', "lightning_local.methods.AugLocal", "'dept'", "Did you mean 'depth'"),
    "misspelt in a union": ("trainer.strategy", by_path("LocalParallelStrategy", num_stage=2))
    + ('"trainer.strategy"', "'num_stage' is not accepted", "Did you mean 'num_stages'"),
    "unknown": (METHOD, by_path("methods.AugLocal", foo=2))
    + ("lightning_local.methods.AugLocal", "'foo' is not accepted", "AugLocal takes: depth, "),
    "no init_args": (METHOD, {"class_path": "lightning_local.methods.AugLocal", "depth": 2})
    + ('"method"', "init_args: {its options}"),
    "type": (METHOD, by_path("methods.AugLocal", depth="many"))
    + ("lightning_local.methods.AugLocal", '"depth"', "<class 'int'>", "many"),
    "types": ("model.init_args.out_features", "many") + ('"out_features"', "<class 'int'>", "many"),
}


def changed(key, value, folder):
    """Arguments with the file of a recipe in which a key has another value."""
    config = yaml.safe_load((EXAMPLES / "digits.yaml").read_text())
    *parents, last = key.split(".")
    functools.reduce(dict.get, parents, config)[last] = value
    file = folder / "changed.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file)]


def refused(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    text = capsys.readouterr().err
    assert stop.value.code == 2, text
    assert re.search(".*".join(map(re.escape, words)), text, re.DOTALL), text
    assert len(text.splitlines()) <= 9, text
    assert not [noise for noise in ("Traceback", "Union", "Namespace", "usage:") if noise in text]


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_value_is_one_short_message(case, tmp_path, capsys):
    key, value, *words = REFUSED[case]
    refused(["fit", *changed(key, value, tmp_path)], ["error: ", *words], capsys)


@pytest.mark.parametrize("case", ["depth", "no partition", "misspelt inside"])
def test_a_plan_refuses_alike(case, tmp_path, capsys):
    key, value, *words = REFUSED[case]
    refused(["plan", *changed(key, value, tmp_path)], ["error: ", *words], capsys)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("method.init_args.depth=-1", (f"{METHOD} (AugLocal):", "depth=-1", "0 or more")),
        ("partition=0", ("model (LocalLearner):", "num_modules=0", "pass a positive int")),
        ("recompute=wrong", ("model (LocalLearner):", "recompute='wrong'", "pass one of")),
        ("recomput=body", ("'recomput' is not accepted", "Did you mean 'recompute'")),
    ],
)
def test_an_option_is_refused_alike(args, words, capsys):
    file = ["fit", "--config", str(EXAMPLES / "digits.yaml")]
    refused([*file, f"--model.{args}"], words, capsys)


def test_a_refusal_has_a_traceback_for_those_who_debug(tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ArgumentError, match=r"model.init_args.method \(AugLocal\)") as stop:
        main(["fit", *changed(*REFUSED["depth"][:2], tmp_path)])
    first = stop.value.__cause__.__cause__
    assert str(first).startswith("Augmented(depth=-1)")
    assert "in count" in "".join(traceback.format_exception(first))


class Refuses(L.LightningModule):
    def __init__(self):
        super().__init__()
        raise ValueError("mine") from KeyError("why")


class Stumbles(L.LightningModule):
    def __init__(self):
        super().__init__()
        [][0]


class Passes(L.LightningModule):
    def __init__(self):
        super().__init__()
        heads.Conv(widen=0)


class MyHead(heads.Conv):
    def __init__(self):
        super().__init__(widen=0)


MODULE = "model.init_args.module"
OWN = {
    "value": (MODULE, Refuses, ValueError, "^mine$"),
    "mishap": (MODULE, Stumbles, IndexError, "out of range"),
    "passed on": (MODULE, Passes, ValueError, "widen=0"),
    "derived": (f"{METHOD}.init_args.head", MyHead, ValueError, "widen=0"),
}


@pytest.mark.parametrize("case", OWN)
def test_an_error_of_a_users_class_comes_as_it_was_raised(case, tmp_path):
    key, kind, error, words = OWN[case]
    args = ["fit", *changed(METHOD, by_path("methods.Greedy"), tmp_path)]
    with pytest.raises(error, match=words) as stop:
        main([*args, f"--{key}={STEM}.{kind.__name__}"])
    frames = [frame for frame, _ in traceback.walk_tb(stop.value.__traceback__)]
    assert kind.__init__.__code__ in [frame.f_code for frame in frames]
    # Nothing of what was tried is printed around it.
    assert stop.value.__context__ is None or isinstance(stop.value.__context__, KeyError)
    assert isinstance(stop.value.__cause__, KeyError) == (kind is Refuses)


def test_a_mishap_of_ours_is_no_refusal(monkeypatch):
    mishap = eval("lambda *given: None + 1", {"__name__": arguments.__name__})
    monkeypatch.setattr(arguments, "check_options", mishap)
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["fit", "--config", str(EXAMPLES / "digits.yaml")])


def test_the_working_directory_is_importable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert str(tmp_path) in sys.path
