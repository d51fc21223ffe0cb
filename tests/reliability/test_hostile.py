"""Hostile files and parameters: nothing is executed, written elsewhere, or given the memory that it asks for."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import shlex
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import TALLY, at_most, is_ours
from papermill.translators import PythonTranslator
from small_cohorts import write_small_cohort

from lumirlib import load_cohort
from lumirlib.evaluation import zero_displacement
from lumirlib.provenance import project_root
from lumirlib.study import jobs, submission, sweep
from lumirlib.study.run import Run
from lumirlib.training import weights
from lumirlib.training.checkpoints import CHECKPOINT_FORMAT, load_checkpoint
from lumirlib.training.engine import Engine

ROOT = project_root()


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


@pytest.fixture
def mark(tmp_path):
    """A file that whatever is executed makes, and that must not be there when the test has ended."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    TALLY.count("hostile file or parameter", "refused")


# checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path, mark, zipped):
    path = tmp_path / "code.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "model": Runs(mark)}, path, _use_new_zipfile_serialization=zipped)
    for read in (load_checkpoint, weights.load_model):
        with pytest.raises(ValueError, match=r"cannot read .*code\.pt as a checkpoint"):
            read(path)


def test_a_plain_pickle_in_place_of_a_checkpoint_is_not_run(tmp_path, mark):
    path = tmp_path / "plain.pt"
    path.write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(ValueError, match=r"cannot read .*plain\.pt as a checkpoint .*not a zip"):
        load_checkpoint(path)


def test_a_checkpoint_that_is_a_bomb_is_not_unpacked(tmp_path, mark):
    whole, bomb = tmp_path / "whole.pt", tmp_path / "bomb.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "model": {"w": torch.zeros(1)}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(200 * 2**20) if name.endswith("data/0") else source.read(name))
    with at_most(100), pytest.raises(ValueError, match=r"bomb\.pt .*expected no compressed parts"):
        load_checkpoint(bomb)


def test_a_checkpoint_whose_tensor_claims_more_than_is_stored_is_refused(tmp_path, mark):
    whole, claims = tmp_path / "whole.pt", tmp_path / "claims.pt"
    torch.save({"format": CHECKPOINT_FORMAT, "model": {"w": torch.arange(1000.0)}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(claims, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"M\xe8\x03" in content
                content = content.replace(b"M\xe8\x03", b"J" + struct.pack("<i", 500_000_000))
            target.writestr(name, content)
    with at_most(300), pytest.raises(ValueError, match=r"claims\.pt"):
        load_checkpoint(claims)


# the cache -----------------------------------------------------------------------------------------------------------


def test_objects_in_a_cached_volume_are_refused_and_not_unpickled(tmp_path, mark):
    cohort = load_cohort(write_small_cohort(tmp_path / "small", training=2, validation=2))
    cohort.with_cache(tmp_path / "cache", progress=False)
    file = next((tmp_path / "cache").glob("*/images/SMALL_0000_*.npy"))
    np.save(file, np.array([[Runs(mark)]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"{file.name}: not a whole volume of this cache"):
        cohort.with_cache(tmp_path / "cache", progress=False)


# submissions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    cohort = load_cohort(write_small_cohort(tmp_path_factory.mktemp("hostile") / "small"))
    pairs = cohort.validation_pairs[:1]
    path = tmp_path_factory.mktemp("zip") / "good.zip"
    submission.write_submission(zero_displacement, cohort, path, pairs, progress=False)
    return cohort, pairs, path, submission.file_name(pairs[0])


def with_members(good, path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(good[2]) as source, zipfile.ZipFile(path, "w", method) as target:
        for name, content in ({name: source.read(name) for name in source.namelist()} | members).items():
            target.writestr(name, content)
    return path


def findings(good, path: Path) -> list[submission.Problem]:
    with at_most(200):
        return submission.validate_submission(path, *good[:2], progress=False)


@pytest.mark.parametrize(
    "name", ["../executed", "../../executed", "/executed", "..\\executed", "a/../../executed", "C:/executed"]
)
def test_a_member_that_would_leave_the_folder_is_named_and_nothing_is_unpacked(good, tmp_path, mark, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = with_members(good, inside / "slip.zip", {name: b"here"})
    before = sorted(tmp_path.rglob("*"))
    found = {finding.file: finding for finding in findings(good, path)}
    assert found[name].fatal and found[name].kind in ("name", "extra")
    assert len(list(submission.read_submission(path, *good[:2]))) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layers", [1, 2])
def test_a_bomb_in_a_submission_is_unpacked_no_further_than_a_field(good, tmp_path, mark, layers):
    content = gzip.compress(bytes(300 * 2**20), 1)
    path = with_members(good, tmp_path / "bomb.zip", {good[3]: content}, zipfile.ZIP_DEFLATED if layers == 2 else 0)
    (found,) = findings(good, path)
    assert found.kind == "unreadable" and "than" in found.message and good[3] in found.message
    with at_most(100), pytest.raises(ValueError, match=good[3]):
        list(submission.read_submission(path, *good[:2]))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_takes_the_memory_it_asks_for_is_refused(good, tmp_path, mark, method):
    path = with_members(good, tmp_path / "packed.zip", {}, method)
    (found,) = findings(good, path)
    assert found.kind == "unreadable" and f"expected it stored or deflated, got method {method}" in found.message


def test_a_field_that_claims_more_than_it_holds_is_refused(good, tmp_path, mark):
    with zipfile.ZipFile(good[2]) as source:
        raw = bytearray(gzip.decompress(source.read(good[3])))
    struct.pack_into("<5h", raw, 40, 4, 1000, 1000, 1000, 3)
    path = with_members(good, tmp_path / "claims.zip", {good[3]: gzip.compress(bytes(raw))})
    (found,) = findings(good, path)
    assert found.kind == "unreadable" and "got shape (1000, 1000, 1000, 3)" in found.message


def test_ten_thousand_members_are_looked_through_in_seconds(good, tmp_path, mark):
    path = with_members(good, tmp_path / "many.zip", {f"{number}.txt": b"" for number in range(10_000)})
    started = time.process_time()
    assert sum(finding.kind == "name" for finding in findings(good, path)) == 10_000
    assert time.process_time() - started < 10


def test_a_member_that_comes_twice_is_scored_neither_as_one_nor_as_the_other(good, tmp_path, mark):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(good[2]) as source, zipfile.ZipFile(path, "w") as target:
        content = source.read(good[3])
        target.writestr(good[3], content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            target.writestr(good[3], content)
    assert [finding.kind for finding in findings(good, path) if finding.fatal] == ["duplicate"]
    with pytest.raises(ValueError, match=rf"twice\.zip: {good[3]} is there 2 times"):
        list(submission.read_submission(path, *good[:2]))


# parameters ----------------------------------------------------------------------------------------------------------


def hostile(mark: Path) -> list[str]:
    touch = f"touch {mark}"
    return [
        f"$({touch})",
        f"`{touch}`",
        f"; {touch} #",
        f"x' ; {touch} '",
        f'" && {touch} "',
        f"x\n{touch}\n",
        f"__import__('os').system('{touch}')",
        f"\\'); import os; os.system('{touch}') #",
    ]


def test_parameters_are_refused_or_stay_one_word(tmp_path, mark):
    for text in hostile(mark):
        for name in ("variant", "preset", "cohort", "engine"):
            with pytest.raises((ValueError, FileNotFoundError)) as caught:
                Run.prepare(**{"cohort": "none.json", "engine": "cpu", name: text}, out=str(tmp_path / "out"))
            assert is_ours(caught.value)
        for options in ({"similarity": text}, {text: 1}, {"epochs": text}):
            with pytest.raises(ValueError, match=r"similarity|unknown option|epochs"):
                Run.prepare(cohort="none.json", engine="cpu", options=options, out=str(tmp_path / "out"))
        with pytest.raises(ValueError, match="precision must be one of"):
            Engine("cpu", precision=text)


def test_the_command_in_provenance_is_quoted_for_a_shell(tmp_path, mark):
    folder = tmp_path / f"x; touch {mark.name} #'\"$(touch {mark.name})"
    cohort = write_small_cohort(folder, training=2, validation=2)
    run = Run.prepare(
        "backbone",
        "smoke",
        str(cohort),
        data_root=str(folder),
        out=str(tmp_path / "a b;c"),
        engine="cpu",
        options={"resolution_mm": 1, "levels": 2},
    )
    words = shlex.split(run.command.replace("<output>", "output").replace("<folder>", "folder"))
    assert words[words.index("cohort") + 1] == "folder/dataset.json"
    assert json.loads(words[words.index("-y") + 1]) == {"options": {"resolution_mm": 1, "levels": 2}}
    assert f"--cohort={cohort}" in run.arguments
    assert ";" not in run.config.run and "$" not in run.config.run and "/" not in run.config.run


@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_a_sweep_hands_each_parameter_to_its_process_as_one_word_without_a_shell(tmp_path, mark, monkeypatch, launcher):
    calls = []

    def popen(words, **options):
        assert isinstance(words, list) and not options.get("shell")
        calls.append(words)
        raise InterruptedError("far enough")

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    for text in hostile(mark):
        parameters = {"variant": "backbone", "seed": "0", "preset": "smoke", "cohort": text}
        run = jobs.SweepRun(Path("run_ablation.ipynb"), tmp_path / "out.ipynb", parameters, {}, launcher)
        with pytest.raises(InterruptedError):
            run.execute(1)
        (place,) = (index for index, word in enumerate(calls[-1]) if word == text)
        assert calls[-1][place - 1] in ("cohort", "--cohort")
    assert len(calls) == len(hostile(mark))


def test_what_papermill_injects_are_literals(mark):
    for text in hostile(mark):
        code = PythonTranslator.codify({"cohort": text, "options": {text: [text, 1.5]}, "seed": 3})
        assigned = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(code).body
            if isinstance(node, ast.Assign)
        }
        assert assigned == {"cohort": text, "options": {text: [text, 1.5]}, "seed": 3}


# the source ----------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "eval",
    "exec",
    "system",
    "popen",
    "getoutput",
    "getstatusoutput",
    "unsafe_load",
    "__import__",
    "loads_pickle",
}
#: submitit's own files of the user's own jobs, see docs/reliability.md.
ALLOWED = {("slurm.py", "pickle_load")}


def sources() -> list[tuple[str, ast.AST]]:
    found = [(path.name, ast.parse(path.read_text(encoding="utf-8"))) for path in (ROOT / "lumirlib").rglob("*.py")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert not any(line.lstrip().startswith(("!", "%")) for text in code for line in text.splitlines()), path.name
        found += [(path.name, ast.parse(text)) for text in code]
    return found


def test_no_source_and_no_notebook_evaluates_text_unpickles_or_calls_a_shell():
    trees = sources()
    assert len(trees) > 60
    for name, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, name
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if ast.unparse(node.func).startswith("yaml."):
                assert called == "safe_load", f"{name}:{node.lineno} calls yaml.{called}"
            method = isinstance(node.func, ast.Attribute) and called == "eval" and not node.args  # of a network
            assert called not in FORBIDDEN or method, f"{name}:{node.lineno} calls {called}"
            assert "pickle" not in called or (name, called) in ALLOWED, f"{name}:{node.lineno} calls {called}"
            given = {word.arg: word.value for word in node.keywords}
            for option, value in (("shell", True), ("allow_pickle", True), ("weights_only", False)):
                found = given.get(option)
                assert not (isinstance(found, ast.Constant) and found.value is value), f"{name}:{node.lineno}: {option}"
            if ast.unparse(node.func) == "torch.load":
                assert isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True


def test_a_buffer_of_bytes_is_no_checkpoint(tmp_path, mark):
    path = tmp_path / "empty.pt"
    for content in (b"", b"PK", io.BytesIO(b"x" * 100).getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*empty\.pt as a checkpoint"):
            load_checkpoint(path)
