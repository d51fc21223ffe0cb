"""What every notebook checks first: the parameters that it was given."""

from __future__ import annotations

import ast
import difflib
import json
from contextlib import suppress

import yaml

#: What papermill writes above the parameters that it was given.
INJECTED = "# Parameters\n"
#: Type of a parameter -> what a value may be, in words, and how to give one.
KINDS = {
    "str": (str, "text", "-r {name} VALUE"),
    "int": (int, "a whole number", "-p {name} 1"),
    "float": ((int, float), "a number", "-p {name} 0.5"),
    "bool": (bool, "True or False", "-p {name} True"),
    "list": (list, "a list", "-y '{{{name}: [ONE, ANOTHER]}}'"),
    "dict": (dict, "names with values", "-y '{{{name}: {{NAME: VALUE}}}}'"),
}


def check_parameters(notebook: dict[str, object]) -> None:
    """Check what papermill was told to set: each parameter exists, and has the type that the notebook gives it.

    The notebook declares its parameters by typed assignments (``seed: int = 0``). papermill itself only warns of a name
    that is not among them, and the notebook would run with its defaults.

    Args:
        notebook: Names and values of the notebook, its ``globals()``. A list or dictionary that was given as text, JSON
            or YAML, is replaced by what the text says.

    Raises:
        ValueError: a parameter that the notebook does not have, with those that are spelt alike, or a value of another
            type than the parameter's.
    """
    declared: dict[str, tuple[str, bool]] = {}
    injected: list[str] = []
    for source in notebook.get("In", ()):
        with suppress(SyntaxError):  # a cell that a reader has tried
            for line in ast.parse(source).body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    optional = isinstance(line.value, ast.Constant) and line.value.value is None
                    declared[line.target.id] = ast.unparse(line.annotation), optional
                elif isinstance(line, ast.Assign) and source.startswith(INJECTED):
                    injected += [target.id for target in line.targets if isinstance(target, ast.Name)]
    unknown = [name for name in dict.fromkeys(injected) if name not in declared]
    if unknown:
        near = {name: " or ".join(difflib.get_close_matches(name, declared, cutoff=0.5)) for name in unknown}
        asked = ", ".join(f"{name!r} (did you mean {found}?)" if found else repr(name) for name, found in near.items())
        raise ValueError(f"this notebook has no parameter {asked}; it has {', '.join(declared)}")
    for name, (kind, optional) in declared.items():
        value = notebook[name]
        if optional and value is None:
            continue
        if kind in ("list", "dict") and isinstance(value, str):
            value = _read(value)
        accepted, words, how = KINDS[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
            given = how.format(name=name)
            raise ValueError(f"{name} must be {words}, got {notebook[name]!r}: papermill ... {given}")
        notebook[name] = value


def _read(text: str) -> object:
    """What a text says in JSON or else, where it says anything, in YAML, which takes 1e-4 for a word."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(yaml.YAMLError):
        return yaml.safe_load(text)
    return text
