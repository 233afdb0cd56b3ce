"""PredSim, InfoPro and the contrastive loss on numbers that a person can check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import CLASSES, Cnn, Mlp, PreAct, Tagger, Vit
from reference_losses import contrastive_loss, similarity_loss
from settings import ScaledCrossEntropy, batches, fit, learner_of, make
from torch import nn
from torch.nn import functional
from twin import DENORMALIZE, RGB

from lightning_local import heads, losses, methods
from lightning_local.dryrun import Boundary
from lightning_local.place import Place

HALF = ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1))
# Form: a hidden state without the batch, the position of its channels, the network's input.
FORMS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {
    "vector": ((6,), 1, (3,)),
    "maps": ((6, 4, 4), 1, (3, 8, 8)),
    "three maps": ((3, 4, 4), 1, (3, 8, 8)),
    "maps of one pixel": ((6, 1, 1), 1, (3, 8, 8)),
    "maps of one row": ((6, 1, 5), 1, (3, 8, 8)),
    "channels last": ((4, 4, 6), 3, (3, 8, 8)),
    "tokens": ((5, 6), 2, (5, 3)),
    "one token": ((1, 6), 2, (1, 3)),
}


def objective(
    loss: Any,
    form: str = "vector",
    classes: int = CLASSES,
    pools: bool = True,
    k: int = 0,
    num_modules: int = 3,
) -> nn.Module:
    """The objective of a head at this place, float64."""
    shape, channel_dim, given = FORMS[form]
    x0 = torch.empty(2, *given, device="meta")
    place = Place(k, num_modules, Boundary(shape, channel_dim), classes, pools, 0, [], x0)
    return loss.build(place, ScaledCrossEntropy()).double()


def contrast(output: torch.Tensor, target: list[int]) -> torch.Tensor:
    """The contrastive loss alone."""
    loss = losses.InfoPro(HALF, task="contrast", lam_first=(0.0, 1.0), lam_last=(0.0, 1.0))
    hidden = torch.zeros(len(output), 6, dtype=torch.float64)
    return objective(loss)(output, hidden, torch.tensor(target), torch.zeros(len(output), 3))


# ---------------------------------------------------------------------- PredSim


@pytest.mark.parametrize("classes", [4, 10])
def test_labels_are_similar_by_one_or_minus_one_over_the_others(classes: int) -> None:
    """The hidden states are one-hot themselves, and P the identity."""
    loss = losses.PredSim(parts="sim")
    module = objective(loss, classes=classes)
    module.projection = nn.Linear(classes, classes, bias=False).double()
    nn.init.eye_(module.projection.weight)
    target = torch.tensor([0, 0, 1])

    def value(labels: list[int]) -> float:
        # Neither scale nor offset of a sample matters.
        hidden = 3.0 * functional.one_hot(torch.tensor(labels), classes).double() + 0.7
        return float(module(torch.zeros(3, classes), hidden, target, None).detach())

    assert value([0, 0, 1]) == pytest.approx(0.0, abs=1e-14)
    assert value([2, 2, 0]) == pytest.approx(0.0, abs=1e-14)
    # Pairs (0, 1) and (1, 2) are exchanged: 1 for -1 / (classes - 1), four entries of nine.
    gap = 1 + 1 / (classes - 1)
    assert value([0, 1, 1]) == pytest.approx(4 * gap**2 / 9, rel=1e-7)  # S has 1e-8 below


@pytest.mark.parametrize("form", FORMS)
def test_similarity_is_symmetric_with_unit_diagonal(form: str) -> None:
    """Seen from outside: the pairs' order is nothing, a sample and its scaled copy are equal."""
    torch.manual_seed(0)
    module = objective(losses.PredSim(parts="sim"), form)
    hidden = torch.randn(4, *FORMS[form][0], dtype=torch.float64)
    target, output = torch.tensor([0, 1, 1, 2]), torch.zeros(4, CLASSES)
    order = [2, 0, 3, 1]
    found = module(output, hidden, target, None)
    again = module(output, hidden[order], target[order], None)
    torch.testing.assert_close(found, again, rtol=1e-12, atol=0)
    torch.testing.assert_close(module(output, 5 * hidden, target, None), found, rtol=1e-6, atol=0)
    # All of one class, all alike: S is 1 everywhere.
    alike = torch.stack([hidden[0], 2 * hidden[0], 0.5 * hidden[0]])
    same = module(output[:3], alike, torch.zeros(3, dtype=torch.long), None)
    single = module(output[:1], hidden[:1], target[:1], None)
    assert float(same.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(single.detach()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("vector", (6, 6)),
        ("maps", (6, 6, 3, 3)),
        ("maps of one pixel", (6, 6, 3, 3)),
        ("channels last", (6, 6, 3, 3)),
        ("tokens", (6, 6)),
    ],
)
def test_projections_keep_the_form(form: str, shape: tuple[int, ...]) -> None:
    module = objective(losses.PredSim(), form)
    assert [tuple(p.shape) for p in module.parameters()] == [shape]
    assert objective(losses.PredSim(parts="pred"), form).projection is None
    assert not list(objective(losses.PredSim(parts="pred"), form).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", ["zeros", "equal"])
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_without_spread_has_finite_derivatives(
    form: str, sample: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = objective(losses.PredSim(beta=0.5), form).to(dtype)
    hidden = torch.randn(4, *FORMS[form][0], dtype=dtype)
    hidden[1] = 0.0 if sample == "zeros" else 1.0
    hidden.requires_grad_()
    output = torch.randn(4, CLASSES, dtype=dtype)
    loss = module(output, hidden, torch.tensor([0, 1, 1, 2]), None)
    leaves = [hidden, *module.parameters()]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    for gradient in (*first, *second):
        assert gradient.isfinite().all()
    if sample == "zeros":  # the other's spread is that of rounding, and its inverse large
        assert first[0].abs().max() < 1e3
    assert first[0][[0, 2, 3]].abs().sum() > 0


@pytest.mark.parametrize("network", [Cnn, Mlp, Tagger])
def test_beta_zero_is_the_criterion_alone(network: type[nn.Module]) -> None:
    learner = learner_of(make(network), methods.PredSim(beta=0.0))
    record = fit(learner, batches(network, 1))
    plain = learner_of(make(network), methods.PredSim(parts="pred"))
    expected = fit(plain, batches(network, 1))
    assert all(map(torch.equal, record.losses[0], expected.losses[0]))
    for name, gradient in record.gradients[0].items():
        if ".projection." in name:
            assert gradient is None
        else:
            assert torch.equal(gradient, expected.gradients[0][name]), name


# ---------------------------------------------------------------------- contrastive


def test_contrastive_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
    scale = torch.tensor([[3.0], [1.0], [0.2]], dtype=torch.float64)  # lengths don't matter
    t = 0.07
    # Products: (0, 1) 0.6, (0, 2) 0.8, (1, 2) 0.96.
    pair = [math.log1p(math.exp(0.2 / t)), math.log1p(math.exp(0.36 / t)), 0.0]
    assert float(contrast(z * scale, [1, 1, 0])) == pytest.approx(sum(pair) / 3, rel=1e-12)

    def anchor(a: float, b: float) -> float:
        return math.log(math.exp(a / t) + math.exp(b / t)) - (a + b) / (2 * t)

    three = (anchor(0.6, 0.8) + anchor(0.6, 0.96) + anchor(0.8, 0.96)) / 3
    assert float(contrast(z * scale, [2, 2, 2])) == pytest.approx(three, rel=1e-12)


@pytest.mark.parametrize("target", [[0], [0, 1, 2]])
def test_anchors_without_positives_give_nothing(target: list[int]) -> None:
    output = torch.randn(len(target), 128, dtype=torch.float64, requires_grad=True)
    loss = contrast(output, target)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_an_output_of_zeros_has_finite_derivatives_in_the_contrastive_loss() -> None:
    output = torch.randn(4, 8, dtype=torch.float64)
    output[2] = 0.0
    output.requires_grad_()
    (first,) = torch.autograd.grad(contrast(output, [0, 0, 1, 1]), output, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), output)
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_ignored_tokens_are_left_out() -> None:
    torch.manual_seed(0)
    target = torch.tensor([[0, 1, -100, 1, 2], [-100, -100, -100, -100, -100], [1, 1, 2, 3, -100]])
    kept = target.flatten() != -100
    hidden = torch.randn(3, 5, 6, dtype=torch.float64)
    output = torch.randn(3, 5, 8, dtype=torch.float64)
    module = objective(losses.PredSim(parts="sim"), "tokens", pools=False)
    z = module.projection(hidden).flatten(0, 1)
    wanted = similarity_loss(z[kept], target.flatten()[kept], CLASSES)
    torch.testing.assert_close(module(output, hidden, target, None), wanted, rtol=1e-12, atol=0)
    weights = {"lam_first": (0.0, 1.0), "lam_last": (0.0, 1.0)}
    module = objective(losses.InfoPro(RGB, "contrast", **weights), "tokens", pools=False)
    wanted = contrastive_loss(output.flatten(0, 1)[kept], target.flatten()[kept])
    torch.testing.assert_close(module(output, hidden, target, torch.zeros(3, 5, 3)), wanted)


# ---------------------------------------------------------------------- InfoPro


@pytest.mark.parametrize("num_modules", [2, 3, 16])
def test_weights_fall_along_a_line(num_modules: int) -> None:
    """Logits of 0 cost log 2 per pixel; heads that are sure and right or know nothing, 0 or log 4.

    The last module has no weights: with three modules the second is the last that has.
    """
    first, last = (5.0, 0.05), (0.2, 0.5)
    x0, target = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 1])
    hidden = torch.zeros(2, 6, dtype=torch.float64)
    sure = 1e3 * functional.one_hot(target, CLASSES).double()
    for k in range(num_modules - 1):
        module = objective(losses.InfoPro(HALF), k=k, num_modules=num_modules)
        for parameter in module.decoder.parameters():
            nn.init.zeros_(parameter)
        r = 0.0 if num_modules == 2 else k / (num_modules - 2)
        lam = [a + r * (b - a) for a, b in zip(first, last, strict=True)]
        image = float(module(sure, hidden, target, x0).detach())
        both = float(module(0 * sure, hidden, target, x0).detach())
        assert image / math.log(2) == pytest.approx(lam[0], rel=1e-12)
        assert (both - image) / math.log(CLASSES) == pytest.approx(lam[1], rel=1e-12)
    if num_modules > 2:
        assert lam == pytest.approx(last)


@pytest.mark.parametrize("form", ["vector", "maps", "channels last", "tokens"])
def test_the_image_is_denormalised_per_channel(form: str) -> None:
    """Logits of 0.3 everywhere: softplus(0.3) - 0.3 t, t the mean of x std + mean."""
    module = objective(losses.InfoPro(RGB, lam_first=(1.0, 0.0)), form)
    layers = [m for m in module.decoder.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    nn.init.zeros_(layers[-1].weight)
    nn.init.constant_(layers[-1].bias, 0.3)
    shape, _, given = FORMS[form]
    hidden = torch.randn(2, *shape, dtype=torch.float64)
    for channel in range(3):
        x0 = torch.zeros(2, *given, dtype=torch.float64)
        view = x0[:, channel] if len(given) != 2 else x0[..., channel]
        view.fill_(2.0)
        wanted = (sum(RGB[0]) + 2.0 * RGB[1][channel]) / 3
        found = module(torch.zeros(2, CLASSES), hidden, torch.tensor([0, 1]), x0)
        assert float(found.detach()) == pytest.approx(
            math.log1p(math.exp(0.3)) - 0.3 * wanted, rel=1e-7
        )


def test_a_wrong_range_is_refused_in_the_first_step() -> None:
    learner = learner_of(make(Cnn), methods.InfoPro(denormalize=((0.0,) * 3, (1.0,) * 3)))
    with pytest.raises(ValueError, match="denormalize"):
        fit(learner, batches(Cnn, 1))
    with pytest.raises(TypeError, match="denormalize"):
        methods.InfoPro()


def test_a_module_without_any_loss_is_refused() -> None:
    method = methods.InfoPro(denormalize=RGB, lam_last=(0.0, 0.0))
    learner_of(make(Cnn), method, 2)  # the published weights of two modules, of which r = 0 is used
    with pytest.raises(ValueError, match="learn nothing"):
        learner_of(make(Cnn), method, 3)


@pytest.mark.parametrize("network", [Cnn, PreAct, Vit])
def test_infopro_without_the_image_is_greedy(network: type[nn.Module]) -> None:
    """Bit for bit, and the decoders stay as they were."""
    weights = {"lam_first": (0.0, 1.0), "lam_last": (0.0, 1.0)}
    infopro = methods.InfoPro(denormalize=DENORMALIZE[network], **weights)
    learner = learner_of(make(network), infopro, 3)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    record = fit(learner, batches(network))
    other = learner_of(make(network), methods.Greedy(head=heads.Conv()), 3)
    expected = fit(other, batches(network))
    for found, wanted in zip(record.losses, expected.losses, strict=True):
        assert all(map(torch.equal, found, wanted))
    found, wanted = learner.state_dict(), other.state_dict()
    assert {name for name in found if ".decoder." not in name} == set(wanted)
    for name, value in found.items():
        assert torch.equal(value, wanted.get(name, before[name])), name
    for name, gradient in record.gradients[0].items():
        assert (gradient is None) == (".decoder." in name)


@pytest.mark.parametrize("task", ["softmax", "contrast"])
def test_without_the_task_the_classifier_gets_no_gradient(task: str) -> None:
    method = methods.InfoPro(denormalize=RGB, task=task, lam_first=(1.0, 0.0), lam_last=(1.0, 0.0))
    learner = learner_of(make(Cnn), method, 3)
    assert learner.local_modules[-1].head is None
    assert learner.local_modules[-1].objective is None
    for name, gradient in fit(learner, batches(Cnn, 1)).gradients[0].items():
        assert (gradient is None) == (".head." in name)
    assert not any(name.startswith("local_modules.2.") for name in learner.state_dict())
