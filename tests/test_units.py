"""Units as a person would draw them, and where hidden states have their channels."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_local import Partition
from lightning_local.partition import Cutting, cut_network

D = 6


def cut(network: nn.Module, x: torch.Tensor, **request) -> Cutting:
    return cut_network(network, Partition(**request), [x])


def units(network: nn.Module, x: torch.Tensor, **request) -> list[str]:
    """Names after which units end; checks that the units, chained, are the network."""
    cutting = cut(network, x, **request)
    assert cutting.split_points == cutting.unit_points
    network.eval()
    values = (x,)
    for unit in cutting.units:
        values = unit(*values)
    assert torch.equal(values, network(x))
    return list(cutting.unit_points)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(inputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return functional.relu(self.norm(self.conv(x)))


class TokenBlock(nn.Module):
    """Causal attention by hand and an MLP, both with two weights or more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x, mask=None):
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


IMAGE, VECTOR, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(4, D), torch.randn(2, 5, D)


def test_an_mlp_has_a_unit_per_linear_layer():
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, D),
        nn.BatchNorm1d(D),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(D, D),
        nn.ReLU(),
        nn.Linear(D, 2),
    )
    assert units(network, IMAGE) == ["4", "6"]


def test_a_stack_of_convolutions():
    network = nn.Sequential(
        conv(3, D),
        nn.BatchNorm2d(D),
        nn.ReLU(),
        conv(D, D),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(D, D),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(D, D),
        nn.ReLU(),
        nn.Linear(D, 2),
    )
    # Both linear layers follow the last hidden state with space: one unit with the last convolution.
    assert units(network, IMAGE) == ["2", "5"]


class Glued(nn.Module):
    """Activations, pools and reshapes as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, D), conv(D, D), conv(D, D)
        self.fc = nn.Linear(D, 2)

    def forward(self, x):
        x = functional.relu(self.first(x))
        x = functional.max_pool2d(functional.relu(self.second(x)), 2)
        return self.fc(functional.relu(self.third(x)).mean((2, 3)))


def test_functional_glue_belongs_to_the_module_before_it():
    cutting = cut(Glued(), IMAGE)
    assert units(Glued(), IMAGE) == ["first", "second"]
    assert [b.shape for b in cutting.boundaries] == [(D, 8, 8), (D, 4, 4)]
    hidden = cutting.bodies[0](IMAGE)[0]
    assert (hidden >= 0).all()


class Functional(nn.Module):
    """Weights without modules, between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.drop = nn.Dropout()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        return self.last(self.drop(functional.linear(self.first(x).relu(), self.weight)))


def test_a_weight_used_by_a_function_opens_a_unit():
    assert units(Functional(), VECTOR) == ["drop"]


class Downsampling(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 2, 2)

    def forward(self, x):
        return self.conv(x)


def nested() -> nn.Module:
    stages = OrderedDict(
        stage1=nn.Sequential(ConvBlock(D, D), ConvBlock(D, D)),
        down=Downsampling(D, 8),
        stage2=nn.Sequential(nn.Sequential(ConvBlock(8, 8)), ConvBlock(8, 8)),
        end=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    return nn.Sequential(
        OrderedDict(stem=nn.Sequential(conv(3, D), nn.ReLU()), body=nn.Sequential(stages))
    )


def test_blocks_in_nested_containers():
    expected = ["stem.1", "body.stage1.0", "body.stage1.1", "body.down.conv", "body.stage2.0.0"]
    assert units(nested(), IMAGE) == expected
    finest = [
        "stem.1",
        "body.stage1.0.norm",
        "body.stage1.1.norm",
        "body.down.conv",
        "body.stage2.0.0.norm",
    ]
    assert units(nested(), IMAGE, granularity="finest") == finest
    whole = ["stem.1", "body.stage1", "body.down.conv", "body.stage2.0.0"]
    assert units(nested(), IMAGE, leaves=["body.stage1"]) == whole


class Residual(nn.Module):
    """A block of several weights with a path around them, and one behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(D, 8), nn.Linear(8, D), nn.Linear(D, D)

    def forward(self, x):
        return self.out(x + self.down(self.up(x).relu()))


class Subclassed(nn.Sequential):
    """A user's container of blocks that is an nn.Sequential, with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("container", [nn.Sequential, Subclassed])
def test_blocks_are_split_by_finest_only(container):
    network = nn.Sequential(nn.Linear(D, D), container(Residual(), Residual()), nn.Linear(D, 2))
    assert units(network, VECTOR) == ["0", "1.0", "1.1"]
    finest = ["0", "1.0.down", "1.0.out", "1.1.down", "1.1.out"]
    assert units(network, VECTOR, granularity="finest") == finest


class ByName(nn.Module):
    """Blocks in a ModuleDict and a ModuleList, run by the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.named = nn.ModuleDict({"a": Residual(), "b": Residual()})
        self.listed = nn.ModuleList([Residual(), Residual()])
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.named.values():
            x = block(x)
        for block in self.listed:
            x = block(x)
        return self.head(x)


def test_blocks_by_name_and_by_number():
    assert units(ByName(), VECTOR) == ["stem", "named.a", "named.b", "listed.0", "listed.1"]


class Gpt(nn.Module):
    """A language model; `mask` makes what the blocks get besides the hidden state."""

    def __init__(self, mask=None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, D), nn.Embedding(16, D)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(TokenBlock() for _ in range(3))
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, 9, bias=False)
        self.mask = mask

    def forward(self, ids):
        t = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device))
        x = self.drop(x)
        mask = None if self.mask is None else self.mask(x, t)
        for block in self.blocks:
            x = block(x, mask)
        return self.lm_head(self.norm(x))


MASKS = {
    "none": None,
    "full": lambda x, t: torch.full((t, t), -1e9, device=x.device).triu(1),
    "new_full": lambda x, t: x.new_full((t, t), -1e9).triu(1),
    "ones_like": lambda x, t: torch.ones_like(x[0] @ x[0].T).triu(1) * -1e9,
    "cast": lambda x, t: torch.full((t, t), -1e9).triu(1).to(x.dtype),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_language_model(mask):
    ids = torch.randint(9, (2, 5))
    network = Gpt(MASKS[mask])
    # Both embeddings open; norm and lm_head, whose output is as wide as the hidden states, close.
    assert units(network, ids) == ["drop", "blocks.0", "blocks.1"]
    cutting = cut(network, ids)
    assert {(b.shape, b.channel_dim) for b in cutting.boundaries} == {((5, D), 2)}
    assert tuple(cutting.output.shape) == (2, 5, 9)
    carried = 0 if mask == "none" else 1
    assert [body.num_carried for body in cutting.bodies] == [0, carried, carried, carried]


# ---------------------------------------------------------------------- layouts


class Permuted(nn.Module):
    """Convolution, then channels last, as in Swin; tokens behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, D)
        self.norm, self.mlp = nn.LayerNorm(D), nn.Linear(D, D)
        self.tokens, self.fc = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        x = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return self.fc(self.tokens(x.flatten(1, 2)).mean(1))


def test_the_layout_of_each_boundary():
    network = nn.Sequential(conv(3, D), nn.ReLU(), conv(D, 8), nn.Flatten(), nn.Linear(512, 2))
    forms = cut(network, IMAGE, split_points=["0", "1", "3"]).boundaries
    assert [(f.shape, f.channel_dim, f.channels) for f in forms] == [
        ((D, 8, 8), 1, D),
        ((D, 8, 8), 1, D),
        ((512,), 1, 512),
    ]
    assert [f.space for f in forms] == [(8, 8), (8, 8), ()]
    forms = cut(Permuted(), IMAGE, split_points=["conv", "norm", "mlp", "tokens"]).boundaries
    assert [f.channel_dim for f in forms] == [3, 3, 2, 1]
    assert [f.shape for f in forms] == [(8, 8, D), (8, 8, D), (64, D), (D,)]
