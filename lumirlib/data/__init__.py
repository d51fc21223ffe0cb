"""Scans on disk: NIfTI files, Learn2Reg cohorts, their memory-mapped cache and loader, and the embedded cohort."""

from lumirlib.data.cohort import Cohort, Pair, Subject
from lumirlib.data.dataset_json import load_cohort
from lumirlib.data.loader import PairLoader

__all__ = ["Cohort", "Pair", "PairLoader", "Subject", "load_cohort"]
