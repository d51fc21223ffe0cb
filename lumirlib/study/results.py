"""Results on disk: writing, checking and finding the tables of runs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lumirlib import provenance
from lumirlib.data import Cohort
from lumirlib.files import check_writable_file, read_json, write_atomically, write_json
from lumirlib.methods import row_from_options
from lumirlib.methods.base import Preset, Row
from lumirlib.methods.presets import split_options

#: Of a table of metrics, at least.
COLUMNS = ("pair", "metric", "value")


def write_results(table: pd.DataFrame, path: str | Path, about: dict) -> Path:
    """Write a table of metrics, and beside it (`.json`) where it comes from.

    Both are written atomically, the provenance last: what stands beside a CSV always belongs to it, and holds its
    SHA-256, so that :func:`read_results` tells a damaged one.

    Args:
        table: Table as :func:`evaluate_method` gives it.
        path: Path of the CSV.
        about: Provenance: commit, command, seed, cohort, preset ...; time and versions are added here.

    Returns:
        `path`.
    """
    path = Path(path)
    full = {**about, "written": provenance.now(), "versions": provenance.versions()}
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomically(path, lambda to: table.to_csv(to, index=False))
    write_json(path.with_suffix(".json"), {**full, "table_sha256": _digest_of_table(path.read_bytes())})
    return path


def check_results_path(path: str | Path) -> None:
    """Raise unless :func:`write_results` can write a table and its JSON, before the work.

    Raises:
        OSError: A place that cannot be written.
        ValueError: The path of a JSON, or one beside which a JSON of another kind stands.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if path == beside:
        raise ValueError(f"expected the path of a CSV, got {path}: the JSON beside it is of that name")
    for file in (path, beside):
        check_writable_file(file)
    if beside.is_file() and not {"commit", "table_sha256"} & read_json(beside).keys():
        raise ValueError(f"{beside} is no provenance of a table and would be overwritten: choose another name")


def _digest_of_table(content: bytes) -> str:
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()  # whatever git made of line ends


def read_table(path: str | Path, about: Mapping[str, object], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """The table that :func:`write_results` wrote.

    Args:
        path: Path of the CSV.
        about: Provenance of the table; the first results have no checksum there.
        columns: Columns that it must have. With those of a table of metrics, each pair and metric comes once, with a
            number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, cut off, or not such a table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    if about.get("table_sha256", _digest_of_table(content)) != _digest_of_table(content):
        raise ValueError(f"{path}: damaged or changed, its SHA-256 is not the one in {path.with_suffix('.json').name}")
    if not content.endswith(b"\n"):
        raise ValueError(f"{path}: expected a table that ends with its last line, got one that is cut off")
    try:
        table = pd.read_csv(io.BytesIO(content))
    except (ValueError, OverflowError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path}: cannot be read as CSV: {error}") from error
    lacking = set(columns) - set(table.columns)
    if lacking:
        raise ValueError(f"{path} lacks the column(s) {', '.join(sorted(lacking))} of such a table")
    if set(COLUMNS) <= set(columns):
        if not len(table) or table["value"].dtype.kind not in "if":
            raise ValueError(f"{path}: expected numbers as values, got {list(table['value'][:3])}")
        if table[["pair", "metric"]].isna().any(axis=None) or table.duplicated(["pair", "metric"]).any():
            raise ValueError(f"{path}: expected every pair and metric once, got one twice or without a name")
    return table


def read_results(path: str | Path) -> tuple[pd.DataFrame, dict]:
    """A table of metrics and its provenance; errors as of :func:`read_table` and :func:`lumirlib.files.read_json`."""
    for needed in (Path(path), Path(path).with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(f"no such file: {needed}")
    about = read_json(Path(path).with_suffix(".json"))
    return read_table(path, about), about


def to_markdown(frame: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    return frame.to_markdown(index=False, disable_numparse=True)


def data_title(cohort: str, name: str, simulated: bool, resolution_mm: float, scored_mm: float | None = None) -> str:
    """What data a table or figure is of, for its title: says "simulated" where it is, and what is not LUMIR.

    Args:
        cohort: Short name of the cohort; of joined ones the last is what is evaluated, and all are trained on.
        name: Name that the cohort gives itself.
        simulated: Whether the cohort is simulated.
        resolution_mm: Edge of a voxel of the images that are registered, in mm.
        scored_mm: Edge of a voxel of the labels that are scored, in mm; None for that of the images. Where it is that
            of the images, the title has one number for both.
    """
    evaluated = cohort.split("+")[-1]
    trained = "" if evaluated == cohort else f"; trained on {cohort.replace('+', ' and ')}"
    size = f"{resolution_mm:g} mm"
    if scored_mm not in (None, resolution_mm):
        size = f"registered at {size}, scored at {scored_mm:g} mm"
    if simulated:
        return f"simulated people, {size}: not a LUMIR result{trained}"
    return f"{name}, {size}{'' if evaluated == 'lumir' else ': not LUMIR'}{trained}"


def scored_mm(about: Mapping[str, object]) -> float:
    """Edge of the voxels that something was scored on, in mm, by its provenance.

    Provenance without "scored_mm" is of results that were scored at the resolution that was worked at.
    """
    return float(about.get("scored_mm", about["resolution_mm"]))


def check_scored_alike(folder: Path, facts: Sequence[Mapping[str, object]], command: str) -> None:
    """Raise ValueError unless all results of a table were scored on voxels of one size.

    Args:
        folder: Folder of the results, for the message.
        facts: Provenance of each result.
        command: Command that makes such results.
    """
    runs: dict[float, list[str]] = {}
    for about in facts:
        runs.setdefault(scored_mm(about), []).append(str(about["run"]))
    if len(runs) > 1:
        kinds = " and ".join(f"on {size:g} mm {', '.join(names)}" for size, names in sorted(runs.items()))
        raise ValueError(
            f"{folder}: results of one table must be scored on voxels of one size, got {kinds}; remove the CSVs of one "
            f"kind and make them anew with: {command}"
        )


def cohort_facts(cohort: Cohort) -> dict[str, object]:
    """What provenance says about a cohort; no path of this machine."""
    return {
        "cohort": cohort.short_name,
        "cohort_name": cohort.name,
        "cohort_digest": cohort.digest,
        "content_digest": cohort.content_digest,
        "simulated": cohort.simulated,
        "resolution_mm": cohort.resolution_mm,
        "training_scans": len(cohort.train),
        "credit": cohort.credit,
        "scored_labels": len(cohort.labels),
    }


def scoring_facts(cohort: Cohort) -> dict[str, object]:
    """:func:`cohort_facts` of what :func:`lumirlib.evaluation.evaluate_method` scored: on the files' own voxels."""
    scoring = cohort.at_own_resolution
    return cohort_facts(cohort) | {"scored_mm": scoring.resolution_mm, "scored_labels": len(scoring.labels)}


def _same_row(options: Mapping[str, object], wanted: Row) -> bool:
    """Whether the options in a results file, where options that came later may be lacking, are those of a row."""
    try:
        return row_from_options(options) == wanted
    except (KeyError, TypeError, ValueError):  # options or values that no row has today
        return False


def _same_preset(given: Mapping[str, object], wanted: Preset) -> bool:
    """Whether a preset in a results file, where options that came later may be lacking, is a preset."""
    try:
        found = Preset(**given)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # options or values that no preset has today
        return False
    return replace(found, about="") == replace(wanted, about="")


#: What the provenance of everything measured says, and that of a run besides.
MEASURED_FACTS = {
    "run": str,
    "method": str,
    "cohort": str,
    "cohort_digest": str,
    "resolution_mm": (int, float),
    "evaluated_pairs": int,
}

RUN_FACTS = {
    "options": dict,
    "preset": dict,
    "seed": int,
    "val_dice": (int, float),
    "val_dice_before": (int, float, type(None)),
    "commit": str,
    "device": str,
    "cohort_name": str,
    "simulated": bool,
}


def _check_facts(path: Path, about: Mapping[str, object]) -> None:
    wanted = {**MEASURED_FACTS, **(RUN_FACTS if "options" in about else {})}
    if path.parent.name != "metrics":  # made from trained weights, later
        wanted = {name: kind for name, kind in wanted.items() if not name.startswith("val_dice")}
    for name, kind in wanted.items():
        value = about.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path}: expected {kinds} as {name!r}, got {value!r}")


def read_provenance(folder: str | Path, cohort: str | None = None, kind: str = "metrics") -> list[tuple[Path, dict]]:
    """CSV and provenance of all that was measured on a cohort; None takes all cohorts."""
    found = []
    for path in sorted(Path(folder, kind).glob("*.json")):
        try:
            about = read_json(path)
        except FileNotFoundError:  # a run is writing it anew at this moment
            continue
        _check_facts(path, about)
        if cohort in (None, about.get("cohort")) and path.with_suffix(".csv").is_file():
            found.append((path.with_suffix(".csv"), about))
    return found


def studies(folder: str | Path) -> pd.DataFrame:
    """What a results folder holds: one line for each cohort, preset and set of other options that was run.

    Args:
        folder: Results folder, with `metrics/`.

    Returns:
        Columns cohort, preset, set_besides ("name=value, ..."; empty where nothing was), resolution_mm, scored_mm,
        simulated, rows, seeds, runs (their numbers), methods (names, joined by ", "); real data first, then by voxel
        size.
    """
    found = [
        {
            "cohort": about["cohort"],
            "preset": about["preset"]["name"],
            "method": about["method"],
            "seed": about["seed"],
            "set_besides": ", ".join(f"{name}={value}" for name, value in sorted(about.get("set_besides", {}).items())),
            "resolution_mm": about["resolution_mm"],
            "scored_mm": scored_mm(about),
            "simulated": about["simulated"],
        }
        for _, about in read_provenance(folder)
        if "preset" in about
    ]
    keys = ["simulated", "resolution_mm", "scored_mm", "cohort", "preset", "set_besides"]
    columns = ["cohort", "preset", "set_besides", "resolution_mm", "scored_mm", "simulated"]
    columns += ["rows", "seeds", "runs", "methods"]
    if not found:
        return pd.DataFrame(columns=columns)
    grouped = pd.DataFrame(found).groupby(keys)
    table = grouped.agg(
        rows=("method", "nunique"),
        seeds=("seed", "nunique"),
        runs=("method", "size"),
        methods=("method", lambda names: ", ".join(dict.fromkeys(names))),
    )
    return table.reset_index()[columns]


def table_of(path: Path, about: Mapping[str, object]) -> pd.DataFrame:
    """The table of something measured, with all of its pairs."""
    table = read_table(path, about)
    pairs = table["pair"].nunique()
    if pairs != about["evaluated_pairs"] or len(table) != pairs * table["metric"].nunique():
        raise ValueError(
            f"{path}: expected {about['evaluated_pairs']} pairs with all metrics, as its provenance says, got "
            f"{pairs} pairs in {len(table)} rows"
        )
    return table


def find_runs(
    folder: str | Path, row: Row, preset: str, cohort: str, options: Mapping[str, object], kind: str = "metrics"
) -> list[tuple[Path, dict]]:
    """CSV and provenance of each finished run of a row, with any seed.

    Args:
        folder: Results folder, with `metrics/`.
        row: Row as :func:`lumirlib.methods.parse_row` gives it.
        preset: Name of the preset.
        cohort: Short name of the cohort.
        options: Options that were set besides.
        kind: Part of the folder that is searched: "metrics", or "robustness".
    """
    chosen, for_row = split_options(preset, row, options)
    wanted = replace(chosen.apply(row), **for_row)
    return [
        (path, about)
        for path, about in read_provenance(folder, cohort, kind)
        if "options" in about and _same_row(about["options"], wanted) and _same_preset(about["preset"], chosen)
    ]


@dataclass(frozen=True)
class Measured:
    """What :mod:`lumirlib.study.costs` or :mod:`lumirlib.study.folding` wrote.

    Attributes:
        table: Table of the CSV; None where it has not been measured.
        about: Provenance of the table.
        how: Words that a reader is told where the table is missing.
    """

    table: pd.DataFrame | None
    about: Mapping[str, object]
    how: str


def read_measured(folder: str | Path, kind: str, name: str) -> Measured:
    """`<folder>/<kind>/<name>.csv` with its provenance, for the kinds "costs" and "folding"."""
    path = Path(folder) / kind / f"{name}.csv"
    how = f"Not measured ({kind}/{name}.csv): `lumirlib measure {kind} --help` says how."
    if not path.is_file():
        return Measured(None, {}, how)
    about = read_json(path.with_suffix(".json"))
    return Measured(read_table(path, about, ()), about, how)
