"""One thread, one seed, and guards against tests that leave something behind."""

import logging
import os
import threading

import lightning as L
import pytest
import torch
import torch.distributed
from fleet import QUIET

# Asserts outside of test files say what they compared, too.
pytest.register_assert_rewrite("composing", "faults", "parallel_modules", "settings", "twin")
torch.set_num_threads(1)
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    L.seed_everything(1234, verbose=False)


@pytest.fixture(autouse=True)
def no_leaked_variables():
    """Environment variables are as before."""
    before = dict(os.environ)
    yield
    leaked = set(os.environ) - set(before) - {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}
    os.environ.clear()
    os.environ.update(before)
    leaked -= {"PYTEST_CURRENT_TEST", "CUBLAS_WORKSPACE_CONFIG", "KMP_INIT_AT_FORK"}
    leaked -= {"KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR", "CUDA_MODULE_LOADING"}
    leaked -= {"_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    assert not leaked, f"test left environment variables: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_process_group():
    """No process group stays open."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("test left a process group open")


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """No thread stays alive."""
    before = set(threading.enumerate())
    yield
    allowed = ("QueueFeederThread", "pydevd", "ThreadPoolExecutor", "tqdm", "Thread-")
    leaked = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.is_alive() and not thread.name.startswith(allowed)
    ]
    assert not leaked, f"test left threads: {leaked}"


@pytest.fixture
def quiet():
    """Arguments of a Trainer that writes and prints nothing."""
    return dict(QUIET)
