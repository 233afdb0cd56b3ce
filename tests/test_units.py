"""Units as a person would draw them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from settings import cut_network
from sketches import IMAGE, VECTOR, D, composed, conv, cut, linear, net
from torch import nn
from torch.nn import functional

from examples.image_classification import CifarResNet
from lightning_local import Partition


def units(network: nn.Module, x: torch.Tensor, **request) -> list[str]:
    """Names after which units end; checks that the units, chained, are the network."""
    cutting = cut(network, x, **request)
    assert cutting.split_points == cutting.unit_points
    network.eval()
    assert torch.equal(composed(cutting.units, x), network(x))
    return list(cutting.unit_points)


def test_an_mlp_has_a_unit_per_linear_layer():
    first = [nn.Flatten(), nn.Linear(192, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout()]
    network = nn.Sequential(*first, linear(), nn.ReLU(), linear(2))
    assert units(network, IMAGE) == ["4", "6"]


def test_a_stack_of_convolutions():
    stem = [conv(3, D), nn.BatchNorm2d(D), nn.ReLU()]
    middle = [conv(D, D), nn.ReLU(), nn.MaxPool2d(2), conv(D, D), nn.ReLU()]
    classifier = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(), nn.ReLU(), linear(2)]
    # Both linear layers follow the last hidden state with space: they go with it.
    assert units(nn.Sequential(*stem, *middle, *classifier), IMAGE) == ["2", "5"]
    # A network whose output has space ends the same way.
    assert units(nn.Sequential(*stem, *middle[:3], conv(D, 2)), IMAGE) == ["2"]


def test_functional_glue_belongs_to_the_module_before_it():
    def forward(self, x):
        x = functional.relu(self.first(x))
        x = functional.max_pool2d(functional.relu(self.second(x)), 2)
        return self.fc(functional.relu(self.third(x)).mean((2, 3)))

    network = net(forward, first=conv(3, D), second=conv(D, D), third=conv(D, D), fc=linear(2))
    assert units(network, IMAGE) == ["first", "second"]
    cutting = cut(network, IMAGE)
    assert [b.shape for b in cutting.boundaries] == [(D, 8, 8), (D, 4, 4)]
    assert (cutting.bodies[0](IMAGE)[0] >= 0).all()


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(inputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return functional.relu(self.norm(self.conv(x)))


def test_blocks_in_nested_containers():
    parts = OrderedDict(
        stage1=nn.Sequential(ConvBlock(D, D), ConvBlock(D, D)),
        down=net(lambda self, x: self.conv(x), conv=nn.Conv2d(D, 8, 2, 2)),
        stage2=nn.Sequential(nn.Sequential(ConvBlock(8, 8)), ConvBlock(8, 8)),
        end=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    stem = nn.Sequential(conv(3, D), nn.ReLU())
    network = nn.Sequential(OrderedDict(stem=stem, body=nn.Sequential(parts)))
    first, second = ["stem.1"], ["body.down.conv", "body.stage2.0.0"]
    assert units(network, IMAGE) == [*first, "body.stage1.0", "body.stage1.1", *second]
    assert units(network, IMAGE, leaves=["body.stage1"]) == [*first, "body.stage1", *second]
    finest = units(network, IMAGE, granularity="finest")
    inner = [f"body.stage1.{i}.norm" for i in (0, 1)]
    assert finest == [*first, *inner, "body.down.conv", "body.stage2.0.0.norm"]


class Residual(nn.Module):
    """A block of several weights with a path around two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = linear(8), nn.Linear(8, D), linear()

    def forward(self, x):
        return self.out(x + self.down(self.up(x).relu()))


class Subclassed(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("container", [nn.Sequential, Subclassed])
def test_blocks_are_split_by_finest_only(container):
    network = nn.Sequential(linear(), container(Residual(), Residual()), linear(2))
    assert units(network, VECTOR) == ["0", "1.0", "1.1"]
    finest = ["0", "1.0.down", "1.0.out", "1.1.down", "1.1.out"]
    assert units(network, VECTOR, granularity="finest") == finest


def test_blocks_by_name_and_by_number():
    def forward(self, x):
        x = self.stem(x)
        for block in (*self.named.values(), *self.listed):
            x = block(x)
        return self.head(x)

    named = nn.ModuleDict({"a": Residual(), "b": Residual()})
    listed = nn.ModuleList([Residual(), Residual()])
    network = net(forward, stem=linear(), named=named, listed=listed, head=linear(2))
    assert units(network, VECTOR) == ["stem", "named.a", "named.b", "listed.0", "listed.1"]


class TokenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(linear(), nn.GELU(), linear())

    def forward(self, x, mask=None):
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


MASKS = {
    "none": None,
    "full": lambda x, t: torch.full((t, t), -1e9, device=x.device).triu(1),
    "new_full": lambda x, t: x.new_full((t, t), -1e9).triu(1),
    "zeros_like": lambda x, t: torch.zeros_like(x[0, :, :1] * x[0, :, 0]),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_language_model(mask):
    def forward(self, ids):
        t = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device))
        x = self.drop(x)
        attended = MASKS[mask] and MASKS[mask](x, t)
        for block in self.blocks:
            x = block(x, attended)
        return self.lm_head(self.norm(x))

    network = net(
        forward,
        tokens=nn.Embedding(9, D),
        positions=nn.Embedding(16, D),
        drop=nn.Dropout(0.1),
        blocks=nn.ModuleList(TokenBlock() for _ in range(3)),
        norm=nn.LayerNorm(D),
        lm_head=linear(9),
    )
    ids = torch.randint(9, (2, 5))
    # Both embeddings open the first unit; norm and lm_head belong to the last block.
    assert units(network, ids) == ["drop", "blocks.0", "blocks.1"]
    cutting = cut(network, ids)
    assert {(b.shape, b.channel_dim) for b in cutting.boundaries} == {((5, D), 2)}
    assert tuple(cutting.output.shape) == (2, 5, 9)
    # The causal mask doesn't depend on a weight, whatever it was made from.
    carried = 0 if mask == "none" else 1
    assert [body.num_carried for body in cutting.bodies] == [0, carried, carried, carried]


@pytest.mark.parametrize(("depth", "units"), [(32, 16), (110, 55)])
def test_units_of_the_papers_resnets(depth, units):
    cutting = cut_network(CifarResNet(depth), Partition(), [torch.zeros(2, 3, 16, 16)])
    assert len(cutting.bodies) == units
    assert cutting.unit_points == cutting.split_points
    assert cutting.split_points[:3] == ("relu", "layer1.0", "layer1.1")
