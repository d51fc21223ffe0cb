"""Fixtures shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import TALLY
from small_cohorts import write_small_cohort


@pytest.fixture
def small_cohort_json(tmp_path) -> Path:
    return write_small_cohort(tmp_path / "small")


@pytest.fixture(scope="session")
def embedded_cohort():
    """The embedded cohort at 4 mm, made into the user's cache where it is not there yet."""
    from lumirlib import load_cohort

    return load_cohort("embedded", 4)


def pytest_sessionfinish(session):
    TALLY.write(session.testscollected, session.testsfailed)
