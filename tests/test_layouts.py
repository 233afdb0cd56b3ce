"""Where hidden states have their channels, and what is refused where that is not clear."""

from __future__ import annotations

import pytest
import torch
from sketches import IMAGE, TOKENS, D, conv, cut, linear, net
from torch import nn


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
