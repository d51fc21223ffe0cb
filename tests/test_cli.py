"""The command `lumirlib`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lumirlib import cli
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import write_nifti
from lumirlib.scans import prepare
from lumirlib.scans.scan import as_scanned

ROOT = Path(__file__).resolve().parent.parent


def test_help_of_the_command_does_not_wait_for_torch():
    code = (
        "import sys\nfrom lumirlib import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\nheavy = {'torch', 'numpy', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "submission write"])
def test_each_subcommand_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: lumirlib {command}" in printed
    assert re.search(rf"examples?:\n  lumirlib {command}", printed) or command == "submission"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["run", "--preset", "dmeo"], "lumirlib run: preset must be one of smoke"),
        (
            ["register", "a.nii", "b.nii", "--out", "c"],
            "lumirlib register: give one of weights, run, method and pretrained",
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
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err


def test_method_is_evaluated_on_a_cohort(small_cohort_json, tmp_path, capsys):
    arguments = ["--method", "affine", "--resolution", "1", "--cohort", str(small_cohort_json), "--quiet"]
    assert cli.main(["evaluate", *arguments, "--out", str(tmp_path / "a.csv")]) == 0
    assert re.search(r"affine: Small blobs, 1 mm: not LUMIR\n(.*\n)*dice +0\.\d+", capsys.readouterr().out)
    assert (tmp_path / "a.csv").is_file() and (tmp_path / "a.json").is_file()


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


def test_names_of_the_package_are_imported_when_they_are_used():
    import lumirlib

    assert set(lumirlib.__all__) <= set(dir(lumirlib))
    assert all(getattr(lumirlib, name) is not None for name in lumirlib.__all__)
    with pytest.raises(AttributeError, match="module 'lumirlib' has no attribute 'nothing'"):
        lumirlib.nothing  # noqa: B018


def readme_commands():
    """Commands of README's section "Your own scans"."""
    section = (ROOT / "README.md").read_text().split("## Your own scans\n")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.S)[1]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("lumirlib ")]


def test_commands_of_the_readme_on_own_scans_work_as_they_stand(tmp_path, monkeypatch):
    """On brains of 4 mm, so the skull stripper, which another test tries, is told where they are."""
    pytest.importorskip("SimpleITK")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "brain_mask", lambda scan, device: scan.values > 0)
    monkeypatch.setattr(prepare, "TEMPLATE_MM", 4)
    for number in range(2):
        array, affine, _ = as_scanned(
            template_in_frame(4) * 800, frame_affine(4), (4 * number, 0, 5), orientation="LIA", spacing_mm=(4, 5, 4)
        )
        write_nifti(tmp_path / "scans" / f"person{number}.nii.gz", array, affine)
    commands = readme_commands()
    assert [command[1] for command in commands] == ["prepare", "register"]
    for command in commands:
        assert cli.main(command[1:]) == 0, command
    assert (tmp_path / "cohort" / "dataset.json").is_file() and (tmp_path / "registered" / "qc.png").is_file()
