"""A LightningCLI program of somebody else's: what its user may write, and what he gets."""

import inspect
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from simple import Lit, Net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_local import LocalCLI, LocalLearner, Partition, couplings, heads, losses, methods
from lightning_local.cli import main

HERE, STEM = Path(__file__), Path(__file__).stem
pytestmark = [
    # lightning/pytorch/cli.py says so of any module with its own recipe, if given --optimizer.
    pytest.mark.filterwarnings("ignore:.*overridden by `.*CLI.configure_optimizers`"),
    # lightning/pytorch/callbacks/model_checkpoint.py: a later run here has a folder of its own.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


class MyModel(Lit):
    def __init__(self, width: int = 6, lr: float = 0.1, network: nn.Module | None = None):
        super().__init__(network or Net(3, width))
        self.save_hyperparameters(ignore="network")
        self.lr = lr

    test_step = Lit.validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Idiomatic(MyModel):
    def __init__(self, width: int = 6):
        super().__init__(width)
        self.network = Net(3, self.hparams.width)


class MyData(L.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0, 0, 0] > 0).long()), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


PROGRAMS = {
    "foreign": LightningCLI,  # without a class: any of them, by class_path
    "ours": LocalCLI,
    "fixed": lambda **options: LightningCLI(LocalLearner, MyData, **options),
    "wrap": lambda **options: LightningCLI(LocalCLI.wrap(MyModel), MyData, **options),
    "wrap idiomatic": lambda **options: LightningCLI(LocalCLI.wrap(Idiomatic), MyData, **options),
    "plain": lambda **options: LightningCLI(MyModel, MyData, **options),
}


def by_path(kind, **options):
    return {"class_path": f"lightning_local.{kind}", "init_args": options}


AUG, SGR = by_path("methods.AugLocal", depth=1), by_path("methods.SGR", weight=0.3)


def recipe(program="foreign", module=f"{STEM}.MyModel", inner=(("width", 5),), **options):
    trainer = {"accelerator": "cpu", "max_steps": 4, "logger": False, "enable_progress_bar": False}
    model = dict(inner)
    if program in ("foreign", "ours", "fixed"):
        model = {"module": {"class_path": module, "init_args": model}, "method": "Greedy"}
    config = {"model": {**model, **options}, "trainer": trainer, "seed_everything": 1}
    if program in ("foreign", "ours"):
        config["model"] = by_path("LocalLearner", **config["model"])
        config["data"] = f"{STEM}.MyData"
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    return ["--config=recipe.yaml"]


def fit(*args, program="foreign", **options):
    args = ["fit", *recipe(program, **options), *args, "--trainer.enable_checkpointing=false"]
    return PROGRAMS[program](args=args, save_config_callback=None).model


def made(args, **options):
    file = recipe("ours", inner={"network": {"class_path": "simple.Net"}}, **options)
    return LocalCLI(args=file + [f"--model.{arg}" for arg in args.split()], run=False).model


def printed(args, capsys):
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS["foreign"](args=[*recipe(), *args, "--print_config"], run=False)
    return yaml.safe_load(capsys.readouterr().out)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    # LightningCLI warns about arguments of the process, here pytest's.
    monkeypatch.setattr(sys, "argv", ["program.py"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["foreign", "ours", "fixed", "wrap"])
def fitted(request, elsewhere):
    learner = PROGRAMS[request.param](args=["fit", *recipe(request.param, method=AUG)]).model
    (checkpoint,) = Path.cwd().rglob("*.ckpt")
    return request.param, learner, checkpoint


def test_only_the_yaml_changes_and_what_is_saved_repeats_the_run(fitted):
    name, learner, checkpoint = fitted
    again = ["--config=config.yaml", "--trainer.default_root_dir=again"]
    assert same(PROGRAMS[name](args=["fit", *again]).model, learner)
    later = [*again, "--trainer.default_root_dir=later", f"--ckpt_path={checkpoint}"]
    for command in ("validate", "test", "predict"):
        cli = PROGRAMS[name](args=[command, *later], save_config_callback=None)
        assert same(cli.model.module, learner.module)
    (x, _), *_ = cli.datamodule.predict_dataloader()
    assert torch.equal(cli.trainer.predict_loop.predictions[0], learner.eval()(x))
    resumed = PROGRAMS[name](args=["fit", *later, "--trainer.max_steps=8"]).model
    assert (resumed.num_modules, resumed.trainer.global_step) == (3, 8)


def test_a_checkpoint_loads_in_the_plain_class_with_its_hyper_parameters(fitted):
    _, learner, checkpoint = fitted
    loaded = MyModel.load_from_checkpoint(checkpoint)
    assert same(loaded, learner.module)
    assert dict(loaded.hparams) == {"width": 5, "lr": 0.1}
    stored = torch.load(checkpoint, weights_only=True).get("hyper_parameters", {})
    assert not {"module", "method"} & stored.keys()


@pytest.mark.parametrize("program", ["ours", "wrap idiomatic"])
def test_a_module_may_read_its_hyper_parameters_while_it_is_made(program):
    assert fit(program=program, module=f"{STEM}.Idiomatic").network.stem.out_channels == 5


def test_a_program_with_a_fixed_class_changes_by_one_line():
    plain = fit("--model.lr=0.2", program="plain")
    end_to_end = fit("--model.lr=0.2", "--model.method=EndToEnd", program="wrap")
    assert same(plain, end_to_end.module)
    learner = fit("--model.lr=0.3", "--model.method.depth=0", program="wrap", method=AUG)
    assert (learner.num_modules, learner.method.head.depth, learner.module.lr) == (4, 0, 0.3)


AXES = {
    "head": [heads.Linear, heads.Conv, heads.Augmented, heads.MLP],
    "loss": [losses.CrossEntropy, losses.PredSim, losses.InfoPro],
    "coupling": [couplings.Isolated, couplings.BackwardLink, couplings.GradientReconciliation],
}
REQUIRED = {"InfoPro": ("denormalize", [[0.5], [0.25]])}


def public_classes():
    """Each preset once, and once with each piece of the axes that it takes."""
    for owner in ["LocalMethod", *methods.METHODS]:
        axes = AXES.keys() & inspect.signature(getattr(methods, owner)).parameters
        for turn in range(max([1, *(len(AXES[axis]) for axis in axes)])):
            yield owner, {axis: AXES[axis][turn % len(AXES[axis])] for axis in sorted(axes)}


@pytest.mark.parametrize(("owner", "pieces"), list(public_classes()), ids=str)
def test_print_config_of_every_public_class(owner, pieces, capsys):
    kinds = {"method": getattr(methods, owner)}
    kinds |= {f"method.{axis}": kind for axis, kind in pieces.items()}
    args = []
    for place, kind in kinds.items():
        args.append(f"--model.{place}={kind.__name__}")
        if kind.__name__ in REQUIRED:
            name, value = REQUIRED[kind.__name__]
            args.append(f"--model.{place}.{name}={value}")
    config = printed(args, capsys)
    Path("again.yaml").write_text(yaml.safe_dump(config))
    learner = PROGRAMS["foreign"](args=["--config=again.yaml"], run=False).model
    for place, kind in kinds.items():
        node = config["model"]
        for name in place.split("."):
            node = node["init_args"][name]
        assert node["class_path"].startswith("lightning_local.")
        assert set(node.get("init_args", {})) == set(inspect.signature(kind).parameters)
        assert type(attrgetter(place)(learner)) is kind


def test_print_config_of_every_form_of_a_partition_and_a_summary(capsys):
    for given in ("3", "units", "[stem,blocks.0]", "lightning_local.Partition"):
        shown = printed([f"--model.partition={given}"], capsys)["model"]["init_args"]["partition"]
        whole = inspect.signature(Partition).parameters if "Partition" in given else None
        assert shown.keys() == whole.keys() if whole else shown == yaml.safe_load(given)
    summary = {"callbacks": [by_path("LocalSummary", head_accuracy=True)]}
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": summary}))
    append = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=LocalSummary"]
    for args in ([*append, "--trainer.callbacks.head_accuracy=true"], ["--config=more.yaml"]):
        callback = printed(args, capsys)["trainer"]["callbacks"][-1]
        assert callback["class_path"] == "lightning_local.LocalSummary"
        assert callback["init_args"]["head_accuracy"] is True


COSINE = ("CosineAnnealingLR", "T_max", 5)
PLATEAU = ("lightning.pytorch.cli.ReduceLROnPlateau", "monitor", "val/loss")
CASES = [("foreign", "", 3), ("foreign", "", 1), ("ours", "", 3), ("ours", "model.", 3)]


@pytest.mark.parametrize(("scheduler", "key", "value"), [COSINE, PLATEAU])
@pytest.mark.parametrize(("program", "whose", "k"), CASES)
def test_an_optimizer_of_the_command_line(program, whose, k, scheduler, key, value):
    args = ["optimizer=AdamW", "optimizer.lr=1e-3", f"lr_scheduler={scheduler}"]
    args = [f"--{whose}{arg}" for arg in (*args, f"lr_scheduler.{key}={value}")]
    learner = fit(*args, program=program, partition=k)
    optimizers, configs = learner.trainer.optimizers, learner.trainer.lr_scheduler_configs
    assert len(optimizers) == learner.num_modules == k
    for optimizer, *mine in zip(optimizers, *learner.parameters_per_module(), strict=True):
        (group,) = optimizer.param_groups
        assert (type(optimizer), group.get("initial_lr", group["lr"])) == (torch.optim.AdamW, 1e-3)
        assert {id(p) for p in group["params"]} == {id(p) for part in mine for p in part}
    assert [config.scheduler.optimizer for config in configs] == optimizers
    for config in configs:
        assert (getattr(config.scheduler, key), config.scheduler.last_epoch) == (value, 1)


def test_two_optimizers_are_a_clear_error():
    with pytest.raises(ValueError, match="--optimizer and LocalLearner.*leave one of them out"):
        fit("--optimizer=AdamW", "--model.init_args.optimizer=SGD")


OVERRIDES = """
method=AugLocal method.depth=5 > method.head.depth: 5
method=BackLink method.weight=0.5 > method.coupling.weight: 0.5
method=Greedy method.head=Conv method.head.hidden_features=7 > method.head.hidden_features: 7
partition=4 > partition.num_modules: 4
module.init_args.network.init_args.width=9 > module.network.fc.in_features: 9
"""
MISSPELT = """
method=AugLocl > AugLocal
partition=[blocks.00] > blocks.0
method=lightning_local.methods.AugLocl > AugLocal
method=AugLocal method.dept=5 > depth
method=Greedy method.head=Augmentd > Augmented
method=Greedy method.coupling=lightning_local.couplings.BackwardLnk > BackwardLink
partition=unit > units
methd=AugLocal > method
"""


@pytest.mark.parametrize("method", [AUG, SGR, "BackLink"])
@pytest.mark.parametrize("line", [line for line in OVERRIDES.splitlines() if " > " in line])
def test_overrides_on_the_command_line(method, line):
    args, path, value = re.split(" > |: ", line)
    assert attrgetter(path)(made(args, method=method)) == yaml.safe_load(value)


@pytest.mark.parametrize("line", [line for line in MISSPELT.splitlines() if " > " in line])
def test_misspelt_names_get_a_suggestion(line, capsys):
    args, suggestion = line.split(" > ")
    with pytest.raises((SystemExit, ValueError)) as stop:
        made(args)
    text = capsys.readouterr().err + str(stop.value)
    assert f"Did you mean {suggestion!r}" in text or f"names are: {suggestion}" in text


def test_a_composition_without_a_head_is_an_error():
    with pytest.raises((SystemExit, TypeError, ValueError)):
        made("method=LocalMethod", method="Greedy")


def test_main_and_python_m_find_classes_in_the_working_directory(monkeypatch, tmp_path):
    args = ["fit", *recipe("ours", "my_classes.Tiny", method=AUG)]
    Path("my_classes.py").write_text(f"from {STEM} import MyModel\nclass Tiny(MyModel): pass")
    paths = f"{HERE.parents[1]}{os.pathsep}{HERE.parent}"
    # One thread, as here: sums of two are others.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "lightning_local", *args, "--trainer.default_root_dir=m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    main(args)
    users = sys.modules["my_classes"]
    loaded = [users.Tiny.load_from_checkpoint(file) for file in tmp_path.rglob("*.ckpt")]
    del sys.modules["my_classes"]
    assert same(*loaded)
