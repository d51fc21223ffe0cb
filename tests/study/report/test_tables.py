"""Table 2 from the files of many runs: what is read, counted, set beside the paper, written and drawn."""

import itertools
import json
import math
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from lumirlib import build_model, cli, parse_variant, plots
from lumirlib.methods import parse_row, presets, row_from_options
from lumirlib.methods.presets import get_preset
from lumirlib.models.backbone import CASCADES, join_velocities
from lumirlib.provenance import project_root
from lumirlib.study import costs, results
from lumirlib.study.folding import amplified_folding
from lumirlib.study.report import figures, publish, statistics, tables
from lumirlib.study.report.runs import load_runs
from lumirlib.study.results import write_results
from lumirlib.study.run import Run

PAIRS = ("A_B", "B_A", "A_C")
FACTS = {
    "cohort": "embedded",
    "cohort_name": "Embedded cohort (simulated)",
    "cohort_digest": "d" * 16,
    "simulated": True,
    "resolution_mm": 4.0,
    "evaluated_pairs": 3,
    "commit": "c" * 40,
    "device": "x",
}


def write_run(
    folder, variant, seed, dice, tre=3.0, tre_points=None, ndv=0.0, hd95=4.0, val_dice=0.6, preset="demo", **changes
):
    """A finished run whose figures are those given, one per pair or one for all; `changes` update its provenance."""
    values = {"dice": dice, "tre_mm": tre, "ndv_percent": ndv, "hd95_mm": hd95, "seconds": 0.1}
    values |= {} if tre_points is None else {"tre_points_mm": tre_points}
    rows = [
        {"pair": pair, "fixed": pair[2], "moving": pair[0], "metric": metric, "value": value}
        for metric, given in values.items()
        for pair, value in zip(PAIRS, np.broadcast_to(given, 3), strict=True)
    ]
    chosen, row = get_preset(preset), parse_row(variant)
    about = {
        **FACTS,
        "run": f"{variant}_seed{seed}",
        "method": variant,
        "seed": seed,
        "preset": asdict(row.training_preset(chosen)),
        "options": asdict(chosen.apply(row)),
        "val_dice": val_dice,
        "val_dice_before": 0.5,
        **changes,
    }
    return write_results(pd.DataFrame(rows), folder / "metrics" / f"{about['run']}.csv", about)


@pytest.fixture
def folder(tmp_path):
    before = write_run(tmp_path, "backbone", 0, [0.5, 0.4, 0.6], tre=5.0, run="Zero", method="Zero Displacement")
    facts = before.with_suffix(".json")
    kept = {key: value for key, value in json.loads(facts.read_text()).items() if key not in ("options", "preset")}
    facts.write_text(json.dumps(kept))
    write_run(tmp_path, "backbone", 0, [0.70, 0.60, 0.80], ndv=0.2)
    write_run(tmp_path, "backbone", 1, [0.72, 0.62, 0.82], ndv=0.4)
    write_run(tmp_path, "LC-2", 0, [0.71, 0.59, 0.84], ndv=0.0, val_dice=0.61)
    write_run(tmp_path, "LC-2", 1, [0.73, 0.62, 0.83], ndv=0.0, val_dice=0.63)
    yield tmp_path
    plt.close("all")


@pytest.fixture
def runs(folder):
    return load_runs(folder, ["backbone", "LK", "LC-2"])


def test_runs_are_found_by_variant_preset_and_cohort_and_what_lacks_is_said(folder, runs):
    assert runs.variants == ("backbone", "LC-2") and runs.missing == ("LK",)
    assert "Not run: LK" in runs.missing_note and "lumirlib sweep --rows backbone LK LC-2 --preset demo" in runs.command
    assert "simulated" in runs.title and "not a LUMIR result" in runs.title
    assert "3 pairs; 2 seeds a row" in runs.spread_note
    write_run(folder, "LK", 0, 0.7, preset="smoke", run="LK_smoke")
    write_run(folder, "LK", 0, 0.7, cohort="brains", run="LK_brains")
    options = asdict(get_preset("demo").apply(parse_variant("LK"))) | {"start_channels": 20}
    write_run(folder, "LK", 0, 0.7, options=options, run="LK_wide")
    assert load_runs(folder, ["backbone", "LK"]).missing == ("LK",)
    wide = load_runs(folder, ["LK"], options={"start_channels": 20})
    assert wide.facts["run"].tolist() == ["LK_wide"] and "start_channels=20" in wide.title


def test_a_table_names_the_voxels_that_were_registered_and_those_that_were_scored(folder):
    assert load_runs(folder, ["backbone"]).title.startswith("simulated people, 4 mm: not a LUMIR result")
    before = {"run": "Zero_1mm", "method": "Zero Displacement", "resolution_mm": 1.0, "scored_mm": 1.0}
    write_run(folder, "backbone", 0, [0.45, 0.35, 0.55], **before)
    write_run(folder, "CA", 0, [0.6, 0.5, 0.7], scored_mm=1.0)
    runs = load_runs(folder, ["CA"])
    assert runs.title.startswith("simulated people, registered at 4 mm, scored at 1 mm: not a LUMIR result")
    zero = runs.values[(runs.values["variant"] == "Before Reg") & (runs.values["metric"] == "dice")]
    assert zero["value"].tolist() == [0.45, 0.35, 0.55]
    listed = results.studies(folder)[["methods", "resolution_mm", "scored_mm"]].to_numpy().tolist()
    assert ["CA", 4.0, 1.0] in listed and ["LC-2, backbone", 4.0, 4.0] in listed


def test_runs_of_an_earlier_version_without_later_options_count(folder):
    options = asdict(get_preset("demo").apply(parse_variant("CA")))
    for name in ("bilateral_mode", "bilateral_sigma", "bilateral_sigma_range"):
        del options[name]
    write_run(folder, "CA", 0, 0.7, options=options)
    assert load_runs(folder, ["CA"]).variants == ("CA",)


def test_runs_that_cannot_stand_in_one_table_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run of LK; make them with: lumirlib sweep --rows LK"):
        load_runs(folder, ["LK"])
    write_run(folder, "LK", 0, 0.7, cohort_digest="e" * 16)
    with pytest.raises(ValueError, match="different states of the cohort 'embedded'"):
        load_runs(folder, ["LK", "backbone"])
    with pytest.raises(ValueError, match="no zero displacement on the pairs of LK_seed0"):
        load_runs(folder, ["LK"])
    write_run(folder, "CA", 0, 0.7, scored_mm=1.0)
    with pytest.raises(
        ValueError, match="on voxels of one size, got on 1 mm CA_seed0 and on 4 mm backbone_seed0, backbone_seed1;"
    ):
        load_runs(folder, ["backbone", "CA"])
    with pytest.raises(ValueError, match="no zero displacement on the pairs of CA_seed0"):
        load_runs(folder, ["CA"])  # there is one, at 4 mm
    write_run(folder, "backbone", 0, 0.7, run="again")
    with pytest.raises(ValueError, match="several runs of one variant and seed: again, backbone_seed0"):
        load_runs(folder, ["backbone"])


def test_table_2_has_means_over_seeds_spread_and_difference_in_the_papers_units(runs):
    table = tables.table2(runs).set_index(["variant", "metric"])
    backbone = table.loc[("backbone", "dice")]
    assert backbone[["paper", "ours", "difference", "seeds", "pairs"]].tolist() == pytest.approx(
        [77.31, 71, 71 - 77.31, 2, 3]
    )
    assert backbone["seed_std"] == pytest.approx(np.std([70, 72], ddof=1))
    assert table.loc[("backbone", "dice_std"), "ours"] == pytest.approx(100 * np.std([0.7, 0.6, 0.8]))
    assert table.loc[("LC-2", "val_dice"), "ours"] == pytest.approx(62)
    assert table.loc[("Before Reg", "tre_mm"), ["paper", "ours"]].tolist() == [4.3543, 5.0]
    assert table.loc[("LC-2", "dice"), "sc"] == 16  # 64 of the paper, a quarter at demo


def test_brief_table_has_a_line_a_method_with_the_papers_figure_and_ours(runs):
    brief = publish.brief_table(tables.table2(runs)).set_index("method")
    assert brief.index.tolist() == ["Before Reg", "backbone", "backbone+LC-2"]
    assert brief.loc["backbone", "Dice (%): paper, ours"] == "77.31 · 71.00 ± 1.41"
    assert brief.loc["backbone+LC-2", "NDV (%): paper, ours"] == "0.0001 · 0.0000 ± 0.0000"
    first = publish.brief_table(tables.table1(runs))
    assert first["method"].tolist() == ["Zero Displacement", "backbone", "next-gen-nn (LC-2)"]
    assert first.loc[1, "Dice (%): paper, ours"] == "– · 71.00 ± 1.41"


def test_what_a_results_folder_holds_is_listed_with_real_data_first(folder, tmp_path):
    write_run(folder, "LK", 0, 0.7, cohort="brains", simulated=False, run="LK_brains")
    write_run(folder, "LK", 0, 0.7, set_besides={"epochs": 6}, run="LK_short")
    found = results.studies(folder)
    assert found["cohort"].tolist() == ["brains", "embedded", "embedded"]
    assert found["set_besides"].tolist() == ["", "", "epochs=6"]
    assert found[["rows", "seeds", "runs"]].to_numpy().tolist() == [[1, 1, 1], [2, 2, 4], [1, 1, 1]]
    assert found.loc[1, "methods"] == "LC-2, backbone"
    assert results.studies(tmp_path / "nothing").empty


def test_runs_of_an_earlier_version_without_validation_dice_before_are_shown(folder):
    for path in (folder / "metrics").glob("*.json"):
        about = json.loads(path.read_text())
        about.pop("val_dice_before", None)
        path.write_text(json.dumps(about))
    table = tables.table2(load_runs(folder, ["backbone"])).set_index(["variant", "metric"])
    assert np.isnan(table.loc[("Before Reg", "val_dice"), "ours"])
    assert table.loc[("Before Reg", "dice"), "ours"] == pytest.approx(50)


def test_best_figures_are_bold_and_ties_of_all_are_not(runs, monkeypatch):
    monkeypatch.setattr(statistics, "MIN_PEOPLE", 3)
    shown = publish.readable_table(tables.table2(runs))
    ours = shown[shown["whose"] == "ours"]
    assert ours["Dice (%)"].tolist() == ["50.00", "71.00 (1.41)", "**72.00** (0.94)"]
    assert ours["TRE (mm)"].tolist() == ["5.0000", "3.0000 (0.0000)", "3.0000 (0.0000)"]
    assert ours["NDV (%)"].tolist()[1:] == ["0.3000 (0.1414)", "**0.0000** (0.0000)"]
    assert shown[shown["whose"] == "paper"]["TRE (mm)"].tolist() == ["4.3543", "2.3753", "**2.3360**"]
    assert shown["method"].tolist()[3] == "backbone (sc:8)"


def test_figures_that_rest_on_three_people_are_not_bold(runs, tmp_path):
    shown = publish.readable_table(tables.table2(runs))
    ours = shown[shown["whose"] == "ours"].drop(columns="Val Dice (%)")  # of pairs that the table does not know
    assert not ours.map(lambda text: "**" in text).any(axis=None)
    assert shown[shown["whose"] == "paper"]["TRE (mm)"].tolist() == ["4.3543", "2.3753", "**2.3360**"]
    assert "rest on 3 people, so none of ours is bold" in publish.publish_table(2, runs, tmp_path / "table2")


def test_tre_of_points_stands_beside_the_challenges_form(folder):
    write_run(folder, "LK", 0, 0.7, tre=3.0, tre_points=2.5)
    table = tables.table2(load_runs(folder, ["LK"]))
    ours = table[table["variant"] == "LK"].set_index("metric")["ours"]
    assert (ours["tre_mm"], ours["tre_points_mm"]) == (3.0, 2.5)
    assert table.set_index("metric").loc["tre_points_mm", "paper"].isna().all()
    brief = publish.brief_table(table).set_index("method")
    assert brief["TRE of points (mm): ours"].to_dict() == {"Before Reg": "–", "backbone+LK": "2.5000"}


def test_methods_of_other_teams_are_called_retrained_here(folder):
    write_run(folder, "VoxelMorph", 0, 0.6)
    shown = publish.readable_table(tables.table1(load_runs(folder, ["VoxelMorph", "LC-2"])))
    assert set(shown["method"]) == {
        "Zero Displacement",
        "VoxelMorph (retrained here)",
        "next-gen-nn (LC-2) (sc:16)",
        "",
    }


def test_differences_are_paired_by_pair_and_seed(runs):
    differences = tables.paired_differences(runs).set_index(["metric", "seed", "pair"])["difference"]
    assert differences["dice"].to_numpy() == pytest.approx([1, -1, 4, 1, 0, 1])
    effect = tables.effects(runs).set_index("metric")
    assert effect.loc["dice", "ours"] == pytest.approx(1.0)
    assert effect.loc["dice", "paper"] == pytest.approx(77.34 - 77.31)
    assert effect.loc["dice", "better_pairs"] == pytest.approx(2 / 3)
    assert effect.loc["dice", "seed_std"] == pytest.approx(np.std([4 / 3, 2 / 3], ddof=1))
    assert effect.loc["ndv_percent", ["ours", "better_pairs"]].tolist() == pytest.approx([-0.3, 1.0])
    assert effect.loc["tre_mm", "better_pairs"] == 0
    with pytest.raises(ValueError, match=r"reference must be one of the runs .backbone, LC-2.; got 'LK'"):
        tables.effects(runs, "LK")


def test_a_filter_behind_trained_weights_is_set_beside_the_papers_bf(folder):
    write_run(folder, "BF-post", 0, 0.7)
    table = tables.table2(load_runs(folder, ["backbone", "BF-post"])).set_index(["variant", "metric"])
    assert table.loc[("BF-post", "dice"), ["method", "paper"]].tolist() == ["backbone+BF-post", 77.34]


def test_tables_are_written_in_three_forms_with_their_provenance(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "MIN_PEOPLE", 3)
    text = publish.publish_table(2, runs, tmp_path / "tables" / "table2")
    csv, md, tex, about = ((tmp_path / "tables" / f"table2.{end}").read_text() for end in ("csv", "md", "tex", "json"))
    assert md == text and "**72.00** (0.94)" in md and md.startswith("**Table 2, paper and ours (simulated people")
    assert r"\textbf{72.00} (0.94)" in tex and r"Dice (\%)" in tex and r"\caption{Table 2" in tex and "±" not in tex
    assert len(csv.splitlines()) == 1 + 3 * 7
    assert json.loads(about)["commits"] == ["c" * 40] and "backbone_seed1" in json.loads(about)["runs"]
    changed = publish.publish_effects(runs, tmp_path / "effects")
    assert "+LC-2" in changed and "+1.00 (0.47), 67% better" in changed and "−0.3000" in changed


def test_figures_of_many_runs_draw_every_pair_and_seed(runs, tmp_path):
    figure = figures.variants_figure(runs, tables.paired_differences(runs), runs.title)
    assert len(figure.axes) == 8 and [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "backbone",
        "LC-2",
    ]
    assert [label.get_text() for label in figure.axes[4].get_yticklabels()] == ["LC-2"]
    diamonds = next(line for line in figure.axes[4].lines if line.get_marker() == "D")
    assert sorted(diamonds.get_xdata()) == pytest.approx([2 / 3, 4 / 3])
    assert "simulated" in figure.get_suptitle()
    plots.save_figure(figure, tmp_path / "schemes")
    assert (tmp_path / "schemes.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "schemes.pdf").is_file()


# folding -------------------------------------------------------------------------------------------------------------


def test_velocities_are_joined_as_the_network_joins_them():
    torch.manual_seed(0)
    images = torch.rand(2, 1, 1, 9, 12, 15)
    for cascade in ("additive", "compositional"):
        model = build_model("backbone", start_channels=4, head_channels=5, levels=3, cascade=cascade)
        fields = model.fields(*images)
        joined = join_velocities(fields.velocities, cascade)
        assert all(torch.equal(*both) for both in zip(joined, fields.displacements, strict=True))


def test_amplified_velocities_fold_less_when_they_are_composed(embedded_cohort):
    torch.manual_seed(0)
    model = build_model("backbone", start_channels=4, levels=3)
    for estimator in model.estimators:  # rough and large
        torch.nn.init.normal_(estimator.conv3.weight, std=0.2)
    table = amplified_folding(model, embedded_cohort, embedded_cohort.validation_pairs[:2], (0.0, 1.0), progress=False)
    ndv = table.pivot_table(index="factor", columns="cascade", values="ndv_percent")
    assert ndv.loc[0.0].tolist() == [0, 0]
    assert ndv.loc[1.0, "additive"] > ndv.loc[1.0, "compositional"]
    assert len(table) == 2 * 2 * 2 and (table.loc[table["factor"] > 0, "displacement_mm"] > 0).all()
    with pytest.raises(ValueError, match="without a bilateral filter"):
        amplified_folding(build_model("BF", start_channels=4), embedded_cohort, ())


def test_folding_is_measured_from_the_checkpoints_of_a_sweep(small_cohort_json, tmp_path, capsys, monkeypatch):
    words = ["--rows", "LC-1", "--seeds", "0", "--preset", "smoke", "--cohort", str(small_cohort_json)]
    words += ["--out", str(tmp_path), "--factors", "1", "3"]
    monkeypatch.setitem(presets.PRESETS, "smoke", replace(get_preset("smoke"), resolution_mm=1, levels=2, epochs=1))
    assert cli.main(["measure", "folding", *words]) == 2
    assert "LC-1 with seed 0 is not trained yet" in capsys.readouterr().err
    Run.prepare("LC-1", "smoke", str(small_cohort_json), out=str(tmp_path)).train(progress=False)
    assert cli.main(["measure", "folding", *words]) == 0
    measured = results.read_measured(tmp_path, "folding", "small_smoke")
    assert set(measured.table["factor"]) == {1, 3} and set(measured.table["cascade"]) == set(CASCADES)
    assert str(tmp_path) not in json.dumps(measured.about) and measured.about["runs"][0].startswith("LC-1_small_smoke")
    text = publish.publish_folding(measured, tmp_path / "folding_table")
    assert "NDV (%), additive" in text and "×3" in text
    figures.folding_figure(measured.table, "t")


# costs ---------------------------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_a_hand_count():
    def convolutions(voxels, n, k):  # of one level's estimator
        return voxels * 27 * (2 * n * 2 * n + 2 * n * k + 3 * k)

    shape, n, k = (32, 48, 64), 8, 27
    voxels = 32 * 48 * 64
    encoder = 2 * voxels * 27 * (n + 2 * n * n + 2 * n * n)  # of both images
    backbone = encoder + sum(convolutions(voxels // 8**level, n, k) for level in range(5))
    variant = parse_variant("backbone", start_channels=n)
    assert costs.multiply_adds(variant, shape) == backbone
    forces = sum(voxels // 8**level * 27 * 6 * 2 * n for level in range(5))
    assert costs.multiply_adds(replace(variant, driven=True), shape) == backbone + forces
    tokens = voxels // 8**4
    attention = 2 * 2 * tokens * tokens * n  # two directions, affinity and gathering
    linear = tokens * (n * n + 2 * n * n + 2 * 2 * n * n)  # one affinity, two values, two gates
    assert costs.multiply_adds(replace(variant, co_attention_levels=1), shape) == backbone + attention + linear


def test_costs_are_measured_in_turn_written_and_read(tmp_path, monkeypatch):
    small = replace(get_preset("smoke"), resolution_mm=16)
    monkeypatch.setattr(costs, "get_preset", lambda name: small)
    words = ["--rows", "backbone", "BF-post", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["measure", "costs", *words]) == 0
    table = pd.read_csv(tmp_path / "costs" / "smoke_cpu.csv").set_index("variant")
    assert (table["seconds_per_pair"] > 0).all() and table.loc["backbone", "seconds_per_step"] > 0
    assert np.isnan(table.loc["BF-post", "seconds_per_step"])  # a filter behind trained weights is not trained
    assert table.loc["backbone", "paper_parameters"] == 909_232
    assert table.loc["backbone", "training_mib"] > table.loc["backbone", "parameters"] * 16 / 2**20
    text = publish.publish_costs(results.read_measured(tmp_path, "costs", "smoke_cpu"), tmp_path / "costs_table")
    assert "10x14x12 voxels" in text and "(1.00×)" in text
    missing = results.read_measured(tmp_path, "costs", "half_cuda")
    assert "Not measured (costs/half_cuda.csv): `lumirlib measure costs --help`" in publish.publish_costs(missing, "n")


def test_costs_that_are_cut_short_keep_the_rounds_that_are_whole(tmp_path, monkeypatch, capsys):
    calls = itertools.count(1)

    def measured(what, *_):
        if (call := next(calls)) == 4:  # of rows 1 and 2 in turn: the second round is not whole
            raise MemoryError(f"measuring {what} was killed")
        return {"seconds_per_pair": float(call), "seconds_per_step": 1.0}

    monkeypatch.setattr(costs, "in_own_process", measured)
    words = ["--rows", "backbone", "LK", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["measure", "costs", *words]) == 2
    assert "measuring LK" in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "costs" / "smoke_cpu.csv")
    assert table[["variant", "round", "seconds_per_pair"]].values.tolist() == [["backbone", 0, 1], ["LK", 0, 2]]


def test_memory_of_a_worker_sees_what_was_allocated_and_freed():
    with costs.PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64, 2**20)  # 256 MiB
        block.sum()
        del block
    assert 200 * 2**20 < memory.peak < 400 * 2**20


def test_mistakes_of_the_costs_are_named(capsys):
    assert cli.main(["measure", "costs", "--rows", "LKK"]) == 2
    assert cli.main(["measure", "costs", "--rounds", "0"]) == 2
    assert "unknown variant 'LKK'" in (errors := capsys.readouterr().err)
    assert "Invalid value for '--rounds': 0 is not in the range x>=1" in errors


# the notebook --------------------------------------------------------------------------------------------------------


def test_notebook_makes_the_table_of_any_results_folder(folder, tmp_path):
    parameters = {"results": str(folder), "out": str(tmp_path / "elsewhere"), "rows": ["table2"]}
    notebook = str(project_root() / "notebooks" / "table2.ipynb")
    papermill.execute_notebook(notebook, str(tmp_path / "o.ipynb"), parameters, progress_bar=False)
    text = "".join(str(cell.get("outputs")) for cell in nbformat.read(tmp_path / "o.ipynb", 4).cells)
    assert "Not run: BF, CA, CA+BF, LK, LC-1" in text and "Not measured" in text
    made = {path.name for path in (tmp_path / "elsewhere" / "tables").iterdir()}
    assert {f"table2_embedded_demo.{end}" for end in ("csv", "md", "tex", "json", "png", "pdf")} <= made
    assert "table2_embedded_demo_effects.csv" in made


# hard pairs and time -------------------------------------------------------------------------------------------------


def test_hard_pairs_are_listed_with_what_goes_with_them(runs, tmp_path):
    pairs = pd.DataFrame(
        {
            "pair": [f"P{n}" for n in range(12)],
            "dice": np.linspace(60, 71, 12),
            "gain": np.linspace(12, 1, 12),
            "dice_before": np.linspace(48, 70, 12),
            "brain_ratio": 1.1,
            "ventricle_ratio": np.linspace(2, 1, 12),
            "displacement_mm": np.linspace(5, 3, 12),
        }
    )
    text = publish.publish_difficulty(pairs, runs, tmp_path / "hard")
    assert "The 5 hardest and the 5 easiest of 12 pairs" in text and "| P0 " in text and "| P11 " in text
    assert "| P5 " not in text and len(pd.read_csv(tmp_path / "hard_pairs.csv")) == 12
    explained = pd.read_csv(tmp_path / "hard_explained.csv", index_col="feature")
    assert explained.loc["dice_before", "dice"] == pytest.approx(1)
    assert explained.loc["ventricle_ratio", "dice"] == pytest.approx(-1)
    assert math.isnan(explained.loc["brain_ratio", "dice"])
    assert "not a LUMIR result" in (tmp_path / "hard_explained.md").read_text()


def test_a_row_that_learned_nothing_is_said_to_have_learned_nothing(folder, tmp_path):
    assert "has learned nothing" not in publish.publish_table(2, load_runs(folder, ["backbone"]), tmp_path / "a")
    write_run(folder, "LK", 0, [0.5, 0.4, 0.6])
    text = publish.publish_table(2, load_runs(folder, ["backbone", "LK"]), tmp_path / "b")
    assert text.strip().endswith("so it has learned nothing yet: LK.")


def test_time_figure_has_a_mark_for_each_measured_row(runs):
    measured = pd.DataFrame({"variant": ["backbone", "backbone", "LC-2"], "seconds_per_pair": [0.1, 0.3, 2.0]})
    figure = figures.time_figure(runs, measured, "t", "cpu")
    (ax,) = figure.axes
    marks = {bars.get_label(): bars.lines[0].get_xydata()[0] for bars in ax.containers}
    assert marks["backbone"].tolist() == pytest.approx([0.2, 71.0]) and marks["LC-2"][0] == 2.0
    assert ax.get_xscale() == "log"


def test_where_half_of_the_people_chose_dice_of_the_others_is_shown_too(runs):
    assert "dice_unused" not in set(tables.table2(runs)["metric"])
    values = runs.values.copy()
    values.loc[values["pair"] == "A_C", "moving"] = "B"  # A is the first half, and in every other pair
    half = replace(runs, values=values, preset=replace(runs.preset, validation_half=True))
    assert half.unused_pairs == ["A_C"]
    table = tables.table2(half)
    own = table[(table["variant"] == "LC-2") & (table["metric"] == "dice_unused")].iloc[0]
    assert own["ours"] == pytest.approx((84 + 83) / 2)
    assert (own["pairs"], own["people"]) == (1, 2) and pd.isna(own["paper"])
    assert "dice_unused" in set(tables.table1(half)["metric"])
    assert "Dice, other people (%)" in publish.readable_table(table).columns


def test_runs_without_options_that_left_are_still_those_of_their_row():
    row, other = parse_row("LC-2"), parse_row("VoxelMorph")
    assert row_from_options({**asdict(row), "symmetric": False, "correlation_window": 0}) == row
    for unknown in ({"symmetric": True}, {"invented": 0}):
        with pytest.raises(ValueError, match="unknown option"):
            row_from_options({**asdict(row), **unknown})
    turned = replace(other, symmetric=not other.symmetric)  # an option of its own
    assert row_from_options(asdict(other)) == other and row_from_options(asdict(turned)) == turned
