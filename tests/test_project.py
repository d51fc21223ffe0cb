"""The project as a user meets it: notebook, command line, environment files."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lumirlib import __version__, cli
from lumirlib.methods.presets import PRESETS
from lumirlib.provenance import project_root, results_folder

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "run_ablation.ipynb"


def test_notebook_runs_from_another_folder_with_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    papermill.execute_notebook(
        str(NOTEBOOK), "LC-2.ipynb", {"variant": "LC-2+CA", "preset": "smoke", "out": "my results"}, progress_bar=False
    )
    csv, provenance = (
        list((tmp_path / "my results" / "metrics").glob(f"LC-2-CA_embedded_smoke_*.{end}")) for end in ("csv", "json")
    )
    assert len(csv) == len(provenance) == 1
    assert json.loads(provenance[0].read_text())["options"]["cascade"] == "compositional"
    assert len(list((tmp_path / "my results" / "figures").glob("*.png"))) == 3
    text = "".join(str(cell.get("outputs")) for cell in nbformat.read("LC-2.ipynb", 4).cells)
    assert "simulated people, 4 mm: not a LUMIR result" in text


def test_notebook_with_a_misspelt_variant_fails_with_the_choices(tmp_path):
    with pytest.raises(
        papermill.PapermillExecutionError, match=r"unknown variant 'LKK'.*backbone, LK, LC-1, LC-2, CA, BF"
    ):
        papermill.execute_notebook(str(NOTEBOOK), str(tmp_path / "o.ipynb"), {"variant": "LKK"}, progress_bar=False)


def test_notebook_parameters_are_typed_and_explained():
    listed = papermill.inspect_notebook(str(NOTEBOOK))
    assert {"variant", "preset", "cohort", "seed", "data_root", "out"} <= listed.keys()
    assert listed["seed"]["inferred_type_name"] == "int"
    assert all(parameter["help"] for parameter in listed.values())


def test_notebooks_are_committed_executed_without_errors_or_paths_of_a_machine():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert outputs, f"{path.name} is committed without outputs, so nbval compares nothing"
        assert not [output for output in outputs if output.output_type == "error"], path.name
        assert any("nbval-ignore-output" not in cell.metadata.get("tags", []) and cell.outputs for cell in cells)
        assert not re.search(r"/(home|root|work|Users)/\w", json.dumps(outputs)), path.name


def test_command_line_trains_and_prints_the_metrics(tmp_path, capsys):
    assert cli.main(["run", "backbone", "--no-notebook", "--preset", "smoke", "--out", str(tmp_path), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed and "hd95_mm" in printed


def test_command_line_explains_mistakes_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "lumirlib", "run", "LK", "--preset", "dmeo"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "preset must be one of smoke, demo" in done.stderr and "Traceback" not in done.stderr


def test_command_line_names_a_broken_scan_without_a_traceback(small_cohort_json, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", replace(PRESETS["smoke"], resolution_mm=1))
    scan = small_cohort_json.parent / "imagesTr" / "SMALL_0002_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-100])
    arguments = ["--preset", "smoke", "--cohort", str(small_cohort_json), "--out", str(tmp_path), "--quiet"]
    assert cli.main(["run", "backbone", "--no-notebook", *arguments]) == 2
    assert "SMALL_0002_0000.nii.gz as NIfTI (truncated or corrupt?)" in capsys.readouterr().err


def test_results_go_where_they_are_asked_for(monkeypatch):
    assert results_folder("somewhere") == Path("somewhere")
    monkeypatch.setenv("LUMIRLIB_RESULTS", "elsewhere")
    assert results_folder() == Path("elsewhere")
    monkeypatch.delenv("LUMIRLIB_RESULTS")
    assert results_folder() == (project_root() or Path.cwd()) / "results"


#: Extras that requirements.txt leaves out: their packages hold others back, or need what pip cannot install.
NOT_PINNED = ("classical", "browser")
#: Packages that others bring, pinned because a change in them changes results or the committed notebooks.
BROUGHT_BY_OTHERS = {"nbclient", "torchreg"}


def test_environment_requirements_and_project_agree_and_versions_stand_in_one_place():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, as requirements.txt does")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "lumirlib" and environment["channels"][0] == "conda-forge"
    python, *rest = environment["dependencies"]
    assert rest == ["pip", {"pip": ["-r requirements.txt"]}]  # no second list of pins
    assert python.removeprefix("python=") + ".0" in SpecifierSet(project["requires-python"])
    *pins, own = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert own == "-e ."
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    extras = project["optional-dependencies"]
    chosen = [Requirement(line) for line in project["dependencies"]]
    chosen += [Requirement(line) for extra, lines in extras.items() if extra not in NOT_PINNED for line in lines]
    for requirement in chosen:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"requirements.txt does not pin {requirement.name}"
        assert version in requirement.specifier, (
            f"requirements.txt pins {requirement.name} to {version}, not {requirement}"
        )
    declared = {canonicalize_name(requirement.name) for requirement in chosen}
    assert set(pinned) - declared == BROUGHT_BY_OTHERS
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
