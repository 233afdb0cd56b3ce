"""What goes over a wire arrives as it was: tensors, structures, and an input that stays hidden."""

import pickle
from collections import deque
from dataclasses import dataclass

import pytest
import torch

from lightning_local.transport import Unread, pack, unpack
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


def test_a_device_arrives_as_that_of_the_process():
    packed = pack([torch.device("cuda:0"), CPU, torch.device("meta"), x])
    got, _ = unpack(pickle.loads(packed.header)[1], packed.tensors or [x], torch.device("cuda:1"))
    assert got[:3] == [torch.device("cuda:1"), CPU, torch.device("meta")]


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


def test_what_others_may_overwrite_is_copied_when_it_is_packed():
    batch, computed = torch.ones(1000), torch.ones(1000)
    packed = pack([computed, batch], batch[:900], fresh={id(computed)})
    batch.zero_()
    computed.zero_()
    assert [float(t.sum()) for t in packed.tensors] == [0.0, 1000.0, 900.0]
