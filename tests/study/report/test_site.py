"""The study as pages and as a PDF: what they hold, that no link is lost, and how they behave in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import pytest

from lumirlib import cli, parse_variant
from lumirlib.provenance import project_root
from lumirlib.study.report import pdf, site

ROOT = project_root()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODELS = "lumirlib.models"
NEEDED = 'pip install "lumirlib[report]"'
#: Sphinx tells what the extensions have to change, thousands of times.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


@pytest.fixture(scope="module")
def packages(request):
    """The packages of the reference: all of them with --long, else two, as reading modules takes most of the time."""
    every = site.public_modules()
    return every if request.config.getoption("--long") else {name: every[name] for name in ("lumirlib", MODELS)}


@pytest.fixture(scope="module")
def pages(packages, tmp_path_factory):
    """The site of this checkout, built by the command."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f"needs {name}: {NEEDED}")
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(site, "public_modules", lambda: packages)
        assert cli.main(["report", "site", "--out", str(out)]) == 0  # no warning
    return out


class Links(HTMLParser):
    """What a page leads to and what it has to be led to."""

    def __init__(self):
        super().__init__()
        self.links, self.places, self.loaded = [], set(), []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "link") and (given.get("src") or given.get("href")):
            self.loaded.append(given.get("src") or given["href"])


def read(page):
    found = Links()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_the_network(pages):
    read_pages = {path.resolve(): read(path) for path in pages.rglob("*.html")}
    lost = []
    for path, found in read_pages.items():
        assert not [name for name in found.loaded if re.match(r"(https?:)?//", name)], path
        for link in [*found.links, *found.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            places = read_pages[target].places if target in read_pages else {unquote(parts.fragment)}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in places):
                lost.append((path.name, link))
    assert not lost


def test_the_site_has_the_result_every_notebook_with_its_output_the_tables_and_the_reference(pages, packages):
    start = (pages / "index.html").read_text(encoding="utf-8")
    assert "Do the paper" in start and "Supported" in start and "study_" in start
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        page = (pages / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert 'class="cell_output' in page, notebook.name
        assert not re.search(r"<p>\| \w", page), f"{notebook.name}: a table that is no table"
    for table in ROOT.glob("results/tables/*.md"):
        assert "<table" in (pages / "results" / "tables" / f"{table.stem}.html").read_text(encoding="utf-8")
    assert {"lumirlib", "lumirlib.viewer"} <= set(packages["lumirlib"])
    assert f"{MODELS}.backbone" in packages[MODELS]
    assert {f"{package}.html" for package in packages} == {path.name for path in (pages / "api").glob("*.html")}
    for package, modules in packages.items():
        page = (pages / "api" / f"{package}.html").read_text(encoding="utf-8")
        assert not [one for one in modules if "._" in one or f'id="module-{one}"' not in page], package
    assert 'id="lumirlib.spatial.warp"' in (pages / "api" / "lumirlib.html").read_text(encoding="utf-8")
    assert not list(pages.rglob("*.ipynb")) and not re.search(r"/(home|root|tmp|work)/\w", start)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_the_site_works_from_disk_in_a_browser_on_a_wide_and_on_a_phone_sized_window(pages, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright (pip install "lumirlib[browser]")')
    broken = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, height in ((1500, 1000), (390, 844)):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: broken.append(str(error)))
            page.on("console", lambda said: broken.append(said.text) if said.type == "error" else None)
            page.on("requestfailed", lambda request: broken.append(request.url))
            for name in ("index", "notebooks/claims", "results/tables/table2_embedded_demo", "api/lumirlib.models"):
                page.goto((pages / f"{name}.html").as_uri())
                page.screenshot(path=tmp_path / f"{name.replace('/', '_')}_{width}.png")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than {width}"
        page.goto((pages / "index.html").as_uri())
        rows = "document.querySelector('article table').tBodies[0].rows"
        column = f"() => [...{rows}].map((row) => row.cells[1].innerText)"
        before = page.evaluate(column)
        page.locator("article table thead th").nth(1).click()
        after = page.evaluate(column)
        figures = [float(text.split("·")[1].split("±")[0]) for text in after]
        assert figures == sorted(figures) and sorted(before) == sorted(after) and before != after
        dark = page.evaluate("document.body.dataset.theme")
        page.locator(".theme-toggle-header button").click()
        assert page.evaluate("document.body.dataset.theme") != dark
        page.goto(f"{(pages / 'search.html').as_uri()}?q=cascade")
        page.wait_for_selector("#search-results li a", timeout=30_000)
        browser.close()
    assert not broken


def test_a_folder_with_other_files_is_not_written_over_and_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    pytest.importorskip("myst_nb", reason=f"needs myst_nb: {NEEDED}")
    assert cli.main(["report", "site", "--out", str(tmp_path)]) == 2
    assert "has other files than such a site" in capsys.readouterr().err
    for module, command in (("furo", "site"), ("typst", "pdf"), ("rocrate.rocrate", "crate")):
        with monkeypatch.context() as patched:
            patched.setitem(__import__("sys").modules, module, None)
            out = [] if command == "crate" else ["--out", str(tmp_path / f"new.{command}")]
            assert cli.main(["report", command, *out]) == 2
        assert NEEDED in capsys.readouterr().err


# the PDF --------------------------------------------------------------------------------------------------------------


def test_the_pdf_has_four_pages_with_the_numbers_of_the_files(tmp_path, capsys):
    pytest.importorskip("typst", reason=f"needs typst: {NEEDED}")
    out = tmp_path / "report.pdf"
    assert cli.main(["report", "pdf", "--out", str(out)]) == 0
    content = out.read_bytes()
    assert content[:5] == b"%PDF-"
    program = shutil.which("pdftotext")
    if program is None:
        pytest.skip("needs pdftotext (Debian: apt-get install poppler-utils) for what the pages say")
    text = subprocess.run([program, "-layout", str(out), "-"], capture_output=True, text=True, check=True).stdout
    assert text.count("\f") == pdf.PAGES
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in ("backbone+LC-2", "backbone+LK", "TransMorph (retrained here)"):
        cells = re.search(rf"^\| {re.escape(row)} +\|(.*)\|$", readme, re.M)[1].split("|")
        assert cells[0].strip() in text, row
    numbers = re.findall(r"^\| ([NTBECS]\d+) \|", (ROOT / "DEVIATIONS.md").read_text(encoding="utf-8"), re.M)
    assert len(numbers) > 50 and not [number for number in numbers if not re.search(rf"\b{number}\b", text)]
    assert "909,232 parameters" not in readme and "Fig. 1" in text and "Fig. 2" in text
    assert cli.main(["report", "pdf", "--out", str(tmp_path / "report.txt")]) == 2
    assert "out must end in .pdf" in capsys.readouterr().err
    assert cli.main(["report", "pdf", "--out", str(out), "--preset", "half"]) == 2
    assert "lumirlib sweep" in capsys.readouterr().err


def test_the_network_is_drawn_as_the_code_builds_it():
    for row in ("backbone", "LC-2", "CA", "LK"):
        figure, model = pdf.network_figure(row), parse_variant(row).build()
        words = " ".join(" ".join(text.get_text() for text in figure.axes[0].texts).split())
        width = model.estimators[0].conv1.in_channels // 2
        assert f"1→{width} {width}→{2 * width} {2 * width}→{width}" in words
        assert f"{sum(one.numel() for one in model.parameters()):,} parameters" in words
        assert words.count("squarings") == len(model.estimators) and f"joined, {model.cascade}" in words
        assert ("5³ + 3³ + 1³ conv" in words) == (row == "LK")
        assert words.count(", CA") == len(model.co_attention)
        plt.close(figure)
