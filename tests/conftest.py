"""Fixtures shared by the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import KILLS, LONG_KILLS, TALLY
from small_cohorts import write_small_cohort


@pytest.fixture(scope="session")
def written_small_cohort(tmp_path_factory) -> Path:
    return write_small_cohort(tmp_path_factory.mktemp("cohorts") / "small").parent


@pytest.fixture
def small_cohort_json(written_small_cohort, tmp_path) -> Path:
    """A small cohort, a copy that the test may change."""
    return shutil.copytree(written_small_cohort, tmp_path / "small") / "dataset.json"


@pytest.fixture
def cohort(small_cohort_json):
    from lumirlib import load_cohort

    return load_cohort(small_cohort_json)


@pytest.fixture(scope="session")
def embedded_cohort():
    """The embedded cohort at 4 mm, made into the user's cache where it is not there yet."""
    from lumirlib import load_cohort

    return load_cohort("embedded", 4)


@pytest.fixture
def kills(request) -> int:
    """How often a test kills what it is about."""
    return LONG_KILLS if request.config.getoption("--long") else KILLS


@pytest.fixture(scope="module", autouse=True)
def memory_kept():
    """Freed memory stays with the worker until a file's tests are over, as in commands: the system would zero it."""
    from lumirlib.models.memory import freed_memory_kept

    with freed_memory_kept():
        yield


@pytest.fixture(autouse=True)
def threads_of_pytorch():
    """Threads of PyTorch are as they were after each test.

    Numba's parallel loops (deedsBCV) change OpenMP's number of them, which is PyTorch's too. Where others use the
    cores, threads wait for one another: on a busy machine the tests behind deedsBCV's took up to 40 times as long.
    """
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session):
    TALLY.write(session.testscollected, session.testsfailed)
