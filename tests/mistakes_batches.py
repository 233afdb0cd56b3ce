"""Mistakes in steps, in what they do with a batch, and in batches."""

import lightning as L
import torch
from mistakes import NOW, X, Y, case, fitted, loader_of
from simple import CLASSES, Lit, Net, data, greedy
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_local import LocalLearner, methods

# Steps.


def stepping(step):
    class Odd(Lit):
        training_step = step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    fitted(greedy(Odd()))


@case(["another input than the batch's", "on_after_batch_transfer"])
def an_input_changed_in_the_step():
    stepping(lambda self, b, batch_idx: functional.cross_entropy(self(b[0] + 1.0), b[1]))


class Scaled(Net):
    def forward(self, x, scale=1.0):
        return super().forward(x * scale)


@case(["with 2 inputs", "gives 1", "LocalLearner(unpack=...)", "leave the loss"])
def an_input_that_is_not_in_the_batch():
    class Odd(Lit):
        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.network(batch[0], scale=2.0), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    fitted(greedy(Odd(Scaled())))


@case(["called the network twice", "join the views"])
def two_views():
    stepping(lambda self, b, batch_idx: functional.cross_entropy(self(b[0]) + self(-b[0]), b[1]))


@case(["called the network twice", "with the same input", "keep its output in a variable"])
def two_calls():
    stepping(lambda self, b, batch_idx: functional.cross_entropy(self(b[0]) + self(+b[0]), b[1]))


@case(["did not call the network", "call the network once"])
def no_call():
    stepping(lambda self, b, batch_idx: self.network.fc.weight.sum())


@case(["returned NoneType without a loss", "return the loss"])
def a_skipped_batch():
    stepping(lambda self, b, batch_idx: self(b[0]) and None if False else (self(b[0]), None)[1])


@case(["a loss of shape (4,)", "return a scalar"])
def a_loss_that_is_no_scalar():
    stepping(lambda self, b, batch_idx: self(b[0]).mean(0))


@case(["depends on network.stem.weight and 7 more", "teaches the last one alone", "weight_decay"])
def a_penalty_on_all_weights():
    def step(self, batch, batch_idx):
        penalty = sum(p.square().sum() for p in self.parameters())
        return functional.cross_entropy(self(batch[0]), batch[1]) + 1e-4 * penalty

    stepping(step)


# Batches.


@case(["The batch is a list of 3", "pass LocalLearner(unpack="])
def a_batch_of_three():
    fitted(greedy(Lit()), DataLoader(list(zip(X, Y, Y, strict=True)), 8))


@case(["a dict with the keys ['a', 'b']", "Expected are (x, y)"])
def a_dict_with_other_keys():
    fitted(greedy(Lit()), DataLoader([{"a": x, "b": y} for x, y in zip(X, Y, strict=True)], 8))


@case(["more than one key", "['x', 'image'] could be the input", "batch['target']"])
def a_dict_with_too_many_keys():
    rows = [{"image": x, "x": x, "label": y, "target": y} for x, y in zip(X, Y, strict=True)]
    fitted(greedy(Lit()), DataLoader(rows, 8))


@case(["returned a tuple of 3", "a tuple of two, (input, target)", "Several inputs"])
def an_unpack_of_three():
    fitted(greedy(Lit(), unpack=lambda batch: (*batch, None)))


@case(["returned a Tensor of shape (2, 1, 6, 6)", "a tuple of two"])
def an_unpack_of_one_tensor_of_two_samples():
    fitted(greedy(Lit(), unpack=lambda batch: batch[0]))


@case(["returned a dict with the keys ['x', 'y']", "a tuple of two"])
def an_unpack_of_a_dict():
    fitted(greedy(Lit(), unpack=lambda batch: {"x": batch[0], "y": batch[1]}))


@case(["is empty", "at least one batch"])
def an_empty_loader():
    L.Trainer(**NOW["quiet"], max_epochs=1).fit(greedy(Lit()), DataLoader([]), data(shuffle=False))


@case(["read only once", "set example_input_array"])
def a_stream_that_is_read_once():
    fitted(greedy(Lit()), iter([(X[:8], Y[:8])]))


@case(["class 9", "4 outputs", "0 to 3", "as many outputs"])
def a_label_out_of_range():
    fitted(greedy(Lit()), loader_of(X, Y.masked_fill(Y == 1, 9)))


@case(["torch.float32 of shape (8, 2)", "neither class indices", "criterion="])
def targets_that_are_numbers():
    fitted(greedy(Lit()), loader_of(X, torch.randn(16, 2)))


@case(["indices of shape (8, 1)", "wants (8,)", "one index per prediction"])
def targets_with_a_dimension_more():
    fitted(greedy(Lit()), loader_of(X, Y[:, None]))


class Words(Lit):
    """Predicts one of `words` per token, `(N, V, T)`, as torch's cross entropy takes it."""

    def __init__(self):
        layers = nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 9)
        super().__init__(nn.Sequential(*layers, ClassesFirst()))

    def validation_step(self, batch, batch_idx):
        pass


class ClassesFirst(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def words(**options):
    x, y = torch.randn(16, 6, 2), torch.arange(96).view(16, 6) % 9
    fitted(greedy(Words(), **options), loader_of(x, y))


@case(["class 6", "heads' 6 outputs", "as (N, T, V)", "(N, V, T)", "pass out_features=V"])
def words_in_dimension_1():
    words()


class Number(Lit):
    """One number per sample, `(N, 1)`."""

    def __init__(self):
        layers = nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 1)
        super().__init__(nn.Sequential(nn.Flatten(), *layers))

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch[0])[:, 0], batch[1])

    validation_step = training_step


def regression(criterion, y=None):
    y = torch.randn(16) if y is None else y
    fitted(greedy(Number(), network="network", criterion=criterion), loader_of(X, y))


@case(["each output with each target, (8, 8)", "(8, 1), and the target", "output.squeeze(-1)"])
def a_criterion_that_broadcasts():
    regression(nn.MSELoss())


@case(["Here pass criterion=lambda output, target: loss(output.squeeze(-1)"])
def a_criterion_that_can_not_broadcast():
    regression(nn.BCEWithLogitsLoss(), Y.float() / CLASSES)


@case(
    ["local module 0 failed", "RuntimeError: The size", "(16, 4)", "int64 of shape (16,)", "unpack"]
)
def numbers_for_class_labels():
    fitted(greedy(Lit(), criterion=lambda output, target: (output - target).abs().mean()))


@case(["local module 0 has no gradient", "(8, 1)", "without detach()"])
def a_criterion_without_a_gradient():
    regression(lambda output, target: (output.detach()[:, 0] - target).abs().mean())


@case(["local module 0 returned a float", "without item()"])
def a_criterion_that_returns_a_number():
    regression(lambda output, target: (output[:, 0] - target).abs().mean().item())


@case(["returned (16, 4)", "reduction='mean'"])
def a_criterion_without_a_mean():
    fitted(greedy(Lit(), criterion=lambda output, target: output))


@case(["denormalize", "[0, 1]", "mean and the standard deviation"])
def images_in_another_scale():
    fitted(LocalLearner(Lit(), methods.InfoPro(denormalize=([0.5], [3.0])), 3))


@case(["local module 2 of 4 was NaN", "in batch 1", "lower the learning rate"], FloatingPointError)
def a_loss_that_is_nan():
    class Bad(Lit):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.network.blocks[1].conv.weight.data.fill_(float("nan"))

    fitted(greedy(Bad()), log_every_n_steps=1)


@case(["differentiates gradients once more", "replace the layer"])
def a_layer_without_a_second_derivative():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.Linear(9, 9), nn.Hardsigmoid())
    net.append(nn.Linear(9, CLASSES))
    fitted(LocalLearner(Lit(net), "SGR", 3))
