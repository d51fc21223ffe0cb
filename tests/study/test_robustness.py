"""Altered moving images: what each alteration does, and that their evaluation resumes and scores as any other."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from lumirlib import cli
from lumirlib.methods import presets
from lumirlib.methods.presets import get_preset
from lumirlib.study import robustness
from lumirlib.study.results import read_table
from lumirlib.study.robustness import ALTERATIONS, change_gamma, invert_contrast, remove_tissue, thicken_slices
from lumirlib.study.run import Run


def ball(shape=(50, 60, 70), radius=24):
    places = torch.stack(torch.meshgrid(*[torch.arange(side) - side / 2 for side in shape], indexing="ij"))
    return (places.norm(dim=0) < radius).float()[None, None]


def test_inverted_contrast_swaps_dark_and_bright_tissue_and_leaves_the_background():
    image = torch.zeros(1, 1, 2, 2, 2)
    image[0, 0, 0] = torch.tensor([[0.2, 0.5], [0.9, 0.0]])
    inverted = invert_contrast(image)
    assert inverted[0, 0, 0].flatten().tolist() == pytest.approx([0.9, 0.6, 0.2, 0.0])
    assert torch.equal(inverted > 0, image > 0) and torch.allclose(invert_contrast(inverted), image)
    assert torch.equal(invert_contrast(torch.zeros(1, 1, 2, 2, 2)), torch.zeros(1, 1, 2, 2, 2))


def test_gamma_is_a_power():
    image = torch.full((1, 1, 2, 2, 2), 0.25)
    assert float(change_gamma(image, 0.5).mean()) == 0.5 and float(change_gamma(image, 2).mean()) == 0.0625
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        change_gamma(image, 0)


def test_thick_slices_are_means_along_k_interpolated_linearly_back():
    ramp = torch.arange(11.0).expand(1, 1, 5, 6, 11)
    thick = thicken_slices(ramp, 4)
    assert thick.shape == ramp.shape
    # from the middle of the first slice, 1.5, to that of the second, 5.5; before it, nothing is known
    assert thick[0, 0, 2, 3, 2:6].tolist() == pytest.approx([2, 3, 4, 5])
    assert thick[0, 0, 2, 3, :2].tolist() == pytest.approx([1.5, 1.5])
    alternating = (torch.arange(12) % 2).float().expand(1, 1, 5, 6, 12)
    assert torch.allclose(thicken_slices(alternating, 4), torch.tensor(0.5))
    assert torch.equal(thicken_slices(ramp, 1), ramp)
    along_i = torch.rand(1, 1, 5, 6, 1).expand(1, 1, 5, 6, 7)
    assert torch.allclose(thicken_slices(along_i, 4), along_i)
    with pytest.raises(ValueError, match="voxels must be 1 or more, got 0"):
        thicken_slices(ramp, 0)


def test_missing_tissue_is_one_ellipsoid_that_the_pair_alone_decides():
    image = ball()
    first, again, other = (remove_tissue(image, name, 4.0) for name in ("A_B", "A_B", "A_C"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[first > 0], image[first > 0])
    # in the middle of a ball that is large enough the hole is whole: its volume is an ellipsoid's, in mm
    whole = torch.ones(1, 1, 60, 60, 60)
    volumes = [float((remove_tissue(whole, f"P{n}", 2.0) == 0).sum()) * 8 for n in range(30)]
    least, most = (4 / 3 * math.pi * edge**3 for edge in robustness.HOLE_MM)
    assert max(volumes) < 1.05 * most and max(volumes) > least
    assert torch.equal(remove_tissue(torch.zeros(1, 1, 5, 6, 7), "A_B", 4.0), torch.zeros(1, 1, 5, 6, 7))


@pytest.fixture
def trained(small_cohort_json, tmp_path, monkeypatch, capsys):
    """Words of the command line for a backbone trained on a small cohort, and its run."""
    small = replace(get_preset("smoke"), resolution_mm=1, levels=2, epochs=1, evaluation_pairs=None)
    monkeypatch.setitem(presets.PRESETS, "smoke", small)
    words = ["--seeds", "0", "--preset", "smoke", "--cohort", str(small_cohort_json), "--out", str(tmp_path)]
    run = Run.prepare("backbone", "smoke", str(small_cohort_json), out=str(tmp_path), engine="cpu")
    assert cli.main(["measure", "robustness", "--rows", "backbone", *words]) == 2
    assert "backbone with seed 0 is not trained yet" in capsys.readouterr().err
    return words, run, run.train(progress=False)


def test_altered_images_are_scored_as_any_other_and_only_what_lacks_is_measured(trained, monkeypatch):
    words, run, result = trained
    words = ["--rows", "backbone", *words]
    assert cli.main(["measure", "robustness", *words, "--pairs", "2"]) == 0
    path = robustness.table_path(run)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["evaluated_pairs"] == 2 and str(run.out) not in path.with_suffix(".json").read_text()
    table = read_table(path, about, robustness.COLUMNS)
    assert table.groupby("pair")["alteration"].apply(list).tolist() == 2 * [list(ALTERATIONS)]
    usual = run.evaluate(result, progress=False).pivot_table(index="pair", columns="metric", values="value")
    own = table[table["alteration"] == robustness.UNALTERED].set_index("pair")
    for metric in ("dice", "hd95_mm", "ndv_percent", "tre_mm"):
        assert own[metric].tolist() == pytest.approx(usual.loc[own.index, metric].tolist(), nan_ok=True)

    measured, original = [], robustness.evaluate_altered

    def stopped(method, run, pair):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(pair.name)
        return original(method, run, pair)

    monkeypatch.setattr(robustness, "evaluate_altered", stopped)
    assert cli.main(["measure", "robustness", *words]) == 130
    assert path.with_suffix(".unfinished").is_file() and len(pd.read_csv(path)) == 2 * len(ALTERATIONS)

    def counted(method, run, pair):
        measured.append(pair.name)
        return original(method, run, pair)

    monkeypatch.setattr(robustness, "evaluate_altered", counted)
    assert cli.main(["measure", "robustness", *words]) == 0 and cli.main(["measure", "robustness", *words]) == 0
    assert len(measured) == len(set(measured)) == 4 and not path.with_suffix(".unfinished").exists()
    found = pd.read_csv(path)
    assert found["pair"].nunique() == 6 and list(found["pair"].unique()) == [pair.name for pair in run.pairs]
    assert set(found["run"]) == {run.config.run}


def test_instance_optimization_is_that_of_the_row_behind_the_same_weights(trained):
    words, _, _ = trained
    assert cli.main(["measure", "robustness", "--rows", "IO", "--pairs", "1", *words]) == 0
    (path,) = (trained[1].out / "robustness").glob("*.csv")
    table = pd.read_csv(path)
    assert path.name.startswith("IO_small") and (table["optimization_steps"] > 0).all()
    assert json.loads(path.with_suffix(".json").read_text())["method"] == "IO"


def test_mistakes_are_named(capsys):
    assert cli.main(["measure", "robustness", "--rows", "backbone", "--pairs", "0"]) == 2
    assert "Invalid value for '--pairs': 0 is not in the range x>=1" in capsys.readouterr().err
