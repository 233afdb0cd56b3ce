"""fast_second_derivatives: torch's second derivatives, bit-equal first ones, and really used."""

import copy
import gc
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
from networks import Cnn, ResBlock
from settings import batches, fit, learner_of, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_local import couplings, heads, second_order
from lightning_local.methods import LocalMethod
from lightning_local.second_order import fast_second_derivatives, graph_nodes


def functions(gradient):
    """Ours and torch's in the graph of a first gradient; one with a new name would be missed."""
    names = [node.name() for node in graph_nodes(gradient.grad_fn)]
    fast = sum(name in ("_ConvolutionBackward", "_BatchNormBackward") for name in names)
    slow = [name for name in names if name.endswith("BackwardBackward0")]
    return fast, sum("Convolution" in name or "BatchNorm" in name for name in slow)


def differentiated_twice(net, x, fast, autocast=None):
    """First gradient and buffers, second gradients, and the functions that made them."""
    net, x = copy.deepcopy(net), x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
        y = net(x)
    loss = 100 * y.to(x.dtype).pow(3).mean()
    with fast_second_derivatives(loss) if fast else nullcontext():
        own = torch.autograd.grad(loss, x, create_graph=True)[0]
    received = torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
    (loss + (own - received).square().sum()).backward()
    second = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return {"": own.detach(), **dict(net.named_buffers())}, {"": x.grad, **second}, functions(own)


def close(found, expected, tolerance):
    """Two ways of rounding: `tolerance` is relative to a tensor's largest entry; 0 is bit-equal."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = tolerance * tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


def compare(net, x, expected, slow=0, tolerance=1e-10, first=0.0, autocast=None):
    """With and without: of the functions, `expected` become ours and `slow` stay torch's."""
    torchs, its_second, functions_before = differentiated_twice(net, x, False, autocast)
    ours, second, functions_after = differentiated_twice(net, x, True, autocast)
    assert (functions_before, functions_after) == ((0, expected + slow), (expected, slow))
    close(ours, torchs, first)
    close(second, its_second, tolerance)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


CONVOLUTIONS = [
    (nn.Conv1d, {"padding": "same", "dilation": 3, "bias": False}),
    (nn.Conv1d, {"padding": "valid", "stride": 3, "dilation": 2}),
    (nn.Conv2d, {"stride": 2, "padding": 1, "bias": False}),
    (nn.Conv2d, {"padding": (1, 0), "groups": 4, "dilation": (1, 2)}),
    (nn.Conv3d, {"padding": (1, 0, 2), "stride": 2}),
    (nn.Conv3d, {"padding": "same", "groups": 2, "bias": False}),
    (nn.ConvTranspose1d, {}),
    (nn.ConvTranspose2d, {"stride": 2, "padding": 1, "output_padding": 1, "bias": False}),
    (nn.ConvTranspose3d, {"stride": 2, "groups": 4, "dilation": 2}),
]


@pytest.mark.parametrize(("cls", "options"), CONVOLUTIONS)
def test_convolutions(cls, options):
    net = nn.Sequential(cls(4, 8, 3, **options), nn.Tanh()).double()
    shape = (9, 8, 7)[: net[0].weight.dim() - 2]
    compare(net, normal(3, 4, *shape), 1)
    compare(net, normal(4, *shape), 1)  # without a batch


NORMS = [
    (nn.BatchNorm1d, (6, 5), {}),
    (nn.BatchNorm1d, (4, 5, 7), {"momentum": None, "eps": 0.3}),
    (nn.BatchNorm2d, (3, 5, 4, 6), {"affine": False}),
    (nn.BatchNorm2d, (1, 5, 4, 6), {"track_running_stats": False}),
    (nn.BatchNorm3d, (2, 5, 3, 4, 2), {}),
    (nn.BatchNorm3d, (2, 5, 3, 4, 2), {"affine": False, "track_running_stats": False}),
    (nn.InstanceNorm2d, (2, 5, 3, 4), {"affine": True}),  # torch's batch norm, on other shapes
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("cls", "shape", "options"), NORMS)
def test_norms(cls, shape, options, training):
    norm = cls(5, **options).double()
    for tensor in filter(torch.is_floating_point, [*norm.parameters(), *norm.buffers()]):
        nn.init.uniform_(tensor, -1 if tensor.requires_grad else 0.5, 2)
    net = nn.Sequential(nn.Tanh(), norm, nn.Tanh()).train(training)
    fast = training or norm.running_mean is None  # it uses the batch's statistics
    for bias in (norm.bias, None):  # an undefined one is a case of its own in torch
        norm.bias = bias
        compare(net, 2 * normal(*shape) + 1, int(fast), int(not fast))


@pytest.mark.parametrize("frozen", ["conv1", "bn1", "conv2", "bias", ""])
def test_frozen_weights(frozen):
    net = ResBlock(4, 8, 2).double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(frozen not in name)  # "" is in all
    compare(net, normal(3, 4, 8, 8), 5)


def test_a_shared_and_parametrised_weight():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    compare(nn.Sequential(conv, nn.Tanh(), conv, nn.Tanh()).double(), normal(2, 3, 6, 6), 2)


@pytest.mark.parametrize("with_input", [True, False])
def test_first_gradients_of_weights(with_input):
    """Torch's part and ours add up; without the input's gradient the first layer is torch's."""
    layers = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 2)
    net, x = nn.Sequential(*layers).double(), normal(3, 3, 6, 6).requires_grad_(with_input)
    inputs, found = [*net.parameters(), *([x] if with_input else [])], []
    for fast in (False, True):
        loss = net(x).pow(3).sum()
        with fast_second_derivatives(loss) if fast else nullcontext():
            first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append(dict(enumerate(second)))
    close(*found, 1e-10)


def test_channels_last():
    net = ResBlock(4, 8, 2).double().to(memory_format=torch.channels_last)
    compare(net, normal(5, 4, 8, 8).to(memory_format=torch.channels_last), 5)


def test_autocast():  # both ways round to 8 bits, at other places
    compare(ResBlock(4, 8, 2), torch.randn(5, 4, 8, 8), 5, tolerance=0.05, autocast=torch.bfloat16)


class Checkpointed(ResBlock):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_segment_stays_torchs():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Checkpointed(4, 8)).double()
    compare(net, normal(3, 3, 8, 8), 1, 5)


def test_a_saved_tensor_under_another_name_leaves_it_to_torch(monkeypatch):
    table = second_order._FAST  # given an `object()`, its functions find nothing to read
    for name, fast in table.items():
        monkeypatch.setitem(table, name, lambda _, g, h, fast=fast: fast(object(), g, h))
    compare(ResBlock(4, 8, 2).double(), normal(3, 4, 8, 8), 0, 5)


@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 2), (True, 1)])
def test_a_convolutions_first_gradient_against_differences(transposed, groups):
    aten, options = torch.ops.aten, [[2, 1], [1, 1], [1, 1], transposed, [0, 0], groups]
    x, w = normal(2, 2, 4, 3), normal(2, 2 // groups, 3, 2).requires_grad_()
    g = normal(*aten.convolution(x, w, None, *options).shape).requires_grad_()

    def first(g, w):
        made = aten.convolution_backward(g, x, w, None, *options, [True, False, False])
        return second_order._Convolution.apply(g, w, made[:1], options)

    assert torch.autograd.gradcheck(first, (g, w))
    assert torch.autograd.gradgradcheck(first, (g, w))


def test_a_third_derivative_of_a_norm_is_refused():
    x = normal(3, 4, 5).requires_grad_()
    with fast_second_derivatives(loss := nn.BatchNorm1d(4).double()(x).pow(3).sum()):
        own = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(own.square().sum(), x, create_graph=True)


def test_nothing_is_kept_alive():
    gc.collect()
    gc.disable()
    try:
        net, x = ResBlock(4, 8, 2), torch.randn(2, 4, 8, 8, requires_grad=True)
        loss = net(x).square().sum()
        with fast_second_derivatives(loss):
            own = torch.autograd.grad(loss, x, create_graph=True)[0]
        kept = [weakref.ref(tensor) for tensor in (x, loss, own)]
        (loss + own.square().sum()).backward()
        del x, loss, own
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("raising", [True, False])
def test_behind_the_block_torch_is_as_it_was(raising):
    x = normal(2, 3, 6, 6).requires_grad_()
    loss = ResBlock(3, 4).double()(x).square().sum()
    with suppress(ZeroDivisionError), fast_second_derivatives(loss):
        inside = torch.autograd.grad(loss, x, create_graph=True)[0]
        1 // (not raising)  # no number if raising
    assert functions(inside) == (5, 0)
    assert functions(torch.autograd.grad(loss, x, create_graph=True)[0]) == (0, 5)


def test_sgr_uses_them():
    class Watched(couplings.GradientReconciliation):
        def _add_penalty(self, work):
            super()._add_penalty(work)
            seen.append(functions(work.loss))

    seen = []
    method = LocalMethod(heads.Linear(), coupling=Watched(weight=0.05))
    fit(learner_of(make(Cnn), method, 3), batches(Cnn, 1))
    assert [fast >= 2 and not slow for fast, slow in seen] == [True, True]
