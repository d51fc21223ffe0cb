"""What the unit tests and the notebooks under nbval share: results folders of the session's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

COMMITTED = Path(__file__).resolve().parent / "results"

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
    """Send what tests and notebooks write to a temporary folder, not into the checkout's results/."""
    config.lumirlib_results = tempfile.mkdtemp(prefix="lumirlib-test-results-")
    os.environ["LUMIRLIB_RESULTS"] = config.lumirlib_results


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Give each notebook a results folder of its own, with the figures that are committed in it.

    A notebook's kernel takes its environment over when its first cell is set up. A notebook that reads results finds
    the committed ones, as a reader does, and not what another notebook has just made on this machine.
    """
    if item.path.suffix != ".ipynb":
        os.environ["LUMIRLIB_RESULTS"] = item.config.lumirlib_results
        return
    folder = Path(item.config.lumirlib_results, item.path.stem)
    if not folder.exists():
        for part in ("metrics", "logs", "costs", "folding", "robustness"):
            if (COMMITTED / part).is_dir():
                shutil.copytree(COMMITTED / part, folder / part)
    os.environ["LUMIRLIB_RESULTS"] = str(folder)


def pytest_unconfigure(config):
    shutil.rmtree(config.lumirlib_results, ignore_errors=True)
    os.environ.pop("LUMIRLIB_RESULTS", None)
