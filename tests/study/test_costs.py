"""What the full reproduction costs: README's table is the generated one, and takes GPU figures where there are some."""

import json
import re
import shutil

import pandas as pd
import pytest

from lumirlib.files import write_between
from lumirlib.provenance import project_root
from lumirlib.study.costs import (
    MARKERS,
    STEPS,
    VALIDATION_PAIRS,
    checkpoint_bytes,
    gpu_hours,
    load_budget,
    readable_budget,
    scale,
)

COMMITTED = project_root() / "results"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(COMMITTED / "costs", tmp_path / "costs", ignore=shutil.ignore_patterns("*paper_cuda*"))
    return tmp_path


def measure_on_a_gpu(folder, prefix=""):
    """Write costs as a GPU would have measured them: half a second a step for the backbone, one for the others."""
    costs = pd.read_csv(folder / "costs" / f"{prefix}demo_cpu.csv")
    costs["seconds_per_step"] = costs["variant"].map({"backbone": 0.5}).fillna(1.0)
    costs["seconds_per_pair"], costs["training_mib"] = 0.1, 2048.0
    path = folder / "costs" / f"{prefix}paper_cuda.csv"
    costs.to_csv(path, index=False)
    about = {"commit": "0123456789abcdef", "device": "Imagined GPU", "images": "160x224x192", "command": "none"}
    path.with_suffix(".json").write_text(json.dumps(about))


def test_the_page_on_speed_has_the_table_that_the_committed_costs_make():
    text = readable_budget(load_budget(COMMITTED))
    page = (project_root() / "docs" / "speed.md").read_text(encoding="utf-8")
    between = page.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    assert between == text, "make it anew: lumirlib report budget --write"


def test_the_papers_schedule_and_sizes():
    assert STEPS == 674_800 and VALIDATION_PAIRS == 90
    assert gpu_hours(0.5, 0.1) == pytest.approx((674_800 * 0.5 + 200 * 90 * 0.1) / 3600)
    assert checkpoint_bytes(909_232) == 909_232 * (4 + 3 * 4 + 4)


def test_several_gpus_share_the_steps_and_the_validation_and_send_gradients_around_a_ring():
    table = scale()
    assert list(table["steps, one seed"]) == ["674,800", "84,400", "10,600"]  # 200 epochs of 3374, 422, 53
    assert list(table["hours"]) == ["187.4 t + 5.0 r", "23.4 t + 0.7 r", "2.9 t + 0.1 r"]
    assert list(table["MB read / step"]) == ["14", "110", "881"]
    # the backbone's 909,232 float32 numbers, of which each GPU passes 2 (n - 1) / n on
    assert table.iloc[:, -1].str.split().str[0].tolist() == ["0.0", "6.4", "7.2"]


def test_without_a_gpu_the_table_says_how_to_measure_and_invents_nothing(folder):
    found = load_budget(folder)
    assert list(found.rows["row"]) == [
        "backbone",
        "BF",
        "CA",
        "CA+BF",
        "LK",
        "LC-1",
        "LC-2",
        "TransMorph",
        "uniGradICON",
        "SynthMorph",
        "VoxelMorph",
    ]
    assert found.rows[["seconds_per_step", "gpu_hours", "training_mib"]].isna().all(axis=None)
    text = readable_budget(found)
    assert "`lumirlib measure costs --preset paper --device cuda`" in text and "All rows" not in text
    assert (
        "GPU-hours, one seed" not in text
        and text.count("have not been measured yet") == 1
        and "Not measured yet: t, r" in text
    )
    assert "12.52 (4.49×)" in text and "3,384 scans × 6.88 MB (uint8) = 23.3 GB" in text


def test_gpu_figures_make_hours_as_soon_as_they_are_there(folder):
    measure_on_a_gpu(folder)
    found = load_budget(folder)
    hours = found.rows.set_index("row")["gpu_hours"]
    assert hours["backbone"] == pytest.approx(94.22, abs=0.01) and hours["LK"] == pytest.approx(187.94, abs=0.01)
    assert found.missing == ("`lumirlib measure costs --rows table1 --preset paper --device cuda`",)
    assert hours.isna().sum() == 4 and "All rows" not in readable_budget(found)
    measure_on_a_gpu(folder, "table1_")
    text = readable_budget(load_budget(folder))
    assert "not been measured" not in text and "Not measured yet: the exchange" in text
    assert "Imagined GPU, 160x224x192 voxels, batch 1, by 0123456789" in text
    assert "All rows: 1,974 GPU-hours a seed, 5,921 with 3 seeds." in text
    assert re.search(r"\| LK .*\| 1\.000 \(2\.00×\) +\| 2\.0 +\| 188 ", text)


def test_costs_without_training_count_as_not_measured(folder):
    measure_on_a_gpu(folder)
    path = folder / "costs" / "paper_cuda.csv"
    pd.read_csv(path).assign(seconds_per_step=float("nan")).to_csv(path, index=False)
    assert len(load_budget(folder).missing) == 2


def test_costs_that_lack_a_row_are_refused_and_none_at_all_too(folder, tmp_path):
    path = folder / "costs" / "demo_cpu.csv"
    costs = pd.read_csv(path)
    costs[costs["variant"] != "LK"].to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"costs of Table 2 in .* lack LK"):
        load_budget(folder)
    with pytest.raises(FileNotFoundError, match=r"Not measured \(costs/demo_cpu.csv\)"):
        load_budget(tmp_path / "nothing")


def test_the_table_is_written_between_the_markers_and_nothing_else_is_touched(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    write_between(readme, MARKERS, "| new |")
    assert readme.read_text() == f"before\n{MARKERS[0]}\n\n| new |\n\n{MARKERS[1]}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"must hold <!-- lumirlib report budget"):
        write_between(readme, MARKERS, "| new |")
