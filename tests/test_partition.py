"""Requests, split points, and what can't be cut: the error names the thing and the remedy."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from settings import cut_network
from torch import nn
from torch.nn import functional

from lightning_local import Partition
from lightning_local.cutting import Cutting
from lightning_local.partition import choose_points

D = 6
ERRORS = (TypeError, ValueError)


def linear() -> nn.Linear:
    return nn.Linear(D, D)


def mlp(n: int = 5) -> nn.Sequential:
    return nn.Sequential(*(linear() for _ in range(n)))


def net(forward: Callable[..., torch.Tensor], **modules: nn.Module) -> nn.Module:
    """A network of the user's class: linear layers a to d, or other modules, and this forward."""
    network = type("Net", (nn.Module,), {"forward": forward})()
    for name, module in {**{name: linear() for name in "abcd"}, **modules}.items():
        setattr(network, name, module)
    return network


def straight(self, x):
    return self.d(self.c(self.b(self.a(x))))


def cut(network: nn.Module, request, *inputs: torch.Tensor, **options) -> Cutting:
    return cut_network(network, Partition.of(request), inputs or (torch.randn(4, D),), **options)


def chain(cutting: Cutting, *inputs: torch.Tensor) -> torch.Tensor:
    values = inputs
    for body in cutting.bodies:
        values = body(*values)
    return values


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
    assert hash(Partition(split_points=["a"])) == hash(Partition(split_points=("a",)))
    with pytest.raises(AttributeError):
        Partition().num_modules = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_modules": 0}, "num_modules=0.*1 "),
        ({"num_modules": True}, "num_modules=True"),
        ({"num_modules": 2.0}, "num_modules=2.0"),
        ({"num_modules": "4"}, "num_modules='4'"),
        ({"num_modules": 2, "split_points": ["a"]}, "num_modules and split_points"),
        ({"split_points": ["a", "b", "a"]}, r"\['a'\] twice"),
        ({"split_points": "layer1"}, "split_points.*'layer1'"),
        ({"split_points": [1, 2]}, "split_points"),
        ({"leaves": "layer1"}, "leaves.*'layer1'"),
        ({"granularity": "coarse"}, "granularity='coarse'.*blocks.*finest"),
        ({"layout": "NCHW"}, "layout='NCHW'.*channels_first"),
    ],
)
def test_wrong_requests(arguments, message):
    with pytest.raises(ERRORS, match=message):
        Partition(**arguments)


@pytest.mark.parametrize("value", ["unit", "4", 2.5, ["a", 3.5], None, True])
def test_wrong_values_of_partition(value):
    with pytest.raises(ERRORS, match=re.escape(repr(value))):
        Partition.of(value)


NAMES = [str(i) for i in range(1, 56)]


@pytest.mark.parametrize("wanted", [None, 1, 2, 5, 7, 16])
def test_an_int_makes_runs_of_nearly_equal_length(wanted):
    ends = [int(p) for p in choose_points(NAMES[:15], Partition(num_modules=wanted), 0)]
    lengths = [b - a for a, b in zip([0, *ends], [*ends, 16], strict=True)]
    assert len(lengths) == (wanted or 16)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("units", "wanted", "tail", "modules"),
    [
        (16, None, 2, 14),
        (16, 16, 2, 14),
        (16, None, 5, 11),
        (16, None, 14, 2),
        (55, None, 2, 53),
        (16, 8, 2, 7),
        (16, 4, 2, 4),
        (16, 4, 4, 3),
        (16, 1, 5, 1),
    ],
)
def test_the_tail_is_joined_after_the_nominal_cut(units, wanted, tail, modules):
    names, request = NAMES[: units - 1], Partition(num_modules=wanted)
    points = choose_points(names, request, tail)
    assert len(points) + 1 == modules
    assert points == choose_points(names, request, 0)[: modules - 1]
    assert not points or int(points[-1]) <= units - tail - 1


def test_a_tail_that_leaves_nothing_names_the_depth_that_fits():
    request = Partition(num_modules=4)
    with pytest.raises(ValueError, match="last 13 units .* 16 units .* at most 11"):
        choose_points(NAMES[:15], request, 12)
    assert len(choose_points(NAMES[:15], request, 11)) == 1


def test_explicit_split_points_are_never_joined():
    assert cut(mlp(), ["2", "3"], tail_units=3).split_points == ("2", "3")
    assert cut(mlp(), "units", tail_units=3).split_points == ("0",)


def test_more_local_modules_than_units():
    refused(mlp(), 6, "partition=6", "5 units", "at most 5", "'units'")
    assert len(cut(mlp(), 5).bodies) == 5


# ---------------------------------------------------------------------- split points


def test_an_unknown_name_gets_the_closest_ones():
    network = net(straight, layer1=mlp(2), layer2=mlp(2))
    refused(network, ["layer3"], "`layer3`", "layer1", "layer2")
    refused(network, ["layer1.7"], "layer1.0")
    message = refused(network, Partition(leaves=["layr1"]), "layr1", "layer1")
    assert "Split point" not in message, "it is a leaf"


def test_split_points_in_another_order_or_at_one_place():
    refused(mlp(), ["2", "0"], "order", "['0', '2']")
    network = nn.Sequential(mlp(2), mlp(2), linear())
    message = refused(network, ["0", "0.1", "1"], "same place")
    points = re.findall(r"'([\d.]+)'", message.rpartition("pass")[2])
    assert len(cut(network, points).bodies) == 3, "the remedy is no remedy"


@pytest.mark.parametrize(
    ("network", "point"),
    [
        (mlp(), "4"),
        (net(lambda self, x: self.b(self.a(x)).log_softmax(1)), "b"),
        (nn.Sequential(linear(), linear(), nn.LogSoftmax(1)), "1"),
        (nn.Sequential(linear(), nn.Sequential(linear(), nn.ReLU())), "1.0"),
    ],
)
def test_a_split_point_with_no_weight_behind_it(network, point):
    refused(network, [point], f"`{point}`", "end of the network")


def test_a_split_point_before_the_first_weight():
    message = refused(nn.Sequential(nn.Flatten(), linear(), linear()), ["0"], "`0`", "parameters")
    assert "more than one tensor" not in message


def test_a_submodule_that_is_called_twice_or_never():
    network = net(lambda self, x: self.b(self.a(self.a(x))))
    refused(network, ["a"], "`a`", "2 times")
    refused(network, ["c"], "`c`", "0 times")


def test_a_cut_that_several_tensors_cross():
    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return self.d(self.c(y) + x)

    message = refused(net(forward), ["b"], "`b`", "more than one tensor")
    feeders = message.partition("results of")[2]
    assert "`a`" in feeders
    assert "`b`" in feeders
    assert cut(net(forward), ["a", "c"]).split_points == ("a", "c")


def test_a_hidden_state_of_several_tensors():
    pair = net(lambda self, x: (self.a(x), self.b(x)))
    join = net(lambda self, pair: self.a(pair[0] + pair[1]))
    network = nn.Sequential(linear(), pair, join, linear())
    refused(network, Partition(split_points=["1"], leaves=["1", "2"]), "`1`", "tuple")
    assert cut(network, Partition(leaves=["1", "2"])).split_points == ("0", "2")


# ---------------------------------------------------------------------- tied parameters, hooks


def test_parameters_tied_across_a_cut():
    language = nn.Sequential(nn.Embedding(9, D), linear(), linear(), nn.Linear(D, 9, bias=False))
    language[3].weight = language[0].weight
    ids = torch.randint(9, (4, 5))
    refused(language, ["1"], "`3.weight`", "`0.weight`", "both sides", "Untie", inputs=[ids])
    direct = net(lambda self, x: self.c(functional.linear(self.b(self.a(x)), self.a.weight)))
    refused(direct, ["a"], "`a.weight`", "both sides")
    again = net(lambda self, x: self.d(self.a(self.c(self.b(self.a(x))))))
    refused(again, ["b"], "`a.weight`", "both sides")


def test_a_weight_may_be_shared_within_one_local_module():
    network = mlp()
    network[3].weight = network[2].weight
    refused(network, ["2"], "`2.weight`", "`3.weight`")
    assert len(cut(network, ["0", "3"]).bodies) == 3


def test_a_layer_with_weights_that_is_called_again_is_no_glue_of_the_one_before_it():
    network = net(lambda self, x: self.d(self.b(self.b(self.b(self.a(x))))))
    assert [name for name, _ in cut(network, ["a"]).bodies[0].named_parameters()] == [
        "a.weight",
        "a.bias",
    ]


@pytest.mark.parametrize("kind", ["", "pre_"])
@pytest.mark.parametrize("direction", ["forward", "full_backward"])
def test_hooks_on_what_is_opened(kind, direction):
    hook = f"register_{direction}_{kind}hook"
    network = nn.Sequential(mlp(2), mlp(2), linear())
    getattr(network[0], hook)(print)
    refused(network, ["0.0"], "`0`", "hooks", "leaves")
    # No cut lies inside: its hooks run.
    assert cut(network, Partition(split_points=["0"], leaves=["0"])).split_points == ("0",)
    assert cut(network, ["0"]).split_points == ("0",)
    getattr(network, hook)(print)
    refused(network, ["0"], "`Sequential`", "hooks")


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


def branch_line() -> str:
    lines, start = inspect.getsourcelines(branches)
    line = next(i for i, text in enumerate(lines) if "if x.sum()" in text)
    return f"test_partition.py:{start + line}: if x.sum() > 0:"


@pytest.mark.parametrize("request_", ["units", 2, ["a"]])
def test_control_flow_in_the_networks_own_forward(request_):
    refused(net(branches), request_, "Net", branch_line(), "submodule of its own", "partition=1")


def test_control_flow_inside_a_submodule():
    network = nn.Sequential(linear(), net(branches), linear(), linear())
    cutting = cut(network, "units")
    assert cutting.split_points == ("0", "1", "2")
    for _ in range(8):
        x = torch.randn(4, D)
        assert torch.equal(chain(cutting, x), network(x))
    refused(network, ["1.a"], "Net", branch_line())
