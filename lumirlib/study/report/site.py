"""The study as static pages that open from disk: README, docs, executed notebooks, tables and the API reference.

Sphinx builds them, with MyST for Markdown and notebooks: of the tools considered it is the one whose search works on
pages that are opened from disk, and whose one index covers prose, notebooks and the API reference.
"""

from __future__ import annotations

import contextlib
import io
import os
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lumirlib
from lumirlib import provenance
from lumirlib.files import check_writable

#: Pages of the checkout, by the heading that they stand under beside every page.
SECTIONS = {
    "Notebooks": ["notebooks/README.md", "notebooks/*.ipynb"],
    "Pages": ["docs/*.md", "DEVIATIONS.md", "CHANGELOG.md", "results/GPU_QUEUE.md"],
}
TABLES, API = "results/tables", "api"

_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")

#: Clicking a heading sorts its column, by our figure where the paper's stands before it; a click opens a figure alone.
SCRIPT = """
document.addEventListener("DOMContentLoaded", () => {
  const key = (cell) => {
    const text = cell.innerText.split("·").pop().replace(/−/g, "-").replace(/(\\d),(?=\\d{3})/g, "$1").trim();
    const number = parseFloat(text);
    return [Number.isNaN(number) ? Infinity : number, cell.innerText];
  };
  for (const table of document.querySelectorAll("article table")) {
    const body = table.tBodies[0];
    const heads = table.tHead ? [...table.tHead.rows[table.tHead.rows.length - 1].cells] : [];
    if (!body) continue;
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.title = "sort by this column";
      const sort = () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [key(row.cells[column] || row.cells[0]), row]);
        rows.sort(([[a, s]], [[b, t]]) => (a === b ? s.localeCompare(t) : a - b) * (down ? -1 : 1));
        rows.forEach(([, row]) => body.append(row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }
  for (const image of document.querySelectorAll("article img")) {
    if (!image.closest("a")) image.addEventListener("click", () => window.open(image.src));
  }
});
"""
STYLE = """
.main, .content { min-width: 0; }
.content { width: min(72em, 100%); }
article .cell_output { overflow-x: auto; max-width: 100%; }
article table { font-size: 0.85em; }
article .table-wrapper, article .output { overflow-x: auto; }
article thead th { cursor: pointer; }
article thead th[aria-sort="ascending"]::after { content: " ▲"; }
article thead th[aria-sort="descending"]::after { content: " ▼"; }
article img { max-width: 100%; height: auto; cursor: zoom-in; background: white; }
article h1 code, article h2 code { overflow-wrap: anywhere; }
"""


def public_modules() -> dict[str, list[str]]:
    """Each package with all its modules but the private ones, itself first."""
    packages: dict[str, list[str]] = {"lumirlib": ["lumirlib"]}
    for module in pkgutil.walk_packages(lumirlib.__path__, "lumirlib."):
        if "._" not in module.name:
            package = module.name if module.ispkg else module.name.rpartition(".")[0]
            packages.setdefault(package, []).append(module.name)
    return packages


def build_site(root: str | Path, out: str | Path) -> list[str]:
    """Build the pages of a checkout.

    Args:
        root: Checkout.
        out: Folder to write to; `index.html` there is the start page.

    Returns:
        What Sphinx warned of: links that lead nowhere, and what it cannot read.

    Raises:
        ModuleNotFoundError: Sphinx or one of its extensions is not installed.
        FileNotFoundError: `root` is no checkout.
        ValueError: `out` is a folder with other files than such pages.
        OSError: `out` cannot be written.
    """
    try:
        import furo  # noqa: F401
        import myst_nb  # noqa: F401
        from sphinx.application import Sphinx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'the site needs {error.name}: pip install "lumirlib[report]"') from error
    root, out = Path(root).resolve(), Path(out).resolve()
    if not (root / "README.md").is_file() or not (root / "notebooks").is_dir():
        raise FileNotFoundError(f"root must be a checkout of lumirlib with README.md and notebooks/, got {root}")
    if out.is_dir() and any(out.iterdir()) and not (out / "searchindex.js").is_file():
        raise ValueError(f"{out} has other files than such a site: give an empty or a new folder")
    check_writable(out)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        source.mkdir()
        _collect(root, source)
        settings = {
            "project": "lumirlib",
            "author": "the lumirlib founders",
            "copyright": f"the lumirlib founders, Apache-2.0. lumirlib {lumirlib.__version__}, {provenance.commit()}",
            "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"],
            "html_theme": "furo",
            "html_title": "lumirlib: the LUMIR reproducibility study",
            "html_static_path": ["_static"],
            "html_js_files": ["study.js"],
            "html_css_files": ["study.css"],
            "html_show_search_summary": False,  # which is fetched, and from disk nothing can be
            "html_copy_source": False,
            "html_show_sourcelink": False,
            "nb_execution_mode": "off",
            "nb_render_markdown_format": "myst",
            "napoleon_use_ivar": True,
            "nb_ipywidgets_js": {},  # which come from the network
            "nb_merge_streams": True,
            "myst_enable_extensions": [],
            "myst_heading_anchors": 4,
            "default_role": "code",
            "autodoc_typehints": "none",
            "autodoc_use_type_comments": False,  # there are none, and it takes seconds to look for them
            "autodoc_member_order": "bysource",
            "suppress_warnings": [
                "myst.header",
                "mystnb.unknown_mime_type",
                "docutils",
                "toc.not_included",
                "ref.python",
            ],
        }
        warnings = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            Sphinx(source, None, made, Path(folder, "doctrees"), "html", settings, status=None, warning=warnings).build(
                True
            )
        shutil.copytree(
            made, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv", "_sources")
        )
    return [line.replace(f"{source}{os.sep}", "") for line in warnings.getvalue().splitlines() if line.strip()]


def _collect(root: Path, source: Path) -> None:
    """Copy all pages into the folder that Sphinx reads, with what their links lead to."""
    listed: dict[str, list[str]] = {}
    pages = {root / "README.md": "index.md"}
    for section, patterns in SECTIONS.items():
        found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
        listed[section] = [_name(path, root) for path in found]
        pages |= {path: _name(path, root) for path in found}
    for path, name in pages.items():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        target.write_text(_LINK.sub(lambda link, page=path: _follow(link, page, root, source), text), encoding="utf-8")
    listed["Results"] = list(_tables(root, source))
    listed["API reference"] = list(_reference(source))
    with open(source / "index.md", "a", encoding="utf-8") as index:
        for section, names in listed.items():
            entries = "\n".join(name.rpartition(".")[0] for name in names)
            index.write(f"\n```{{toctree}}\n:hidden:\n:caption: {section}\n\n{entries}\n```\n")
    static = source / "_static"
    static.mkdir()
    (static / "study.js").write_text(SCRIPT, encoding="utf-8")
    (static / "study.css").write_text(STYLE, encoding="utf-8")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _follow(link: re.Match[str], page: Path, root: Path, source: Path) -> str:
    """A link as the site has it: files that it leads to come along, folders and what is not in the checkout do not."""
    target = (page.parent / link[1]).resolve()
    if "://" in link[1] or not target.is_relative_to(root) or not target.exists():
        return link[0]
    if target == root / "README.md":
        return f"]({os.path.relpath('index.md', page.parent.relative_to(root))}{link[2] or ''})"
    if target.is_dir():
        listing = _list_files(target, root, source)
        return f"]({os.path.relpath(listing, (source / page.relative_to(root)).parent)})"
    copy = source / target.relative_to(root)
    if target.suffix not in (".md", ".ipynb") and not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, copy)
    return link[0]


def _list_files(folder: Path, root: Path, source: Path) -> Path:
    """A page that lists the files of a folder, which come along."""
    copy = source / folder.relative_to(root)
    copy.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    for name in names:
        shutil.copyfile(folder / name, copy / name)
    page = copy / "files.md"
    lines = "".join(f"- [{name}]({name})\n" for name in names)
    page.write_text(f"---\norphan: true\n---\n\n# {_name(folder, root)}\n\n{lines}", encoding="utf-8")
    return page


def _tables(root: Path, source: Path) -> Iterator[str]:
    """A page for each table that was published, with its figure and its CSV."""
    folder = root / TABLES
    (source / TABLES).mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.match(r"\*\*(.+?)\*\*", text)
        parts = [f"# {title[1] if title else path.stem}", text[title.end() :].strip() if title else text]
        for ending, words in ((".png", "![{0}]({0})"), (".csv", "As numbers: [{0}]({0})")):
            if path.with_suffix(ending).is_file():
                shutil.copyfile(path.with_suffix(ending), source / TABLES / f"{path.stem}{ending}")
                parts.append(words.format(f"{path.stem}{ending}"))
        (source / TABLES / path.name).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        yield f"{TABLES}/{path.name}"


def _reference(source: Path) -> Iterator[str]:
    """A page for each package: furo draws the list of all pages anew on every page, and a module's own is short."""
    (source / API).mkdir()
    for package, modules in public_modules().items():
        parts = [
            f"{'#' if module == package else '##'} `{module}`\n\n"
            f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"
            for module in modules
        ]
        (source / API / f"{package}.md").write_text("\n".join(parts), encoding="utf-8")
        yield f"{API}/{package}.md"
