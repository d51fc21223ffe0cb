"""A long training takes no more memory and no more open files as it goes on."""

import long_run
import pytest
from faults import TALLY

from lumirlib import load_cohort
from lumirlib.methods.presets import get_preset
from lumirlib.training.engine import Engine


def test_sixty_steps_leave_no_file_and_no_thread_open(small_cohort_json, tmp_path):
    cohort = load_cohort(small_cohort_json).with_cache(tmp_path, progress=False)
    preset = get_preset("smoke", resolution_mm=1, channel_divisor=16, levels=2, steps_per_epoch=4)
    found = long_run.long_run(cohort, preset, 60, Engine("cpu", readers=2), progress=False)
    assert found["steps"] == 60 and found["epochs"] == 15
    assert found["open_files"][1] - found["open_files"][0] <= 1 and found["threads"][1] - found["threads"][0] <= 1
    assert found["open_files_slope_per_step"] == 0


@pytest.mark.long
def test_two_thousand_steps_at_smoke_size_need_constant_memory(embedded_cohort, tmp_path):
    cohort = embedded_cohort.with_cache(tmp_path, progress=False)
    preset = get_preset("smoke", steps_per_epoch=24)
    found = long_run.long_run(cohort, preset, 2000, Engine("cpu", readers=2), progress=False)
    assert found["steps"] >= 2000
    assert abs(found["memory_slope_kib_per_step"]) < 20  # of the 420 of one volume
    assert found["open_files_slope_per_step"] == 0 and found["open_files"][1] - found["open_files"][0] <= 2
    TALLY.count("training steps of a long run", "taken", found["steps"])
