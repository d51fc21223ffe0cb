"""The plan of the house, as in pyproject.toml: imports go one way and in no circles, and every module has a place."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumirlib.provenance import project_root

PROGRAM = Path(sys.executable).with_name("lint-imports")
#: Lines that break the plan, by the module that they are appended to, and what is then said.
BREACHES = {
    "metrics/overlap.py": ("import lumirlib.evaluation", "metrics.overlap -> lumirlib.evaluation"),
    "training/engine.py": ("def run(): from lumirlib.study import sweep", "training.engine -> lumirlib.study.sweep"),
    "scans/qc.py": ("if TYPE_CHECKING: from lumirlib.study.run import Run", "scans.qc -> lumirlib.study.run"),
    "study/run.py": ("from lumirlib.scans import folder", "study.run -> lumirlib.scans.folder"),
    "methods/unet.py": ("from lumirlib.methods import voxelmorph", "No cycles are allowed in lumirlib.methods."),
    "study/paper.py": ("from lumirlib.study.report import claims", "No cycles are allowed in lumirlib.study."),
    "helpers.py": ("", "not listed as layers:\n\n- lumirlib.attic\n- lumirlib.helpers\n"),
    "attic/__init__.py": ("", "not listed as layers:\n\n- lumirlib.attic\n- lumirlib.helpers\n"),
}

#: A name that only its own module uses; those of protocols end in an underscore too.
PRIVATE = re.compile(r"_[a-zA-Z]\w*(?<!_)")


def lint(checkout) -> subprocess.CompletedProcess:
    if not PROGRAM.exists():
        pytest.skip("needs import-linter, of requirements.txt")
    return subprocess.run([PROGRAM, "--no-cache"], cwd=checkout, capture_output=True, text=True)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What is said of a copy of the package with all breaches."""
    checkout = tmp_path_factory.mktemp("checkout")
    for path in (project_root() / "lumirlib").rglob("*.py"):
        copy = checkout / path.relative_to(project_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for module, (line, _) in BREACHES.items():
        path = checkout / "lumirlib" / module
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    shutil.copy(project_root() / "pyproject.toml", checkout)
    done = lint(checkout)
    assert done.returncode == 1 and "0 kept, 2 broken" in done.stdout, done.stdout + done.stderr
    return done.stdout


def test_imports_go_one_way_without_circles_and_every_module_has_a_place():
    done = lint(project_root())
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("module", BREACHES)
def test_an_import_that_is_turned_round_and_a_module_without_a_place_are_named(module, broken):
    assert BREACHES[module][1] in broken


def private_names(tree: ast.AST) -> set[str]:
    """Private names that a module defines: functions, classes, variables, attributes."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stored = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    found |= {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in stored
        if hasattr(node, "id") or hasattr(node, "attr")
    }
    return {name for name in found if PRIVATE.fullmatch(name)}


def words(tree: ast.AST) -> set[str]:
    """Attributes, imported names and names in strings, as monkeypatch takes them."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found | {string.rpartition(".")[2] for string in strings}


def test_no_test_reaches_into_a_private_name_of_the_library():
    sources = (project_root() / "lumirlib").rglob("*.py")
    private = set().union(*(private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in sources))
    reached = {
        f"{path.name}: {name}"
        for path in (project_root() / "tests").rglob("*.py")
        for name in words(ast.parse(path.read_text(encoding="utf-8"))) & private
        if path.name != "test_architecture.py"
    }
    assert not reached


def test_private_names_are_found_where_they_are_made_and_where_they_are_taken():
    module = "class _One:\n    def __init__(self): self._two = self.three_ = 4\n_five: int = 6"
    assert private_names(ast.parse(module)) == {"_One", "_two", "_five"}
    test = "from lumirlib.a import _one\nmonkeypatch.setattr(a, '_two', 3)\nmonkeypatch.setattr('a._four', b._five)"
    assert words(ast.parse(test)) >= {"_one", "_two", "_four", "_five"}
