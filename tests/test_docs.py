"""What the documents say is true: their code runs, their tests and links exist."""

import configparser
import re
import sys
from pathlib import Path

import pytest

from benchmarks.report import renew_table

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FEW = "limit_train_batches=2, limit_val_batches=1"
SHORTER = {"max_epochs=8": f"max_epochs=1, {FEW}", "max_epochs=12": f"max_epochs=2, {FEW}"}
NO_CODE = {"api.md", "results.md"}  # docstrings, whose examples are doctests; tables


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name not in NO_CODE], ids=lambda p: p.name
)
def test_the_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py"])
    scope = {"__name__": "document"}
    found = blocks(path, "python")
    assert found
    for code in found:
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(compile(code, path.name, "exec"), scope)


@pytest.mark.parametrize("path", [*DOCUMENTS, *(ROOT / "benchmarks").rglob("*.md")], ids=str)
def test_links_and_tests_exist(path):
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)`", text):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_every_row_of_the_feature_table_has_a_test():
    text = (ROOT / "docs" / "lightning.md").read_text()
    table = text.partition("| feature |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        assert "::test_" in row, row


@pytest.mark.parametrize("folder", sorted(p.parent for p in ROOT.glob("benchmarks/*/result.json")))
def test_benchmark_tables_are_those_of_their_results(folder):
    text = (folder / "README.md").read_text()
    renew_table(folder)
    assert (folder / "README.md").read_text() == text


def test_the_oldest_versions_are_those_claimed():
    """What `.ci/oldest` installs is what setup.cfg allows at least, and what the README says."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    claimed = {}
    for line in config["options"]["install_requires"].split():
        name, least = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups()
        claimed[name] = least
    pinned = dict(
        line.split("==") for line in (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    )
    assert pinned.keys() == claimed.keys()
    for name, least in claimed.items():
        assert pinned[name] == least + ".0" * (pinned[name].count(".") - least.count(".")), name
    table = (ROOT / "README.md").read_text().partition("## Compatibility")[2]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    ]
    oldest = dict(zip(head, rows[-1], strict=True))
    python = config["options"]["python_requires"].removeprefix(">=")
    assert oldest == {**oldest, **pinned, "Python": python}
