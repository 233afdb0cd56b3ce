"""What goes over a wire, where local modules live, and who reads data: without processes."""

import pickle
from collections import deque
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from simple import Lit, Net, data
from torch.utils.data import DataLoader, IterableDataset

from lightning_local import LocalLearner
from lightning_local.dividing import additive, divide
from lightning_local.feeding import feed
from lightning_local.placement import (
    check_placement,
    check_shared,
    extra_states,
    stages_of,
    tensors_per_module,
)
from lightning_local.transport import Unread, fill, flat_bytes, pack
from lightning_local.wire import Wire

CPU = torch.device("cpu")


def passed(obj, batch=None, hidden=()):
    """What arrives, with memory of its own."""
    line = deque()

    def receive(tensor, *args, **options):
        sent = line.popleft()
        assert sent.dtype == tensor.dtype == torch.uint8
        assert sent.shape == tensor.shape
        tensor.copy_(sent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributed, "send", lambda tensor, *_, **__: line.append(tensor.clone())
        )
        patch.setattr(torch.distributed, "recv", receive)
        wire = Wire(0, None, None, CPU)
        wire.send(pack(obj, batch, hidden))
        got = wire.take(wire.receive())
    assert not line
    return got


def forms(packed):
    return pickle.loads(packed.header)[0]


x = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "plain": x,
    "large": torch.arange(40_000.0).reshape(200, 200),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "one row": x[:1],
    "bool": x > 4,
    "int8": x.to(torch.int8),
    "bf16": x.to(torch.bfloat16),
    "half": x.half(),
    "double": x.double(),
    "complex": torch.complex(x, -x),
    "conj": torch.complex(x, -x).conj(),
    "negated": torch.complex(x, -x).conj().imag,
    "transposed": x.transpose(0, 2),
    "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "gaps": x[:, ::2],
    "offset": x[1],
    "expanded": torch.ones(1, 4).expand(3, 4),
    "overlapping": torch.arange(6.0).unfold(0, 3, 1),
    "needs gradients": x.clone().requires_grad_(),
    "inference": torch.inference_mode()(lambda: torch.ones(2))(),
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_were(name):
    tensor = TENSORS[name]
    got, _ = passed(tensor)
    assert (got.dtype, got.shape, got.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    assert torch.equal(got.to_dense(), tensor.detach().to_dense())
    assert not got.requires_grad
    dense = name not in ("sparse", "gaps", "expanded", "overlapping", "negated")
    assert not dense or got.stride() == tensor.stride()


def test_a_message_is_no_part_of_a_graph():
    leaf = torch.ones(3, requires_grad=True)
    assert passed([leaf * 2])[0][0].grad_fn is None


@dataclass
class Sample:
    image: torch.Tensor
    name: str


def test_structures_arrive():
    given = {
        "list": [x, (1, 2.5, None)],
        "sample": Sample(x + 1, "a"),
        "names": ["é", b"bytes"],
        "set": {1, 2},
    }
    got, batch = passed(given, [x, "batch", "long " * 10_000])
    assert torch.equal(got["list"][0], x)
    assert got["list"][1] == (1, 2.5, None)
    assert torch.equal(got["sample"].image, x + 1)
    assert (got["sample"].name, got["names"], got["set"]) == ("a", ["é", b"bytes"], {1, 2})
    assert torch.equal(batch[0], x)
    assert batch[1:] == ["batch", "long " * 10_000]


def test_a_tensor_that_is_there_twice_is_sent_once():
    packed = pack([x, x], {"x": x})
    assert len(forms(packed)) == 1
    got, batch = passed([x, x], {"x": x})
    assert got[0] is got[1]
    assert got[0] is batch["x"]


def test_objects_made_while_packing_are_not_taken_for_each_other():
    class Fresh:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            # A tensor that lives only while it is pickled: its id is free afterwards.
            return list, ([torch.full((3,), float(self.value))],)

    got, _ = passed([Fresh(i) for i in range(50)])
    assert [float(each[0][0]) for each in got] == list(range(50))


class Tagged(torch.Tensor):
    pass


def test_subclasses_keep_their_attributes():
    tagged = torch.ones(2, 3).as_subclass(Tagged)
    tagged.tag = "cat"
    got, _ = passed([tagged, torch.nn.Parameter(x)])
    assert type(got[0]) is Tagged
    assert got[0].tag == "cat"
    assert torch.equal(got[1], x)


def test_what_can_not_be_sent_is_told():
    with pytest.raises(TypeError, match="can't be pickled.*Let the dataset or collate_fn return"):
        pack([lambda: None])


def test_the_input_is_left_out_of_the_batch():
    y = torch.arange(2)
    packed = pack(("message",), {"x": x, "y": y}, {id(x)})
    assert len(forms(packed)) == 1
    _, batch = passed(("message",), {"x": x, "y": y}, {id(x)})
    hidden = batch["x"]
    assert isinstance(hidden, Unread)
    assert (hidden.shape, hidden.dtype, hidden.device) == (x.shape, x.dtype, CPU)
    assert "Unread(shape=(2, 3, 4)" in repr(hidden)
    assert len(hidden) == hidden.size(0) == 2
    assert isinstance(hidden.detach(), Unread)
    for read in (lambda t: t + 1, lambda t: t.sum(), lambda t: t[0], lambda t: t.clone()):
        with pytest.raises(RuntimeError, match="send_input=True"):
            read(hidden)
    # And on to the next stage.
    assert isinstance(passed(None, batch)[1]["x"], Unread)


@pytest.mark.parametrize("read", [lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.item()])
def test_the_input_can_not_be_read_past_torch(read):
    one = torch.ones(1)
    hidden = passed(None, [one], {id(one)})[1][0]
    with pytest.raises(RuntimeError, match="send_input=True"):
        read(hidden)


def test_the_message_itself_is_never_hidden():
    got, batch = passed([x], [x], {id(x)})
    assert torch.equal(got[0], x)
    assert torch.equal(batch[0], x)


def test_flat_bytes_come_back():
    tensors = [x, torch.tensor(7), torch.empty(0), x.transpose(0, 1), x > 3, x.bfloat16()]
    data = flat_bytes(tensors)
    assert data.numel() == sum(t.numel() * t.element_size() for t in tensors)
    others = [torch.zeros_like(t) for t in tensors]
    fill(others, data)
    for one, other in zip(tensors, others, strict=True):
        assert torch.equal(one, other)
    assert flat_bytes([]).numel() == 0


# Placement.


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [[1.0] * 5, [1, 9, 1, 1, 1], [5, 4, 3, 2, 1], [0, 0, 0, 0, 7]])
def test_blocks_are_the_best_there_are(costs, stages):
    found = divide(additive(costs), stages)
    assert [k for block in found for k in block] == list(range(5))
    assert all(len(block) > 0 for block in found)

    def largest(cuts):
        edges = [0, *cuts, 5]
        return max(sum(costs[a:b]) for a, b in zip(edges, edges[1:], strict=False))

    best = min(largest(cuts) for cuts in combinations(range(1, 5), stages - 1))
    assert max(sum(costs[k] for k in block) for block in found) == best


def test_blocks_even_out_what_the_largest_leaves_open():
    assert divide(additive([10, 1, 1, 1, 1]), 3) == [range(1), range(1, 3), range(3, 5)]


def learner_of(network=None, partition="units", method="Greedy"):
    learner = LocalLearner(Lit(network), method, partition)
    learner.build(torch.zeros(2, 1, 6, 6))
    return learner


def test_stages_of_a_learner():
    learner = learner_of()
    assert learner.num_modules == 4
    assert stages_of(learner, None, 1) == [range(4)]
    assert stages_of(learner, None, 4) == [range(k, k + 1) for k in range(4)]
    assert stages_of(learner, (0, 1, 1, 2), 3) == [range(1), range(1, 3), range(3, 4)]
    with pytest.raises(ValueError, match=r"5 stages for 4 local modules: pass .*num_stages=4"):
        stages_of(learner, None, 5)
    for placement, stages in (((0, 1, 1), 2), ((0, 0, 1, 1), 3)):
        with pytest.raises(ValueError, match="give one stage per local module, from 0 to"):
            stages_of(learner, placement, stages)


def test_a_placement_is_kept_as_it_is():
    assert check_placement(None) is None
    assert check_placement([0, 0, 1, 2]) == (0, 0, 1, 2)


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "PredSim"])
def test_every_tensor_belongs_to_one_local_module(method):
    learner = learner_of(method=method)
    learner.module.register_buffer("weights", torch.ones(4))
    found = tensors_per_module(learner)
    ids = [id(t) for tensors in found for t in tensors]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(t) for t in (*learner.parameters(), *learner.buffers())}
    for k, module in enumerate(learner.modules_in_order()):
        mine = {id(t) for t in found[k]}
        assert {id(p) for p in (*module.body.parameters(), *module.parameters())} <= mine
    assert id(learner.module.weights) in {id(t) for t in found[-1]}


def test_a_shared_norm_without_parameters_is_refused_on_two_stages():
    network = Net()
    norm = torch.nn.BatchNorm2d(6, affine=False)
    network.blocks[0].bn = network.blocks[2].bn = norm
    learner = learner_of(network)
    check_shared(learner, [range(4)])
    with pytest.raises(ValueError, match=r"blocks.0.bn.* running statistics would part"):
        check_shared(learner, [range(2), range(2, 4)])


class Counted(torch.nn.Identity):
    def get_extra_state(self):
        return 1


def test_extra_states_belong_to_their_local_module():
    network = Net()
    network.blocks[1].add_module("counted", Counted())
    network.fc.register_forward_pre_hook(lambda *args: None)
    learner = learner_of(network)
    learner.module.add_module("outside", Counted())
    names = [[name for name, _ in found] for found in extra_states(learner)]
    inside = "module.network.blocks.1.counted"
    assert sorted(name for found in names for name in found) == [inside, "module.outside"]
    assert "module.outside" in names[-1]


# Feeding.


class Told:
    """Processes that note what they are told, or say what they were told to."""

    num_stages = 2
    replica = 0

    def __init__(self, stage, says=()):
        self.stage = stage
        self.says = list(says)
        self.told = []

    def announce(self, value):
        self.told.append(value)
        return self.says.pop(0) if self.stage else value


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def stream():
    return DataLoader(Stream(), 2)


def test_a_length_that_is_sure_needs_no_word():
    loader = data()
    first, later = Told(0), Told(1)
    assert feed(loader, first) is loader
    fed = feed(loader, later)
    assert len(fed) == len(list(fed)) == 3
    assert first.told == later.told == []


def test_an_end_that_nobody_knows_is_told():
    first, later = Told(0), Told(1, [1, 1, 1, 0])
    assert [batch.tolist() for batch in feed(stream(), first)] == [[0, 1], [2, 3], [4]]
    assert first.told == [1, 1, 1, 0]
    fed = feed(stream(), later)
    assert len(list(fed)) == 3
    assert not later.says
    with pytest.raises(TypeError):
        len(fed)


def test_an_iterator_is_made_when_it_is_asked_for():
    """As torch's loaders do: making one draws from the generator."""
    loader = stream()
    before = torch.get_rng_state()
    iter(feed(loader, Told(0)))
    assert not torch.equal(before, torch.get_rng_state())


class Stateful:
    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < 3:
            self.position += 1
            yield self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_stateful_loader_stays_one():
    first = Told(0)
    fed = feed(Stateful(), first)
    fed.load_state_dict({"position": 1})
    assert list(fed) == [2, 3]
    assert fed.state_dict() == {"position": 3}
    assert first.told == [1, 1, 0]
    assert not hasattr(feed(stream(), Told(0)), "state_dict")


def test_attributes_of_the_loader_are_there():
    fed = feed(stream(), Told(0))
    assert fed.batch_size == 2
    with pytest.raises(AttributeError):
        _ = fed.nothing
