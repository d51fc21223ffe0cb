"""Scans on disk: NIfTI files, Learn2Reg cohorts, and the embedded cohort."""

from lumirlib.data.cohort import Cohort, Pair, Subject, load_cohort

__all__ = ["Cohort", "Pair", "Subject", "load_cohort"]
