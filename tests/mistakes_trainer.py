"""Mistakes with a Trainer, its callbacks and its checkpoints."""

import lightning as L
import torch
from lightning.pytorch import callbacks as cbs
from mistakes import NOW, case, fitted
from simple import Lit, Net, data, greedy, wrap

from lightning_local import EarlyExit, LocalLearner, LocalSummary

# The Trainer.


@case(["LearningRateFinder does not work", "plain"])
def a_callback_that_can_not_work():
    fitted(greedy(Lit()), callbacks=[cbs.LearningRateFinder()])


@case(["LocalSummary is for a LocalLearner", "wrap the module"], TypeError)
def a_summary_of_a_plain_module():
    fitted(Lit(), callbacks=[LocalSummary()])


@case(["EarlyExit needs heads", "AugLocal"])
def early_exit_without_heads():
    L.Trainer(**NOW["quiet"], callbacks=[EarlyExit()]).test(
        LocalLearner(WithTest(), "EndToEnd"), data(shuffle=False)
    )


class WithTest(Lit):
    def test_step(self, batch, batch_idx):
        self(batch[0])


@case(["torch.compile(learner)", "LocalLearner(compile=True)"])
def a_compiled_learner():
    fitted(torch.compile(greedy(Lit()), backend="eager"))


# Checkpoints.


def resumed(learner, path=None):
    L.Trainer(**NOW["quiet"], max_epochs=2).fit(
        learner, data(), data(shuffle=False), ckpt_path=path or NOW["file"]
    )


@case(["truncated", "resume from an older one"])
def a_truncated_file():
    path = NOW["file"].with_name("cut.ckpt")
    path.write_bytes(NOW["file"].read_bytes()[:2000])
    resumed(wrap(2)(Lit()), path)


@case(["another network", "other shapes", "Build the module as it was"])
def a_file_of_another_network():
    resumed(wrap(2)(Lit(Net(width=7))))


@case(["method Linear x CrossEntropy x Isolated", "has MLP", "use the method of the checkpoint"])
def a_file_of_another_method():
    resumed(LocalLearner(Lit(), "DGL", 2))


@case(["has 2 local modules", "pass partition=['blocks.0']"])
def a_file_of_local_modules_for_one():
    resumed(LocalLearner(Lit(), "Greedy", 1))


def altered(change):
    content = torch.load(NOW["file"], weights_only=True)
    change(content["lightning_local"])
    path = NOW["file"].with_name("altered.ckpt")
    torch.save(content, path)
    resumed(wrap(2)(Lit()), path)


@case(["tensors of heads", "it lacks"])
def a_file_without_its_heads():
    altered(lambda entry: entry["heads"].clear())


@case(["version 99", "install a newer one"])
def a_file_of_a_newer_format():
    altered(lambda entry: entry.update(version=99))


@case(["one of the module inside", "load it with that class"], TypeError)
def a_file_loaded_as_a_learner():
    LocalLearner.load_from_checkpoint(NOW["file"])


@case(["written by the plain module", "wrap that in a new LocalLearner"])
def a_file_of_the_plain_module():
    path = NOW["file"].with_name("plain.ckpt")
    fitted(Lit()).save_checkpoint(path)
    resumed(wrap(2)(Lit()), path)
