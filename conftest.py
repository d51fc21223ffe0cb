"""What the unit tests and the notebooks under nbval share: a results folder of the session's own."""

from __future__ import annotations

import os
import shutil
import tempfile


def pytest_configure(config):
    """Send what tests and notebooks write to a temporary folder, not into the checkout's results/."""
    config.lumirlib_results = tempfile.mkdtemp(prefix="lumirlib-test-results-")
    os.environ["LUMIRLIB_RESULTS"] = config.lumirlib_results


def pytest_unconfigure(config):
    shutil.rmtree(config.lumirlib_results, ignore_errors=True)
    os.environ.pop("LUMIRLIB_RESULTS", None)
