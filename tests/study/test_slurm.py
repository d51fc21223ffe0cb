"""Sweeps as jobs: on submitit's local executor, with stand-ins for Slurm's commands, and on Slurm where it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
import pytest
from small_runs import LEAVES_METRICS, prepare_metrics

from lumirlib import cli
from lumirlib.study import jobs, slurm
from lumirlib.training.checkpoints import load_checkpoint

pytest.importorskip("submitit", reason='sweeps on a cluster need submitit: pip install "lumirlib[slurm]"')

PARAMETERS = 'variant, seed, preset, cohort, out, options = "", -1, "", "", "", {}'
#: Ends when it may; for LK it breaks until it is mended.
SMALL = (
    """
import time
from pathlib import Path
while not Path(out, "go").exists():
    time.sleep(0.1)
if variant == "LK" and not Path(out, "mended").exists():
    raise RuntimeError("this row is broken")
with Path(out, f"{variant}-{seed}.txt").open("a") as file:
    file.write("ran ")
"""
    + LEAVES_METRICS
)
#: Trains, and notes the epochs that it starts and ends at.
TRAINING = """
from pathlib import Path
from lumirlib.study.run import Run
from lumirlib.training.checkpoints import load_checkpoint
run = Run.prepare(variant, preset, cohort, seed, "", out, "cpu", options)
last = run.out / "checkpoints" / run.config.run / "last.pt"
with Path(out, "epochs.txt").open("a") as file:
    print(load_checkpoint(last)["state"]["epoch"] if last.exists() else 0, file=file)
    file.flush()
    result = run.train()
    print(result.history["epoch"].max(), len(result.history), file=file)
run.evaluate(result)
"""
#: For the small cohort, whose voxels are of 1 mm: seconds.
TINY = {"resolution_mm": 1, "levels": 3, "channel_divisor": 16, "epochs": 6}


def write_notebook(path, code):
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def planned(tmp_path, rows=("backbone", "LK"), code=SMALL, **changes):
    """Runs of a notebook made of `code`; their results folder is there."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    given = {"cohort": "embedded", **changes}
    notebook = write_notebook(tmp_path / "small.ipynb", code)
    runs = jobs.plan(list(rows), [0], "smoke", data_root="", out=str(out), **given)
    if "prepared" in code:
        prepare_metrics(runs)
    return [replace(run, notebook=notebook) for run in runs]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "LATE_SECONDS", 2.0)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    return slurm.Queue(tmp_path / "out" / "slurm", "local", poll_seconds=0.2)


def until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def task(queue, run):
    """The process of a job in which submitit calls the run."""
    return psutil.Process(int(queue.job_id(run))).children()[0]


def test_jobs_outlive_ctrl_c_are_waited_for_and_broken_ones_reported_and_submitted_again(
    queue, tmp_path, capsys, monkeypatch
):
    backbone, large_kernel = runs = planned(tmp_path)
    queue.submit(runs, {})
    ids = [queue.job_id(run) for run in runs]

    def press(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(slurm.time, "sleep", press)
        queue.wait(runs)
    assert f"scancel {' '.join(ids)}" in "".join(capsys.readouterr())
    again = slurm.Queue(queue.folder, "local", poll_seconds=0.2)
    again.submit(runs, {})
    assert "2 runs, 0 finished before, 2 submitted before\n" in capsys.readouterr().out
    assert [again.job_id(run) for run in runs] == ids and again.live(runs) == runs
    (tmp_path / "out" / "go").touch()
    broken = again.wait(runs)
    assert list(broken) == [large_kernel.output]
    assert "RuntimeError: this row is broken" in broken[large_kernel.output]
    assert backbone.is_finished() and large_kernel.failed.is_file()
    (tmp_path / "out" / "mended").touch()
    again.submit(runs, {})
    assert again.wait(runs) == {}
    assert "2 runs, 1 finished before, 0 submitted before\nsubmitted 1 job;" in capsys.readouterr().out
    assert [(tmp_path / "out" / f"{row}-0.txt").read_text() for row in ("backbone", "LK")] == ["ran ", "ran "]


def test_a_job_whose_time_is_over_saves_and_goes_on_from_there(queue, tmp_path, small_cohort_json):
    (run,) = planned(tmp_path, ["backbone"], TRAINING, cohort=str(small_cohort_json), options=TINY)
    queue.submit([run], {})
    until(lambda: list((tmp_path / "out" / "checkpoints").glob("*/last.pt")))
    task(queue, run).send_signal(signal.SIGUSR2)
    assert queue.wait([run]) == {}
    first, second, ended = (tmp_path / "out" / "epochs.txt").read_text().splitlines()
    assert first == "0" and 0 < int(second) < TINY["epochs"]
    assert ended == f"{TINY['epochs']} {TINY['epochs'] + 1}"  # the history has epoch 0 as well


def test_sigterm_has_a_job_save_and_end_and_the_next_goes_on(queue, tmp_path, small_cohort_json):
    given = {"cohort": str(small_cohort_json), "options": TINY, "launcher": "train"}
    (run,) = planned(tmp_path, ["backbone"], **given)
    queue.submit([run], {})
    until(lambda: list((tmp_path / "out" / "checkpoints").glob("*/last.pt")))
    os.kill(task(queue, run).pid, signal.SIGTERM)
    assert "left no result" in queue.wait([run])[run.output]
    (last,) = (tmp_path / "out" / "checkpoints").glob("*/last.pt")
    before = load_checkpoint(last)["state"]
    assert 0 < before["epoch"] < TINY["epochs"]
    queue.submit([run], {})
    assert queue.wait([run]) == {}
    after = load_checkpoint(last)["state"]
    assert after["history"][: len(before["history"])] == before["history"]  # with the seconds of the first session
    assert after["epoch"] == TINY["epochs"] and run.is_finished()


# what Slurm is asked for ---------------------------------------------------------------------------------------------


@pytest.fixture
def slurm_stand_in(tmp_path, monkeypatch):
    """Commands of Slurm that number jobs from 7 and start none; the ids in `queued` are those in the queue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "number").write_text("6")
    scripts = {
        "srun": "exit 1",
        "sbatch": f"n=$(($(cat {folder}/number) + 1)); echo $n > {folder}/number; echo Submitted batch job $n",
        "squeue": f"cat {folder}/queued",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "queued").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def submission(tmp_path, number):
    lines = (tmp_path / "out" / "slurm" / f"{number}_submission.sh").read_text().splitlines()
    return {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}


def test_slurm_gets_one_array_and_filters_behind_the_jobs_of_their_bases(slurm_stand_in, tmp_path, capsys):
    arguments = ["--rows", "backbone", "LK", "BF-post", "--seeds", "0", "1", "--preset", "smoke", "--jobs", "3"]
    arguments += ["--out", str(tmp_path / "out"), "--executor", "slurm", "--no-wait"]
    arguments += ["--slurm", "partition=gpu", "gpus_per_node=1", "mem_gb=64", "timeout_min=90"]
    arguments += ['additional_parameters={"reservation": "mri"}']
    assert cli.main(["sweep", *arguments]) == 0
    asked = {"partition=gpu", "gpus-per-node=1", "mem=64GB", "time=90", "signal=USR2@90", "reservation=mri"}
    assert asked | {"array=0-3%3"} <= submission(tmp_path, 7)
    for number, base in ((8, "7_0"), (9, "7_1")):
        assert asked | {f"dependency=afterok:{base}", "kill-on-invalid-dep=yes"} <= submission(tmp_path, number)
    record = json.loads((tmp_path / "out" / "slurm" / "BF-post_embedded_smoke_seed1.json").read_text())
    assert record["job"] == "9"
    (slurm_stand_in / "queued").write_text("7_0\n7_1\n7_2\n8\n9\n")
    capsys.readouterr()
    assert cli.main(["sweep", *arguments]) == 0
    assert "6 runs, 0 finished before, 5 submitted before\nsubmitted 1 job;" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "slurm" / "LK_embedded_smoke_seed1.json").read_text())["job"] == "10"


def test_the_time_of_a_job_is_a_day_unless_given(slurm_stand_in, tmp_path):
    words = ["--rows", "LK", "--preset", "smoke", "--out", str(tmp_path / "out"), "--executor", "slurm", "--no-wait"]
    assert cli.main(["sweep", *words]) == 0
    assert "time=1440" in submission(tmp_path, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--slurm", "partitoin=gpu"], r"unknown --slurm option partitoin: choose from account,"),
        (["--slurm", "partition"], "--slurm takes name=value, got 'partition'"),
        (["--slurm", "nodes=2"], "--slurm nodes must be 1, got 2: a run is one task of one node"),
        (["--slurm", "timeout_min=long"], 'Parameter "timeout_min" expected type'),
    ],
)
def test_options_that_cannot_be_used_are_named(given, message, slurm_stand_in, tmp_path, capsys):
    assert cli.main(["sweep", "--rows", "LK", "--out", str(tmp_path), "--executor", "slurm", *given]) == 2
    assert message in capsys.readouterr().err


def test_what_slurm_refuses_is_said(slurm_stand_in, tmp_path, capsys):
    (slurm_stand_in / "sbatch").write_text("#!/bin/sh\necho invalid partition specified: gpu >&2; exit 1\n")
    assert cli.main(["sweep", "--rows", "LK", "--out", str(tmp_path), "--executor", "slurm"]) == 2
    assert "sbatch refused the jobs: invalid partition specified: gpu" in capsys.readouterr().err


def test_a_machine_without_slurm_or_submitit_says_what_to_do(tmp_path, capsys, monkeypatch):
    arguments = ["--rows", "LK", "--out", str(tmp_path), "--executor", "slurm"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["sweep", *arguments]) == 2
    assert "needs Slurm's srun and sbatch on the PATH" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["sweep", *arguments]) == 2
    assert 'pip install "lumirlib[slurm]"' in capsys.readouterr().err


@pytest.mark.slurm
def test_on_slurm_a_filter_waits_for_its_base_and_falls_with_it(tmp_path):
    if not shutil.which("sbatch") or subprocess.run(["squeue"], capture_output=True).returncode:
        pytest.skip("needs Slurm: sbatch is not on the PATH, or squeue gets no answer")
    code = SMALL.replace('variant == "LK"', 'variant == "CA"')
    runs = planned(tmp_path, ["backbone", "CA", "BF-post", "CA+BF-post"], code)
    (tmp_path / "out" / "go").touch()
    queue = slurm.Queue(tmp_path / "out" / "slurm", poll_seconds=1)
    queue.submit(runs, {"cpus_per_task": 1})
    broken = queue.wait(runs)
    assert [Path(output).name.split("_")[0] for output in broken] == ["CA", "CA-BF-post"]
    assert "this row is broken" in broken[runs[1].output] and "left no result" in broken[runs[3].output]
