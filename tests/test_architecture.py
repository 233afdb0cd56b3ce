"""The shape of the package: public names, who imports whom, sizes, what it says of itself."""

import ast
import re
from pathlib import Path

import pytest

import lightning_local
from lightning_local import methods

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_local"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.glob("*.py"))

PUBLIC = {
    "EarlyExit",
    "LocalCLI",
    "LocalLearner",
    "LocalParallelStrategy",
    "LocalSummary",
    "Partition",
    "couplings",
    "heads",
    "losses",
    "methods",
    "plan_partition",
}
# What a file may import besides torch and the standard library; a line may use all lines above it.
LAYERS = [
    {"preserving", "recompute", "dividing", "factories", "in_place", "meter", "work", "reads"},
    {"decisions"},
    {"nodes"},
    {"fake_run", "traced"},
    {"second_order", "ranges"},
    {"transport", "alarm", "replicas"},
    {"wire", "processes"},
    {"channels"},
    {"tracing", "questions"},
    {"body", "dryrun", "composition"},
    {"units", "place", "layers"},
    {"slicing", "augmented", "objectives", "decoders"},
    {"similarity", "reconciliation"},
    {"reconstruction"},
    {"partition", "message", "heads", "losses", "couplings", "local_module", "randomness"},
    {"cutting", "trial"},
    {"links"},
    {"methods", "substitute", "batch_loop"},
    {"distributed_links"},
    {"evaluation"},
    {"first_batch", "hooks", "guarding", "wrapper", "wrapping", "optim", "precision", "schedules"},
    {"arguments", "fakes"},
    {"examples"},
    {"build", "metrics", "state"},
    {"setting"},
    {"rehearsal"},
    {"balancing"},
    {
        "compiling",
        "exits",
        "stepping",
        "head_accuracy",
        "publisher",
        "tables",
        "pictures",
        "watching",
    },
    {"saving", "early_exit"},
    {"callbacks", "loop"},
    {"learner"},
    {"limits", "placement", "feeding", "in_step"},
    {"holdings", "mesh_strategy"},
    {"gathering"},
    {"strategy"},
    {"measuring", "plan_picture"},
    {"plan"},
    {"planner"},
    {"cli_errors"},
    {"cli"},
    {"plan_command"},
    {"__init__", "__main__"},
]
TORCH_ONLY = set().union(*LAYERS[:19])


def imported(path):
    """Modules imported when the file is, as (package, room or None)."""
    found = set()
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if parts[0] != "lightning_local":
                found.add((parts[0], None))
            elif len(parts) > 1:
                found.add((parts[0], parts[1]))
            else:
                found |= {(parts[0], alias.name) for alias in node.names}
    return found


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def test_public_names_are_frozen():
    assert set(lightning_local.__all__) == PUBLIC
    assert len(PUBLIC) <= 12
    for name in PUBLIC:
        assert getattr(lightning_local, name) is not None


def test_every_room_has_a_layer():
    assert {room(path) for path in FILES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = room(path)
    level = next(i for i, names in enumerate(LAYERS) if own in names)
    allowed = set().union(*LAYERS[: level + 1])
    for package, target in imported(path):
        if package == "lightning_local":
            assert target in allowed, f"{own} imports {target}"
        elif own in TORCH_ONLY:
            assert package not in {"lightning", "lightning_utilities", "torchmetrics"}


@pytest.mark.parametrize(
    "path",
    [*FILES, *TESTS],
    ids=lambda p: str(p.relative_to(PACKAGE if p in FILES else ROOT)),
)
def test_budgets(path):
    lines = len(path.read_text().splitlines())
    preset = path.parent.name == "methods" and path.name not in ("__init__.py", "base.py")
    assert lines <= (120 if preset else 300)


def test_every_preset_file_is_in_the_table():
    files = {p.stem for p in (PACKAGE / "methods").glob("*.py")} - {"__init__", "base"}
    listed = {cls.__module__.rpartition(".")[2] for cls in methods.METHODS.values()}
    assert files == listed
    assert all(name == cls.__name__ for name, cls in methods.METHODS.items())


def test_presets_override_nothing():
    for cls in methods.METHODS.values():
        own = {name for name in vars(cls) if not name.startswith("__")}
        assert own == set()
        assert not {"__call__", "__getattr__", "__new__"} & set(vars(cls))


def test_no_drawers_and_no_asserts_on_users_input():
    assert not {"utils", "core", "common", "misc"} & {path.stem for path in FILES}
    for path in FILES:
        assert "NotImplementedError" not in path.read_text()


def test_every_docstring_example_runs():
    import doctest
    import importlib
    import pkgutil

    count = 0
    for info in pkgutil.walk_packages(lightning_local.__path__, "lightning_local."):
        if info.name.endswith("__main__"):
            continue
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, info.name
        count += result.attempted
    assert count >= 8


def test_no_absolute_path_of_a_machine():
    folders = [p for name in ("examples", "docs", "benchmarks") for p in (ROOT / name).rglob("*.*")]
    places = [*FILES, *folders, *ROOT.glob("*.md"), *ROOT.glob("*.cfg")]
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt)/\w")
    for path in places:
        if path.suffix in (".py", ".md", ".yaml", ".cfg", ".toml"):
            assert not pattern.search(path.read_text()), path
