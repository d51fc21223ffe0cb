"""The API reference as a site of HTML pages, by pdoc; a warning, such as a name that is not found, ends it.

    python docs/build_api.py --out site

Then open site/index.html. `pip install "lumirlib[docs]"` brings pdoc; requirements.txt has it.
"""

from __future__ import annotations

import argparse
import pkgutil
import warnings
from pathlib import Path

import lumirlib

#: What pdoc leaves out: modules whose name begins with an underscore.
PRIVATE = r"!lumirlib(\..*)?\._"


def public_modules() -> list[str]:
    """The package and all its modules but the private ones."""
    found = pkgutil.walk_packages(lumirlib.__path__, "lumirlib.")
    return ["lumirlib", *(module.name for module in found if "._" not in module.name)]


def build(out: Path) -> list[str]:
    """Write the site to a folder; the modules that it documents.

    Raises:
        ImportError: pdoc is not installed.
        Warning: of pdoc, about a docstring, an annotation or a module.
    """
    import pdoc

    specs: list[str] = []
    modules: list[str] = []
    for module in public_modules():
        if module not in modules:  # pdoc takes some modules of a package along
            specs.append(module)
            modules += pdoc.extract.walk_specs([module, PRIVATE])
    pdoc.render.configure(docformat="google", footer_text=f"lumirlib {lumirlib.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        warnings.filterwarnings("error", category=UserWarning)
        pdoc.pdoc(*specs, PRIVATE, output_directory=out)
    return modules


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("site"), help="folder to write to")
    given = options.parse_args()
    print(f"{len(build(given.out))} modules in {given.out}")
