"""The project as a user meets it: notebook, command line, environment files."""

import ast
import json
import os
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

from lumirlib import __version__, cli, provenance
from lumirlib.methods.presets import PRESETS
from lumirlib.provenance import results_folder
from lumirlib.study.jobs import NOTEBOOK
from lumirlib.study.notebooks import KINDS, check_parameters

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / NOTEBOOK
IMPORTS = (ast.Import, ast.ImportFrom)


def test_notebook_runs_from_another_folder_with_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {"channel_divisor": 32, "epochs": 1, "validation_pairs": 1, "evaluation_pairs": 2}
    parameters = {"variant": "LC-2+CA", "preset": "smoke", "out": "my results", "head_channels": 9, "options": smaller}
    papermill.execute_notebook(str(RUN), "LC-2.ipynb", parameters, progress_bar=False)
    csv, provenance = (
        list((tmp_path / "my results" / "metrics").glob(f"LC-2-CA_embedded_smoke_*.{end}")) for end in ("csv", "json")
    )
    assert len(csv) == len(provenance) == 1
    options = json.loads(provenance[0].read_text())["options"]
    assert options["cascade"] == "compositional" and options["head_channels"] == 9
    assert len(list((tmp_path / "my results" / "figures").glob("*.png"))) == 3
    text = "".join(str(cell.get("outputs")) for cell in nbformat.read("LC-2.ipynb", 4).cells)
    assert "simulated people, 4 mm: not a LUMIR result" in text


def test_notebook_with_a_misspelt_parameter_fails_in_its_first_cell_with_what_is_spelt_alike(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r"no parameter 'varient' \(did you mean variant"):
        papermill.execute_notebook(str(RUN), str(tmp_path / "o.ipynb"), {"varient": "LK"}, progress_bar=False)
    cells = [cell for cell in nbformat.read(tmp_path / "o.ipynb", 4).cells if cell.cell_type == "code"]
    (broken,) = (n for n, cell in enumerate(cells) if any(output.output_type == "error" for output in cell.outputs))
    sources = [cell.source for cell in cells if not cell.source.startswith("# This cell was added by papermill")]
    assert "check_parameters(globals())" in cells[broken].source and cells[broken].source == sources[2]


def colab(cell) -> bool:
    """Whether a cell only makes a machine of Colab ready."""
    return "colab" in cell.metadata.get("tags", [])


def test_the_start_page_gets_ready_on_colab_alone():
    (cell,) = [cell for cell in nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4).cells if colab(cell)]
    names: dict = {}
    exec(cell.source, names)
    assert "subprocess" not in names and "source" not in names  # nothing is installed elsewhere


def test_committed_notebooks_are_small_and_show_pictures_and_text_in_place_of_widgets():
    """A widget's state weighs as much as its picture, and without a kernel it says "Loading widget"."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        widgets = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
        assert "widgets" not in notebook.metadata and not widgets, f"{path.name}: take the widgets out of what it shows"
        assert path.stat().st_size < 1e6, path.name


def test_notebooks_check_their_parameters_before_anything_else():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" and not colab(cell)]
        statements = [ast.unparse(line) for line in ast.parse(code[1]).body if not isinstance(line, IMPORTS)]
        assert statements[0] == "check_parameters(globals())", path.name
        declared = {line.target.id: ast.unparse(line.annotation) for line in ast.parse(code[0]).body}
        assert set(declared.values()) <= set(KINDS), path.name


#: As the first cells of a notebook would leave them.
CELLS = ["", 'variant: str = "backbone"\nepochs: int = None\nlambda1: float = 1.0\noptions: dict = {}\nrows: list = []']


def notebook_with(injected: str, **values) -> dict:
    declared = {"variant": "backbone", "epochs": None, "lambda1": 1.0, "options": {}, "rows": []}
    return {"In": [*CELLS, f"# Parameters\n{injected}"], **declared, **values}


def test_parameters_given_as_text_are_read_as_json_or_yaml():
    notebook = notebook_with("", options='{"similarity": "mse", "rate": 1e-4}', rows="[LC-2, CA]", lambda1=2)
    check_parameters(notebook)
    assert notebook["options"] == {"similarity": "mse", "rate": 1e-4} and notebook["rows"] == ["LC-2", "CA"]
    assert notebook["lambda1"] == 2 and notebook["epochs"] is None
    notebook = notebook_with("", options="{similarity: mse}")
    check_parameters(notebook)
    assert notebook["options"] == {"similarity": "mse"}


@pytest.mark.parametrize(
    ("injected", "values", "message"),
    [
        ('varient = "LK"', {}, r"no parameter 'varient' \(did you mean variant\?\); it has variant, epochs, lambda1"),
        ("gpu = 1\nepoch = 3", {}, r"no parameter 'gpu', 'epoch' \(did you mean epochs\?\)"),
        ("", {"options": "similarity"}, r"options must be names with values, got 'similarity'.* -y '\{options: \{NAME"),
        ("", {"options": "{"}, "options must be names with values, got '{'"),
        ("", {"rows": "LC-2"}, r"rows must be a list, got 'LC-2': papermill ... -y '\{rows: \[ONE, ANOTHER\]\}'"),
        ("", {"epochs": "20"}, "epochs must be a whole number, got '20': papermill ... -p epochs 1"),
        ("", {"epochs": True}, "epochs must be a whole number, got True"),
        ("", {"variant": 3}, "variant must be text, got 3: papermill ... -r variant VALUE"),
        ("", {"variant": None}, "variant must be text, got None"),
    ],
)
def test_parameters_that_do_not_exist_or_fit_are_refused(injected, values, message):
    with pytest.raises(ValueError, match=message):
        check_parameters(notebook_with(injected, **values))


def test_what_a_reader_assigns_in_a_cell_of_his_own_is_no_parameter():
    notebook = notebook_with("")
    notebook["In"] += ["mine = 1", "no python at all"]
    check_parameters(notebook)


def test_notebook_parameters_are_typed_and_explained():
    listed = papermill.inspect_notebook(str(RUN))
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
    words = ["run", "backbone", "--no-notebook", "--preset", "smoke", "--out", str(tmp_path), "--quiet"]
    assert cli.main([*words, "--set", "channel_divisor=32", "epochs=1", "evaluation_pairs=2"]) == 0
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
    assert results_folder("study") == ROOT / "results"
    monkeypatch.delenv("LUMIRLIB_RESULTS")
    assert results_folder() == ROOT / "runs"
    monkeypatch.setattr(provenance, "project_root", lambda: None)
    assert results_folder() == Path.cwd() / "lumirlib-results"
    with pytest.raises(FileNotFoundError, match=r"come with a checkout of lumirlib.*give a results folder"):
        results_folder("study")


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the checkout's git")
def test_nothing_that_is_committed_is_in_the_folder_of_a_users_runs_and_git_ignores_all_of_it():
    assert git("ls-files", "runs").split() == ["runs/.gitignore"]
    made = [
        "runs/backbone.ipynb",
        "runs/metrics/a.csv",
        "runs/notebooks/a.ipynb",
        "runs/tables/a.md",
        "runs/slurm/a.json",
    ]
    assert git("check-ignore", *made).split() == made


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the checkout's git")
def test_a_clone_is_light_and_holds_no_executed_run():
    tracked = [ROOT / name for name in git("ls-files", "-z").split("\0") if name]
    assert sum(path.stat().st_size for path in tracked if path.is_file()) < 25e6
    notebooks = {path.parent for path in tracked if path.suffix == ".ipynb"}
    assert notebooks == {ROOT / "notebooks"}


@pytest.mark.long
def test_papermill_a_sweep_and_the_notebooks_of_tables_leave_a_clone_as_it_was(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "LUMIRLIB_RESULTS"}
    environment["PYTHONPATH"] = str(clone)
    for words in (
        ["papermill", "notebooks/run_ablation.ipynb", "runs/backbone.ipynb", "-p", "preset", "smoke"],
        ["lumirlib.study.sweep", "--rows", "LK", "--preset", "smoke"],
        ["papermill", "notebooks/table2.ipynb", "runs/table2.ipynb"],
        ["papermill", "notebooks/claims.ipynb", "runs/claims.ipynb"],
    ):
        subprocess.run([sys.executable, "-m", *words], cwd=clone, env=environment, check=True, capture_output=True)
    done = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert {path.parent.name for path in (clone / "runs").rglob("*.csv")} >= {"metrics", "logs", "tables"}


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
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    assert {"message", "title", "authors", "license", "date-released"} <= citation.keys()  # cffconvert --validate


def test_binder_installs_what_the_project_pins():
    lines = (ROOT / ".binder" / "requirements.txt").read_text().split("\n")
    assert "-r ../requirements.txt" in lines
    assert (ROOT / ".binder" / "runtime.txt").read_text().strip() == "python-3.11"


#: What a reader without a checkout can do: two pairs of simulated people, registered by packaged weights.
DEMO = """
from lumirlib import load_cohort, pretrained
from lumirlib.evaluation import evaluate_method, zero_displacement
people = load_cohort("embedded", 4)
for method in (zero_displacement, pretrained("ours", resolution_mm=4)):
    table = evaluate_method(method, people, people.validation_pairs[:2], progress=False)
    print(table[table["metric"] == "dice"]["value"].mean())
"""


@pytest.mark.long
def test_a_wheel_works_alone_in_a_bare_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("lumirlib-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    pins = tmp_path / "pins.txt"
    pins.write_text("".join(line for line in (ROOT / "requirements.txt").open() if "==" in line))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", pins, wheel], check=True, cwd=tmp_path, env=environment)
    given = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    assert "ours-1mm" in subprocess.run([python, "-m", "lumirlib", "info"], **given).stdout
    before, after = map(float, subprocess.run([python, "-c", DEMO], **given).stdout.split())
    assert after > before + 0.03
    listed = subprocess.run([python, "-c", "import lumirlib; print(lumirlib.__file__)"], **given).stdout
    assert listed.startswith(str(tmp_path / "bare"))
