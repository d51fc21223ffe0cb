"""Faults: kills, full disks, two writers at once, folders that cannot be written; what is left is whole or refused."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import reliability
import torch
from faults import TALLY, is_ours
from matplotlib.figure import Figure
from small_cohorts import smooth_blob, write_small_cohort
from small_runs import LEAVES_METRICS, prepare_metrics
from tqdm.auto import tqdm

from lumirlib import cli, files, load_cohort, parse_variant
from lumirlib.data.nifti import read_volume, write_nifti
from lumirlib.files import check_writable, read_json, write_atomically, write_json
from lumirlib.methods.presets import PRESETS
from lumirlib.provenance import project_root
from lumirlib.study import jobs, results, submission, sweep
from lumirlib.study.results import write_results
from lumirlib.study.run import Run
from lumirlib.training import launch, trainer
from lumirlib.training.checkpoints import load_checkpoint, save_checkpoint
from lumirlib.training.config import make_config
from lumirlib.training.engine import Engine

matplotlib.use("Agg")
OPTIONS = {"resolution_mm": 1, "channel_divisor": 16, "levels": 2, "epochs": 1, "steps_per_epoch": 2}


def names(folder: Path) -> frozenset[str]:
    """Of all that lies below a folder; those of temporary files are new each time."""
    return frozenset(str(path) for path in folder.rglob("*"))


def forked(work: Callable[[], None]) -> int:
    """Do `work` in a child, which has everything imported; its number. It ends with status 0 if all goes well."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # its own is shared with children, and a killed one would keep it
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return child


def killed(work: Callable[[], None], seconds: float, begun: Callable[[], bool]) -> bool:
    """Do `work` in a child and send it SIGKILL some time after it has begun; whether that came before its end."""
    child = forked(work)
    while not begun():
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_often(
    kills: int,
    kind: str,
    work: Callable[[], None],
    seconds: float,
    check: Callable[[], None],
    folder: Path,
    has_worked: Callable[[], bool] = lambda: True,
) -> None:
    """Kill `work`, which writes below `folder`, until that has come `kills` times; look at what each leaves.

    Three times of four the kill comes up to `seconds` after its first file, else as soon after its start. On a busy
    machine, later and later kills follow until one has left something of the work.
    """
    generator = np.random.default_rng(0)
    done = 0
    for number in range(5 * kills):
        if done >= kills:
            if has_worked():
                break
            seconds *= 2
        before = names(folder)
        hit = killed(work, generator.uniform(0, seconds), lambda: number % 4 == 0 or names(folder) != before)  # noqa: B023
        check()
        if hit:
            done += 1
            TALLY.count(f"kill -9, {kind}", "whole afterwards")
    assert done >= kills


# kills ---------------------------------------------------------------------------------------------------------------


def checkpoint_content(value: float) -> dict:
    config = {"variant": {"name": "backbone"}, "preset": {}, "cohort": "small", "cohort_digest": "0", "seed": 0}
    return {"config": config, "model": {"weight": torch.full((40_000,), value)}}


def test_a_checkpoint_is_old_or_new_whenever_its_writer_is_killed(tmp_path, kills):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_content(0))
    seen = set()

    def work():
        while True:
            save_checkpoint(path, checkpoint_content(time.monotonic_ns() // 1000 % 10**6))

    def check():
        weight = load_checkpoint(path)["model"]["weight"]
        assert weight.unique().numel() == 1
        seen.add(float(weight[0]))

    kill_often(kills, "checkpoint write", work, 0.15, check, tmp_path, lambda: len(seen) > 1)
    assert len(seen) > 1


def test_a_result_and_its_provenance_belong_together_whenever_their_writer_is_killed(tmp_path, kills):
    path = tmp_path / "run.csv"
    found = []

    def work():
        for value in range(10**6):
            table = pd.DataFrame({"pair": [f"p{n}" for n in range(200)], "metric": "dice", "value": value / 1e6})
            write_results(table, path, {"value": value / 1e6})

    def check():
        if not path.with_suffix(".json").is_file():  # the moment between both: no result
            return
        table, about = results.read_results(path)
        assert len(table) == 200 and set(table["value"]) == {about["value"]}
        found.append(about["value"])

    kill_often(kills, "result write", work, 0.25, check, tmp_path, lambda: bool(found))
    assert found


def test_a_nifti_file_and_a_figure_are_whole_whenever_their_writer_is_killed(tmp_path, kills):
    image, figure = tmp_path / "image.nii.gz", tmp_path / "figure.png"

    def work():
        drawn = Figure((2, 1))
        drawn.subplots().plot([0, 1])
        for number in range(10**6):
            write_nifti(image, smooth_blob(number % 7), np.eye(4))
            write_atomically(figure, lambda to: drawn.savefig(to, format="png", dpi=60))

    def check():
        if image.exists():
            array, _ = read_volume(image)
            assert any(np.array_equal(array, smooth_blob(number)) for number in range(7))
        if figure.exists():
            assert figure.read_bytes().endswith(b"IEND\xaeB`\x82")

    kill_often(kills, "image and figure write", work, 0.1, check, tmp_path)


def test_a_cache_is_whole_or_lacking_whenever_its_builder_is_killed(tmp_path, kills):
    path = write_small_cohort(tmp_path / "small", training=30)
    cohort = load_cohort(path)
    reference = {one.name: cohort.image(one).clone() for one in cohort.train}
    folder = tmp_path / "cache"
    rounds = []

    def work():
        load_cohort(path).with_cache(folder, workers=2, progress=False)

    def check():
        entries = list(folder.rglob("SMALL_*.npy"))
        rounds.append(len(entries))
        for entry in entries:
            assert np.load(entry).dtype in (np.uint8, np.int16)
        if len(entries) == 66:  # all made: begin anew
            shutil.rmtree(folder)
            folder.mkdir()

    folder.mkdir()
    kill_often(kills, "cache build", work, 0.12, check, folder, lambda: max(rounds) > 0)
    assert max(rounds) > 0
    cached = load_cohort(path).with_cache(folder, progress=False, verify=True)
    assert all(torch.equal(cached.image(one), reference[one.name]) for one in cached.train)
    assert not list(folder.rglob(".partial-*"))


def test_a_submission_is_whole_or_not_there_whenever_its_writer_is_killed(small_cohort_json, tmp_path, kills):
    cohort = load_cohort(small_cohort_json)
    path = tmp_path / "s.zip"

    def method(fixed, moving):
        time.sleep(0.005)
        return (fixed - moving).expand(1, 3, *fixed.shape[2:])

    def work():
        submission.write_submission(method, cohort, path, progress=False)

    def check():
        if path.exists():
            assert len(list(submission.read_submission(path, cohort))) == 6
            path.unlink()

    kill_often(kills, "submission write", work, 0.12, check, tmp_path)
    submission.write_submission(method, cohort, path, progress=False)
    for pair, field in submission.read_submission(path, cohort):
        assert torch.equal(field, method(cohort.image(pair.fixed), cohort.image(pair.moving)))


WAITS = """
from pathlib import Path
import time
Path(out, f"{variant}-{seed}.started").touch()
time.sleep(0.4)
"""


@pytest.mark.parametrize("launcher", ["train", pytest.param("notebook", marks=pytest.mark.long)])
def test_a_sweep_that_is_killed_goes_on_with_what_is_not_finished(tmp_path, monkeypatch, launcher, kills):
    """Runs are stand-ins that write a file and wait, started by the sweep as its own are."""
    target = tmp_path / "out"
    (target / "notebooks").mkdir(parents=True)
    planned = jobs.plan(["backbone", "LK", "CA"], [0, 1], "smoke", "embedded", "", str(target))
    if launcher == "notebook":
        prepare_metrics(planned)
        cells = [
            nbformat.v4.new_code_cell('variant, seed, out = "", 0, ""', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(WAITS + LEAVES_METRICS),
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = tmp_path / "small.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebook)
        runs = [replace(run, notebook=notebook) for run in planned]
    else:
        runs = [replace(run, launcher="train", output=run.output.with_suffix(".txt")) for run in planned]
        script = "import time; print('begin', flush=True); time.sleep(0.05); print('end')"
        monkeypatch.setattr(jobs.SweepRun, "command", lambda self, output: [sys.executable, "-S", "-c", script])
        monkeypatch.setattr(jobs.SweepRun, "is_finished", lambda self: self.output.exists())

    def work():
        sweep.run_sweep(runs, jobs=2)

    def check():
        for process in psutil.process_iter(["cmdline"]):  # the runs of a killed sweep go on by themselves
            if str(target) in " ".join(process.info["cmdline"] or []):
                process.kill()
        for run in runs:
            if launcher == "train" and run.output.exists():
                assert run.output.read_text().split()[-1] == "end"
            elif run.output.exists():
                assert run.is_finished() and nbformat.read(run.output, 4).cells[-1].execution_count
        if all(run.is_finished() for run in runs):
            for path in [*(run.output for run in runs), *target.glob("metrics/*")]:
                path.unlink()

    kill_often(kills, f"sweep of {launcher}s", work, 0.4 if launcher == "train" else 8, check, target)
    assert sweep.run_sweep(runs) == {} and all(run.is_finished() for run in runs)
    assert not list(target.rglob("*.partial.*"))


SWEEP = """
import sys
from pathlib import Path
from dataclasses import replace
from lumirlib.study import jobs, sweep

out = sys.argv[1]
script = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
jobs.SweepRun.command = lambda self, output: [sys.executable, "-S", "-c", script, str(output) + ".started"]
jobs.SweepRun.is_finished = lambda self: False
planned = jobs.plan(["backbone", "LK", "CA"], [0], "smoke", "embedded", "", out)
sweep.run_sweep([replace(run, launcher="train", output=run.output.with_suffix(".txt")) for run in planned], jobs=2)
"""


def test_sigterm_to_a_sweep_ends_the_runs_under_way_and_starts_no_other(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)], stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while len(list(tmp_path.rglob("*.started"))) < 2 and time.monotonic() < started + 120:
        assert process.poll() is None
        time.sleep(0.05)
    runs = psutil.Process(process.pid).children()
    process.terminate()
    assert process.wait(30) == 143 and len(runs) == 2 and len(list(tmp_path.rglob("*.started"))) == 2
    assert not psutil.wait_procs(runs, timeout=10)[1]


MEASURED = """
import os, pathlib, sys, time
from lumirlib.study.costs import in_own_process

def work(folder):
    (pathlib.Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    in_own_process("sleep", work, sys.argv[1])
"""


def test_a_measuring_process_ends_when_the_one_that_started_it_is_killed(tmp_path):
    script, begun = tmp_path / "measured.py", tmp_path / "begun"
    script.write_text(MEASURED)
    begun.mkdir()
    parent = subprocess.Popen([sys.executable, script, begun], stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while not names(begun) and time.monotonic() < started + 120:
        assert parent.poll() is None
        time.sleep(0.05)
    (child,) = (psutil.Process(int(path.name)) for path in begun.iterdir())
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs([child], timeout=10)[1]


def test_files_that_killed_writers_left_are_swept_up_when_they_are_old(tmp_path):
    left, young = tmp_path / ".partial-old.pt", tmp_path / ".partial-young.pt"
    for file in (left, young):
        file.write_bytes(b"half")
    os.utime(left, (0, time.time() - files.STALE_SECONDS - 60))
    write_json(tmp_path / "new.json", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == [".partial-young.pt", "new.json"]


# full disks ----------------------------------------------------------------------------------------------------------

WRITERS = {
    "JSON": lambda path: write_json(path, {"text": "x" * 100_000}),
    "NIfTI": lambda path: write_nifti(path.with_suffix(".nii"), smooth_blob(0, (40, 50, 60)), np.eye(4)),
    "checkpoint": lambda path: save_checkpoint(path, checkpoint_content(1)),
    "result": lambda path: write_results(
        pd.DataFrame({"pair": [f"p{n}" for n in range(5000)], "metric": "dice", "value": 0.5}), path, {}
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("room", [0, 1, 4096, 50_000])
def test_a_disk_that_fills_up_while_writing_is_told_by_name_and_leaves_no_half(tmp_path, kind, room):
    """A limit on sizes of files stands for the disk: the system refuses to write on, as it does on a full one."""
    path = tmp_path / "target.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="target") as caught:
            WRITERS[kind](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_ours(caught.value) and not list(tmp_path.iterdir())
    TALLY.count("full disk", "told by name")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_no_space_left_is_told_with_its_number_and_what_was_there_is_kept(tmp_path, monkeypatch, kind, number):
    path = tmp_path / "target.csv"
    WRITERS[kind](path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"target.*kept|kept.*target|cannot write the checkpoint .*target") as caught:
        WRITERS[kind](path)
    assert is_ours(caught.value) and os.strerror(number) in str(caught.value)
    after = {file: file.read_bytes() for file in tmp_path.iterdir()}
    # a result's provenance goes first, so that no table stands beside another's
    assert after.items() <= before.items() and (kind == "result" or after == before)
    TALLY.count("full disk", "told by name")


# two at once ---------------------------------------------------------------------------------------------------------


def test_four_builders_at_once_make_each_volume_once_again_and_again(tmp_path):
    path = write_small_cohort(tmp_path / "small", training=10)
    for attempt in range(5):
        folder = tmp_path / f"cache{attempt}"
        counts = [tmp_path / f"{attempt}-{number}" for number in range(4)]

        def build(made: Path, folder: Path = folder) -> None:
            made.write_text(str(load_cohort(path).with_cache(folder, workers=2, progress=False).cache.made))

        builders = [forked(lambda made=made: build(made)) for made in counts]
        assert [os.waitpid(builder, 0)[1] for builder in builders] == [0] * 4
        assert sum(int(count.read_text()) for count in counts) == 26 == len(list(folder.rglob("SMALL_*.npy")))
        load_cohort(path).with_cache(folder, progress=False, verify=True)
        TALLY.count("four builders of one cache at once", "each volume made once")


def test_two_writers_of_one_file_at_once_leave_one_of_both_wholly(tmp_path):
    path = tmp_path / "target.json"
    children = []
    for name in "ab":
        child = os.fork()
        if child == 0:
            try:
                for _ in range(200):
                    write_json(path, {"by": name * 20_000})
            finally:
                os._exit(0)
        children.append(child)
    reads = 0
    while any(psutil.pid_exists(child) and os.waitpid(child, os.WNOHANG) == (0, 0) for child in children[:1]):
        if path.exists():
            assert set(read_json(path)["by"]) in ({"a"}, {"b"})
            reads += 1
    os.waitpid(children[1], 0)
    assert reads > 10 and sorted(file.name for file in tmp_path.iterdir()) == ["target.json"]
    TALLY.count("reads beside two writers", "whole", reads)


# folders that cannot be written --------------------------------------------------------------------------------------


def read_only(monkeypatch, folder: Path) -> None:
    """Refuse new files below a folder, as a file system does that is mounted read-only: root may write elsewhere."""
    make = tempfile.mkstemp

    def refuse(*arguments, dir=None, **others):
        if Path(dir or ".").resolve().is_relative_to(folder.resolve()):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return make(*arguments, dir=dir, **others)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)


@pytest.mark.parametrize("how", ["read-only", "a file in its place"])
def test_a_results_folder_that_cannot_be_written_is_told_before_anything_is_trained(
    small_cohort_json, tmp_path, monkeypatch, capsys, how
):
    out = tmp_path / "out"
    if how == "read-only":
        read_only(monkeypatch, out)
    else:
        out.write_text("a file")
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: pytest.fail("it has been trained"))
    run = Run.prepare("backbone", "smoke", str(small_cohort_json), out=str(out), engine="cpu", options=OPTIONS)
    with pytest.raises(OSError, match=rf"cannot write: .*{out.name}") as caught:
        run.train(progress=False)
    assert is_ours(caught.value)
    words = [f"{name}={value}" for name, value in OPTIONS.items()]
    arguments = ["--cohort", str(small_cohort_json), "--preset", "smoke", "--out", str(out), "--device", "cpu"]
    assert cli.main(["run", "backbone", "--no-notebook", *arguments, "--quiet", "--set", *words]) == 2
    said = capsys.readouterr().err
    assert "lumirlib run: " in said and "cannot write" in said and "Traceback" not in said
    TALLY.count("results folder that cannot be written", "told before training", 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up the rights of root, which others do not have")
def test_a_folder_without_the_right_to_write_is_told_by_the_system_itself():
    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which only its owner may enter
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            check_writable(folder)
        except PermissionError as error:
            status = 0 if is_ours(error) and str(folder) in str(error) and "cannot write" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_writable(folder)
    folder.rmdir()
    TALLY.count("results folder that cannot be written", "told before training")


def test_a_sweep_into_a_folder_that_cannot_be_written_ends_with_a_sentence(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert cli.main(["sweep", "--rows", "backbone", "--preset", "smoke", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "lumirlib sweep: [Errno" in said and str(tmp_path / "out") in said and "Traceback" not in said
    TALLY.count("results folder that cannot be written", "told before training")


# papermill -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_papermill_run_that_is_interrupted_ends_in_the_same_figures_when_it_is_run_again(tmp_path, number):
    cohort = write_small_cohort(tmp_path / "small")
    notebook = project_root() / "notebooks" / "run_ablation.ipynb"
    options = {**OPTIONS, "epochs": 40, "steps_per_epoch": 4}
    found = []
    for name in ("whole", "cut"):
        out = tmp_path / name
        out.mkdir()
        command = [
            sys.executable,
            "-m",
            "papermill",
            str(notebook),
            str(tmp_path / f"{name}.ipynb"),
            "-p",
            "preset",
            "smoke",
            "-p",
            "cohort",
            str(cohort),
            "-p",
            "out",
            str(out),
            "-y",
            json.dumps({"options": options}),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if name == "cut":
            child = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run behind "&"
            )
            while not list(out.rglob("last.pt")):
                assert child.poll() is None
                time.sleep(0.02)
            time.sleep(0.3)
            family = psutil.Process(child.pid).children(recursive=True)
            for process in [*family, psutil.Process(child.pid)] if number == signal.SIGKILL else [child]:
                process.send_signal(number)
            child.wait()
            psutil.wait_procs(family, timeout=30)
            assert not list((out / "metrics").glob("backbone*.json"))
        subprocess.run(command, check=True, capture_output=True, env=environment)
        (log,) = (out / "logs").glob("*.csv")
        (path,) = (out / "metrics").glob("backbone*.csv")
        table, about = results.read_results(path)
        figures = table[table["metric"] != "seconds"].set_index(["pair", "metric"])["value"]
        found.append((figures, about["best_epoch"], pd.read_csv(log)[["epoch", "loss", "val_dice"]]))
    pd.testing.assert_series_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    pd.testing.assert_frame_equal(found[0][2], found[1][2])
    TALLY.count("interrupted papermill run, run again", "the same figures")


# determinism ---------------------------------------------------------------------------------------------------------


def weights_of(cohort, out: Path, row: str, engine: Engine) -> dict:
    preset = replace(PRESETS["smoke"], resolution_mm=1, epochs=1, steps_per_epoch=2, channel_divisor=16, levels=2)
    config = make_config(parse_variant(row), preset, cohort, 0, head_channels=4)
    return load_checkpoint(launch.train(config, cohort, out, engine, progress=False).checkpoint)["model"]


@pytest.mark.parametrize("row", ["backbone", "LK+BF", "LC-2+CA"])
def test_deterministic_runs_are_equal_to_the_bit_whatever_reads_for_them(small_cohort_json, tmp_path, row):
    cohort = load_cohort(small_cohort_json)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = Engine("cpu", deterministic=True)
        first = weights_of(cohort, tmp_path / "first", row, engine)
        cached = cohort.with_cache(tmp_path / "cache", progress=False)
        again = weights_of(cached, tmp_path / "again", row, replace(engine, readers=3))
        plain = weights_of(cohort, tmp_path / "plain", row, Engine("cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.allclose(first[name], plain[name], atol=1e-5) for name in first)


def test_the_switch_is_on_for_its_run_alone_and_stands_in_the_command(small_cohort_json, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    with Engine("cpu", deterministic=True).reproducibly():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]), accumulate=False)
    with Engine("cpu").reproducibly():
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    runs = [
        Run.prepare(
            "backbone",
            "smoke",
            str(small_cohort_json),
            out=str(tmp_path),
            options=OPTIONS,
            engine=Engine("cpu", deterministic=on),
        )
        for on in (False, True)
    ]
    assert runs[0].config.run == runs[1].config.run and "-p deterministic True" in runs[1].command
    assert "--deterministic" in runs[1].arguments and "deterministic" in runs[1].engine.describe()
    with pytest.raises(ValueError, match="deterministic must be true or false, got 1"):
        Engine("cpu", deterministic=1)


# the page ------------------------------------------------------------------------------------------------------------


def test_the_page_of_reliability_names_tests_that_are_there_and_the_counts_of_its_run():
    root = project_root()
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in sources] == []
    tally = root / "results" / "reliability" / "tally.json"
    if tally.exists():
        assert reliability.readable(json.loads(tally.read_text(encoding="utf-8"))) in page
    else:
        assert "Not run yet." in page
