"""What the unit tests and the notebooks under nbval share: results folders of the session's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from lumirlib._process import cores, environment_of, threads_each

#: Workers at most: each takes up to 2 GiB.
MAX_WORKERS = 4
#: Folder of the results of the notebooks that show the network which `lumirlib run backbone` trains: one trains it.
TRAINED = dict.fromkeys(("figures", "run_ablation"), "trained")

# The workers share the cores. PyTorch, which is imported later, reads this, and so do the kernels of notebooks and the
# commands that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.update(environment_of(threads_each(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))) | os.environ)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what is marked long too: minutes to hours")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """As many as cores; none for files, single tests, -k and -m: to start workers would take longer than they save."""
    asked = config.option.file_or_dir
    is_part = asked and not any(Path(one).is_dir() for one in asked)
    return 0 if is_part or config.option.keyword or config.option.markexpr else min(cores(), MAX_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of a file go to one worker, with what its fixtures made, and so do the notebooks of one network."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TRAINED.get(Path(file).stem, file)

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(config, items):
    # what takes longest goes first: begun last, it would leave the other workers idle
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path.parent.name != "training"))
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
    """Give each notebook, or those of one network, a folder for what it makes, so that none meets another's results.

    A notebook's kernel takes its environment over when its first cell is set up.
    """
    own = TRAINED.get(item.path.stem, item.path.stem) if item.path.suffix == ".ipynb" else ""
    os.environ["LUMIRLIB_RESULTS"] = str(Path(item.config.lumirlib_results, own))


def pytest_unconfigure(config):
    shutil.rmtree(config.lumirlib_results, ignore_errors=True)
    os.environ.pop("LUMIRLIB_RESULTS", None)
