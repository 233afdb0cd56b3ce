"""The programs under `examples/`, run as they are but shorter."""

from pathlib import Path

import torch
import yaml

from examples import new_method
from lightning_local import heads, methods
from lightning_local.cli import main


def test_a_new_method_in_one_short_file(quiet):
    assert len(Path(new_method.__file__).read_text().splitlines()) <= 60
    torch.manual_seed(0)
    learner = new_method.main(limit_train_batches=3, limit_val_batches=1, **quiet)
    assert learner.num_modules == 7
    assert learner.trainer.global_step == 3 * 4
    module = learner.local_modules[2]
    assert isinstance(module.objective, new_method._Decorrelated)
    # The second term: 0 for channels apart, and above it for channels that are copies.
    output, target = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)
    plain = torch.log(torch.tensor(10.0))
    hidden = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    torch.testing.assert_close(module.objective(output, hidden, target, None), plain)
    copies = hidden[:, :1].expand(4, 2)
    torch.testing.assert_close(module.objective(output, copies, target, None), plain + 0.5)


def test_a_new_method_through_yaml(tmp_path, monkeypatch):
    config = tmp_path / "new.yaml"
    method = {"class_path": "examples.new_method.Apart", "init_args": {"weight": 0.5}}
    model = {"init_args": {"method": method}}
    config.write_text(yaml.safe_dump({"model": model}))
    folder = Path(new_method.__file__).parent / "image_classification"
    quick = ["logger=false", "enable_progress_bar=false", "callbacks=null", "fast_dev_run=1"]
    args = ["fit", "--config", str(folder / "digits.yaml"), "--config", str(config)]
    monkeypatch.setattr("sys.argv", ["program.py"])  # LightningCLI compares it with its args
    main([*args, *(f"--trainer.{option}" for option in quick)])


def test_its_pieces_combine_with_the_packages():
    method = methods.LocalMethod(heads.MLP(), new_method.Decorrelated(0.1))
    assert method.loss.weight == 0.1
