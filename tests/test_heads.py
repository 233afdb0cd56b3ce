"""Heads: shapes for every layout, what they may not see, batches of one sample."""

import pytest
import torch
from torch import nn

from lightning_local import heads
from lightning_local.dryrun import Boundary
from lightning_local.layers import BatchNorm1d, BatchNorm2d
from lightning_local.place import Place

FORMS = {
    "vector": ((5,), 1),
    "maps": ((16, 8, 6), 1),
    "maps, channels last": ((8, 6, 16), 3),
    "sequence, channels first": ((16, 9), 1),
    "tokens": ((9, 16), 2),
    "volume": ((4, 3, 5, 6), 1),
}


def place(form, pools=True, out=7, k=0, num_modules=3):
    shape, channel_dim = FORMS[form]
    return Place(k, num_modules, Boundary(shape, channel_dim), out, pools, 0, [])


def hidden(form, n=4):
    return torch.randn(n, *FORMS[form][0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", [heads.Linear(), heads.Conv(), heads.Augmented(depth=0)])
def test_one_prediction_per_sample_from_every_layout(form, head):
    module = head.build(place(form))
    x = hidden(form)
    assert module(x).shape == (4, 7)
    for n in (1, 3):
        assert module.train()(hidden(form, n)).isfinite().all()
    x.requires_grad_()
    module.eval()(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("head", [heads.Linear(), heads.Conv()])
def test_a_prediction_per_token_sees_its_own_token_alone(head):
    module = head.build(place("tokens", pools=False)).eval()
    x = hidden("tokens")
    assert module(x).shape == (4, 9, 7)
    changed = x.clone()
    changed[:, 5] += 1.0
    same = (module(x) == module(changed)).all(-1)
    assert same[:, [t for t in range(9) if t != 5]].all()
    assert not same[:, 5].any()


def test_the_published_convolution_heads():
    sizes = {16: (32, (2, 2)), 32: (64, (2, 2)), 64: (64, (1, 1)), 256: (256, (1, 1))}
    for channels, (width, stride) in sizes.items():
        boundary = Boundary((channels, 8, 8), 1)
        module = heads.Conv().build(Place(0, 2, boundary, 10, True, 0, []))
        conv = next(m for m in module if isinstance(m, nn.Conv2d))
        assert (conv.out_channels, conv.stride, conv.bias) == (width, stride, None)
        linears = [m.out_features for m in module if isinstance(m, nn.Linear)]
        assert linears == [128, 10]


@pytest.mark.parametrize(
    ("norm", "shape"), [(BatchNorm1d(3), (1, 3)), (BatchNorm2d(3), (1, 3, 1, 1))]
)
def test_one_value_per_channel_is_normalised_by_running_statistics(norm, shape):
    norm.running_mean.fill_(0.5)
    x = torch.randn(shape)
    found = norm.train()(x)
    assert torch.equal(found, norm.eval()(x))
    assert norm.running_mean.eq(0.5).all()
    many = torch.randn(4, *shape[1:])
    plain = type(norm).__mro__[1](3).train()
    plain.load_state_dict({**norm.state_dict()})
    assert torch.equal(norm.train()(many), plain(many))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: heads.Conv(hidden_features=0), "hidden_features=0"),
        (lambda: heads.Augmented(depth=-1), "depth=-1"),
        (lambda: heads.Augmented(depth=1.5), "depth=1.5"),
        (lambda: heads.Augmented(pyramid=2), "pyramid=2"),
        (lambda: heads.Augmented(init="zero"), "init='zero'"),
        (lambda: heads.Augmented(block="conv"), "block='conv'"),
    ],
)
def test_arguments_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
