"""What LocalSummary counts, measures, prints and draws."""

import io
import logging
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from simple import Lit, Net, data, run
from torch.utils.flop_counter import FlopCounterMode

from lightning_local import LocalLearner, LocalSummary, couplings, methods, tables
from lightning_local.meter import LiveBytes, Meter, existing


def built(method, **options):
    learner = LocalLearner(Lit(), method, **options)
    learner.build(torch.zeros(4, 1, 6, 6))
    return learner


def forward_flops(module, *inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() / len(inputs[0])


def test_forward_flops_add_up_to_the_networks():
    learner = built("Greedy")
    modules = learner.modules_in_order()
    x = torch.zeros(4, 1, 6, 6)
    assert sum(m.body_flops for m in modules) == forward_flops(learner.module.network, x)
    # 3x3 convolution of 1 to 6 channels on 6 x 6 positions, two per multiply-add.
    assert modules[0].body_flops == 2 * 9 * 1 * 6 * 36
    assert modules[1].body_flops == 2 * 9 * 6 * 6 * 36
    assert [m.head_flops for m in modules] == [2 * 6 * 4] * 3 + [0]


@pytest.mark.parametrize(
    ("coupling", "expected"),
    [
        (couplings.Isolated(), [220, 220, 200]),
        (couplings.BackwardLink(), [220 + 200, 220 + 200, 200]),
        (couplings.BackwardLink(length=1), [220 + 100, 220 + 100, 200]),
        (couplings.BackwardLink(length=0), [220, 220, 200]),
        (couplings.GradientReconciliation(), [220, 550, 500]),
        (couplings.GradientReconciliation(every=3), [220, 330, 300]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, couplings.Coupling) else "",
)
def test_backward_flops_by_formula(coupling, expected):
    found = [
        coupling.backward_flops(100, 0 if last else 10, units=2, first=first)
        for first, last in ((True, False), (False, False), (False, True))
    ]
    assert found == expected


def test_a_step_costs_what_its_parts_cost():
    learner = built("Greedy")
    body = sum(m.body_flops for m in learner.modules_in_order())
    plain, local = tables.flops_of_a_step(learner)
    assert plain == 3 * body
    assert local == 3 * (body + 3 * 48)


@pytest.mark.parametrize("rich", [True, False])
def test_the_tables(rich, quiet, capsys, monkeypatch, caplog):
    monkeypatch.setattr(tables, "_RICH", rich)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.INFO)
    summary = LocalSummary(head_accuracy=True, memory=True)
    with caplog.at_level(logging.INFO):
        run(lambda m: LocalLearner(m, "Greedy"), quiet, callbacks=[summary])
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    text = capsys.readouterr().out if rich else caplog.text
    assert "Greedy: 4 units in 4 local modules" in text
    for value in ("blocks.0", "3.89 k", "23.3 k", "6x6x6", "(end)", "per sample", "1.00"):
        assert value in text, value
    assert text.count("KiB") >= 4
    for accuracy in summary.accuracies:
        assert f"{accuracy:.2%}" in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


LONG = "layer2.0.shortcut.conv.weight"
ROWS = [[f"{k:02d}", f"{LONG}{k}", *["14,510,123"] * 8] for k in range(3)]


def shown(monkeypatch, stream, columns):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", stream)
    tables.print_table("A title", ["module", "cut after", *["params"] * 8], ROWS)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def test_a_file_gets_tables_of_any_width(monkeypatch):
    """Their cells are copied from there: a split point, a number of parameters."""
    text = shown(monkeypatch, io.StringIO(), 80)
    assert "…" not in text
    for k in range(3):
        assert f" {k:02d} │ {LONG}{k} │" in text
    assert text.count("14,510,123") == 3 * 8


@pytest.mark.parametrize("columns", [60, 100, 130, 300])
def test_a_narrow_terminal_folds_what_it_has_no_room_for(columns, monkeypatch):
    text = shown(monkeypatch, Terminal(), columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    found, row = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            found.append(row := cells)
        elif cells:
            row[:] = [a + b for a, b in zip(row, cells, strict=True)]
    assert found == ROWS
    assert (text.count("14,510,123") == 3 * 8) == (columns >= 130)  # names are folded first


def test_no_table_for_one_module_but_its_memory(quiet, capsys):
    run(lambda m: LocalLearner(m, "EndToEnd"), quiet, callbacks=[LocalSummary()])
    assert not capsys.readouterr().out.strip()
    summary = LocalSummary(memory=True)
    run(lambda m: LocalLearner(m, "EndToEnd"), quiet, callbacks=[summary])
    text = capsys.readouterr().out
    assert "units in" not in text
    assert f"{summary.peaks[0] / 2**10:.0f} KiB" in text


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("method", ["EndToEnd", "Greedy", "BackLink", "SGR"])
def test_peaks_are_those_of_a_count_from_outside(method, window, quiet):
    class Wide(Lit):
        def __init__(self):
            super().__init__(Net(blocks=3, width=32))

    class Outside(L.Callback):
        """The most that lives at once in any later step."""

        peak = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.loop.stepping.steps == 1:
                self.counter = LiveBytes(
                    existing(pl_module, pl_module.loop.stepping.optimizers, batch)
                )
                self.counter.__enter__()

        def on_train_batch_end(self, trainer, pl_module, *args):
            counter = self.__dict__.pop("counter", None)
            if counter is not None:
                counter.__exit__(None, None, None)
                self.peak = max(self.peak, counter.peak)

    summary, outside = LocalSummary(memory=True), Outside()
    run(
        lambda m: LocalLearner(m, method), quiet, Wide, callbacks=[summary, outside],
        accumulate_grad_batches=window,
    )  # fmt: skip
    assert len(summary.peaks) == (1 if method == "EndToEnd" else 4)
    assert min(summary.peaks) > 0
    # Metrics, and what the user's own code makes between the modules, are no module's.
    assert max(summary.peaks) == pytest.approx(outside.peak, rel=0.02)


def test_measuring_changes_no_number(quiet):
    states = []
    for memory in (False, True):
        callbacks = [LocalSummary(memory=memory)]
        _, learner = run(lambda m: LocalLearner(m, "BackLink"), quiet, callbacks=callbacks)
        states.append(learner.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_meter_knows_each_modules_own_peak():
    meter = Meter(2, torch.device("cpu"))
    existing = torch.zeros(1000)
    with meter.running([existing]):
        with meter.module(0):
            big = torch.zeros(5000)
            del big
        with meter.module(1):
            small = torch.zeros(100)
            del small
        with meter.module(0):
            pass
    assert meter.peaks == [24000, 4400]


def test_the_pictures_are_drawn_from_the_logged_numbers(tmp_path, quiet, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def keep(self, x, y, **options):
        drawn.append((self.get_figure(), list(x), list(y)))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", keep)
    logger = CSVLogger(tmp_path)
    summary = LocalSummary(head_accuracy=True)
    options = {**quiet, "logger": logger}
    trainer, learner = run(
        lambda m: LocalLearner(m, methods.Greedy()), options, epochs=3, callbacks=[summary]
    )
    folder = tmp_path / "lightning_logs" / "version_0"
    assert {p.name for p in folder.glob("*.png")} == {"local_loss.png", "local_accuracy.png"}
    figures = list(dict.fromkeys(figure for figure, _, _ in drawn))
    losses = [line for line in drawn if line[0] is figures[0]]
    assert len(losses) == 2 * 4
    for k in range(4):
        assert losses[k][1] == [1, 2, 3]
        assert losses[k][2][-1] == float(trainer.callback_metrics[f"local/0{k}/loss_epoch"])
    lines = [line for line in drawn if line[0] is figures[1]]
    assert len(lines) == 3
    assert lines[-1][2] == [100 * a for a in summary.accuracies]


@pytest.mark.parametrize("installed", [True, False])
def test_no_picture_where_nobody_looks(installed, tmp_path, quiet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(lambda m: LocalLearner(m, "Greedy"), quiet, epochs=1, callbacks=[LocalSummary()])
    options = {**quiet, "logger": CSVLogger(tmp_path)}
    summary = LocalSummary(pictures=installed)
    if installed:
        monkeypatch.setattr("lightning_local.callbacks._MATPLOTLIB", False)
    run(lambda m: LocalLearner(m, "Greedy"), options, epochs=1, callbacks=[summary])
    assert not list(tmp_path.rglob("*.png"))


def test_the_summary_refuses_another_module(quiet):
    with pytest.raises(TypeError, match="LocalSummary is for a LocalLearner"):
        L.Trainer(max_epochs=1, callbacks=[LocalSummary()], **quiet).fit(Lit(), data(), data())
