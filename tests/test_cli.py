"""The command `lumirlib`."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import nbformat
import numpy as np
import pytest

from lumirlib import cli
from lumirlib.data.cache import DTYPES
from lumirlib.data.dataset_json import NAMED_COHORTS
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_nifti, write_nifti
from lumirlib.files import write_json
from lumirlib.methods.external import MethodUnavailableError
from lumirlib.methods.presets import PRESETS
from lumirlib.methods.variants import variant_choices
from lumirlib.scans import prepare
from lumirlib.scans.scan import as_scanned
from lumirlib.study import jobs
from lumirlib.study.folding import FACTORS
from lumirlib.study.report import claims
from lumirlib.study.slurm import ClusterError
from lumirlib.training import engine, registrar
from lumirlib.training.divergence import NonFiniteLossError

ROOT = Path(__file__).resolve().parent.parent


def leaves(group=cli.lumirlib, words=()):
    """All sub-commands, as words after `lumirlib`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*words, name))
        else:
            yield (*words, name)


COMMANDS = list(leaves())


@pytest.mark.parametrize("words", [(), ("run",), ("measure", "costs"), ("weights",)], ids=" ".join)
def test_help_does_not_wait_for_torch(words):
    code = (
        "import sys\nfrom lumirlib import cli\nassert cli.main([*sys.argv[1:], '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'pandas'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Usage: lumirlib {' '.join(words)}".strip() in done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_explains_itself_with_an_example_of_its_own(words, capsys):
    assert cli.main([*words, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"Usage: lumirlib {' '.join(words)}" in printed
    assert re.search(rf"\n  examples:\n    lumirlib {' '.join(words)}\b", printed)


def test_help_lists_what_the_library_knows(capsys):
    cli.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for known in (*PRESETS, *variant_choices()[:7], *engine.PRECISIONS, *engine.CACHES, *NAMED_COHORTS):
        assert known in text, known
    cli.main(["prepare", "--help"])
    assert ", ".join(prepare.STEPS) in capsys.readouterr().out
    cli.main(["cache", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(known in text for known in DTYPES)


def test_options_of_the_command_line_have_the_defaults_of_the_library():
    given = cli.lumirlib.commands["run"].make_context("run", ["LK"]).params
    for one in fields(engine.Engine):
        assert given[one.name] == one.default, one.name
    given = cli.lumirlib.commands["measure"].commands["folding"].make_context("folding", []).params
    assert given["factors"] == FACTORS


def test_one_flag_takes_several_words_up_to_the_next_option(tmp_path, capsys):
    words = ["--seeds", "0", "1", "--rows", "LK", "CA", "--seeds=2", "--preset", "smoke", "--out", str(tmp_path)]
    assert cli.main(["sweep", *words, "--set", "epochs=3", "smoothness_weight=1e-2", "--no-notebook", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [tuple(re.search(r"run (\S+) .*--seed (\d)", line).groups()) for line in lines]
    assert found == [("LK", "0"), ("LK", "1"), ("LK", "2"), ("CA", "0"), ("CA", "1"), ("CA", "2")]
    assert all(line.endswith("--set epochs=3 smoothness_weight=0.01") for line in lines)
    assert cli.main(["sweep", "--seeds", "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: lumirlib [OPTIONS] COMMAND"),
        (["trian"], "No such command 'trian'"),
        (["run"], "Missing argument 'ROW'"),
        (["run", "LKK"], "lumirlib run: unknown variant 'LKK'"),
        (["run", "LK", "--preset", "dmeo"], "lumirlib run: preset must be one of smoke"),
        (["run", "LK", "--set", "epochs"], "lumirlib run: --set takes name=value, got 'epochs'"),
        (["run", "LK", "--cohort", "nowhere.json"], "nowhere.json"),
        (["run", "LK", "--train-only"], "--train-only and --consistency go with --no-notebook"),
        (
            ["register", "a.nii", "b.nii", "--out", "c"],
            "lumirlib register: no such NIfTI file: a.nii",
        ),
        (["prepare", "no folder", "--out", "c"], "lumirlib prepare: no such folder: no folder"),
        (["evaluate", "--method", "VoxelMorph"], "VoxelMorph is a network, which needs weights"),
        (["submission", "score", "no.zip"], "lumirlib submission score: "),
    ],
)
def test_mistakes_end_with_status_2_and_a_sentence(arguments, message, capsys, small_cohort_json, monkeypatch):
    monkeypatch.chdir(small_cohort_json.parent)
    if arguments[:1] == ["submission"]:
        arguments = [*arguments, "--cohort", str(small_cohort_json)]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("a value"), 2, "lumirlib report claims: a value\n"),
        (PermissionError("a file"), 2, "lumirlib report claims: a file\n"),
        (ModuleNotFoundError("a package"), 2, "lumirlib report claims: a package\n"),
        (MemoryError("killed: memory?"), 2, "lumirlib report claims: killed: memory?\n"),
        (NonFiniteLossError("a loss"), 2, "lumirlib report claims: a loss\n"),
        (ClusterError("no Slurm"), 2, "lumirlib report claims: no Slurm\n"),
        (MethodUnavailableError("no ANTs"), 2, "lumirlib report claims: no ANTs\n"),
        (KeyboardInterrupt(), 130, "lumirlib report claims: interrupted\n"),
        (KeyboardInterrupt("saved"), 130, "lumirlib report claims: saved\n"),
        (SystemExit(143), 143, ""),
    ],
)
def test_errors_of_every_command_end_in_one_place(error, status, said, monkeypatch, capsys):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(claims, "load_study", broken)
    assert cli.main(["report", "claims"]) == status
    assert capsys.readouterr().err == said


def test_an_error_of_the_program_itself_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(claims, "load_study", lambda *_: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        cli.main(["report", "claims"])


def test_a_run_goes_through_its_notebook_and_says_where_it_is(small_cohort_json, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.provenance, "project_root", lambda: tmp_path)
    parameters = "variant = cohort = preset = data_root = out = ''; seed = 0; resume = True; options = {}"
    work = (
        "from lumirlib.study.run import Run\n"
        "run = Run.prepare(variant, preset, cohort, seed, data_root, out, options=options)\n"
        "run.evaluate(run.train(resume, False), False)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (parameters, work)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / jobs.NOTEBOOK)
    options = ["resolution_mm=1", "levels=2", "epochs=1", "steps_per_epoch=1", "channel_divisor=16"]
    words = ["run", "LK", "--cohort", str(small_cohort_json), "--preset", "smoke", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--quiet", "--set", *options]) == 0
    printed = capsys.readouterr().out
    (output,) = (tmp_path / "out" / "notebooks").iterdir()
    assert re.fullmatch(r"LK_small_smoke_.*_seed0\.ipynb", output.name)
    assert f"best epoch 1; {output}; {tmp_path / 'out' / 'metrics'}" in printed and "hd95_mm" in printed
    notebook.cells[1].source = "raise ValueError('no luck')"
    nbformat.write(notebook, tmp_path / jobs.NOTEBOOK)
    assert cli.main([*words, "--restart", "--quiet", "--set", *options]) == 1
    failed = output.with_suffix(".failed.ipynb")
    assert f"lumirlib run: ValueError: no luck; see {failed}" in capsys.readouterr().err
    assert nbformat.read(failed, 4).metadata["papermill"]["parameters"]["resume"] is False


def test_a_run_without_the_projects_notebooks_says_how_it_goes_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.provenance, "project_root", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "LK"]) == 2
    said = capsys.readouterr().err
    assert "no such notebook: " in said and "go without the notebook: --no-notebook" in said


def test_method_is_evaluated_on_a_cohort(small_cohort_json, tmp_path, capsys):
    arguments = ["--method", "affine", "--resolution", "1", "--cohort", str(small_cohort_json), "--quiet"]
    assert cli.main(["evaluate", *arguments, "--out", str(tmp_path / "a.csv")]) == 0
    assert re.search(r"affine: Small blobs, 1 mm: not LUMIR\n(.*\n)*dice +0\.\d+", capsys.readouterr().out)
    assert (tmp_path / "a.csv").is_file() and (tmp_path / "a.json").is_file()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder.csv", "cannot write: expected a file, got a folder"),
        ("file/a.csv", "cannot write: expected a folder, got a file"),
        ("a.json", "expected the path of a CSV"),
        ("dataset.csv", "dataset.json is no provenance of a table and would be overwritten"),
    ],
)
def test_a_table_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.setattr("lumirlib.evaluation.evaluate_method", lambda *arguments: pytest.fail("it began to work"))
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dataset.json").write_text("{}")
    assert cli.main(["evaluate", "--method", "affine", "--cohort", "no.json", "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "dataset.json").read_text() == "{}"


def test_submission_is_written_validated_and_scored(small_cohort_json, tmp_path, capsys):
    common = ["--cohort", str(small_cohort_json), "--resolution", "1", "--quiet"]
    path = str(tmp_path / "disp.zip")
    assert cli.main(["submission", "write", path, "--method", "affine", *common]) == 0
    assert cli.main(["submission", "validate", path, *common]) == 0
    assert "every displacement is zero" in capsys.readouterr().out
    assert cli.main(["submission", "score", path, *common]) == 0
    assert "hd95_mm" in capsys.readouterr().out
    Path(path).write_bytes(Path(path).read_bytes()[:-30])
    assert cli.main(["submission", "validate", path, *common]) == 2


def test_info_says_what_is_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LUMIR_BRAINS", str(tmp_path))
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"torch +\d", printed) and re.search(r"cpu +\d+ cores", printed)
    assert f"{tmp_path / 'dataset.json'} does not exist" in printed


def test_the_command_is_the_only_thing_to_run():
    """No message, docstring or subprocess calls a module of the package."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "lumirlib").rglob("*.py")}
    assert not [path.name for path, text in texts.items() if re.search(r"-m\W+lumirlib\.", text)]
    main = ("argparse", 'if __name__ == "__main__"')
    assert [path.name for path, text in texts.items() if any(word in text for word in main)] == ["__main__.py"]


def test_names_of_the_package_are_imported_when_they_are_used():
    import lumirlib

    assert set(lumirlib.__all__) <= set(dir(lumirlib))
    assert all(getattr(lumirlib, name) is not None for name in lumirlib.__all__)
    with pytest.raises(AttributeError, match="module 'lumirlib' has no attribute 'nothing'"):
        lumirlib.nothing  # noqa: B018


def commands_on_own_scans():
    """Commands of docs/own_scans.md."""
    section = (ROOT / "docs" / "own_scans.md").read_text()
    block = re.search(r"```bash\n(.*?)```", section, re.S)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("lumirlib ")]


def test_commands_of_the_page_on_own_scans_work_as_they_stand(tmp_path, monkeypatch):
    """On brains of 4 mm that lie in the frame but for a few mm; stripping, bias and affine have tests of their own."""
    pytest.importorskip("SimpleITK")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "brain_mask", lambda scan, device: scan.values > 0)
    monkeypatch.setattr(prepare, "corrected_bias", lambda scan, mask: scan.values)
    monkeypatch.setattr(prepare, "affine_to_frame", lambda *given: np.eye(4))
    monkeypatch.setattr(registrar, "BEST_MM", 4)  # other tests register at 1 mm
    for number in range(2):
        array, affine, _ = as_scanned(
            template_in_frame(4) * 800, frame_affine(4), (4 * number, 0, 5), orientation="LIA", spacing_mm=(4, 5, 4)
        )
        write_nifti(tmp_path / "scans" / f"person{number}.nii.gz", array, affine)
        write_nifti(tmp_path / "raw" / f"sub-0{number}" / "anat" / f"sub-0{number}_T1w.nii.gz", array, affine)
    write_json(tmp_path / "raw" / "dataset_description.json", {"Name": "Two brains", "BIDSVersion": "1.10.0"})
    write_nifti(tmp_path / "labels_of_person1.nii.gz", (array > 0).astype(np.int16), affine)
    commands = commands_on_own_scans()
    assert [command[1] for command in commands] == ["prepare", "prepare", "register", "apply"]
    for command in commands:
        assert cli.main(command[1:]) == 0, command
    assert all((tmp_path / name / "dataset.json").is_file() for name in ("cohort", "derivatives"))
    assert (tmp_path / "registered" / "qc.png").is_file()
    assert set(np.unique(read_nifti(tmp_path / "labels.nii.gz")[0])) == {0, 1}
