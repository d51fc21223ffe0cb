"""What the unit tests and the notebooks under nbval share: results folders of the session's own, threads, order."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from lumirlib.training.threads import cores, environment_of, threads_each

#: Workers at most: each takes up to 2 GiB.
MAX_WORKERS = 4
#: Folder of the results of the notebooks that show the network which `lumirlib run backbone` trains: one trains it.
TRAINED = dict.fromkeys(("figures", "run_ablation"), "trained")
#: A parameter of these, and what it is without --long: one epoch by Muon, after which all distances have fallen as they
#: do after Adam's eight, and a third of the pairs.
WHOLE = "options: dict = {}"
SHORTER = (
    'options: dict = {"epochs": 1, "optimizer": "muon", "learning_rate_factor": 4, '
    '"validation_pairs": 2, "evaluation_pairs": 10}'
)
#: Files that take longest, half a minute and more, go first: begun last, one would leave the other workers idle. At
#: first one alone compiles loops, and the others find them on the disk.
LONGEST = (
    "test_browser",
    *TRAINED,
    "test_site",
    "test_verify",
    "register_your_own",
    "test_engine",
    "test_faults",
    "test_slurm",
    "test_register_options",
    "test_register",
    "test_folder",
    "test_prepare",
    "test_step",
    "test_project",
    "test_cli",
    "test_cohort",
    "test_trainer",
)

# The workers share the cores. PyTorch, which is imported later, reads this, and so do the kernels of notebooks and the
# commands that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.update(environment_of(threads_each(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))) | os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a test that takes more threads does not have them spin


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run what is marked long too: minutes to hours")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than cores, as some wait for processes; none for files, single tests, -k and -m, which would not pay."""
    asked = config.option.file_or_dir
    is_part = asked and not any(Path(one).is_dir() for one in asked)
    return 0 if is_part or config.option.keyword or config.option.markexpr else min(cores() + 1, MAX_WORKERS)


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
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --long"))
        trains = item.path.suffix == ".ipynb" and item.path.stem in TRAINED
        if trains and "parameters" in item.cell.metadata.get("tags", []):
            if WHOLE not in item.cell.source:
                raise pytest.UsageError(f"{item.path.name} must have the parameter {WHOLE!r}: conftest.py shortens it")
            item.cell.source = item.cell.source.replace(WHOLE, SHORTER, 1)


def pytest_collection_finish(session):
    gc.freeze()  # every collection of the garbage that tests leave would go through all modules and tests too


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
