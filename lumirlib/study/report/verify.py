"""Every table, figure, verdict, card and generated part of a page, made anew from the results on disk and compared.

What there is to compare follows from the files: the notebooks that make files from results alone are executed for every
cohort and preset that was run, into a temporary folder, and what they write is held against what is committed.
"""

from __future__ import annotations

import ast
import atexit
import difflib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.core.interactiveshell import InteractiveShell

from lumirlib import plots
from lumirlib.data.dataset_json import BRAINS_VARIABLE
from lumirlib.evaluation import summarize
from lumirlib.files import read_json, write_atomically
from lumirlib.study import costs
from lumirlib.study.model_cards import model_card
from lumirlib.study.report import claims, crate
from lumirlib.study.results import read_results, read_table, studies
from lumirlib.training.weights import read_weights

#: Relative difference of two fractions that count as one figure: other processors round the last digits otherwise.
TOLERANCE = 1e-6
#: Differences below this are none, as of what is zero but for rounding.
ZERO = 1e-9
#: Of provenance, what says when and with what a file was written, not what is in it.
OF_THE_WRITING = ("written", "versions")
#: Endings of what notebooks write; a figure stands for its pictures.
TABLE, FIGURE, PICTURES = (".csv", ".md", ".tex", ".json"), ".figure.jsonl", (".png", ".pdf")
PAGES = ("*.md", "docs/*.md", "notebooks/*.md")

_BLOCK = re.compile(r"^<!-- (?!end of )(.+?) -->\n\n(.*?)\n\n<!-- end of (.+?) -->$", re.M | re.S)
_FRACTION = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Drift:
    """Something that is not what the results make of it.

    Attributes:
        file: Path below the checkout.
        line: Its line, from 1; 0 for the whole file.
        message: What was expected, and what is there.
    """

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"


@dataclass
class Verification:
    """What came of :func:`verify`.

    Attributes:
        drifts: What is not what it should be.
        compared: Kind of thing -> paths below the checkout, or marks of a page's part, that were made anew.
        pictures: Figures of scans, which only the weights and the scans make anew.
    """

    drifts: list[Drift] = field(default_factory=list)
    compared: dict[str, list[str]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)

    def add(self, kind: str, what: str, drifts: Iterable[Drift]) -> None:
        """Note that something was compared."""
        self.compared.setdefault(kind, []).append(what)
        self.drifts += drifts


def verify(root: str | Path) -> Verification:
    """Make all that follows from the results of a checkout anew, and compare.

    Args:
        root: Checkout, with `results/`, `notebooks/`, `docs/`, `README.md` and the packaged weights.

    Raises:
        FileNotFoundError: `root` has no results or no notebooks.
    """
    root = Path(root)
    for needed in ("results", "notebooks"):
        if not (root / needed).is_dir():
            raise FileNotFoundError(f"root must be a checkout of lumirlib with a folder {needed}/, got {root}")
    found = Verification()
    _verify_checksums(root, found)
    with tempfile.TemporaryDirectory() as folder:
        made = make(root, Path(folder))
        _compare_products(root, made, found)
    _verify_pages(root, made.summaries, found)
    _verify_cards(root, found)
    found.add("crate", crate.NAME, (Drift(*one) for one in crate.differences(root)))
    return found


def renew(root: str | Path) -> list[str]:
    """Put what the results make now in the place of what is committed: tables, figures, parts of pages, the crate.

    Tables and figures of runs that no file is committed of yet are left to their notebooks.

    Returns:
        Paths below the checkout that were written.

    Raises:
        FileNotFoundError: as for :func:`verify`.
        ModuleNotFoundError: rocrate is not installed.
        ValueError: a notebook that ends with an error, where it leaves a committed table or figure unmade.
    """
    root = Path(root)
    written = []
    with tempfile.TemporaryDirectory() as folder:
        made = make(root, Path(folder), pictures=True)
        if made.errors and _not_made(root, made):
            raise ValueError("; ".join(f"{what}: {error}" for what, error in made.errors.items()))
        stale = {_stem(name) for name in _committed(root) if _is_stale(root, name, made)}
        stale |= {_stem(name) for name in _missing(root, made)}
        for name, path in made.files.items():
            if _stem(name) in stale:
                shutil.copyfile(path, root / "results" / name)
                written.append(f"results/{name}")
    for path, block, expected in _parts(root, made.summaries):
        if isinstance(expected, Drift):
            raise ValueError(str(expected))
        if expected and block[2] not in expected:
            (nearest,) = difflib.get_close_matches(block[2], expected, 1, 0.0)
            whole = path.read_text(encoding="utf-8").replace(block[2], nearest)
            write_atomically(path, lambda to, new=whole: to.write_text(new, encoding="utf-8"))
            written.append(_below(path, root))
    return [*written, _below(crate.write_crate(root), root)]


def _is_stale(root: Path, name: str, made: Made) -> bool:
    """Whether a committed file is not what was made, or a figure that was made has no data beside it."""
    path, anew = root / "results" / name, made.files.get(name)
    if path.suffix in PICTURES:
        return anew is not None and any(_check_picture(path, root))
    return anew is not None and bool(compare(path, anew.read_text(encoding="utf-8"), root))


# what was measured ----------------------------------------------------------------------------------------------------
def _verify_checksums(root: Path, found: Verification) -> None:
    """Tables of runs, against the SHA-256 that stands in their provenance."""
    results = root / "results"
    for beside in sorted(path for path in results.rglob("*.json") if path.parent != results / "tables"):
        path = beside.with_suffix(".csv")
        try:
            about = read_json(beside)
            if "table_sha256" not in about:
                continue
            read_table(path, about, ())
        except (ValueError, OSError) as error:
            found.add("tables of runs", _below(path, root), [Drift(_below(path, root), 0, _said(error, root))])
        else:
            found.add("tables of runs", _below(path, root), ())


# what notebooks write -------------------------------------------------------------------------------------------------
def _cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _declared_parameters(notebook: Path) -> dict[str, str]:
    """Names and defaults (as source) of a notebook's parameters, which are the typed assignments of its first cell."""
    cells = _cells(notebook)
    lines = ast.parse(cells[0]).body if cells else []
    found = [one for one in lines if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and one.value]
    return {one.target.id: ast.unparse(one.value) for one in found}  # type: ignore[union-attr, arg-type]


def from_results_alone(folder: Path) -> dict[Path, dict[str, str]]:
    """The notebooks that read results and write files without a device to compute on, with their parameters."""
    listed = {path: _declared_parameters(path) for path in sorted(folder.glob("*.ipynb"))}
    needed = {"results", "out", "cohort", "preset"}
    return {path: names for path, names in listed.items() if needed <= names.keys() and "device" not in names}


@contextmanager
def _without_scans() -> Iterator[None]:
    """The real scans are not at hand: a picture of them is not made from results."""
    before = os.environ.pop(BRAINS_VARIABLE, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[BRAINS_VARIABLE] = before


def execute(notebook: Path, parameters: Mapping[str, object], pictures: bool = False) -> dict[str, object]:
    """Execute the code of a notebook in this process, without showing anything; its names afterwards.

    Args:
        notebook: Path of the notebook, whose first code cell has its parameters.
        parameters: Values of parameters.
        pictures: Whether figures are drawn, besides their data.
    """
    first, *rest = _cells(notebook)
    given = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    shell = InteractiveShell(history_load_length=0)
    shell.history_manager.enabled = False
    atexit.unregister(shell.atexit_operations)  # it would keep all that the notebook makes until this process ends
    names: dict[str, object] = shell.user_ns
    names["In"] = sources = []
    drawn = nullcontext() if pictures else plots.without_pictures()
    before = plt.rcParams.copy()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), drawn, _without_scans(), plt.ioff():
        try:
            for source in [first, given, *rest]:
                sources.append(source)
                shell.run_cell(source, silent=True).raise_error()
        finally:
            plt.close("all")
            plt.rcParams.update(before)
    return names


@dataclass
class Made:
    """What the notebooks make of the results.

    Attributes:
        files: Path below the results folder -> what was made, in a temporary folder.
        errors: Notebook, cohort and preset -> what it ended with.
        summaries: What a page may show of the claims, one for each cohort and preset that was judged.
    """

    files: dict[str, Path] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)


def _committed(root: Path) -> dict[str, Path]:
    results = root / "results"
    files = (path for kind in ("tables", "figures") for path in sorted((results / kind).glob("*")) if path.is_file())
    return {_below(path, results): path for path in files}


def make(root: Path, folder: Path, pictures: bool = False) -> Made:
    """Execute the notebooks of a checkout for each cohort and preset that a table or figure of it is named after."""
    results, made = root / "results", Made()
    stems = [Path(_stem(name)).name for name in _committed(root)]
    listed = studies(results)
    combinations: dict[tuple[str, str], list[str]] = {}
    for line in listed[listed["set_besides"] == ""].itertuples():
        combinations.setdefault((line.cohort, line.preset), []).extend(line.methods.split(", "))
    for notebook, names in from_results_alone(root / "notebooks").items():
        for (cohort, preset), methods in combinations.items():
            tail = f"_{cohort}_{preset}"
            if not any(tail in stem for stem in stems):
                continue
            # a notebook about one row, for all those whose name a committed file has
            rows = [row for row in dict.fromkeys(methods) if any(f"_{row}{tail}" in stem for stem in stems)]
            for row in rows if "variant" in names else [""]:
                given = {"cohort": cohort, "preset": preset, "results": str(results), "out": str(folder)}
                try:
                    after = execute(notebook, given | ({"variant": row} if row else {}), pictures)
                except Exception as error:  # whatever a damaged table does to a cell
                    made.errors[f"{notebook.name}, {cohort}, {preset}"] = _said(error, root)
                    continue
                if isinstance(after.get("study"), claims.Evidence):
                    made.summaries.append(claims.summary(after["study"], after["findings"]))  # type: ignore[arg-type]
    made.files = {_below(path, folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return made


def _compare_products(root: Path, made: Made, found: Verification) -> None:
    """Tables and figures."""
    why = "; ".join(f"{what}: {error}" for what, error in made.errors.items())
    of_runs = _of_runs(root)
    for name, path in _committed(root).items():
        file, anew = _below(path, root), made.files.get(name)
        if path.suffix in PICTURES:
            if name in of_runs:
                found.pictures.append(file)
            if name not in of_runs or path.with_name(f"{path.stem}{FIGURE}").is_file():
                found.drifts += _check_picture(path, root)
        elif anew is not None:
            kind = "figures" if name.endswith(FIGURE) else "tables"
            found.add(kind, file, compare(path, anew.read_text(encoding="utf-8"), root))
    for name in _not_made(root, made):
        reason = f" ({why})" if why else ": are its runs in results/metrics/?"
        found.drifts.append(Drift(f"results/{name}", 0, f"no notebook makes it anew from the results{reason}"))
    for name in _missing(root, made):
        found.drifts.append(Drift(f"results/{name}", 0, "missing, though the results make it"))


def _of_runs(root: Path) -> set[str]:
    """The committed files that are of a single run, which its notebook trains or reads from a checkpoint."""
    runs = tuple(f"{path.stem}_" for path in (root / "results" / "metrics").glob("*.json"))
    return {name for name, path in _committed(root).items() if path.name.startswith(runs)}


def _not_made(root: Path, made: Made) -> list[str]:
    """The committed tables and figures that no notebook made of the results."""
    others = _committed(root).keys() - made.files.keys() - _of_runs(root)
    return sorted(name for name in others if Path(name).suffix not in PICTURES)


def _missing(root: Path, made: Made) -> list[str]:
    """What was made of a table or figure of which only a part is committed."""
    committed = _committed(root)
    stems = {_stem(name) for name in committed}
    return [
        name
        for name, path in made.files.items()
        if name not in committed and _stem(name) in stems and path.suffix not in PICTURES and not _shows_scans(path)
    ]


def _shows_scans(made: Path) -> bool:
    return made.name.endswith(FIGURE) and '{"image": ' in made.read_text(encoding="utf-8")


def _stem(name: str) -> str:
    """Path of a product without its ending; a table and a figure of one name are two products."""
    for ending in (FIGURE, *PICTURES):
        if name.endswith(ending):
            return name.removesuffix(ending) + " (figure)"
    return name.rpartition(".")[0]


def _check_picture(path: Path, root: Path) -> Iterator[Drift]:
    """A picture is the one that was drawn with the data beside it."""
    data = path.with_name(f"{path.stem}{FIGURE}")
    if not data.is_file():
        yield Drift(_below(path, root), 0, f"the data of this figure, {data.name}, are missing")
        return
    try:
        stated = json.loads(data.read_text(encoding="utf-8").splitlines()[0])["sha256"].get(path.suffix[1:])
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        yield Drift(_below(data, root), 1, f"expected the SHA-256 of the pictures: {error}")
        return
    if stated != hashlib.sha256(path.read_bytes()).hexdigest():
        yield Drift(_below(path, root), 0, f"not the picture that was drawn with {data.name}: its SHA-256 differs")


def compare(path: Path, expected: str, root: Path) -> list[Drift]:
    """The first line of a text file that is not as expected, if any.

    Fractions in CSV and JSON may differ by :data:`TOLERANCE`; all else, and text for readers, is the same to the last
    character. What provenance says of its writing, and a figure about its pictures, is left out.
    """
    text = path.read_text(encoding="utf-8")
    tolerant = path.suffix in (".csv", ".json", ".jsonl")
    if path.suffix == ".json":
        try:
            text, expected = (_without_writing(one) for one in (text, expected))
        except ValueError as error:
            return [Drift(_below(path, root), 0, f"not valid JSON: {error}")]
    found, wanted = text.splitlines(), expected.splitlines()
    start = 1 if path.name.endswith(FIGURE) else 0
    for number in range(start, max(len(found), len(wanted))):
        here = found[number] if number < len(found) else None
        there = wanted[number] if number < len(wanted) else None
        if here != there and not (tolerant and here is not None and there is not None and alike(here, there)):
            return [Drift(_below(path, root), number + 1, _difference(there, here))]
    return []


def _without_writing(text: str) -> str:
    whole = json.loads(text)
    return json.dumps({key: value for key, value in whole.items() if key not in OF_THE_WRITING}, indent=1)


def _difference(expected: str | None, found: str | None) -> str:
    if found is None or expected is None:
        return f"a line is missing: {_cut(expected)}" if found is None else f"a line too many: {_cut(found)}"
    same = (one == other for one, other in zip(expected, found, strict=False))
    begin = max(0, sum(itertools.takewhile(bool, same)) - 40)
    return f"expected …{_cut(expected[begin:])}, got …{_cut(found[begin:])}"


def _cut(text: str | None, most: int = 90) -> str:
    text = text or ""
    return text if len(text) <= most else f"{text[:most]}…"


def alike(first: str, second: str) -> bool:
    """Whether two lines have the same words and whole numbers, and fractions that differ by rounding at most."""
    if _FRACTION.split(first) != _FRACTION.split(second):
        return False
    for one, other in zip(_FRACTION.findall(first), _FRACTION.findall(second), strict=True):
        if one == other:
            continue
        if "." not in one + other and "e" not in (one + other).lower():
            return False
        if abs(float(one) - float(other)) > max(ZERO, TOLERANCE * abs(float(one))):
            return False
    return True


# pages and cards ------------------------------------------------------------------------------------------------------
def _benchmark_part(root: Path, words: list[str]) -> str:
    """What a script of benchmarks/ makes of the JSON that it wrote: its `readable(<content of its TARGET>)`."""
    path = root / words[1]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"no such script: {words[1]}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.readable(read_json(module.TARGET))


def _parts(root: Path, summaries: list[str]) -> Iterator[tuple[Path, re.Match[str], list[str] | Drift]]:
    """Page, match of :data:`_BLOCK` and what may stand there, for each part of a page that a command makes."""
    makers: dict[str, Callable[[], list[str]]] = {
        claims.COMMAND: lambda: summaries,
        costs.COMMAND: lambda: [costs.readable_budget(costs.load_budget(root / "results"))],
    }
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        text = path.read_text(encoding="utf-8")
        for block in _BLOCK.finditer(text):
            words, line = block[1].removesuffix(" --write").split(), text.count("\n", 0, block.start()) + 1
            try:
                if words[0] == "python":
                    yield path, block, [_benchmark_part(root, words)]
                elif " ".join(words) in makers:
                    yield path, block, makers[" ".join(words)]()
                else:
                    yield path, block, Drift(_below(path, root), line, f"nothing is known that makes {block[1]!r}")
            except (ValueError, OSError) as error:
                yield path, block, Drift(_below(path, root), line, f"{block[1]!r} fails: {_said(error, root)}")


def _verify_pages(root: Path, summaries: list[str], found: Verification) -> None:
    """The parts of pages between `<!-- COMMAND -->` and `<!-- end of COMMAND -->`."""
    for path, block, expected in _parts(root, summaries):
        file, line = _below(path, root), block.string.count("\n", 0, block.start(2)) + 1
        drifts = [expected] if isinstance(expected, Drift) else _compare_part(file, line, block[2], expected)
        found.add("parts of pages", f"{file}: {block[1]}", drifts)


def _compare_part(file: str, line: int, shown: str, expected: list[str]) -> list[Drift]:
    if shown in expected:
        return []
    nearest = difflib.get_close_matches(shown, expected, 1, 0.0)
    if not nearest:
        return [Drift(file, line, "the results make no such part: are its runs in results/metrics/?")]
    for number, (here, there) in enumerate(zip([*shown.splitlines(), None], [*nearest[0].splitlines(), None])):  # noqa: B905
        if here != there:
            return [Drift(file, line + number, _difference(there, here))]
    return []


def _verify_cards(root: Path, found: Verification) -> None:
    """Cards of packaged weights, against the facts in the weights' file, and these against every pair's figures."""
    folder = root / "lumirlib" / "pretrained_weights"
    for path in sorted(folder.glob("*.safetensors")):
        card, measured = path.with_suffix(".md"), root / "results" / "pretrained" / f"{path.stem}.csv"
        try:
            facts = read_weights(path).facts
            drifts = compare(card, model_card(facts), root)
            table, _ = read_results(measured)
        except (ValueError, OSError) as error:
            found.add("cards", _below(card, root), [Drift(_below(card, root), 0, _said(error, root))])
            continue
        means = summarize(table)["mean"]
        stated = pd.Series({metric: figure["mean"] for metric, figure in facts["figures"].items()})
        wrong = [metric for metric in stated.index if not abs(stated[metric] - means.get(metric)) <= TOLERANCE]
        drifts += [
            Drift(_below(measured, root), 0, f"{metric}: the card says {stated[metric]:g}, its pairs {means[metric]:g}")
            for metric in wrong
        ]
        found.add("cards", _below(card, root), drifts)
    for card in sorted(folder.glob("*.md")):
        if not card.with_suffix(".safetensors").is_file():
            found.drifts.append(Drift(_below(card, root), 0, "a card of no weights"))


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _said(error: Exception, root: Path) -> str:
    words = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return words.replace(f"{root}/", "")
