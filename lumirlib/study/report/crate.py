"""What can be read by programs: `results/` as an RO-Crate, and a manifest of each cohort's files.

The crate, `results/ro-crate-metadata.json`, names every file with its SHA-256, its licence and what it was made from
(RO-Crate 1.3, https://www.researchobject.org/ro-crate/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumirlib._version import __version__
from lumirlib.data import Cohort, Subject
from lumirlib.files import read_json, write_atomically, write_json
from lumirlib.provenance import redact_path
from lumirlib.study.results import cohort_facts

NAME = "results/ro-crate-metadata.json"
MANIFESTS = "cohorts"

APACHE = "https://spdx.org/licenses/Apache-2.0"
#: Of what was measured on real brains: the terms of their manual labels.
CC_BY_NC = "https://creativecommons.org/licenses/by-nc/4.0/"
LICENCES = {APACHE: "Apache License 2.0", CC_BY_NC: "Creative Commons Attribution-NonCommercial 4.0"}
FORMATS = {
    ".csv": "text/csv",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".tex": "application/x-tex",
    ".png": "image/png",
    ".pdf": "application/pdf",
}
#: Folders of a results folder that git ignores.
NOT_COMMITTED = ("checkpoints", "notebooks", "submissions", "slurm", "registered")


# manifests ------------------------------------------------------------------------------------------------------------
def manifest(cohort: Cohort) -> dict[str, Any]:
    """Which files a cohort is made of.

    Returns:
        Facts of :func:`lumirlib.study.results.cohort_facts`; "training" and "validation", lists of subjects with the
        names of their files and, of real scans, the files' SHA-256 (simulated people are made from the digest's recipe
        wherever they are needed); "pairs", names of the pairs that are scored.
    """
    people = {one.name: one for pair in cohort.validation_pairs for one in (pair.fixed, pair.moving)}
    return {
        **cohort_facts(cohort),
        "training": [_subject(one, cohort.simulated) for one in cohort.train],
        "validation": [_subject(one, cohort.simulated) for _, one in sorted(people.items())],
        "pairs": [pair.name for pair in cohort.validation_pairs],
    }


def write_manifest(cohort: Cohort, results: Path) -> Path:
    """Write :func:`manifest` to `<results>/cohorts/<short name>.json`; the path."""
    return write_json(results / MANIFESTS / f"{cohort.short_name}.json", manifest(cohort))


def _subject(subject: Subject, simulated: bool) -> dict[str, str]:
    found = {"name": subject.name}
    for kind in ("image", "labels", "landmarks"):
        path = getattr(subject, kind)
        if path is not None:
            found[kind] = path.name
            if not simulated:
                found[f"{kind}_sha256"] = _sha256(path)
    return found


# the crate ------------------------------------------------------------------------------------------------------------
def _sha256(path: Path) -> str:
    content = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(1 << 20):
            content.update(part)
    return content.hexdigest()


def files_of(root: Path) -> list[Path]:
    """Files of `results/` that the crate describes: all that are kept, but the crate itself."""
    results = root / "results"
    return [
        path
        for path in sorted(results.rglob("*"))
        if path.is_file()
        and path != root / NAME
        and not path.name.startswith(".")
        and path.relative_to(results).parts[0] not in NOT_COMMITTED
    ]


def write_crate(root: str | Path) -> Path:
    """Describe `results/` of a checkout anew; the path of the crate.

    Raises:
        ModuleNotFoundError: rocrate is not installed.
        FileNotFoundError: no results.
    """
    try:
        from rocrate.model.contextentity import ContextEntity
        from rocrate.rocrate import ROCrate
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('an RO-Crate needs rocrate: pip install "lumirlib[report]"') from error
    root = Path(root)
    results = root / "results"
    if not results.is_dir():
        raise FileNotFoundError(f"root must be a checkout of lumirlib with a folder results/, got {root}")
    beside = {path: read_json(path) for path in files_of(root) if path.suffix == ".json"}
    crate = ROCrate()

    def entity(identifier: str, kind: str, **properties: Any) -> dict[str, str]:
        crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **properties}))
        return {"@id": identifier}

    licences = {name: entity(name, "CreativeWork", name=words) for name, words in LICENCES.items()}
    software = entity(
        "#lumirlib", "SoftwareApplication", name="lumirlib", version=__version__, license=licences[APACHE]
    )
    cohorts: dict[str, dict[str, str]] = {}
    for about in beside.values():
        name = about.get("cohort")
        if isinstance(name, str) and "cohort_name" in about and name not in cohorts:
            stated = {"creditText": about["credit"]} if about.get("credit") else {}
            file = results / MANIFESTS / f"{name}.json"
            if file.is_file():
                stated["hasPart"] = {"@id": _below(file, results)}
            cohorts[name] = entity(
                f"#cohort-{name}",
                "Dataset",
                name=about["cohort_name"],
                description=f"simulated: {'yes' if about.get('simulated') else 'no'}",
                **stated,
            )
    written = [str(about["written"]) for about in beside.values() if "written" in about]
    for path in files_of(root):
        about = beside.get(_provenance_of(path), {})
        file = crate.add_file(path, _below(path, results))
        real = "brains" in str(about.get("cohort") or path.name) or "brains" in path.parent.name
        properties = {
            "name": path.name,
            "sha256": _sha256(path),
            "contentSize": str(path.stat().st_size),
            "license": licences[CC_BY_NC if real else APACHE],
            "encodingFormat": FORMATS.get(path.suffix, "text/plain"),
            "creator": software,
        }
        if sources := _sources(path, about, cohorts, results):
            properties["isBasedOn"] = sources
        if "command" in about:
            command = " ".join(redact_path(word) for word in str(about["command"]).split())
            properties["description"] = f"made by `{command}` at commit {about.get('commit', 'unknown')}"
        for name, value in properties.items():
            file[name] = value
    crate.name = "Results of the LUMIR reproducibility study"
    crate.description = (
        "Metrics of every run and pair, with tables, figures and costs made from them; no scan, no label."
    )
    crate.license = [*licences.values()]
    crate.datePublished = max(written, default="unknown")
    return write_atomically(
        root / NAME,
        lambda to: to.write_text(json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False) + "\n", "utf-8"),
    )


def _provenance_of(path: Path) -> Path:
    """Where the provenance of a file stands: beside it, in the JSON of its name."""
    return path.with_name(f"{path.name.removesuffix('.figure.jsonl') if path.suffix == '.jsonl' else path.stem}.json")


def _sources(path: Path, about: dict[str, Any], cohorts: dict[str, Any], results: Path) -> list[dict[str, str]]:
    """Cohort and tables of runs that a file was made from."""
    runs = [results / "metrics" / f"{run}.csv" for run in about.get("runs", [])]
    found = [{"@id": _below(run, results)} for run in runs if run.is_file() and run != path]
    named = [name for name in cohorts if f"_{name.replace('+', '-')}_" in f"_{path.name}"]
    cohort = cohorts.get(str(about.get("cohort", named[0] if named else "")))
    return [*([cohort] if cohort else []), *found]


def differences(root: Path) -> Iterator[tuple[str, int, str]]:
    """File, line of the crate and words for each file that is not as the crate says, or that it does not name."""
    path, results = root / NAME, root / "results"
    anew = "`lumirlib report crate` describes results/ anew"
    if not path.is_file():
        yield NAME, 0, f"missing: {anew}"
        return
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    try:
        described = {one["@id"]: one for one in json.loads(text)["@graph"] if one.get("@type") == "File"}
    except (ValueError, KeyError, TypeError) as error:
        yield NAME, 0, f"not an RO-Crate ({error}): {anew}"
        return
    present = {_below(file, results): file for file in files_of(root)}
    for name, file in present.items():
        if name not in described:
            yield f"results/{name}", 0, f"not in the crate: {anew}"
        elif described[name].get("sha256") != (digest := _sha256(file)):
            yield f"results/{name}", 0, f"its SHA-256 is {digest}, not the crate's, {described[name].get('sha256')}"
    for name in described.keys() - present.keys():
        line = next((number for number, one in enumerate(lines, 1) if f'"@id": {json.dumps(name)}' in one), 0)
        yield NAME, line, f"results/{name} is missing"


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
