"""lumirlib: the LUMIR reproducibility study as a library.

A faithful, fast reproduction of "Large Scale Unsupervised Brain MRI Image Registration Solution for Learn2Reg 2024".
The conventions (axes, units, directions) are stated in :mod:`lumirlib.spatial`.

What is listed below is imported when it is first used, so that `lumirlib --help` need not wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lumirlib._version import __version__

if TYPE_CHECKING:
    from lumirlib import losses, metrics, spatial
    from lumirlib.data import load_cohort
    from lumirlib.methods.variants import Variant, build_model, parse_variant
    from lumirlib.metrics.pair import evaluate_pair
    from lumirlib.training.weights import pretrained

#: Name -> module that it is taken from; None for a module of its own.
_WHERE = {
    "Variant": "methods.variants",
    "build_model": "methods.variants",
    "evaluate_pair": "metrics.pair",
    "load_cohort": "data",
    "losses": None,
    "metrics": None,
    "parse_variant": "methods.variants",
    "pretrained": "training.weights",
    "spatial": None,
}

__all__ = [
    "Variant",
    "__version__",
    "build_model",
    "evaluate_pair",
    "load_cohort",
    "losses",
    "metrics",
    "parse_variant",
    "pretrained",
    "spatial",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'lumirlib' has no attribute {name!r}")
    module = importlib.import_module(f"lumirlib.{_WHERE[name] or name}")
    found = module if _WHERE[name] is None else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
