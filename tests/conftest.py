"""Settings that every test and every kernel started by a test shares."""

import importlib
import os
import sys

import pytest

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # pytest-xdist already uses the cores
    "MPLBACKEND": "Agg",  # no display; notebook kernels choose their own backend
    "HF_HUB_OFFLINE": "1",  # parity tests build small random models, they never download
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PLATFORM_DIRS": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def pytest_configure(config):
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    importlib.import_module("kernels.runtime")  # before anything else imports Triton


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """A test that flushes subnormal numbers, as recipes do, must not do so for the next one."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
