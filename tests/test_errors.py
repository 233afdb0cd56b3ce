"""Bad input ends in one error that names it, what is allowed and what to do; nothing saved is hurt.

The mistakes are in `mistakes_*.py`. Details of each area are tested beside it.
"""

import functools
import re
import traceback
from pathlib import Path

import mistakes_arguments  # noqa: F401  # fills CASES
import mistakes_batches  # noqa: F401  # fills CASES
import mistakes_modules  # noqa: F401  # fills CASES
import mistakes_trainer  # noqa: F401  # fills CASES
import pytest
from fleet import QUIET
from mistakes import CASES, NOW
from simple import Lit, fit, wrap

from lightning_local import LocalLearner

PACKAGE = str(Path(LocalLearner.__init__.__code__.co_filename).parent)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    fit(wrap(2)(Lit()), dict(QUIET), epochs=1).save_checkpoint(path)
    return path


@functools.cache
def outcome(name):
    """The error of a case, its message and where it was raised."""
    function, _, _ = CASES[name]
    try:
        function()
    except Exception as error:
        caught = error
    else:
        pytest.fail("nothing was raised")
    frames = traceback.extract_tb(caught.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    where = (ours[-1].filename, ours[-1].lineno) if ours else None
    last = frames[-1].filename.startswith(PACKAGE)
    return caught, str(caught), where if last else None


@pytest.mark.filterwarnings("ignore:Using torch.compile:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_explained(name, quiet, checkpoint):
    NOW.update(quiet=quiet, file=checkpoint)
    before = checkpoint.read_bytes()
    error, message, where = outcome(name)
    _, words, kind = CASES[name]
    assert type(error) is kind, repr(error)
    assert re.search(".*".join(map(re.escape, words)), message, re.DOTALL), message
    assert where is not None, "not raised by us"
    assert checkpoint.read_bytes() == before


def test_there_are_many_mistakes_and_none_is_explained_like_another(quiet, checkpoint):
    NOW.update(quiet=quiet, file=checkpoint)
    found = [outcome(name) for name in CASES]
    messages, places = {message for _, message, _ in found}, {where for _, _, where in found}
    assert len(messages) == len(CASES) >= 60
    assert len(places) >= 40
