"""What the documentation says is true: its commands are accepted, its examples run, its links lead somewhere."""

import argparse
import importlib
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import yaml
from small_cohorts import smooth_blob, write_small_cohort

from lumirlib import cli, evaluation, load_cohort, methods
from lumirlib.data.nifti import write_nifti
from lumirlib.methods import parse_row, variants
from lumirlib.methods.presets import get_preset

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, as requirements.txt does")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("notebooks/*.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
    ROOT / "results" / "GPU_QUEUE.md",
]
PROGRAMS = "python3?|papermill|pytest|pip|torchrun|conda|jupyter|lumirlib"


class ParsedError(Exception):
    """Raised in place of running a program whose arguments have been accepted."""


def text_of(page: Path) -> str:
    """A page's Markdown; of a notebook that of its cells."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown")


def fenced(text: str, *languages: str) -> list[str]:
    """The code blocks of a page in one of the languages ("" for a block that names none)."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M)
    return [code for language, code in found if language.strip() in languages]


def commands(page: Path) -> list[str]:
    """Every command of a page, from its blocks and its lines, one each."""
    text = text_of(page)
    lines = "".join(fenced(text, "bash", "")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    lines += [code.replace("\n", " ") for code in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", prose)]
    lines = [re.sub(r"=[A-Z]\b", "=1", re.sub(r"<[^>]*>", "FOLDER", line)) for line in lines]  # what a reader fills in
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


ALL = [(page, command) for page in PAGES for command in commands(page)]


@cache
def parameters_of(notebook: Path) -> dict:
    return papermill.inspect_notebook(str(notebook))


def check_notebook_call(words: list[str]) -> None:
    """papermill: the notebook exists, it has the parameters, and rows and presets have these values."""
    if words[0] == "--help-notebook":
        assert parameters_of(ROOT / words[1])
        return
    known = parameters_of(ROOT / words[0])
    assert words[1].endswith(".ipynb")
    rest = words[2:]
    while rest:
        flag, name, *rest = rest
        if flag == "-y":
            assert set(yaml.safe_load(name)) <= set(known), name
            continue
        assert flag in ("-p", "-r"), flag
        value, *rest = rest
        assert name in known, f"{words[0]} has no parameter {name!r}: {', '.join(known)}"
        if name == "variant":
            parse_row(value)
        elif name == "preset":
            get_preset(value)


def check_program(run, arguments: list[str], monkeypatch) -> None:
    """A Python program accepts its arguments; nothing of it is run after that."""
    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        original(self, args, namespace)
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse)
        patched.setattr(sys, "argv", ["program", *arguments])
        try:
            run()
        except ParsedError:
            return
        except SystemExit as stop:
            assert stop.code in (0, None) and "--help" in arguments, f"refused: {arguments}"
            return
    pytest.fail("the program has parsed no arguments")


def check_lumirlib(arguments: list[str], monkeypatch) -> None:
    """The command takes these words; nothing of it is run after that."""

    def parsed(self, context):
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(cli.lumirlib.command_class, "invoke", parsed)
        try:
            status = cli.main(arguments)
        except ParsedError:
            return
    assert status == 0 and "--help" in arguments, f"refused: {arguments}"


@pytest.mark.parametrize(
    ("page", "command"), ALL, ids=[f"{page.relative_to(ROOT)}-{number}" for number, (page, _) in enumerate(ALL)]
)
def test_every_command_of_the_documentation_is_accepted(page, command, monkeypatch, tmp_path, capsys):
    words = shlex.split(command, comments=True)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if not words or words[0] in (".", "mkdir", "cd"):
        return
    if words[0] == "papermill":
        check_notebook_call(words[1:])
    elif words[0] == "pytest":
        markers = [marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        assert "-m" not in words or words[words.index("-m") + 1] in markers
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word or word in ("tests", "notebooks"))
    elif words[:2] == ["pip", "install"]:
        extras = PROJECT["project"]["optional-dependencies"]
        assert {name for word in words for name in re.findall(r"^lumirlib\[(\w+)\]$", word)} <= set(extras)
        assert "-r" not in words or (ROOT / words[words.index("-r") + 1]).is_file()
    elif words[0] == "conda":
        assert words[1:] in (["env", "create", "-f", "environment.yml"], ["activate", "lumirlib"])
    elif words[0].startswith("python") and words[1:3] == ["-m", "venv"]:
        importlib.import_module("venv")
    elif words[0] == "lumirlib" or (words[1:] and words[0] == "torchrun" and "lumirlib" in words):
        arguments = words[words.index("lumirlib") + 1 :]
        if all(re.fullmatch("[a-z]+", word) for word in arguments):
            arguments = [*arguments, "--help"]  # a command that is only named
        check_lumirlib(arguments, monkeypatch)
        if arguments[0] == "sweep" and not {"--help", "WIDE+CA"} & set(arguments):  # docs/extending.md makes that row
            assert cli.main([*arguments, "--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
        if arguments[0] == "run" and arguments[1] != "--help":
            parse_row(arguments[1])
            get_preset(arguments[arguments.index("--preset") + 1] if "--preset" in arguments else "demo")
    elif words[0] == "python" and words[1] == "-m":
        importlib.import_module(words[2])
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python":
        check_program(lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[2:], monkeypatch)
    elif words[:2] == ["jupyter", "lab"]:
        assert all((ROOT / word).exists() for word in words[2:])
    elif words[0] == "antsApplyTransforms":
        pass  # another project's program
    elif words[0] == "bash":
        subprocess.run(["bash", "-n", str(ROOT / words[1])], check=True)
    else:
        pytest.fail(f"{page.name}: nothing checks {command!r}")


def test_every_program_of_the_documentation_is_run_by_a_test():
    pattern = r"\blumirlib ((?:(?:measure|report|submission|weights) )?\w+)"
    named = {name for _, command in ALL for name in re.findall(pattern, command)}
    assert {"run", "sweep", "measure costs"} <= named
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in named:
        words = ", ".join(f'"{word}"' for word in name.split())
        assert f"cli.main([{words}" in tests, f"no test runs lumirlib {name}"


def test_budget_is_printed_as_the_page_on_speed_has_it(capsys):
    assert cli.main(["report", "budget"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed and printed in text_of(ROOT / "docs" / "speed.md")


@pytest.mark.parametrize("page", ["README.md", "docs/extending.md"])
def test_examples_of_the_documentation_run_as_they_stand(page, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMIRLIB_RESULTS", str(tmp_path))
    for module, registry in ((variants, "SCHEMES"), (methods, "BASELINES"), (evaluation, "FURTHER_METRICS")):
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))  # what is added here ends here
    blocks = fenced((ROOT / page).read_text(encoding="utf-8"), "python")
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "examples"})
    if page == "docs/extending.md":
        found = [path.read_text() for path in (tmp_path / "metrics").glob("*.csv")]
        assert len(found) == 2 and all(",correlation,0." in table for table in found)


def test_the_page_about_data_is_true_of_a_folder_laid_out_as_it_says(tmp_path, capsys, monkeypatch):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    write_small_cohort(tmp_path).rename(tmp_path / "LUMIR_dataset.json")
    (check,) = fenced(text.replace("   ", ""), "python")
    exec(compile(check.replace("/data/LUMIR", str(tmp_path)), "docs/data.md", "exec"), {})
    assert capsys.readouterr().out == "4 training scans, 6 pairs, (16, 20, 24)\nlabels: True\n"
    content = fenced(text, "json")[0]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "dataset.json").write_text(content)
    for number, name in enumerate(re.findall(r"\./(\w+/\w+)\.nii\.gz", content)):
        write_nifti(folder / f"{name}.nii.gz", smooth_blob(number), np.eye(4))
    monkeypatch.setenv("LUMIR_BRAINS", str(folder))
    cohort = load_cohort("brains")
    assert len(cohort.train) == 2 and len(cohort.validation_pairs) == 2 and not cohort.has_labels
    write_nifti(folder / "labelsVal" / "C_0000.nii.gz", np.full((16, 20, 24), 4, np.uint8), np.eye(4))
    write_nifti(folder / "labelsVal" / "D_0000.nii.gz", np.full((16, 20, 24), 4, np.uint8), np.eye(4))
    assert load_cohort("brains").has_labels


def test_additions_take_ten_lines_as_promised():
    for block in fenced((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), "python"):
        kept = [line for line in block.splitlines() if line.strip() and not re.match(r"(from|import|#|@)\b", line)]
        assert len(kept) <= 10, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_documentation_lead_to_files_of_the_project(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", text_of(target), re.M)
            assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings], link


def test_every_notebook_is_listed_with_its_time_and_opens_with_its_command():
    listed = text_of(ROOT / "notebooks" / "README.md")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert f"]({path.name})" in listed, f"notebooks/README.md lacks {path.name}"
        cells = [cell for cell in nbformat.read(path, 4).cells if "colab" not in cell.metadata.get("tags", [])]
        first, second = cells[:2]
        assert first.cell_type == "markdown" and first.source.startswith("# ")
        assert f"papermill notebooks/{path.name}" in first.source
        assert re.search(r"second|minute|hour", first.source), f"{path.name} does not say how long it takes"
        assert "parameters" in second.metadata.get("tags", [])
        assert all(parameter["help"] for parameter in parameters_of(path).values()), path.name
