"""The study proves itself: what is committed follows from the results, and whatever is tampered with is found."""

import json
import re
import shutil
from pathlib import Path

import pytest

from lumirlib import cli
from lumirlib.provenance import project_root
from lumirlib.study.report import crate, verify
from lumirlib.study.report.verify import alike, execute

ROOT = project_root()
TAIL = "_embedded_demo"
RUNS = ("backbone", "LC-2", "LC-1")


def test_all_that_is_committed_follows_from_the_committed_results():
    found = verify.verify(ROOT)
    assert not found.drifts, "\n".join(map(str, found.drifts))
    assert {"tables of runs", "tables", "figures", "parts of pages", "cards", "crate"} <= found.compared.keys()
    kept = [path for kind in ("tables", "figures") for path in (ROOT / "results" / kind).glob("*.*")]
    compared = len(found.compared["tables"]) + len(found.compared["figures"])
    assert compared + sum(path.suffix in (".png", ".pdf") for path in kept) == len(kept)


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """A checkout with three rows of the study, their table, verdicts and figures, pages and a card; all of it right."""
    root = tmp_path_factory.mktemp("study")
    chosen = [
        *(name for row in RUNS for name in ROOT.glob(f"results/metrics/{row}{TAIL}_seed*")),
        *(name for row in RUNS for name in ROOT.glob(f"results/logs/{row}{TAIL}_seed*")),
        *ROOT.glob("results/metrics/ZeroDisplacement_embedded_4mm*"),
        *ROOT.glob("results/folding/embedded_demo*"),
        *ROOT.glob("results/costs/*demo_cpu*"),
        *ROOT.glob("results/reliability/*"),
        *ROOT.glob("results/pretrained/ours*"),
        *ROOT.glob("lumirlib/pretrained_weights/ours*"),
        *(ROOT / f"notebooks/{name}.ipynb" for name in ("table1", "table2", "claims")),  # Table 1 has LC-2 alone
        ROOT / "benchmarks/reliability.py",
        *(ROOT / name for name in ("docs/speed.md", "docs/reliability.md", "README.md")),
    ]
    for path in chosen:
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    given = {"cohort": "embedded", "preset": "demo", "results": str(root / "results"), "out": str(root / "results")}
    for name in ("table2", "claims"):
        execute(root / "notebooks" / f"{name}.ipynb", given)
    pytest.importorskip("rocrate", reason='needs rocrate (pip install "lumirlib[report]")')
    assert "README.md" in verify.renew(root)  # whose part was of other runs
    return root


def tampered(small_study, tmp_path) -> Path:
    return shutil.copytree(small_study, tmp_path / "study")


def replace(path: Path, old: str, new: str) -> int:
    """Replace text that a file has; the number of its first line."""
    text = path.read_text(encoding="utf-8")
    assert old in text, path
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


def other_digit(path: Path, line: int) -> None:
    """Change the first decimal of a line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at = re.search(r"\d\.\d", lines[line - 1]).end() - 1
    lines[line - 1] = f"{lines[line - 1][:at]}{9 - int(lines[line - 1][at])}{lines[line - 1][at + 1 :]}"
    path.write_text("".join(lines), encoding="utf-8")


def test_everything_that_is_tampered_with_is_found_with_its_line(small_study, tmp_path):
    assert not verify.verify(small_study).drifts  # so `renew` would write nothing twice
    root = tampered(small_study, tmp_path)
    results = root / "results"
    wanted = set()

    def expect(name: str, line: int) -> None:
        wanted.add((name, line))

    other_digit(results / f"tables/table2{TAIL}.csv", 9)
    expect(f"results/tables/table2{TAIL}.csv", 9)
    expect(
        f"results/tables/table2{TAIL}.md",
        replace(results / f"tables/table2{TAIL}.md", "backbone+LC-2", "backbone+LC-3"),
    )
    expect(
        f"results/tables/claims{TAIL}.tex", replace(results / f"tables/claims{TAIL}.tex", "cannot be told", "supported")
    )
    replace(results / f"tables/claims{TAIL}.json", '"embedded"', '"lumir"')
    expect(f"results/tables/claims{TAIL}.json", 4)
    data = results / f"tables/table2{TAIL}.figure.jsonl"
    expect(f"results/tables/{data.name}", replace(data, '"label": "_child', '"label": "_other'))
    (results / f"tables/table2{TAIL}_effects.md").unlink()
    expect(f"results/tables/table2{TAIL}_effects.md", 0)
    (results / "figures" / f"fig2{TAIL}.png").write_bytes(b"another picture")
    expect(f"results/figures/fig2{TAIL}.png", 0)
    shutil.copyfile(results / f"tables/table2{TAIL}.md", results / "tables/table2_brains_half.md")
    expect("results/tables/table2_brains_half.md", 0)
    expect("README.md", replace(root / "README.md", "| backbone+LC-2 ", "| backbone+LC-9 "))
    expect("docs/speed.md", replace(root / "docs/speed.md", "909,236", "909,237"))
    tally = results / "reliability/tally.json"
    about = json.loads(tally.read_text())
    about["tests"] += 1
    tally.write_text(json.dumps(about))  # a figure of a benchmark that a page quotes
    page = (root / "docs/reliability.md").read_text().splitlines()
    expect("docs/reliability.md", page.index("<!-- python benchmarks/reliability.py -->") + 3)
    card = "lumirlib/pretrained_weights/ours-1mm.md"
    expect(card, replace(root / card, "| Dice (%) |", "| dice (%) |"))
    (root / "lumirlib/pretrained_weights/nobody-4mm.md").write_text("# nobody\n")
    expect("lumirlib/pretrained_weights/nobody-4mm.md", 0)
    (root / "docs/new.md").write_text(
        "\n<!-- lumirlib report dreams -->\n\n1\n\n<!-- end of lumirlib report dreams -->\n"
    )
    expect("docs/new.md", 2)

    drifts = verify.verify(root).drifts
    found = {(drift.file, drift.line) for drift in drifts}
    assert wanted <= found, wanted - found
    hashes = {drift.file for drift in drifts if "SHA-256" in drift.message or "not in the crate" in drift.message}
    changed = {name for name, _ in wanted if name.startswith("results/") and (root / name).is_file()}
    assert changed | {"results/reliability/tally.json"} <= hashes  # by the crate, whatever made them


def test_a_digit_of_a_runs_own_table_is_found_by_the_figures_that_follow_and_by_the_crate(small_study, tmp_path):
    root = tampered(small_study, tmp_path)
    follows = {"metrics": f"results/tables/table2{TAIL}.csv", "logs": f"results/figures/fig2{TAIL}.figure.jsonl"}
    for kind in follows:
        path = next((root / "results" / kind).glob(f"backbone{TAIL}_seed0_*.csv"))
        other_digit(path, 3)
        beside = path.with_suffix(".json")
        if beside.is_file():  # the first runs have no checksum of their own
            about = json.loads(beside.read_text())
            about.pop("table_sha256", None)
            beside.write_text(json.dumps(about))
    found = {drift.file for drift in verify.verify(root).drifts}
    assert {f"results/{kind}/backbone{TAIL}" for kind in follows} == {
        name.partition("_seed")[0] for name in found if name.startswith(("results/metrics/", "results/logs/"))
    }
    assert set(follows.values()) <= found


def test_tables_and_figures_whose_runs_are_missing_are_found(small_study, tmp_path, monkeypatch, capsys):
    root = tampered(small_study, tmp_path)
    for path in root.glob(f"results/metrics/LC-1{TAIL}_seed1_*"):
        path.unlink()
    found = {drift.file for drift in verify.verify(root).drifts}
    figure = f"results/tables/table2{TAIL}.figure.jsonl"
    assert {figure, f"results/tables/table2{TAIL}.csv", "README.md", crate.NAME} <= found
    for path in root.glob("results/metrics/*"):
        path.unlink()
    monkeypatch.setattr("lumirlib.provenance.project_root", lambda: root)
    assert cli.main(["report", "verify"]) == 1
    told = capsys.readouterr().out
    assert f"{figure}: no notebook makes it anew from the results: are its runs in results/metrics/?" in told
    assert "README.md:" in told and "the results make no such part" in told


def test_a_damaged_table_is_named_where_a_notebook_ends_with_it(small_study, tmp_path):
    root = tampered(small_study, tmp_path)
    path = next((root / "results" / "metrics").glob(f"backbone{TAIL}_seed0_*.csv"))
    path.write_bytes(path.read_bytes()[:-5])
    drifts = {drift.file: drift.message for drift in verify.verify(root).drifts}
    assert path.name in drifts[f"results/tables/table2{TAIL}.csv"]
    assert "table2.ipynb, embedded, demo" in drifts[f"results/tables/table2{TAIL}.csv"]


def test_fractions_may_differ_by_rounding_and_nothing_else_may():
    assert alike("a,0.12345678901,3", "a,0.12345678902,3") and alike("1e-17,5.0", "0.0,5")
    assert not alike("a,0.123456", "a,0.123457") and not alike("a,1", "a,2") and not alike("a,1.0", "b,1.0")
    assert not alike("12345678", "12345679") and not alike("1.0,2.0", "1.0")


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkout of lumirlib with a folder results/, got"):
        verify.verify(tmp_path)


def test_the_crate_is_described_anew_by_a_command(small_study, tmp_path, monkeypatch):
    root = tampered(small_study, tmp_path)
    (root / "results" / "new.csv").write_text("a\n1\n")
    assert [file for file, *_ in crate.differences(root)] == ["results/new.csv"]
    monkeypatch.setattr("lumirlib.provenance.project_root", lambda: root)
    assert cli.main(["report", "crate"]) == 0
    assert not list(crate.differences(root))


def test_the_crate_has_licence_source_and_checksum_of_every_file():
    described = {one["@id"]: one for one in json.loads((ROOT / crate.NAME).read_text())["@graph"]}
    files = [one for one in described.values() if one["@type"] == "File"]
    assert len(files) == len(crate.files_of(ROOT))
    for one in files:
        assert len(one["sha256"]) == 64 and one["license"]["@id"] in described, one["@id"]
        assert all(source["@id"] in described for source in one.get("isBasedOn", []))
        assert one["license"]["@id"] == crate.CC_BY_NC or "brains" not in one["@id"]
    table = described["tables/table2_embedded_demo.csv"]
    assert {"@id": "#cohort-embedded"} in table["isBasedOn"] and len(table["isBasedOn"]) > 10
    assert described["#cohort-brains"]["hasPart"] == {"@id": "cohorts/brains.json"}


def test_a_manifest_names_every_file_of_a_cohort_with_its_checksum(cohort, tmp_path):
    assert cli.main(["report", "manifest", "--cohort", str(cohort.path), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cohorts" / f"{cohort.short_name}.json").read_text())
    people = [*found["training"], *found["validation"]]
    assert len(found["training"]) == len(cohort.train) and found["pairs"] == [
        one.name for one in cohort.validation_pairs
    ]
    assert all(len(one["image_sha256"]) == 64 and "/" not in one["image"] for one in people)
    assert any("labels_sha256" in one for one in people)
    assert found["cohort_digest"] == cohort.digest
