"""What the unit tests and the notebooks under nbval share: results folders of the session's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# The workers of `pytest -n` share the cores. PyTorch, which is imported later, reads this, and so do the kernels of
# notebooks and the commands that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what is marked long too: minutes to hours")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --long"))


def pytest_configure(config):
    """Send what tests and notebooks write to a temporary folder, not into the checkout."""
    config.lumirlib_results = tempfile.mkdtemp(prefix="lumirlib-test-results-")
    os.environ["LUMIRLIB_RESULTS"] = config.lumirlib_results


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give each notebook a folder of its own for what it makes, so that none goes on from another's checkpoint.

    A notebook's kernel takes its environment over when its first cell is set up.
    """
    own = item.path.stem if item.path.suffix == ".ipynb" else ""
    os.environ["LUMIRLIB_RESULTS"] = str(Path(item.config.lumirlib_results, own))


def pytest_unconfigure(config):
    shutil.rmtree(config.lumirlib_results, ignore_errors=True)
    os.environ.pop("LUMIRLIB_RESULTS", None)
