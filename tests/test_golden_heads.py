"""Golden values of DGL, PredSim and InfoPro, and their heads written down by hand.

As in `test_golden.py`; what a loss has of its own counts as the head's.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from networks import CLASSES
from torch import nn
from torch.nn import functional

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, heads, losses, methods
from lightning_local.dryrun import Boundary
from lightning_local.place import Place

IMAGES = torch.zeros(2, 3, 32, 32)
CIFAR = (
    tuple(v / 255 for v in (125.3, 123.0, 113.9)),
    tuple(v / 255 for v in (63.0, 62.1, 66.7)),
)
METHODS: dict[str, Any] = {
    "dgl": methods.DGL,
    "dgl-original": functools.partial(methods.DGL, variant="original"),
    "predsim": methods.PredSim,
    "infopro": functools.partial(methods.InfoPro, denormalize=CIFAR),
    "infopro-contrast": functools.partial(methods.InfoPro, denormalize=CIFAR, task="contrast"),
}
GOLDEN = {
    "dgl": (838_294, 3_375_036),
    "dgl-original": (1_217_174, 4_901_244),
    "predsim": (284_310, 1_113_372),
    "infopro": (449_115, 1_724_974),
    "infopro-contrast": (677_445, 2_546_962),
}
SIDES = {16: 32, 32: 16, 64: 8}
# For each channel count how many of the K - 1 modules have it.
TIMES = {16: {16: 6, 32: 5, 64: 4}, 55: {16: 19, 32: 18, 64: 17}}


def place(channels: int, height: int, width: int, out: int = 10, x0: Any = IMAGES) -> Place:
    shape = torch.empty_like(x0, device="meta")
    return Place(0, 3, Boundary((channels, height, width), 1), out, True, 0, [], shape)


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_on_resnet32(name: str) -> None:
    learner = LocalLearner(LitClassifier(CifarResNet(32)), METHODS[name]())
    learner.build(IMAGES)
    assert learner.num_modules == 16
    assert count(learner.local_modules) == GOLDEN[name][0]
    found = sum(p.numel() for n, p in learner.named_parameters() if n.startswith("local_modules."))
    assert found == GOLDEN[name][0]


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_on_both_networks_place_by_place(name: str) -> None:
    method = METHODS[name]()
    found = {}
    for channels, side in SIDES.items():
        out = 128 if name == "infopro-contrast" else 10
        with torch.device("meta"):
            head = method.head.build(place(channels, side, side, out))
            objective = method.loss.build(place(channels, side, side), nn.CrossEntropyLoss())
        found[channels] = count(head, objective)
    for (_, times), golden in zip(TIMES.items(), GOLDEN[name], strict=True):
        assert sum(found[channels] * n for channels, n in times.items()) == golden


def test_parameters_on_resnet110() -> None:
    """Built by the learner, as in use; the others' only place by place, for time."""
    learner = LocalLearner(LitClassifier(CifarResNet(110)), methods.PredSim())
    learner.build(IMAGES)
    assert learner.num_modules == 55
    assert count(learner.local_modules) == GOLDEN["predsim"][1]


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True)


def mlp_by_hand(module: nn.Module, x: torch.Tensor, convs: int, hidden: int, bias: bool) -> Any:
    w = list(module.parameters())
    side = -(-x.shape[-1] // 4)
    x = functional.adaptive_avg_pool2d(x, side)
    for _ in range(convs):
        kernel, scale, shift = w.pop(0), w.pop(0), w.pop(0)
        assert kernel.shape[2:] == (1, 1)
        x = norm(functional.conv2d(x, kernel), scale, shift).clamp(min=0)
    x = functional.adaptive_avg_pool2d(x, 2).flatten(1)
    for _ in range(hidden):
        x = x @ w.pop(0).T
        if bias:
            x = x + w.pop(0)
        x = norm(x, w.pop(0), w.pop(0)).clamp(min=0)
    x = x @ w.pop(0).T + w.pop(0)
    assert not w
    return x


@pytest.mark.parametrize(("channels", "side"), [(16, 32), (64, 8), (6, 7), (5, 3)])
@pytest.mark.parametrize(
    ("head", "form"),
    [
        (heads.MLP(), (3, 2, False)),
        (heads.MLP(hidden=3, bias=True), (3, 3, True)),
        (heads.MLP(convs=0, hidden=1), (0, 1, False)),
        (methods.DGL().head, (3, 2, False)),
        (methods.DGL(variant="original").head, (3, 3, True)),
        (methods.DGL(variant="original", bias=False, convs=1).head, (1, 3, False)),
    ],
)
def test_mlp_heads_are_dgls(head: Any, form: Any, channels: int, side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, channels, side, side, dtype=torch.float64)
    module = head.build(place(channels, side, side, CLASSES)).double()
    torch.testing.assert_close(module(x), mlp_by_hand(module, x, *form))


@pytest.mark.parametrize(
    ("channels", "height", "width", "kernel", "padding", "size"),
    [
        (16, 32, 32, (8, 4), (0, 0), (4, 8)),
        (32, 16, 16, (4, 4), (0, 0), (4, 4)),
        (64, 8, 8, (4, 2), (0, 0), (2, 4)),
        (512, 1, 1, (1, 1), (0, 0), (1, 1)),
        (8, 8, 8, (1, 1), (0, 0), (8, 8)),
        # Odd sizes are padded by half a kernel where it does not fit.
        (16, 7, 7, (2, 1), (1, 0), (4, 7)),
        (64, 7, 7, (4, 2), (2, 1), (2, 4)),
        (64, 14, 14, (8, 4), (4, 2), (2, 4)),
        (128, 7, 7, (4, 4), (2, 2), (2, 2)),
        (512, 7, 7, (8, 8), (4, 4), (1, 1)),
    ],
)
def test_pooled_linear_heads_are_predsims(
    channels: int, height: int, width: int, kernel: Any, padding: Any, size: Any
) -> None:
    torch.manual_seed(0)
    module = heads.Linear(pool_features=512).build(place(channels, height, width, CLASSES))
    weight, bias = module.parameters()
    assert weight.shape == (CLASSES, channels * size[0] * size[1])
    assert weight.shape[1] <= 512
    x = torch.randn(2, channels, height, width)
    pooled = functional.avg_pool2d(x, kernel, padding=padding)
    assert pooled.shape[2:] == size
    expected = pooled.flatten(1) @ weight.T + bias
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("shape", [(600, 4, 4), (600, 7, 7), (600, 1, 1)])
def test_pooling_ends_at_one_pixel(shape: tuple[int, int, int]) -> None:
    module = heads.Linear(pool_features=512).build(place(*shape, CLASSES))
    assert count(module) == CLASSES * 601
    assert module(torch.randn(2, *shape)).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("height", "width"), [(7, 7), (14, 14), (1, 9), (9, 1), (13, 5), (3, 28), (15, 16)]
)
@pytest.mark.parametrize("channels", [3, 64, 200])
def test_every_size_is_pooled_to_the_target(channels: int, height: int, width: int) -> None:
    module = heads.Linear(pool_features=512).build(place(channels, height, width, CLASSES))
    assert module(torch.randn(2, channels, height, width)).shape == (2, CLASSES)
    assert next(module.parameters()).shape[1] <= 512


def test_zero_initialised_linear_heads() -> None:
    for options in ({}, {"pool_features": 64}):
        module = heads.Linear(zero_init=True, **options).build(place(16, 8, 8))
        assert not next(module.parameters()).any()
        assert next(heads.Linear(**options).build(place(16, 8, 8)).parameters()).any()
    weight, _ = methods.PredSim(zero_init=True).head.build(place(16, 8, 8)).parameters()
    assert not weight.any()


@pytest.mark.parametrize("side", [32, 8, 5, 1])
def test_decoders_are_infopros(side: int) -> None:
    torch.manual_seed(0)
    objective = losses.InfoPro(CIFAR).build(place(6, side, side), nn.CrossEntropyLoss())
    w = list(objective.decoder.parameters())
    shapes = [(12, 6, 3, 3), (12,), (12,), (12,), (3, 12, 3, 3), (3,)]
    assert [tuple(p.shape) for p in w] == shapes
    x = torch.randn(4, 6, side, side)
    up = functional.interpolate(x, size=(32, 32), mode="bilinear", align_corners=True)
    up = norm(functional.conv2d(up, w[0], w[1], padding=1), w[2], w[3]).clamp(min=0)
    expected = functional.conv2d(up, w[4], w[5], padding=1)
    torch.testing.assert_close(objective.decoder(x), expected, rtol=1e-4, atol=1e-5)  # float32


def test_decoders_of_large_images_are_infopros() -> None:
    """Those of its ImageNet code: never all channels at the image's size."""
    torch.manual_seed(0)
    x0 = torch.zeros(2, 3, 224, 224)
    at = place(24, 28, 28, x0=x0)
    objective = losses.InfoPro(CIFAR).build(at, nn.CrossEntropyLoss())
    w = list(objective.decoder.parameters())
    kernels = [(128, 24, 1, 1), (32, 128, 3, 3), (12, 32, 3, 3), (3, 12, 3, 3)]
    assert [tuple(p.shape) for p in w if p.ndim == 4] == kernels
    x = hidden = torch.randn(2, 24, 28, 28)
    for i, side in enumerate([56, 112, 224]):
        a, b, gain, shift = w[4 * i : 4 * i + 4]
        x = norm(functional.conv2d(x, a, b, padding=a.shape[2] // 2), gain, shift).clamp(min=0)
        x = functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)
    expected = functional.conv2d(x, w[12], w[13], padding=1)
    torch.testing.assert_close(objective.decoder(hidden), expected, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize(
    ("hidden", "image", "widths"),
    [
        ((56, 56), (224, 224), [32, 12]),
        ((7, 7), (224, 224), [128, 128, 128, 32, 12]),
        ((10, 19), (150, 300), [128, 128, 32, 12]),
        ((224, 224), (224, 224), [12]),
    ],
)
def test_decoders_go_up_in_steps(
    hidden: tuple[int, int], image: tuple[int, int], widths: list[int]
) -> None:
    x0 = torch.zeros(1, 3, *image)
    objective = losses.InfoPro(CIFAR).build(place(6, *hidden, x0=x0), nn.CrossEntropyLoss())
    convs = [m for m in objective.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [*widths, 3]
    assert objective.decoder(torch.randn(1, 6, *hidden)).shape == x0.shape
    other = (image[0] + 31, image[1] - 7)  # another size than at the start
    assert objective.decoder(torch.randn(1, 6, *hidden), other).shape == (1, 3, *other)


@pytest.mark.parametrize("shape", [(1, 28, 28), (4, 9, 13)])
def test_decoders_give_the_form_of_the_input(shape: tuple[int, int, int]) -> None:
    values = ((0.5,) * shape[0], (0.1,) * shape[0])
    x0 = torch.zeros(2, *shape)
    objective = losses.InfoPro(values).build(place(6, 5, 4, x0=x0), nn.CrossEntropyLoss())
    hidden = torch.randn(2, 6, 5, 4)
    assert objective.decoder(hidden).shape == x0.shape
    assert objective(torch.zeros(2, 10), hidden, torch.tensor([0, 1]), x0).isfinite()


def test_contrast_predicts_an_embedding() -> None:
    learner = LocalLearner(LitClassifier(CifarResNet(20)), METHODS["infopro-contrast"](), 3)
    learner.build(IMAGES)
    first = learner.local_modules[0]
    assert first.head(torch.randn(2, 16, 32, 32)).shape == (2, 128)
    assert first.objective.criterion is None
