"""Where and how a run is computed: several processes, precision, and runs that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from small_cohorts import write_small_cohort

from lumirlib.study.run import Run
from lumirlib.training import launch, trainer
from lumirlib.training.engine import Engine

LUMIRLIB_RUN = ["-m", "lumirlib", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *LUMIRLIB_RUN]
TINY = {"resolution_mm": 1, "channel_divisor": 16, "levels": 3, "batch_size": 2}


def prepare(cohort_json, out, variant="backbone", engine="cpu", **options):
    return Run.prepare(variant, "smoke", str(cohort_json), out=str(out), engine=engine, options={**TINY, **options})


def weights(run, name="last.pt"):
    return trainer.load_checkpoint(run.out / "checkpoints" / run.config.run / name)["model"]


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def one_thread(monkeypatch):
    """Sums over threads differ in their last digits; processes started by torchrun have one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# several processes ---------------------------------------------------------------------------------------------------


def train_in_two_forks(run):
    """Train a run in two processes with what torchrun would tell them; they have everything imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in ("0", "1"):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {**told, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
            try:
                launch.train(run.config, run.cohort, run.out, Engine("cpu"), progress=False)
            finally:
                os._exit(sys.exc_info()[0] is not None)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    return run.train(progress=False)


@pytest.mark.parametrize(
    ("variant", "processes"), [("LC-2", 2), pytest.param("uniGradICON", 1, marks=pytest.mark.long)]
)
def test_two_processes_give_the_weights_and_the_log_of_one_at_the_same_batch(
    small_cohort_json, tmp_path, one_thread, variant, processes
):
    alone = prepare(small_cohort_json, tmp_path / "alone", variant)
    shared = prepare(small_cohort_json, tmp_path / "shared", variant, Engine("cpu", processes=processes))
    assert alone.config.run == shared.config.run
    first = alone.train(progress=False)
    second = shared.train(progress=False) if processes == 2 else train_in_two_forks(shared)
    assert first.trained_by != second.trained_by and "2 processes" in second.trained_by[0]
    assert same_weights(weights(alone), weights(shared))
    columns = ["epoch", "steps", "loss", "similarity", "smoothness", "val_dice", "val_similarity", "val_ndv_percent"]
    pd.testing.assert_frame_equal(first.history[columns], second.history[columns], rtol=1e-12)


@pytest.mark.parametrize(
    "starter",
    [
        [sys.executable, *LUMIRLIB_RUN, "--no-notebook", "--processes=2"],  # which starts torchrun
        pytest.param(TORCHRUN, marks=pytest.mark.long),
    ],
    ids=["lumirlib", "torchrun"],
)
def test_processes_that_are_told_to_stop_save_and_another_number_of_them_goes_on(
    small_cohort_json, tmp_path, one_thread, starter
):
    whole = prepare(small_cohort_json, tmp_path / "whole", epochs=8)
    whole.train(progress=False)
    cut = prepare(small_cohort_json, tmp_path / "cut", epochs=8)
    log = cut.out / "logs" / f"{cut.config.run}.csv"
    child = subprocess.Popen([*starter, *cut.arguments, "--train-only", "--quiet"], stderr=subprocess.PIPE, text=True)
    while not log.is_file() and child.poll() is None:
        time.sleep(0.01)
    started = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert not psutil.wait_procs(started, timeout=10)[1]
    trained = len(pd.read_csv(log)) - 1
    assert child.returncode != 0 and 0 < trained < 8, said
    cut.train(progress=False)
    assert same_weights(weights(whole), weights(cut))


def test_a_batch_that_processes_cannot_share_is_refused(small_cohort_json, tmp_path, monkeypatch):
    run = prepare(small_cohort_json, tmp_path, batch_size=3)
    monkeypatch.setattr(Engine, "world_size", 2)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes that share it, got 3"):
        trainer.Trainer(run.config, run.cohort, tmp_path, run.engine)


def test_what_breaks_in_one_of_several_processes_is_told(small_cohort_json, tmp_path):
    run = prepare(small_cohort_json, tmp_path, engine=Engine("cpu", processes=2), batch_size=3)
    with pytest.raises(
        ChildProcessError, match=r"(?s)2 processes ended with status .*batch_size must be a multiple of"
    ):
        run.train(progress=False)


def test_parts_of_several_processes_come_back_in_order(monkeypatch):
    def gathered(parts, own):
        parts[:] = [[0, 3, 6], [1, 4], [2, 5]]

    monkeypatch.setattr(Engine, "world_size", 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    assert Engine("cpu").gather([0, 3, 6]) == list(range(7))


# engines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision must be one of auto, 32-true, bf16-mixed; got 'fp16'"),
        ({"cache": "yes"}, "cache must be one of auto, on, off; got 'yes'"),
        ({"processes": 0}, "processes must be a whole number from 1, got 0"),
        ({"readers": True}, "readers must be a whole number from 1, got True"),
        ({"device": "cuda:99"}, "device must be auto, cpu or a device of this machine, got 'cuda:99'"),
    ],
)
def test_engines_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(**options)


def test_tasks_of_slurm_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(ValueError, match="4 tasks of Slurm would each train the same run"):
        Engine("cpu")


def test_an_engine_does_not_name_a_run_but_stands_in_its_command(small_cohort_json, tmp_path):
    plain = prepare(small_cohort_json, tmp_path)
    other = prepare(small_cohort_json, tmp_path, engine=Engine("cpu", precision="bf16-mixed", processes=2))
    assert plain.config.run == other.config.run
    assert "-p device cpu -p precision bf16-mixed -p processes 2" in other.command
    assert {"--device=cpu", "--precision=bf16-mixed"} <= set(other.arguments)
    assert not any("processes" in word for word in other.arguments)
    assert other.engine.describe().endswith(", bf16-mixed")


def test_bfloat16_trains_like_float32(small_cohort_json, tmp_path):
    runs = [
        prepare(small_cohort_json, tmp_path / name, engine=Engine("cpu", precision=name), epochs=4, batch_size=1)
        for name in ("32-true", "bf16-mixed")
    ]
    plain, mixed = (run.train(progress=False) for run in runs)
    assert not same_weights(weights(runs[0]), weights(runs[1]))
    assert all(weight.dtype == torch.float32 for weight in weights(runs[1]).values())
    assert mixed.history["loss"].iloc[-1] == pytest.approx(plain.history["loss"].iloc[-1], abs=5e-3)
    assert "bf16-mixed" in mixed.trained_by[0]


def test_recomputed_activations_train_to_the_same_weights_and_networks_that_cannot_say_so(
    small_cohort_json, tmp_path, one_thread
):
    runs = [
        prepare(small_cohort_json, tmp_path / str(on), engine=Engine("cpu", checkpointing=on)) for on in (False, True)
    ]
    for run in runs:
        run.train(progress=False)
    first, second = map(weights, runs)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    baseline = prepare(small_cohort_json, tmp_path, "VoxelMorph", Engine("cpu", checkpointing=True))
    with pytest.raises(ValueError, match="checkpointing must be off: VoxelMorphNetwork cannot recompute"):
        baseline.train(progress=False)


# killed --------------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import torch
from lumirlib.study.run import Run

cohort, out, checkpoint, options = *sys.argv[1:4], json.loads(sys.argv[4])
ahead, kills = float(sys.argv[5]), int(sys.argv[6])
torch.set_num_threads(1)
generator = np.random.default_rng(0)

def written():
    return Path(checkpoint).stat().st_mtime_ns if Path(checkpoint).exists() else 0

for number in range(kills):  # children of one process that has everything imported: they start in no time
    before, child = written(), os.fork()
    if child == 0:
        try:
            run = Run.prepare("backbone", "smoke", cohort, out=out, engine="cpu", options=options)
            run.train(progress=False)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    if number % 4:  # at any moment of the epochs behind its first checkpoint
        while written() == before:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended without a checkpoint"
            time.sleep(0.001)
        time.sleep(generator.uniform(0, ahead))
    else:  # or of its start
        time.sleep(generator.uniform(0, 1))
    os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"run {number} ended before it was killed, with {status}"
"""


def test_killed_again_and_again_at_random_moments_a_run_ends_in_the_same_weights(tmp_path, one_thread, kills):
    cohort = write_small_cohort(tmp_path / "small")
    options = {**TINY, "epochs": 4 * kills, "batch_size": 1, "steps_per_epoch": 2}
    whole, cut = (prepare(cohort, tmp_path / name, **options) for name in ("whole", "cut"))
    result = whole.train(progress=False)
    epoch_seconds = 2 * result.history["seconds"].median()
    last = cut.out / "checkpoints" / cut.config.run / "last.pt"
    words = [str(cohort), str(cut.out), str(last), json.dumps(options), str(2 * epoch_seconds), str(kills)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    epochs = trainer.load_checkpoint(last)["state"]["epoch"]
    assert 0 < epochs < options["epochs"]
    resumed = cut.train(progress=False)
    assert same_weights(weights(whole), weights(cut))
    assert same_weights(weights(whole, "best.pt"), weights(cut, "best.pt"))
    columns = ["epoch", "steps", "loss", "val_dice"]
    pd.testing.assert_frame_equal(resumed.history[columns], result.history[columns])
