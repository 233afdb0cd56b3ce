"""What holds for every partition, batch and number, found out by random examples."""

import math
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simple import CLASSES, METHODS, Lit, fit
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, Partition
from lightning_local.dividing import additive, divide
from lightning_local.ranges import size
from lightning_local.wrapping import default_unpack

# The same examples in every run.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("fixed")


class Chain(nn.Module):
    """Units named layers.0 to layers.n-1."""

    def __init__(self, units):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(units))

    def forward(self, x):
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


def built(units, partition):
    torch.manual_seed(0)
    learner = LocalLearner(Lit(Chain(units)), "Greedy", partition)
    learner.build(torch.randn(2, 5))
    return learner


@given(st.integers(2, 9), st.integers(1, 11))
def test_any_number_of_local_modules_is_even_or_refused(units, parts):
    if parts > units:
        with pytest.raises(ValueError, match=f"asks for {parts} .* has {units} .*at most {units}"):
            built(units, parts)
        return
    learner = built(units, parts)
    modules = learner.modules_in_order()
    assert len(modules) == max(1, parts)
    ends = [last + 1 for last in learner.cutting.last_unit] if parts > 1 else [units]
    lengths = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert sum(lengths) == units
    assert max(lengths) - min(lengths) <= 1


NAMES = st.lists(st.sampled_from([f"layers.{i}" for i in range(6)]), min_size=1, max_size=6)


@given(NAMES)
def test_split_points_cut_there_or_are_named(names):
    if names != sorted(set(names)) or "layers.5" in names:
        with pytest.raises(ValueError, match="|".join(map(re.escape, names))):
            built(6, Partition(split_points=names))
        return
    learner = built(6, Partition(split_points=names))
    assert list(learner.split_points) == names
    x = torch.randn(3, 5)
    values = (x,)
    for module in learner.modules_in_order()[:-1]:
        values = module(*values)
    assert torch.equal(learner.modules_in_order()[-1](*values), learner.network(x))


class Conv(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width + 1, 3, stride=2, padding=1)
        self.fc = nn.Linear(width + 1, CLASSES)

    def forward(self, x):
        x = functional.relu(self.second(functional.relu(self.norm(self.first(x)))))
        return self.fc(x.mean((2, 3)))


@settings(max_examples=20)
@given(
    st.sampled_from(sorted(set(METHODS) - {"EndToEnd", "InfoPro", "AugLocal"})),
    *(st.integers(1, high) for high in (4, 3, 5, 7, 7)),
)
def test_any_batch_of_images_trains(name, samples, channels, width, height, breadth):
    """But for those that BatchNorm itself can't normalise."""
    assume(samples * height * breadth > 1)
    torch.manual_seed(0)
    learner = LocalLearner(Lit(Conv(channels, width)), METHODS[name]())
    x = torch.randn(samples, channels, height, breadth)
    before = learner.network.first.weight.detach().clone()
    batches = [(x, torch.arange(samples) % CLASSES)] * 2
    from fleet import QUIET

    quiet = {**QUIET, "limit_val_batches": 0}
    fit(learner, quiet, epochs=1, loader=torch.utils.data.DataLoader(batches, batch_size=None))
    assert all(p.isfinite().all() for p in learner.parameters())
    assert not torch.equal(learner.network.first.weight, before)


LEAVES = st.sampled_from([torch.zeros(2), 1, "a", None])
BATCHES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from(["x", "y", "image", "label", "z"]), inner, max_size=3),
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(BATCHES)
def test_any_batch_is_unpacked_or_named(batch):
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    known = isinstance(batch, dict) and {"label", "y"} & {*batch} and {"image", "x"} & {*batch}
    if not pair and not (known and len(batch) - ("z" in batch) == 2):
        kind = "a dict" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        with pytest.raises(ValueError, match=f"The batch is {kind}.*unpack"):
            default_unpack(batch)
        return
    x, y = default_unpack(batch)
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
    assert any(x is part for part in parts)
    assert any(y is part for part in parts)


@settings(max_examples=200)
@given(st.integers(1, 10**6), st.sampled_from(["", "k", "M", "G", "T"]), st.sampled_from("bB "))
def test_sizes_are_read_as_written(count, unit, byte):
    power = ["", "k", "M", "G", "T"].index(unit)
    assert size("", "", f"{count}{unit}{byte}".strip()) == count * 1000**power
    binary = f"{count}{unit}i{byte}".strip() if unit else str(count)
    assert size("", "", binary) == count * 1024**power


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.data())
def test_divisions_have_all_things_and_no_larger_largest_than_even_ones(costs, drawn):
    count = drawn.draw(st.integers(1, len(costs)))
    blocks = divide(additive(costs), count)
    assert [i for block in blocks for i in block] == list(range(len(costs)))
    assert all(len(block) for block in blocks)
    step = math.ceil(len(costs) / count)
    even = [sum(costs[i : i + step]) for i in range(0, len(costs), step)]
    if len(even) == count:
        largest = max(sum(costs[i] for i in block) for block in blocks)
        assert largest <= max(even) * (1 + 1e-9) + 1e-9
