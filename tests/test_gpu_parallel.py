"""Stages on CUDA: two on one device through gloo, one on each of several through NCCL."""

import lightning as L
import pytest
import torch
from fleet import Place, together
from simple import METHODS, Lit, data
from test_gpu import Still

from lightning_local import LocalLearner, LocalParallelStrategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def fit(method, quiet, **options):
    L.seed_everything(3, verbose=False)
    learner = LocalLearner(Lit(Still()), METHODS[method]())
    trainer = L.Trainer(max_epochs=2, **{**quiet, "accelerator": "gpu", **options})
    trainer.fit(learner, data(), data(shuffle=False))
    return {name: tensor.cpu() for name, tensor in learner.module.state_dict().items()}


def stage(rank, size, quiet, methods, backend, precision):
    one = backend == "gloo"
    devices = [torch.device("cuda", 0 if one else r) for r in range(size)]
    found = {}
    for method in methods:
        strategy = LocalParallelStrategy(
            process_group_backend=backend,
            parallel_devices=devices,
            cluster_environment=Place(rank, size),
        )
        options = {"devices": 1 if one else size, "precision": precision}
        found[method] = fit(method, quiet, strategy=strategy, **options)
    return found


def assert_as_one_process(backend, quiet, methods, precision="64-true"):
    expected = together(1, alone, quiet, methods, precision)[0]
    for found in together(2, stage, 2, quiet, methods, backend, precision):
        for method in methods:
            for name, tensor in expected[method].items():
                torch.testing.assert_close(found[method][name], tensor, rtol=1e-7, atol=1e-9)


def alone(rank, quiet, methods, precision):
    return {method: fit(method, quiet, precision=precision) for method in methods}


def test_two_stages_on_one_gpu_over_gloo(quiet):
    assert_as_one_process("gloo", quiet, [name for name in METHODS if name != "EndToEnd"])


def test_mixed_precision_over_gloo(quiet):
    for precision in ("bf16-mixed", "16-mixed"):
        results = together(2, stage, 2, quiet, ["Greedy", "BackLink", "SGR"], "gloo", precision)
        for found in results:
            assert all(t.isfinite().all() for states in found.values() for t in states.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_stages_over_nccl(quiet):
    assert_as_one_process("nccl", quiet, [name for name in METHODS if name != "EndToEnd"])
