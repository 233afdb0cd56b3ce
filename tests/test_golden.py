"""Golden values of the papers' code, and head forms written down by hand.

Parameter counts need no weights: ResNet-110 is cut once, and its heads are made on the meta device.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from networks import CLASSES, Cnn, Vit
from settings import batches, learner_of, make
from torch import nn
from torch.nn import functional

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, heads, methods
from lightning_local.augmented import ResidualBlock, sample_units
from lightning_local.place import Place, Unit

IMAGES = torch.zeros(2, 3, 32, 32)
RESNET_32 = [806_412, 1_341_058, 1_511_608, 1_705_390, 1_684_388, 1_727_898]
RESNET_110 = [3_166_354, 5_941_576, 7_240_702, 9_044_468, 10_279_466, 12_466_400]
# Depth of each head, as (depth, number of heads that have it), for d = 1..6.
DEPTHS_16 = [
    [(1, 14)],
    [(2, 13)],
    [(3, 6), (2, 6)],
    [(4, 4), (3, 6), (2, 1)],
    [(5, 3), (4, 4), (3, 3)],
    [(6, 2), (5, 3), (4, 4)],
]
DEPTHS_55 = [
    [(1, 53)],
    [(2, 52)],
    [(3, 25), (2, 26)],
    [(4, 17), (3, 32), (2, 1)],
    [(5, 12), (4, 25), (3, 12)],
    [(6, 10), (5, 19), (4, 19)],
]
D = range(1, 7)


def built(depth: int, method: Any) -> LocalLearner:
    learner = LocalLearner(LitClassifier(CifarResNet(depth)), method)
    learner.build(IMAGES)
    return learner


@functools.cache
def greedy(depth: int) -> LocalLearner:
    return built(depth, methods.Greedy())


def count(modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def heads_of(learner: LocalLearner) -> list[nn.Module]:
    found = [module.head for module in learner.local_modules]
    assert found[-1] is None
    return found[:-1]


def meta_heads(depth: int, head: heads.Head) -> list[nn.Module]:
    """The heads of one unit per module, after the tail is joined, without weights."""
    cutting = greedy(depth).cutting
    ends = (*cutting.unit_boundaries, None)
    units = [Unit(body, ends[i], ends[i + 1]) for i, body in enumerate(cutting.units[1:])]
    num_modules = len(cutting.units) - head.tail_units
    with torch.device("meta"):
        return [
            head.build(Place(k, num_modules, ends[k], 10, True, k, units[k:]))
            for k in range(num_modules - 1)
        ]


def blocks_of(head: nn.Module) -> list[ResidualBlock]:
    return [module for module in head.children() if isinstance(module, ResidualBlock)]


@pytest.mark.parametrize(
    ("depth", "units", "backbone", "linear"),
    [(32, 16, 466_906, 5_270), (110, 55, 1_730_714, 20_220)],
)
def test_greedy_on_the_papers_networks(depth: int, units: int, backbone: int, linear: int) -> None:
    learner = greedy(depth)
    assert learner.num_modules == len(learner.local_modules) == units
    assert count([learner.module]) == backbone
    assert count(heads_of(learner)) == count(learner.local_modules) == linear
    per_stage = (units - 1) // 3
    widths = [16] * (per_stage + 1) + [32] * per_stage + [64] * per_stage
    assert [boundary.channels for boundary in learner.cutting.boundaries] == widths[:-1]


def test_conv_heads_of_resnet32() -> None:
    assert count(heads_of(built(32, methods.BackLink()))) == 388_374
    assert count(meta_heads(110, heads.Conv())) == 19 * 10_186 + 18 * 28_170 + 17 * 46_602


@pytest.mark.parametrize("d", [2, 5])
def test_auglocal_resnet32_built_by_the_learner(d: int) -> None:
    learner = built(32, methods.AugLocal(depth=d))
    assert learner.num_modules == 16 - d
    assert count(heads_of(learner)) == RESNET_32[d - 1]
    depths = [len(blocks_of(head)) for head in heads_of(learner)]
    assert depths == [depth for depth, times in DEPTHS_16[d - 1] for _ in range(times)]


def test_auglocal_resnet110_built_by_the_learner() -> None:
    learner = built(110, methods.LocalMethod(head=heads.Augmented(2)))
    assert learner.num_modules == 53
    assert count(heads_of(learner)) == RESNET_110[1]


@pytest.mark.parametrize("d", D)
@pytest.mark.parametrize(
    ("depth", "golden", "depths"), [(32, RESNET_32, DEPTHS_16), (110, RESNET_110, DEPTHS_55)]
)
def test_auglocal_counts(depth: int, golden: list[int], depths: Any, d: int) -> None:
    found = meta_heads(depth, heads.Augmented(d))
    assert len(found) == {32: 16, 110: 55}[depth] - d - 1
    expected = [own for own, times in depths[d - 1] for _ in range(times)]
    assert [len(blocks_of(head)) for head in found] == expected
    assert count(found) == golden[d - 1]
    for head in found:
        # The last sampled unit is the network's last one, of 64 channels.
        assert blocks_of(head)[-1].conv2.out_channels == 64
        assert sum(isinstance(m, nn.BatchNorm1d) for m in head.children()) == (d <= 1)


@pytest.mark.parametrize(
    ("unit", "n", "depth", "expected"),
    [
        *(
            (unit, 16, 2, [middle, 15])
            for unit, middle in ((0, 8), (1, 8), (5, 10), (9, 12), (12, 14))
        ),
        (0, 16, 5, [3, 6, 9, 12, 15]),
        (1, 16, 5, [4, 7, 9, 12, 15]),
        (5, 16, 5, [7, 9, 11, 13, 15]),
        (9, 16, 5, [10, 11, 13, 14, 15]),
        (0, 55, 3, [18, 36, 54]),
        (1, 55, 3, [19, 36, 54]),
        (5, 55, 3, [21, 38, 54]),
        (9, 55, 3, [24, 39, 54]),
        (50, 55, 3, [51, 53, 54]),
        (13, 16, 5, [14, 15]),
        (14, 16, 1, [15]),
    ],
)
def test_sampled_units(unit: int, n: int, depth: int, expected: list[int]) -> None:
    assert sample_units(unit, n, depth) == expected


def test_sampled_units_end_at_the_last_one() -> None:
    for n in (2, 5, 16, 55):
        for unit in range(n - 1):
            for depth in range(1, 8):
                found = sample_units(unit, n, depth)
                assert found[-1] == n - 1
                assert len(found) == len(set(found)) == min(depth, n - 1 - unit)
                assert found == sorted(found)
                assert found[0] > unit


@pytest.mark.parametrize(
    ("depth", "d", "expected"),
    [
        (32, 1, [(64, 2)]),
        (32, 2, [(32, 2), (64, 2)]),
        (32, 5, [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]),
        (110, 3, [(16, 1), (32, 2), (64, 2)]),
    ],
)
def test_strides_of_the_first_head(depth: int, d: int, expected: list[tuple[int, int]]) -> None:
    blocks = blocks_of(meta_heads(depth, heads.Augmented(d))[0])
    assert [(block.conv2.out_channels, block.conv1.stride[0]) for block in blocks] == expected


@pytest.mark.parametrize(("d", "pyramid", "expected"), [(4, 0.0, 4), (0, 0.0, 0), (0, 0.5, 1)])
def test_depth_without_a_pyramid(d: int, pyramid: float, expected: int) -> None:
    """Pyramid 0 is the same depth everywhere; depth 0 needs it, else every head has 1 unit."""
    head = heads.Augmented(d, pyramid=pyramid)
    assert [head.depth_at(k, 12) for k in range(11)] == [expected] * 11


def test_two_modules_have_no_line_to_fall_along() -> None:
    assert heads.Augmented(5).depth_at(0, 2) == 5


def test_depth_zero_is_greedys_head_and_a_batch_norm() -> None:
    norms = sum(2 * width for width in [16] * 6 + [32] * 5 + [64] * 4)
    found = meta_heads(32, heads.Augmented(0, pyramid=0.0))
    assert len(found) == 15
    assert count(found) == 5_270 + norms


@pytest.mark.parametrize(
    "head", [heads.Augmented(2), heads.Augmented(2, init="copy"), heads.Augmented(1, block="copy")]
)
def test_heads_share_no_storage(head: heads.Head) -> None:
    for network in (Cnn, Vit):
        learner = learner_of(make(network), methods.LocalMethod(head))
        groups = [learner.module, *(module.head for module in learner.local_modules if module.head)]
        seen: set[int] = set()
        for group in groups:
            tensors = [*group.parameters(), *group.buffers()]
            own = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
            assert own, network
            assert not own & seen, network
            seen |= own


def test_copied_units_start_from_the_networks_weights() -> None:
    learner = learner_of(make(Cnn), methods.AugLocal(depth=2, init="copy"))
    last = learner.module.net.blocks[4].conv.weight
    fresh = learner_of(make(Cnn), methods.AugLocal(depth=2))
    for head, other in zip(heads_of(learner), heads_of(fresh), strict=True):
        assert any(torch.equal(p, last) for p in head.parameters() if p.shape == last.shape)
        assert not any(torch.equal(p, last) for p in other.parameters() if p.shape == last.shape)


def conv_by_hand(w: list[torch.Tensor], x: torch.Tensor, stride: int) -> torch.Tensor:
    x = functional.conv2d(x, w[0], stride=stride, padding=1)
    x = functional.batch_norm(x, None, None, w[1], w[2], training=True)
    x = x.clamp(min=0).mean((2, 3)) @ w[3].T + w[4]
    return x.clamp(min=0) @ w[5].T + w[6]


def block_by_hand(w: list[torch.Tensor], x: torch.Tensor, stride: int) -> torch.Tensor:
    def norm(x: torch.Tensor, i: int) -> torch.Tensor:
        return functional.batch_norm(x, None, None, w[i], w[i + 1], training=True)

    out = norm(functional.conv2d(x, w[0], stride=stride, padding=1), 1).clamp(min=0)
    out = norm(functional.conv2d(out, w[3], padding=1), 4)
    if len(w) > 6:
        x = norm(functional.conv2d(x, w[6], stride=stride), 7)
    return (out + x).clamp(min=0)


def test_heads_compute_what_the_papers_say() -> None:
    torch.manual_seed(0)
    place = functools.partial(Place, 0, 3, out_features=CLASSES, pools=True, unit=0, later=())
    for channels, stride in ((16, 2), (64, 1)):
        x = torch.randn(4, channels, 8, 8)
        form = type(greedy(32).cutting.boundaries[0])((channels, 8, 8), 1)
        linear = heads.Linear().build(place(form))
        weight, bias = linear.parameters()
        torch.testing.assert_close(linear(x), x.mean((2, 3)) @ weight.T + bias)
        conv = heads.Conv().build(place(form))
        expected = conv_by_hand(list(conv.parameters()), x, stride)
        torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)  # float32
        for width, step in ((channels, 1), (2 * channels, 2)):
            block = ResidualBlock(channels, width, step)
            expected = block_by_hand(list(block.parameters()), x, step)
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_tokens_pool_over_the_sequence() -> None:
    learner = learner_of(make(Vit), methods.Greedy())
    x = batches(Vit, 1)[0][0]
    hidden = learner.module.net.embed(x)
    head = learner.local_modules[0].head
    weight, bias = head.parameters()
    torch.testing.assert_close(head(hidden), hidden.mean(1) @ weight.T + bias)
