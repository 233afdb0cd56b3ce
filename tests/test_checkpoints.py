"""Checkpoints: the user's files, resuming, and the evaluation that loads them."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from simple import Lit, Net, data, run, wrap

from lightning_local import LocalLearner, heads, methods


def test_checkpoint_files_and_the_plain_class(tmp_path, quiet):
    class Saved(Lit):
        def __init__(self, width=6):
            super().__init__()
            self.save_hyperparameters()

    names = []
    for folder, make in (("plain", lambda module: module), ("local", wrap("units"))):
        checkpoint = ModelCheckpoint(
            tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
        )
        options = {**quiet, "enable_checkpointing": True}
        _, model = run(make, options, Saved, callbacks=[checkpoint])
        names.append(sorted(path.name for path in (tmp_path / folder).iterdir()))
    assert names[0] == names[1] == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    loaded = Saved.load_from_checkpoint(tmp_path / "local" / "step=6.ckpt", width=9)
    assert loaded.hparams.width == 9
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def file_of(make, path, quiet, **options):
    trainer, model = run(make, quiet, epochs=1, **options)
    trainer.save_checkpoint(path)
    return model


def resume(model, path, quiet):
    L.Trainer(max_epochs=2, **quiet).fit(model, data(), data(shuffle=False), ckpt_path=path)


class Steady(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def augmented(partition):
    return lambda module: LocalLearner(module, methods.AugLocal(depth=1), partition)


@pytest.mark.parametrize("make", [wrap, augmented])
def test_the_cuts_of_the_checkpoint_win(make, tmp_path, quiet):
    path = tmp_path / "a.ckpt"
    saved = file_of(make(2), path, quiet, module=Steady)
    again, other = make(2)(Steady()), make("units")(Steady())
    resume(again, path, quiet)
    with pytest.warns(UserWarning, match="2 local modules, cut after .*, are used, not the ."):
        resume(other, path, quiet)
    assert other.split_points == saved.split_points
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class Wider(Lit):
    def __init__(self):
        super().__init__(Net(width=8))


class Deeper(Lit):
    def __init__(self):
        super().__init__(Net(blocks=4))


def conv(width):
    return lambda module: LocalLearner(module, methods.Greedy(head=heads.Conv(width)))


REFUSED = {
    "wider": (wrap("units"), lambda: wrap("units")(Wider()), r"another network .* other shapes:"),
    "deeper": (wrap("units"), lambda: wrap("units")(Deeper()), r"lacks network.blocks.3.conv"),
    "shallower": (wrap(2), lambda: wrap(2)(Lit(Net(blocks=2))), r"has also network.blocks.2"),
    "method": (
        wrap("units"),
        lambda: LocalLearner(Lit(), "SGR"),
        r"Linear x CrossEntropy x Isolated .* has Conv x CrossEntropy x GradientReconc",
    ),
    "end to end": (wrap("units"), lambda: wrap(1)(Lit()), r"method Linear x .* has EndToEnd"),
    "heads": (conv(4), lambda: conv(5)(Lit()), r"not those of the learner's Conv .* other shapes"),
    "plain": (lambda module: module, lambda: wrap(2)(Lit()), "written by the plain module"),
    "one module": (
        lambda module: LocalLearner(module, "Greedy", 2),
        lambda: LocalLearner(Lit(), "Greedy", 1),
        r"pass partition=\['blocks.0'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(case, tmp_path, quiet):
    saved_by, make, message = REFUSED[case]
    path = tmp_path / "a.ckpt"
    file_of(saved_by, path, quiet)
    before_file = path.read_bytes()
    learner = make()
    before = {k: v.clone() for k, v in learner.module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        resume(learner, path, quiet)
    assert path.read_bytes() == before_file
    for name, tensor in learner.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_remedy_for_other_shapes_works(tmp_path, quiet):
    """`strict=False` is none: torch refuses other shapes all the same."""
    path, module = tmp_path / "a.ckpt", Wider()
    file_of(wrap(2), path, quiet)
    with pytest.raises(ValueError, match="Or wrap one with what fits: ") as refused:
        resume(wrap(2)(module), path, quiet)
    code = str(refused.value).partition("fits: ")[2].removesuffix(".")
    exec(code, {"module": module, "path": path, "torch": torch})
    file = torch.load(path)["state_dict"]
    own = module.state_dict()
    alike = {name for name in own if own[name].shape == file[name].shape}
    assert alike == {"network.fc.bias", *(n for n in own if n.endswith("num_batches_tracked"))}
    assert all(torch.equal(own[name], file[name]) for name in alike)
    resume(wrap(2)(module), None, quiet)


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(keep, tmp_path, quiet):
    path = tmp_path / "a.ckpt"
    file_of(wrap(2), path, quiet)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match=r"a.ckpt' is truncated .* resume from an older one"):
        resume(wrap(2)(Lit()), path, quiet)
    with pytest.raises(ValueError, match="is truncated"):
        L.Trainer(**quiet).validate(wrap(2)(Lit()), data(shuffle=False), ckpt_path=path)


def test_a_file_of_a_newer_format_is_refused(tmp_path, quiet):
    path = tmp_path / "a.ckpt"
    file_of(wrap(2), path, quiet)
    content = torch.load(path, weights_only=True)
    content["lightning_local"]["version"] = 99
    torch.save(content, path)
    with pytest.raises(ValueError, match="version 99 .* install a newer one"):
        resume(wrap(2)(Lit()), path, quiet)


def test_a_save_that_is_cut_short_leaves_the_last_file(tmp_path, quiet, monkeypatch):
    from fsspec.implementations.local import LocalFileOpener

    path = tmp_path / "a.ckpt"
    trainer, _ = run(wrap(2), quiet, epochs=1)
    trainer.save_checkpoint(path)
    before = path.read_bytes()

    def write(self, content):
        self.f.write(content[:100])
        raise OSError("no space left")

    monkeypatch.setattr(LocalFileOpener, "write", write, raising=False)
    with pytest.raises(OSError, match="no space left"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before


def test_the_entry_is_complete_and_of_plain_types(tmp_path, quiet):
    learner = file_of(wrap("units"), tmp_path / "a.ckpt", quiet)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    entry = content["lightning_local"]
    assert entry["method"] == "Linear x CrossEntropy x Isolated"
    assert entry["split_points"] == list(learner.split_points)
    assert entry["boundaries"] == [[6, 6, 6]] * 3
    assert len(entry["heads"]) == 6
    assert len(content["optimizer_states"]) == len(content["lr_schedulers"]) == 4
    assert set(content["state_dict"]) == set(Lit().state_dict())
    assert len(entry["streams"]["cpu"]) == 4
    assert set(entry["random"]) == {"torch", "cuda", "python", "numpy"}


def test_a_learner_says_how_to_load_its_files(tmp_path, quiet):
    file_of(wrap(2), tmp_path / "a.ckpt", quiet)
    with pytest.raises(TypeError, match="one of the module inside: load it with that class"):
        LocalLearner.load_from_checkpoint(tmp_path / "a.ckpt")


def test_validate_test_and_predict_are_the_users(tmp_path, quiet):
    class Steps(Lit):
        def test_step(self, batch, batch_idx):
            self.log("test/size", float(len(batch[0])), reduce_fx="sum")

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    trainer, learner = run(wrap("units"), quiet, Steps, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = wrap("units")(Steps())
    trainer = L.Trainer(**quiet)
    expected = L.Trainer(**quiet).validate(learner.module, data(shuffle=False), verbose=False)
    found = trainer.validate(
        fresh, data(shuffle=False), ckpt_path=tmp_path / "a.ckpt", verbose=False
    )
    assert found == expected
    assert trainer.test(fresh, data(shuffle=False), verbose=False)[0]["test/size"] > 0
    outputs = torch.cat(trainer.predict(fresh, data(shuffle=False)))
    learner.eval()
    assert torch.equal(outputs, torch.cat([learner(x) for x, _ in data(shuffle=False)]))
