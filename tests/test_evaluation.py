"""Evaluation, tables and figures."""

import math
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from small_runs import small_run

import lumirlib
from lumirlib import evaluation, metrics, plots, spatial
from lumirlib.metrics.pair import NDV_MASKS
from lumirlib.study import results
from lumirlib.study.paper import paper_table
from lumirlib.study.report import tables

matplotlib.use("Agg")
SHAPE = (12, 14, 16)


def test_evaluate_pair_gives_the_four_metrics_of_the_parts():
    generator = torch.Generator().manual_seed(0)
    displacement = spatial.resize(torch.randn(1, 3, 4, 4, 4, generator=generator), SHAPE)
    fixed, moving = (torch.randint(0, 5, (1, 1, *SHAPE), generator=generator) for _ in range(2))
    mask = torch.ones(1, 1, *SHAPE)
    landmarks = [metrics.landmark_volume({"a": place}, SHAPE) for place in ((5, 6, 7), (6, 6, 8))]
    found = lumirlib.evaluate_pair(displacement, fixed, moving, *landmarks, mask, spacing_mm=2.0, labels=(0, 1, 2))
    warped = spatial.warp(moving, displacement, "nearest")
    assert list(found) == ["dice", "tre_mm", "ndv_percent", "hd95_mm"]
    assert found["dice"] == metrics.dice(warped, fixed, moving, (0, 1, 2))
    assert found["hd95_mm"] == metrics.hd95_mm(warped, fixed, moving, 2.0, (0, 1, 2))
    assert found["ndv_percent"] == metrics.ndv_percent(displacement, mask) > 0
    assert found["tre_mm"] == metrics.tre_mm(spatial.warp(landmarks[1], displacement, "nearest"), landmarks[0], 2.0)


def test_what_a_pair_lacks_is_nan():
    found = lumirlib.evaluate_pair(torch.zeros(1, 3, *SHAPE))
    assert found.pop("ndv_percent") == 0
    assert all(math.isnan(value) for value in found.values())


def test_a_displacement_that_is_not_finite_or_transposed_is_refused():
    with pytest.raises(ValueError, match="displacement must hold finite values only, got 1 NaN"):
        broken = torch.zeros(1, 3, *SHAPE)
        broken[0, 0, 0, 0, 0] = math.nan
        lumirlib.evaluate_pair(broken)
    with pytest.raises(TypeError, match="moving_labels must have an integer dtype"):
        labels = torch.ones(1, 1, *SHAPE, dtype=torch.int16)
        lumirlib.evaluate_pair(torch.zeros(1, 3, *SHAPE), labels, labels.float())
    with pytest.raises(ValueError, match=r"displacement must be \(B, 3, D, H, W\), got \(1, 12, 14, 16, 3\)"):
        lumirlib.evaluate_pair(torch.zeros(1, *SHAPE, 3))


def test_ndv_is_masked_by_the_moving_image_or_by_the_fixed_one(embedded_cohort):
    pair = embedded_cohort.validation_pairs[0]
    folded = torch.zeros(1, 3, *embedded_cohort.shape)
    folded[0, 0, :20:2] = 1.5
    found = {}
    for mask in NDV_MASKS:
        image = embedded_cohort.image(getattr(pair, mask))
        found[mask] = evaluation.score_displacement(embedded_cohort, pair, folded, mask)["ndv_percent"]
        assert found[mask] == metrics.ndv_percent(folded, image > 0)
    assert found["moving"] != found["fixed"]
    with pytest.raises(ValueError, match="ndv_mask must be one of moving, fixed; got 'both'"):
        evaluation.score_displacement(embedded_cohort, pair, folded, "both")


def test_the_true_displacement_scores_near_perfect_on_the_embedded_cohort(embedded_cohort):
    pairs = embedded_cohort.validation_pairs[:2]
    by_images = {id(embedded_cohort.image(pair.moving)): pair for pair in pairs}

    def oracle(fixed, moving):
        return embedded_cohort.true_displacement(by_images[id(moving)])

    table = evaluation.evaluate_method(oracle, embedded_cohort, pairs[:1], progress=False)
    value = table.set_index("metric")["value"]
    assert value["displacement_error_mm"] == 0
    assert value["dice"] > 0.7 and value["tre_points_mm"] < 0.5


def test_an_evaluation_that_was_killed_goes_on_with_the_next_pair(small_cohort_json, tmp_path, monkeypatch):
    taken = []

    def stops_at_the_second_pair(fixed, moving):
        taken.append(moving)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return evaluation.zero_displacement(fixed, moving)

    run = small_run(small_cohort_json, tmp_path, evaluation_pairs=3)
    assert len(run.pairs) == 3
    result = run.train(progress=False)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(replace(result, model=stops_at_the_second_pair), progress=False)
    journal = tmp_path / "checkpoints" / run.config.run / "evaluated.jsonl"
    journal.write_text(journal.read_text() + '["cut", {"di')  # as a kill leaves it
    resumed = run.evaluate(replace(result, model=stops_at_the_second_pair), progress=False)
    assert len(taken) == 1 + len(run.pairs) and not journal.exists()
    whole = run.evaluate(replace(result, model=evaluation.zero_displacement), progress=False)
    timeless = [table[table["metric"] != "seconds"].reset_index(drop=True) for table in (resumed, whole)]
    pd.testing.assert_frame_equal(*timeless)
    # other code starts anew
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(replace(result, model=stops_at_the_second_pair), progress=False)
    monkeypatch.setattr("lumirlib.provenance.source_digest", lambda: "other")
    run.evaluate(replace(result, model=stops_at_the_second_pair), progress=False)
    assert len(taken) == 2 + len(run.pairs)


def test_a_method_that_gives_both_directions_runs_once_for_two_opposite_pairs(small_cohort_json):
    cohort = lumirlib.load_cohort(small_cohort_json)
    runs = []

    class Shift:
        def __call__(self, fixed, moving):
            displacement = evaluation.zero_displacement(fixed, moving)
            displacement[:, 0] = fixed.sum() - moving.sum()
            displacement[:, 1] = 0.5
            return displacement / (fixed.sum() + moving.sum())

    class Both(Shift):
        def symmetric(self, fixed, moving):
            runs.append((fixed, moving))
            return self(fixed, moving), self(moving, fixed)

    pairs = cohort.validation_pairs[::-1][:5]  # one of them without its opposite
    alone, both = (evaluation.evaluate_method(method(), cohort, pairs, progress=False) for method in (Shift, Both))
    assert list(dict.fromkeys(both["pair"])) == [pair.name for pair in pairs]
    timeless = [table[table["metric"] != "seconds"].reset_index(drop=True) for table in (alone, both)]
    pd.testing.assert_frame_equal(*timeless)
    seconds = both[both["metric"] == "seconds"]["value"]
    assert len(runs) == 2 and seconds.nunique() == 3


def test_deedsbcv_which_is_not_trained_is_evaluated_without_inverse_consistency(small_cohort_json, tmp_path):
    run = small_run(small_cohort_json, tmp_path, "deedsBCV", evaluation_pairs=2)
    table = run.evaluate(run.train(progress=False), progress=False)
    assert "inverse_consistency_mm" not in set(table["metric"]) and run.metrics_path.is_file()


# scoring on the files' own voxels ------------------------------------------------------------------------------------


def test_a_method_that_works_on_coarse_voxels_is_scored_on_the_files_own(small_cohort_json):
    coarse = lumirlib.load_cohort(small_cohort_json, resolution_mm=2)
    fine, pair = lumirlib.load_cohort(small_cohort_json), coarse.validation_pairs[0]
    seen = []

    def one_coarse_voxel_along_i(fixed, moving):
        seen.append(tuple(fixed.shape[2:]))
        displacement = evaluation.zero_displacement(fixed, moving)
        displacement[:, 0] = 1
        return displacement

    table = evaluation.evaluate_method(one_coarse_voxel_along_i, coarse, (pair,), progress=False)
    found = table.set_index("metric")["value"].to_dict()
    two_fine_voxels = torch.zeros(1, 3, *fine.shape)
    two_fine_voxels[:, 0] = 2
    expected = evaluation.score_displacement(fine, pair, two_fine_voxels)
    assert seen == [coarse.shape]
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert found["displacement_mm"] == pytest.approx(2) and found["ndv_working_percent"] == 0
    # the first landmark lies half a voxel farther along k in one person, the second at the same place in both
    assert found["tre_points_mm"] == pytest.approx((math.hypot(2, 0.5) + 2) / 2)


def test_folds_of_coarse_voxels_that_interpolation_hides_are_kept_beside(small_cohort_json):
    coarse = lumirlib.load_cohort(small_cohort_json, resolution_mm=2)
    pair, pushed = coarse.validation_pairs[0], torch.zeros(1, 3, *coarse.shape)
    pushed[0, 0, 4, 5, 6] = 1.5
    mask = coarse.image(pair.moving) > 0
    table = evaluation.evaluate_method(lambda fixed, moving: pushed, coarse, (pair,), progress=False)
    found = table.set_index("metric")["value"]
    # one voxel pushed by 1.5 has a third of a voxel folded; no fine voxels lie on the line to its neighbour
    assert found["ndv_working_percent"] == pytest.approx(100 / 3 / int(mask[..., 1:-1, 1:-1, 1:-1].sum()), rel=1e-5)
    assert found["ndv_percent"] == 0
    coarsely = evaluation.evaluate_method(
        lambda fixed, moving: pushed, coarse, (pair,), progress=False, at_own_resolution=False
    ).set_index("metric")["value"]
    assert coarsely["ndv_percent"] == found["ndv_working_percent"] and "ndv_working_percent" not in coarsely
    own = evaluation.evaluate_method(evaluation.zero_displacement, coarse.at_own_resolution, (pair,), progress=False)
    assert "ndv_working_percent" not in set(own["metric"])  # it is ndv_percent


def test_a_displacement_of_another_grid_than_the_images_is_refused(small_cohort_json):
    coarse = lumirlib.load_cohort(small_cohort_json, resolution_mm=2)
    with pytest.raises(ValueError, match=r"must give displacements of \(1, 3, 8, 10, 12\), got \(1, 3, 16, 20, 24\)"):
        evaluation.evaluate_method(
            lambda fixed, moving: torch.zeros(1, 3, 16, 20, 24), coarse, coarse.validation_pairs[:1], progress=False
        )


def test_summary_takes_the_population_std_and_counts_pairs_that_have_a_value():
    table = pd.DataFrame({"metric": ["dice"] * 3 + ["tre_mm"] * 3, "value": [0.5, 0.6, 0.7, 2.0, math.nan, 4.0]})
    summary = evaluation.summarize(table)
    assert summary.loc["dice", "std"] == pytest.approx(np.std([0.5, 0.6, 0.7]))
    assert summary.loc["tre_mm"].tolist() == [3.0, 1.0, 2]


def test_provenance_beside_a_table_always_belongs_to_it(tmp_path, monkeypatch):
    path = results.write_results(long_table(0.5), tmp_path / "run.csv", {"commit": "first"})
    assert path.with_suffix(".json").is_file()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_results(long_table(0.9), path, {"commit": "second"})
    assert not path.with_suffix(".json").exists()  # the first run's would now be untrue


# tables --------------------------------------------------------------------------------------------------------------


def long_table(dice, std=0.0, tre=3.0):
    rows = [("p", "dice", dice - std), ("q", "dice", dice + std)]
    rows += [
        (pair, metric, value)
        for pair in "pq"
        for metric, value in (("tre_mm", tre), ("ndv_percent", 0.1), ("hd95_mm", 4.0))
    ]
    return pd.DataFrame(rows, columns=["pair", "metric", "value"])


HISTORY = pd.DataFrame(
    {
        "epoch": [0, 1, 2],
        "val_dice": [0.5, 0.6, 0.58],
        "loss": [math.nan, 1.0, 0.9],
        "similarity": [math.nan, 0.9, 0.8],
        "val_ndv_percent": [0.0, 0.1, 0.05],
    }
)


def test_the_papers_numbers_are_carried_whole():
    assert len(paper_table(1)) == 7 and len(paper_table(2)) == 8
    backbone = paper_table(2).set_index("method").loc["backbone"]
    assert backbone[["val_dice", "dice", "tre_mm", "ndv_percent", "hd95_mm"]].tolist() == [
        76.50,
        77.31,
        2.3753,
        0.2177,
        3.3437,
    ]


def test_table_sets_ours_beside_the_paper_in_the_papers_units():
    table = tables.compare_with_paper("backbone", long_table(0.7, 0.01), long_table(0.5, 0.02), 0.6, 0.5)
    ours, paper = table.loc[("backbone", "ours")], table.loc[("backbone", "paper")]
    assert ours.tolist() == pytest.approx([60, 70, 1, 3.0, 0.1, 4.0])
    assert paper["Dice (%)"] == 77.31
    assert table.loc[("backbone", "ours - paper"), "Dice (%)"] == pytest.approx(70 - 77.31)
    assert table.loc[("gain by registration", "ours"), "Dice (%)"] == pytest.approx(20)
    assert table.loc[("gain by registration", "paper"), "Dice (%)"] == pytest.approx(77.31 - 56.57)
    assert table.loc[("before registration", "ours"), "Val Dice (%)"] == pytest.approx(50)
    assert table.loc[("backbone", "our pairs"), ["Dice (%)", "TRE (mm)"]].tolist() == [2, 2]


def test_a_combination_that_the_paper_never_ran_has_an_empty_paper_row():
    table = tables.compare_with_paper("LC-2+LK", long_table(0.7), long_table(0.5), 0.6, 0.5)
    assert table.loc[("LC-2+LK", "paper")].isna().all()
    assert table.loc[("LC-2+LK", "ours"), "Dice (%)"] == pytest.approx(70)


# figures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_curves_show_loss_dice_and_ndv_with_the_level_before_registration():
    figure = plots.curves_figure(HISTORY, "title")
    loss, dice, ndv = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 0.9]]
    assert dice.lines[0].get_ydata().tolist() == pytest.approx([50, 60, 58])
    assert dice.lines[1].get_ydata()[0] == 50
    assert ndv.lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.1, 0.05])
    assert all(ax.get_xlabel() == "epoch" for ax in figure.axes)


def test_metrics_figure_draws_each_pair_and_their_mean():
    figure = plots.metrics_figure(long_table(0.5, 0.1), long_table(0.7, 0.1), "title")
    dice = figure.axes[0]
    assert dice.lines[-1].get_ydata().tolist() == pytest.approx([50, 70])
    assert dice.get_title() == "2 pairs" and dice.get_ylabel() == "Dice (%)"


def test_representative_pairs_are_the_easiest_the_median_and_the_hardest():
    dices = pd.DataFrame({"pair": list("abcde"), "metric": "dice", "value": [0.5, 0.9, 0.1, 0.6, 0.3]})
    assert plots.representative_pairs(dices) == ["b", "a", "c"]
    assert plots.representative_pairs(dices[:1]) == ["a"]


def test_pair_figure_warps_and_draws_the_grid_where_the_displacement_moves_it():
    image = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 0] = 1.0
    _, axes = plt.subplots(1, 5)
    plots.plot_pair(axes, image, image, displacement, spacing_mm=4.0, slice_index=5)
    shown = axes[2].images[0].get_array()
    assert np.allclose(shown[:, :-1], image[0, 0, 1:, :, 5].T, atol=1e-5)
    first = axes[4].collections[0].get_segments()[0]
    assert np.allclose(first[:, 0], 1.0)  # the line i = 0 lies at i = 1
    assert [ax.get_title() for ax in axes] == ["moving", "fixed", "warped", "motion", "deformation grid"]


def test_motion_of_zero_displacement_draws_no_streamline():
    image = torch.rand(1, 1, *SHAPE)
    _, ax = plt.subplots()
    plots.plot_motion(ax, torch.zeros(1, 3, *SHAPE), image, 5, 1.0)
    assert not ax.collections
