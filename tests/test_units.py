"""Units as a person would draw them; inputs of a network; where hidden states have channels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from settings import cut_network
from torch import nn
from torch.nn import functional

from lightning_local import Partition
from lightning_local.cutting import Cutting

D = 6
IMAGE, VECTOR, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(4, D), torch.randn(4, 5, D)


def net(forward: Callable[..., torch.Tensor], **modules: nn.Module) -> nn.Module:
    """A network of the user's class with these modules and this forward."""
    network = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in modules.items():
        setattr(network, name, module)
    return network


def linear(outputs: int = D) -> nn.Linear:
    return nn.Linear(D, outputs)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def cut(network: nn.Module, *inputs: torch.Tensor, **request) -> Cutting:
    return cut_network(network, Partition(**request), inputs)


def composed(bodies, *inputs: torch.Tensor) -> torch.Tensor:
    values = inputs
    for body in bodies:
        values = body(*values)
    return values


def units(network: nn.Module, x: torch.Tensor, **request) -> list[str]:
    """Names after which units end; checks that the units, chained, are the network."""
    cutting = cut(network, x, **request)
    assert cutting.split_points == cutting.unit_points
    network.eval()
    assert torch.equal(composed(cutting.units, x), network(x))
    return list(cutting.unit_points)


# ---------------------------------------------------------------------- units


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


# ---------------------------------------------------------------------- layouts


def test_the_layout_of_each_boundary():
    network = nn.Sequential(conv(3, D), nn.ReLU(), conv(D, 8), nn.Flatten(), nn.Linear(512, 2))
    forms = cut(network, IMAGE, split_points=["0", "1", "3"]).boundaries
    assert [(f.shape, f.channel_dim, f.channels) for f in forms] == [
        ((D, 8, 8), 1, D),
        ((D, 8, 8), 1, D),
        ((512,), 1, 512),
    ]
    assert [f.space for f in forms] == [(8, 8), (8, 8), ()]

    def channels_last(self, x):
        x = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return self.fc(self.tokens(x.flatten(1, 2)).mean(1))

    layers = {"conv": conv(3, D), "norm": nn.LayerNorm(D), "mlp": linear(), "tokens": linear()}
    network = net(channels_last, **layers, fc=linear(2))
    forms = cut(network, IMAGE, split_points=[*layers]).boundaries
    assert [f.channel_dim for f in forms] == [3, 3, 2, 1]
    assert [f.shape for f in forms] == [(8, 8, D), (8, 8, D), (64, D), (D,)]


def recurrent() -> nn.Module:
    """Nothing tells where the hidden state between the two recurrences has its features."""
    return net(
        lambda self, x: self.b(self.a(self.second(self.first(x)[0])[0].mean(1))),
        first=nn.GRU(D, D, batch_first=True),
        second=nn.GRU(D, D, batch_first=True),
        a=linear(),
        b=linear(),
    )


def test_an_ambiguous_layout_is_an_error_where_a_cut_is_made():
    with pytest.raises(ValueError, match=r"`first` has shape \(4, 5, 6\).*layout='channels_last'"):
        cut(recurrent(), TOKENS, split_points=["first"])
    for layout, dim in (("channels_last", 2), ("channels_first", 1)):
        forms = cut(recurrent(), TOKENS, split_points=["first", "a"], layout=layout).boundaries
        assert [f.channel_dim for f in forms] == [dim, 1]
    assert cut(recurrent(), TOKENS, split_points=["a"]).boundaries[0].channels == D


class TokenNorm(nn.LayerNorm):
    """A subclass of the user's, which may do anything."""


class MapNorm(nn.BatchNorm2d):
    """Another one."""


@pytest.mark.parametrize(("width", "dim"), [(D, 2), (5, 0)])
def test_a_subclass_has_its_channels_where_their_number_is(width, dim):
    """Tokens are (5, D) here, so 5 features could be either dimension."""
    tokens = torch.randn(4, 5, width)
    network = nn.Sequential(TokenNorm(width), nn.ReLU(), TokenNorm(width))
    if dim:
        assert cut(network, tokens, split_points=["1"]).boundaries[0].channel_dim == dim
    else:
        with pytest.raises(ValueError, match="not clear: the layers around it .TokenNorm, TokenN"):
            cut(network, tokens, split_points=["1"])
    network = nn.Sequential(MapNorm(3), nn.ReLU(), MapNorm(3))
    assert cut(network, IMAGE, split_points=["1"]).boundaries[0].channel_dim == 1
    # 8 channels of 8 x 8: the convolution before tells what the norm does not.
    network = nn.Sequential(conv(3, 8), MapNorm(8), nn.ReLU(), MapNorm(8), conv(8, 2))
    assert cut(network, IMAGE, split_points=["2"]).boundaries[0].channel_dim == 1


def test_neighbours_that_disagree_about_the_channels():
    network = nn.Sequential(conv(3, 8), nn.Linear(8, 8), conv(8, 2), nn.Flatten())
    network.append(nn.Linear(128, 2))
    with pytest.raises(ValueError, match=r"`0` has shape .*Conv2d, Linear"):
        cut(network, IMAGE, split_points=["0"])


def test_a_hidden_state_without_the_batch_in_front_is_refused():
    network = net(lambda self, x: self.b(self.a(x).transpose(0, 1)).mean(0), a=linear(), b=linear())
    with pytest.raises(ValueError, match=r"`a`.*batch"):
        cut(network, TOKENS, split_points=["a"])


# ---------------------------------------------------------------------- inputs


FORWARDS = {
    "none": lambda self, x, mask=None: self.b(self.a(x if mask is None else x * mask)),
    "keyword only": lambda self, x, *, flip=False: self.b(self.a(-x if flip else x)),
    "number and name": lambda self, x, scale=2.0, mode="a": self.b(self.a(x * scale)),
    "structure": lambda self, x, sizes=(2, 3), more=None: self.b(self.a(x * sizes[1])),
    "any": lambda self, x, *args, **kwargs: self.b(self.a(x)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_arguments_that_the_batch_does_not_give(name):
    network = net(FORWARDS[name], a=linear(), b=linear())
    assert torch.equal(composed(cut(network, VECTOR).bodies, VECTOR), network(VECTOR))


def test_inputs_have_to_fit_the_forward():
    two = net(lambda self, x, y: self.b(self.a(x * y)), a=linear(), b=linear())
    optional = net(FORWARDS["none"], a=linear(), b=linear())
    # A mask for all samples is no batch of one.
    inputs = VECTOR, torch.rand(1, D)
    for network in (two, optional):
        assert torch.equal(composed(cut(network, *inputs).bodies, *inputs), network(*inputs))
    with pytest.raises((TypeError, ValueError), match="y"):
        cut(two, VECTOR)
    with pytest.raises((TypeError, ValueError), match="2 inputs"):
        cut(net(lambda self, x: self.b(self.a(x)), a=linear(), b=linear()), *inputs)
    # BatchNorm needs two samples; one is enough as an example.
    normed = nn.Sequential(linear(), nn.BatchNorm1d(D), linear())
    assert cut(normed, VECTOR[:1]).split_points == ("1",)
