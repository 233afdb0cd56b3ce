"""What only a CUDA device shows; skipped, with the reason, where there is none."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from simple import METHODS, Lit, Net, data, run
from test_second_order import CONVOLUTIONS, NORMS, compare
from torch import nn

from examples.image_classification import CifarResNet, LitClassifier
from lightning_local import LocalLearner, LocalSummary
from lightning_local.rehearsal import rehearse
from lightning_local.setting import Setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Lightning advises "tensor cores" precision by a log line, and older drivers warn.
    pytest.mark.filterwarnings("ignore:.*torch.set_float32_matmul_precision.*:UserWarning"),
]


@pytest.fixture
def on_gpu(quiet):
    return {**quiet, "accelerator": "gpu"}


def learner(method, **options):
    return lambda module: LocalLearner(module, METHODS[method](), **options)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_precision(method, precision, on_gpu):
    options = {"precision": precision, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    trainer, model = run(learner(method), on_gpu, epochs=3, **options)
    assert trainer.global_step == 6
    assert all(p.isfinite().all() for p in model.parameters())


class Still(nn.Module):
    """Without dropout, whose random numbers are each device's own."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.stem, self.blocks, self.fc = net.stem, net.blocks, net.fc

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_numbers_as_on_the_cpu(method, quiet, on_gpu):
    found = [
        run(learner(method), where, lambda: Lit(Still()), precision="64-true")[1].state_dict()
        for where in (quiet, on_gpu)
    ]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name].cpu(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "SGR"])
def test_captured_graphs_compute_what_eager_code_does(method, on_gpu):
    """Several epochs, so that graphs are captured, replayed, and a smaller batch comes between."""
    torch._dynamo.reset()
    found = [
        run(learner(method, compile=mode), on_gpu, lambda: Lit(Still()), epochs=3)[1].state_dict()
        for mode in (False, "reduce-overhead")
    ]
    torch._dynamo.reset()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("method", ["BackLink", "SGR"])
def test_resumed_with_dropout_at_an_epochs_end(method, tmp_path, on_gpu):
    class Steady(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    options = {**on_gpu, "enable_checkpointing": True, "deterministic": "warn"}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    _, whole = run(learner(method), options, Steady, epochs=3, callbacks=[saving])
    L.seed_everything(99, verbose=False)
    resumed = learner(method)(Steady())
    trainer = L.Trainer(max_epochs=3, **{**on_gpu, "deterministic": "warn"})
    path = tmp_path / "epoch=0.ckpt"
    trainer.fit(resumed, data(), data(shuffle=False), ckpt_path=path)
    torch.use_deterministic_algorithms(False)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_peaks_are_the_allocators(on_gpu):
    summary = LocalSummary(memory=True)
    run(learner("Greedy"), on_gpu, callbacks=[summary])
    assert len(summary.peaks) == 4
    assert min(summary.peaks) > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_fakes_predicts_what_is_allocated(method, on_gpu):
    """Within 15 %: the allocator rounds, and kernels need workspaces."""
    batch = torch.randn(512, 3, 32, 32), torch.zeros(512).long()

    class Peak(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.cuda.reset_peak_memory_stats()

        def on_train_batch_end(self, trainer, module, *args):
            self.bytes = torch.cuda.max_memory_allocated()

    peak = Peak()
    trainer = L.Trainer(**on_gpu, max_epochs=1, callbacks=[peak], limit_val_batches=0)
    model = learner(method)(LitClassifier(CifarResNet(20)))
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 3, batch_size=None))
    setting = Setting(batch, 512)
    expected = rehearse(model, model.modules_in_order(), model.method, setting).peak
    assert peak.bytes == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("recompute", ["body", "blocks"])
@pytest.mark.parametrize("method", ["EndToEnd", "AugLocal", "BackLink"])
def test_recomputing_changes_nothing(method, recompute, on_gpu):
    options = {**on_gpu, "deterministic": "warn"}
    found = [
        run(learner(method, recompute=mode), options)[1].state_dict()
        for mode in ("none", recompute)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["Greedy", "BackLink", "SGR"])
def test_no_wait_for_the_device_between_the_modules(method, on_gpu):
    """What the loop itself does in a step never reads a number from the device."""

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, trainer, pl_module, *args):
            torch.cuda.set_sync_debug_mode("default")

    class Quiet(Lit):
        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    try:
        run(learner(method), on_gpu, Quiet, epochs=2, callbacks=[Watch()], log_every_n_steps=50)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["Greedy", "BackLink"])
def test_compiled(method, on_gpu):
    trainer, model = run(learner(method, compile=True), on_gpu, epochs=1)
    assert trainer.global_step == 3
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.fixture
def no_tf32():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


SECOND = [
    (torch.float64, None, 1e-8),
    (torch.float32, None, 1e-3),  # cuDNN may take another algorithm than torch's way does
    (torch.float32, torch.float16, 0.05),  # both ways round, at other places
    (torch.float32, torch.bfloat16, 0.1),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("dtype", "autocast", "tolerance"), SECOND)
def test_fast_second_derivatives_are_torchs(dtype, autocast, tolerance, groups, layout, no_tf32):
    first = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
    last = nn.Conv2d(8, 4, 3, stride=2, groups=groups)
    net = nn.Sequential(first, nn.BatchNorm2d(8), nn.Tanh(), last)
    net = net.to("cuda", dtype, memory_format=layout)
    x = torch.randn(6, 8, 12, 12, dtype=dtype).to("cuda", memory_format=layout)
    compare(net, x, 3, tolerance=tolerance, first=tolerance, autocast=autocast)


@pytest.mark.parametrize(("cls", "options"), CONVOLUTIONS)
def test_fast_second_derivatives_of_convolutions(cls, options, no_tf32):
    net = nn.Sequential(cls(4, 8, 3, **options), nn.Tanh()).to("cuda", torch.float64)
    x = torch.randn(3, 4, *(9, 8, 7)[: net[0].weight.dim() - 2], dtype=torch.float64)
    compare(net, x.to("cuda"), 1, tolerance=1e-8, first=1e-8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("cls", "shape", "options"), NORMS)
def test_fast_second_derivatives_of_norms(cls, shape, options, training, no_tf32):
    norm = cls(5, **options).to("cuda", torch.float64)
    net = nn.Sequential(nn.Tanh(), norm, nn.Tanh()).train(training)
    fast = training or norm.running_mean is None
    x = torch.randn(shape, dtype=torch.float64, device="cuda")
    for bias in (norm.bias, None):  # with an undefined one, as without a weight, it isn't cuDNN's
        norm.bias = bias
        compare(net, x, int(fast), int(not fast), tolerance=1e-8, first=1e-8)
