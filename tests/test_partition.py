"""Requests, split points, and what can't be cut: the error names the thing and the remedy."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, Partition, methods
from lightning_local.partition import Cutting, choose_points, cut_network

D = 6


def linear() -> nn.Linear:
    return nn.Linear(D, D)


class Net(nn.Module):
    """Linear layers a to d, or other modules, behind a forward that a test gives."""

    def __init__(self, forward: Callable[..., torch.Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name in "abcd":
            setattr(self, name, linear())
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def straight(self, x):
    return self.d(self.c(self.b(self.a(x))))


def mlp(n: int = 5) -> nn.Sequential:
    return nn.Sequential(*(linear() for _ in range(n)))


def cut(network: nn.Module, request, *inputs: torch.Tensor, **options) -> Cutting:
    return cut_network(network, Partition.of(request), inputs or (torch.randn(4, D),), **options)


def refused(network: nn.Module, request, *parts: str, kind=ValueError, inputs=()) -> str:
    """The message with which a cut is refused; it holds all `parts`."""
    with pytest.raises(kind) as caught:
        cut(network, request, *inputs)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


# ---------------------------------------------------------------------- requests


def test_requests():
    assert Partition.of("units") == Partition()
    assert Partition.of(3) == Partition(num_modules=3)
    assert Partition.of(["a", "b"]) == Partition(split_points=("a", "b"))
    assert Partition.of(Partition(granularity="finest")).granularity == "finest"
    assert Partition(split_points=["a"], leaves=["b"]) == Partition(None, ("a",), ("b",))
    assert hash(Partition(split_points=["a"])) == hash(Partition(split_points=("a",)))
    with pytest.raises(AttributeError):
        Partition().num_modules = 2


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_modules": 0}, ValueError, "num_modules=0.*1 "),
        ({"num_modules": -2}, ValueError, "num_modules=-2"),
        ({"num_modules": True}, (TypeError, ValueError), "num_modules=True"),
        ({"num_modules": 2.0}, (TypeError, ValueError), "num_modules=2.0"),
        ({"num_modules": "4"}, (TypeError, ValueError), "num_modules='4'"),
        ({"num_modules": 2, "split_points": ["a"]}, ValueError, "num_modules and split_points"),
        ({"split_points": ["a", "b", "a"]}, ValueError, r"\['a'\] twice"),
        ({"split_points": "layer1"}, (TypeError, ValueError), "split_points.*'layer1'"),
        ({"split_points": [1, 2]}, (TypeError, ValueError), "split_points"),
        ({"leaves": "layer1"}, (TypeError, ValueError), "leaves.*'layer1'"),
        ({"granularity": "coarse"}, ValueError, "granularity='coarse'.*blocks.*finest"),
        ({"layout": "NCHW"}, ValueError, "layout='NCHW'.*channels_first"),
    ],
)
def test_wrong_requests(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Partition(**arguments)


@pytest.mark.parametrize("request_", ["unit", "4", 2.5, ["a", 3], None, True])
def test_wrong_values_of_partition(request_):
    with pytest.raises((TypeError, ValueError), match=re.escape(repr(request_))):
        Partition.of(request_)


def test_an_int_makes_runs_of_nearly_equal_length():
    names = [str(i) for i in range(1, 16)]
    assert choose_points(names, Partition(), 0) == tuple(names)
    assert choose_points(names, Partition(num_modules=1), 0) == ()
    for wanted in range(1, 17):
        ends = [int(p) for p in choose_points(names, Partition(num_modules=wanted), 0)]
        lengths = [b - a for a, b in zip([0, *ends], [*ends, 16], strict=True)]
        assert len(lengths) == wanted
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("units", "wanted", "tail", "modules"),
    [
        (16, None, 2, 14),
        (16, 16, 2, 14),
        (16, None, 5, 11),
        (55, None, 2, 53),
        (16, 8, 2, 7),
        (16, 4, 2, 4),
        (16, 4, 4, 3),
        (16, 1, 5, 1),
        (16, None, 14, 2),
    ],
)
def test_the_tail_is_joined_after_the_nominal_cut(units, wanted, tail, modules):
    names = [str(i) for i in range(1, units)]
    points = choose_points(names, Partition(num_modules=wanted), tail)
    assert len(points) + 1 == modules
    assert set(points) <= set(choose_points(names, Partition(num_modules=wanted), 0))
    assert not points or int(points[-1]) <= units - tail - 1


def test_a_tail_that_leaves_nothing_names_the_depth_that_fits():
    names = [str(i) for i in range(1, 16)]
    with pytest.raises(ValueError, match="last 13 units .* 16 units .* at most 11") as caught:
        choose_points(names, Partition(num_modules=4), 12)
    depth = int(re.search(r"at most (\d+)", str(caught.value)).group(1))
    assert len(choose_points(names, Partition(num_modules=4), depth)) == 1
    with pytest.raises(ValueError, match="at most 11"):
        choose_points(names, Partition(num_modules=4), depth + 1)


def test_explicit_split_points_are_never_joined():
    assert cut(mlp(), ["2", "3"], tail_units=3).split_points == ("2", "3")
    assert cut(mlp(), "units", tail_units=3).split_points == ("0",)
    assert cut(mlp(), 2, split_points=["3"]).split_points == ("3",)


def test_more_local_modules_than_units():
    message = refused(mlp(), 6, "partition=6", "5 units", "at most 5")
    assert "'units'" in message
    assert len(cut(mlp(), 5).bodies) == 5


# ---------------------------------------------------------------------- split points


def test_an_unknown_split_point_gets_the_closest_names():
    network = Net(straight, layer1=mlp(2), layer2=mlp(2))
    refused(network, ["layer3"], "`layer3`", "layer1", "layer2")
    refused(network, ["layer1.7"], "layer1.0")
    message = refused(network, Partition(leaves=["layr1"]), "layr1", "layer1")
    assert "Split point" not in message, "it is a leaf"
    with pytest.raises(ValueError, match=r"layer9.*layer1"):
        LocalLearner(Module(network), methods.Greedy(), ["layer9"])


def test_split_points_in_another_order_or_at_one_place():
    refused(mlp(), ["2", "0"], "order", "['0', '2']")
    network = nn.Sequential(mlp(2), mlp(2), linear())
    suggestion = refused(network, ["0", "0.1", "1"], "same place")
    points = re.findall(r"'([\d.]+)'", suggestion.rpartition("pass")[2])
    assert len(cut(network, points).bodies) == 3, "the remedy is no remedy"


@pytest.mark.parametrize(
    ("network", "point"),
    [
        (mlp(), "4"),
        (Net(straight), "d"),
        (Net(lambda self, x: self.b(self.a(x)).log_softmax(1)), "b"),
        (nn.Sequential(linear(), linear(), nn.LogSoftmax(1)), "1"),
        (nn.Sequential(linear(), nn.Sequential(linear(), nn.ReLU())), "1.0"),
    ],
)
def test_a_split_point_that_leaves_no_weight_behind(network, point):
    refused(network, [point], f"`{point}`", "end of the network")


def test_a_split_point_before_the_first_weight():
    message = refused(nn.Sequential(nn.Flatten(), linear(), linear()), ["0"], "`0`", "parameters")
    assert "more than one tensor" not in message


def test_a_submodule_that_is_called_twice_or_never():
    twice = Net(lambda self, x: self.b(self.a(self.a(x))))
    refused(twice, ["a"], "`a`", "2 times")
    refused(twice, ["c"], "`c`", "0 times")
    assert cut(twice, "units").split_points == ()


def test_a_cut_that_several_tensors_cross():
    def skip(self, x):
        x = self.a(x)
        y = self.b(x)
        return self.d(self.c(y) + x)

    message = refused(Net(skip), ["b"], "`b`", "more than one tensor")
    assert "`a`" in message
    assert "`b`" in message.partition("results of")[2]
    assert cut(Net(skip), ["a", "c"]).split_points == ("a", "c")


class Pair(nn.Module):
    def __init__(self, gives: bool) -> None:
        super().__init__()
        self.linear, self.gives = linear(), gives

    def forward(self, x):
        return (self.linear(x), x) if self.gives else self.linear(x[0] + x[1])


def test_a_hidden_state_of_several_tensors():
    network = nn.Sequential(linear(), Pair(True), Pair(False), linear())
    refused(network, ["1"], "`1`", "tuple")
    assert cut(network, "units").split_points == ("0", "2")


# ---------------------------------------------------------------------- tied parameters, hooks


def test_parameters_tied_across_a_cut():
    language = nn.Sequential(nn.Embedding(9, D), linear(), linear(), nn.Linear(D, 9, bias=False))
    language[3].weight = language[0].weight
    ids = torch.randint(9, (4, 5))
    message = refused(language, ["1"], "`3.weight`", "`0.weight`", "both sides", inputs=[ids])
    assert "Untie" in message
    direct = Net(lambda self, x: self.c(functional.linear(self.b(self.a(x)), self.a.weight)))
    refused(direct, ["a"], "`a.weight`", "both sides")
    again = Net(lambda self, x: self.d(self.a(self.c(self.b(self.a(x))))))
    refused(again, ["b"], "`a.weight`", "both sides")


def test_a_weight_may_be_shared_within_one_local_module():
    network = mlp()
    network[3].weight = network[2].weight
    refused(network, ["2"], "`2.weight`", "`3.weight`")
    assert len(cut(network, ["0", "3"]).bodies) == 3
    shared = Net(lambda self, x: self.d(self.b(self.b(self.c(self.b(self.a(x)))))))
    first = cut(shared, ["a"]).bodies[0]
    # A layer with weights that is called again is no glue of the one before it.
    assert [name for name, _ in first.named_parameters()] == ["a.weight", "a.bias"]


HOOKS = [
    lambda module: module.register_forward_hook(print),
    lambda module: module.register_forward_pre_hook(print),
    lambda module: module.register_full_backward_hook(print),
    lambda module: module.register_full_backward_pre_hook(print),
]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_what_is_opened(hook):
    network = nn.Sequential(mlp(2), mlp(2), linear())
    handle = hook(network[0])
    refused(network, ["0.0"], "`0`", "hooks", "leaves")
    # No cut lies inside: its hooks run.
    assert cut(network, Partition(split_points=["0"], leaves=["0"])).split_points == ("0",)
    assert cut(network, ["0"]).split_points == ("0",)
    handle.remove()
    hook(network)
    refused(network, ["0"], "`Sequential`", "hooks")
    inner = mlp()
    hook(inner[1])
    assert len(cut(inner, "units").bodies) == 5


def test_a_cut_inside_a_leaf_is_a_contradiction():
    network = nn.Sequential(mlp(2), linear())
    refused(network, Partition(split_points=["0.0"], leaves=["0"]), "`0.0`", "leaves")


def test_a_network_without_parameters():
    refused(nn.Sequential(nn.Flatten(), nn.ReLU()), "units", "no parameters", "`network`")


# ---------------------------------------------------------------------- code that can't be traced


def branches(self, x):
    x = self.a(x)
    if x.sum() > 0:
        x = -x
    return self.d(self.c(self.b(x)))


def line_of(function: Callable[..., object], text: str) -> str:
    lines, start = inspect.getsourcelines(function)
    return f"test_partition.py:{start + [text in line for line in lines].index(True)}: {text}"


def test_control_flow_in_the_networks_own_forward():
    where = line_of(branches, "if x.sum() > 0:")
    for request in ("units", 2, ["a"]):
        refused(Net(branches), request, "Net", where, "submodule of its own", "partition=1")


def test_control_flow_inside_a_submodule():
    network = nn.Sequential(linear(), Net(branches), linear(), linear())
    cutting = cut(network, "units")
    assert cutting.split_points == ("0", "1", "2")
    for _ in range(8):
        x = torch.randn(4, D)
        values = (x,)
        for body in cutting.bodies:
            values = body(*values)
        assert torch.equal(values, network(x))
    refused(network, ["1.a"], "Net", line_of(branches, "if x.sum() > 0:"))


# ---------------------------------------------------------------------- inputs and shapes


def given(self, x, *args, **kwargs):
    return straight(self, x)


FORWARDS = {
    "default": lambda self, x, mask=None: straight(self, x if mask is None else x * mask),
    "keyword only": lambda self, x, *, flip=False: straight(self, -x if flip else x),
    "number and name": lambda self, x, scale=2.0, mode="a": straight(self, x * scale),
    "structure": lambda self, x, sizes=(2, 3), more=None: straight(self, x * sizes[1]),
    "any": given,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_arguments_that_the_batch_does_not_give(name):
    network = type("Other", (Net,), {"forward": FORWARDS[name]})(straight)
    bodies = cut(network, ["a", "b"]).bodies
    x = torch.randn(5, D)
    assert torch.equal(bodies[2](*bodies[1](*bodies[0](x))), network(x))


def test_inputs_that_the_forward_does_not_take():
    network = type("Two", (Net,), {"forward": lambda self, x, y: straight(self, x * y)})(straight)
    assert len(cut(network, "units", torch.randn(4, D), torch.randn(4, D)).bodies) == 4
    refused(network, "units", "2", "y", kind=(TypeError, ValueError))
    refused(
        Net(straight), "units", "2", kind=(TypeError, ValueError), inputs=[torch.ones(4, D)] * 2
    )


def test_a_mask_of_one_row_and_a_batch_of_one():
    network = type("Two", (Net,), {"forward": lambda self, x, y: straight(self, x * y)})(straight)
    x, mask = torch.randn(4, D), torch.rand(1, D)
    bodies = cut(network, ["a"], x, mask).bodies
    assert torch.equal(bodies[1](*bodies[0](x, mask)), network(x, mask))
    normed = nn.Sequential(linear(), nn.BatchNorm1d(D), linear())
    assert cut(normed, "units", torch.randn(1, D)).split_points == ("1",)


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.network(batch[0]), batch[1])


class Ambiguous(nn.Module):
    """Nothing tells where the hidden state between its two recurrences has its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(D, D, batch_first=True)
        self.second = nn.GRU(D, D, batch_first=True)
        self.a, self.b = linear(), linear()

    def forward(self, x):
        return self.b(self.a(self.second(self.first(x)[0])[0])).mean(1)


def test_only_the_cuts_that_are_made_have_to_be_possible():
    x = torch.randn(4, 5, D)
    refused(Ambiguous(), ["first"], "`first`", "(4, 5, 6)", "layout", inputs=[x])
    assert cut(Ambiguous(), ["a"], x).boundaries[0].channel_dim == 2
    assert cut(Ambiguous(), Partition(2, layout="channels_last"), x).boundaries[0].channels == D


def test_a_hidden_state_without_the_batch_in_front():
    first = Net(lambda self, x: self.b(self.a(x).transpose(0, 1)).mean(0))
    refused(first, ["a"], "`a`", "batch", inputs=[torch.randn(4, 5, D)])
