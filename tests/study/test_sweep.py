"""The sweep, on a small notebook of its own: what is run, skipped, reported and run again."""

from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
from small_runs import LEAVES_METRICS, prepare_metrics

from lumirlib import cli
from lumirlib.study import jobs, paper, sweep

CODE = """
variant, seed, options = "", -1, {}
"""
WORK = """
from pathlib import Path
assert type(seed) is int and type(variant) is str
if variant == "LK" and not Path(out, "mended").exists():
    raise RuntimeError("this row is broken")
Path(out, f"{variant}-{seed}.txt").write_text("ran")
"""


@pytest.fixture
def runs(tmp_path):
    cells = [
        nbformat.v4.new_code_cell(CODE, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(WORK + LEAVES_METRICS),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebook)
    planned = jobs.plan(["backbone", "LK"], [0], "smoke", "embedded", "", str(tmp_path / "out"))
    prepare_metrics(planned)
    return [replace(run, notebook=notebook) for run in planned]


def test_table_2_is_planned_in_the_papers_order_with_every_seed(tmp_path):
    assert paper.rows_of_table(2) == ["backbone", "BF", "CA", "CA+BF", "LK", "LC-1", "LC-2"]
    planned = jobs.plan(["table2"], [0, 1], "demo", "embedded", "", str(tmp_path))
    assert [run.output.name for run in planned[:2]] == [
        "backbone_embedded_demo_seed0.ipynb",
        "backbone_embedded_demo_seed1.ipynb",
    ]
    assert len({run.output for run in planned}) == 14


def test_finished_runs_are_skipped_and_broken_ones_reported_and_run_again(runs, tmp_path, capsys):
    backbone, large_kernel = runs
    broken = sweep.run_sweep(runs)
    assert list(broken) == [large_kernel.output]
    assert "RuntimeError: this row is broken" in broken[large_kernel.output]
    assert backbone.is_finished() and not large_kernel.is_finished() and large_kernel.failed.is_file()
    first = backbone.output.read_bytes()
    (tmp_path / "out" / "mended").touch()
    assert sweep.run_sweep(runs, jobs=2) == {}
    assert "2 runs, 1 finished before" in capsys.readouterr().out
    assert backbone.output.read_bytes() == first
    assert large_kernel.is_finished() and not large_kernel.failed.exists()
    assert (tmp_path / "out" / "LK-0.txt").read_text() == "ran"


def test_damaged_metrics_or_those_of_other_parameters_count_as_unfinished(runs, tmp_path):
    sweep.run_sweep(runs[:1])
    run = runs[0]
    assert not replace(run, parameters={**run.parameters, "preset": "demo"}).is_finished()
    assert not replace(run, parameters={**run.parameters, "seed": "1"}).is_finished()
    (metrics,) = (tmp_path / "out" / "metrics").glob("*.csv")
    metrics.write_bytes(metrics.read_bytes().replace(b"0.5", b"0.6"))
    assert not run.is_finished()


def test_a_run_whose_executed_notebook_is_gone_is_finished_and_one_that_was_cut_off_is_not(runs):
    sweep.run_sweep(runs[:1])
    run = runs[0]
    run.output.rename(run.partial)
    assert not run.is_finished()
    run.partial.unlink()
    assert run.is_finished()


def test_dry_run_lists_the_commands_and_runs_nothing(tmp_path, capsys):
    assert cli.main(["sweep", "--rows", "LC-2+CA", "--seeds", "3", "--dry-run", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("to run") and "-r variant LC-2+CA -p seed 3 -r preset demo" in printed
    assert not list(tmp_path.iterdir())


def test_options_are_handed_to_every_run_and_name_its_output(tmp_path, capsys):
    arguments = ["--rows", "LC-1", "--set", "smoothness_weight=0.1", "cascade=compositional", "--out", str(tmp_path)]
    assert cli.main(["sweep", *arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert """-y '{"options": {"smoothness_weight": 0.1, "cascade": "compositional"}}'""" in printed
    assert "LC-1_embedded_demo_smoothness_weight-0.1_cascade-compositional_seed0.ipynb" in printed


def test_a_finished_run_of_other_options_is_run_again(runs):
    given = replace(runs[0], options={"epochs": 3})
    prepare_metrics([given])
    assert given.execute(threads=1) == ""
    assert given.is_finished() and not runs[0].is_finished()


def test_filters_of_trained_weights_are_run_when_all_else_has_ended(tmp_path):
    planned = jobs.plan(["BF-post", "backbone"], [0, 1], "demo", "embedded", "", str(tmp_path))
    assert [run.parameters["variant"] for run in planned] == ["backbone", "backbone", "BF-post", "BF-post"]


def test_runs_without_notebooks_need_none(tmp_path, capsys):
    arguments = ["--rows", "VoxelMorph", "--seeds", "2", "--no-notebook", "--out", str(tmp_path), "--dry-run"]
    assert cli.main(["sweep", *arguments, "--set", "similarity=mse", "amsgrad=false"]) == 0
    alone = capsys.readouterr().out
    assert "-m lumirlib run VoxelMorph --no-notebook --quiet --seed 2 --preset demo --cohort embedded" in alone
    assert alone.endswith(f"--out {tmp_path} --set similarity=mse amsgrad=false\n")


@pytest.mark.parametrize("launcher", [[], ["--no-notebook"]])
def test_how_a_run_is_computed_is_handed_to_either_launcher_and_names_no_output(launcher, tmp_path, capsys):
    arguments = ["--rows", "LK", *launcher, "--out", str(tmp_path), "--set", "batch_size=4", "--dry-run"]
    arguments += ["--device", "cuda", "--processes", "4", "--precision", "bf16-mixed", "--compile"]
    assert cli.main(["sweep", *arguments]) == 0  # where there may be no such device
    printed = capsys.readouterr().out
    if launcher:
        assert "--device=cuda --precision=bf16-mixed --processes=4 --compile --set batch_size=4" in printed
    else:
        engine = '"device": "cuda", "precision": "bf16-mixed", "processes": 4, "compile": true'
        assert f"""-y '{{"options": {{"batch_size": 4}}, {engine}}}'""" in printed
        assert "LK_embedded_demo_batch_size-4_seed0.ipynb" in printed


def test_a_run_that_is_finished_is_so_whatever_it_was_computed_on(runs):
    run = replace(runs[0], engine={"device": "cpu"})
    assert run.execute(threads=1) == ""
    assert run.is_finished() and runs[0].is_finished()


def test_a_run_counts_as_finished_until_the_row_of_its_name_is_another_one(monkeypatch):
    (run,) = jobs.plan(["LC-2"], [0], "demo", "embedded", "", "study")
    assert run.is_finished()
    later = replace(jobs.parse_row("LC-2"), passes=2)
    monkeypatch.setattr(jobs, "parse_row", lambda name: later)
    assert not run.is_finished()


@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_a_sweep_over_the_committed_study_knows_what_is_finished_without_notebooks(tmp_path, launcher):
    arguments = {"preset": "demo", "cohort": "embedded", "data_root": "", "launcher": launcher}
    planned = jobs.plan(["LC-2"], [0, 2, 77], out="study", **arguments)
    assert [run.is_finished() for run in planned] == [True, True, False]
    (other,) = jobs.plan(["LC-2"], [0], out="study", options={"epochs": 9}, **arguments)
    assert not other.is_finished()
    assert not jobs.plan(["LC-2"], [0], out=str(tmp_path), **arguments)[0].is_finished()


def test_a_run_on_other_files_of_the_same_cohort_is_not_finished(monkeypatch):
    arguments = {"preset": "demo", "cohort": "embedded", "data_root": "", "launcher": "train"}
    (run,) = jobs.plan(["LC-2"], [0], out="study", **arguments)
    monkeypatch.setattr(jobs, "load_cohort", lambda *_: SimpleNamespace(digest="2d96246082c21149"))
    assert run.is_finished()
    monkeypatch.setattr(jobs, "load_cohort", lambda *_: SimpleNamespace(digest="0123456789abcdef"))
    assert not run.is_finished()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "LKK"], "unknown variant 'LKK'"),
        (["--preset", "dmeo"], "preset must be one of smoke, demo"),
        (["--set", "lambda1=3"], "unknown option lambda1"),
        (["--set", "epochs"], "--set takes name=value, got 'epochs'"),
        (["--jobs", "0"], "Invalid value for '--jobs': 0 is not in the range x>=1"),
        (["--executor", "slrum"], "Invalid value for '--executor': 'slrum' is not one of 'local', 'slurm'"),
        (["--processes", "0"], "processes must be a whole number from 1, got 0"),
        (["--processes", "2"], "batch_size must be a multiple of the 2 processes that share it, got 1: --set batch"),
        (["--precision", "fp8"], "precision must be one of auto, 32-true, bf16-mixed"),
        (["--slurm", "partition=gpu"], "--slurm and --no-wait go with --executor slurm"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert cli.main(["sweep", *arguments, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
