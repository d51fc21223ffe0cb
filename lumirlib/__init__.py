"""lumirlib: the LUMIR reproducibility study as a library.

A faithful, fast reproduction of "Large Scale Unsupervised Brain MRI Image Registration Solution for Learn2Reg 2024".
The conventions (axes, units, directions) are stated in :mod:`lumirlib.spatial`.
"""

from lumirlib import losses, metrics, spatial
from lumirlib._version import __version__
from lumirlib.data import load_cohort
from lumirlib.evaluation import evaluate_pair
from lumirlib.variants import Variant, build_model, parse_variant

__all__ = [
    "Variant",
    "__version__",
    "build_model",
    "evaluate_pair",
    "load_cohort",
    "losses",
    "metrics",
    "parse_variant",
    "spatial",
]
