"""Random streams per module, messages, links, and the arguments of couplings."""

import pytest
import torch

from lightning_local import couplings, heads, losses, methods
from lightning_local.links import InProcessLinks
from lightning_local.losses import per_item
from lightning_local.message import Message
from lightning_local.metrics import LocalMetrics
from lightning_local.randomness import Streams, seed_for
from lightning_local.reconciliation import gradient_distance

CPU = torch.device("cpu")


def test_streams_are_separate_and_leave_the_global_generator_alone():
    streams = Streams(5, 3)
    before = torch.get_rng_state()
    draws = {}
    for k in (2, 0, 1, 0):
        with streams.using(k, CPU):
            draws.setdefault(k, []).append(torch.rand(4))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(*draws[0])
    other = Streams(5, 3)
    for k in range(3):
        for expected in draws[k]:
            with other.using(k, CPU):
                assert torch.equal(torch.rand(4), expected)
    assert len({float(d[0][0]) for d in draws.values()}) == 3


def test_streams_go_on_where_they_were_saved():
    streams = Streams(5, 2)
    with streams.using(1, CPU):
        torch.rand(3)
    saved = streams.save()
    with streams.using(1, CPU):
        expected = torch.rand(3)
    other = Streams(6, 2)
    other.load(saved)
    with other.using(1, CPU):
        assert torch.equal(torch.rand(3), expected)


def test_one_module_draws_from_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with Streams(5, 1).using(0, CPU):
        assert torch.equal(torch.rand(2), expected)


def test_seeds_differ_between_modules_and_seeds():
    seeds = {seed_for(seed, k) for seed in range(50) for k in range(-20, 50)}
    assert len(seeds) == 50 * 70
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_message_carries_no_graph():
    x = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(AssertionError):
        Message((x,), None, None, 0)
    with pytest.raises(AssertionError):
        Message((x.detach(),), None, None, 0, gradient=x)
    links = InProcessLinks()
    message = Message((x.detach(), 3), None, None, 0)
    links.send(1, message)
    assert links.receive(1) is message
    with pytest.raises(KeyError):
        links.receive(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: couplings.BackwardLink(weight=-1.0), "weight=-1.0"),
        (lambda: couplings.BackwardLink(weight=float("nan")), "weight=nan"),
        (lambda: couplings.BackwardLink(length=-2), "length=-2"),
        (lambda: couplings.GradientReconciliation(distance="l1"), "distance='l1'"),
        (lambda: couplings.GradientReconciliation(every=0), "every=0"),
        (lambda: couplings.GradientReconciliation(warmup=-1), "warmup=-1"),
        (lambda: couplings.GradientReconciliation(weight="1"), "weight='1'"),
    ],
)
def test_arguments_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_piece_of_the_wrong_axis_is_named():
    with pytest.raises(TypeError, match="coupling=.*instance of Coupling"):
        methods.LocalMethod(heads.Linear(), coupling=losses.CrossEntropy())
    with pytest.raises(TypeError, match="head=.*instance of Head"):
        methods.Greedy(head=torch.nn.Linear(2, 2))


def test_distances_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    # Times N = 2 per sample: differences (2, -2) and (0, 2).
    assert gradient_distance(a, b, "squared_l2") == pytest.approx((8 + 4) / 2, rel=1e-15)
    assert gradient_distance(a, b, "mse") == pytest.approx((8 + 4) / 4, rel=1e-15)
    assert gradient_distance(a, b, "cosine") == pytest.approx((1 + 0) / 2)
    assert gradient_distance(a, b, "normalized_l2") == pytest.approx(2**0.5 / 2, abs=1e-5)
    assert gradient_distance(a, a, "squared_l2") == 0


def test_tokens_are_joined_for_class_indices_only():
    logits, target = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    assert [t.shape for t in per_item(logits, target)] == [(6, 5), (6,)]
    real = torch.zeros(2, 3, 5)
    assert per_item(logits, real)[0] is logits
    assert per_item(logits[:, 0], target[:, 0])[0].shape == (2, 5)


def test_metrics_name_the_first_bad_loss_and_average_windows():
    metrics = LocalMetrics(3, CPU)
    output, target = torch.eye(4), torch.tensor([0, 1, 2, 0])
    for step in range(4):
        for k in range(3):
            bad = (step, k) in [(2, 1), (2, 2), (3, 0)]
            loss = torch.tensor(float("nan") if bad else float(step + k))
            metrics.update(k, loss, output, target)
        metrics.close_step(step)
        if step == 1:
            values = metrics.read()
            assert values["local/01/loss"] == 1.5
            assert values["local/02/accuracy"] == 0.75
            metrics.check()
    with pytest.raises(FloatingPointError, match="local module 1 of 3 .* batch 2"):
        metrics.check()
    metrics.check()


def test_the_penalty_is_averaged_over_the_steps_that_have_one():
    metrics = LocalMetrics(2, CPU)
    for step in range(4):
        for k in range(2):
            penalty = torch.tensor(6.0) if k == 1 and step % 2 == 0 else None
            metrics.update(k, torch.tensor(2.0), None, None)
            metrics.add_penalty(penalty)
        metrics.close_step(step)
    values = metrics.read()
    assert values["local/01/reconciliation"] == 3.0
    assert "local/00/reconciliation" not in values
    assert metrics.read(epoch=True)["local/01/reconciliation_epoch"] == 3.0
