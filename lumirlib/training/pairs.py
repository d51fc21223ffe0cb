"""The pairs that a run trains on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from lumirlib.data import Cohort, Pair, Subject, load_cohort
from lumirlib.methods.base import Row


def evenly_spaced(items: tuple, count: int | None) -> tuple:
    """`count` items spread evenly over the sequence; all where it is None or larger."""
    if count is None or count >= len(items):
        return tuple(items)
    return tuple(items[round(position)] for position in np.linspace(0, len(items) - 1, count))


def halves(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """The first half of the people by name, who choose epochs and settings, and the others."""
    people = sorted(set(names))
    return set(people[: len(people) // 2]), set(people[len(people) // 2 :])


def of_first_half(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The pairs of which both people are in the first half of all people of `pairs`, by name."""
    chosen, _ = halves(subject.name for pair in pairs for subject in (pair.fixed, pair.moving))
    return tuple(pair for pair in pairs if {pair.fixed.name, pair.moving.name} <= chosen)


def epoch_pairs(train: tuple[Subject, ...], seed: int, epoch: int, limit: int | None = None) -> Iterator[Pair]:
    """The pairs of one epoch: each scan is the moving image once, in random order, with a random other one fixed.

    They depend on nothing but the arguments, so that a run resumes in the middle of an epoch. A `limit` above the
    number of scans takes them again, in another order.
    """
    if len(train) < 2:
        raise ValueError(f"training needs at least 2 scans, the cohort has {len(train)}")
    generator = np.random.default_rng([seed, epoch])
    left = len(train) if limit is None else limit
    while left > 0:
        for moving in generator.permutation(len(train))[:left]:
            fixed = (moving + 1 + generator.integers(len(train) - 1)) % len(train)
            yield Pair(fixed=train[fixed], moving=train[moving])
        left -= len(train)


def epoch_batches(
    train: tuple[Subject, ...], seed: int, epoch: int, steps: int, batch_size: int
) -> Iterator[list[Pair]]:
    """The batches of one epoch, over all processes.

    Args:
        train: Training scans.
        seed: Random seed of the run.
        epoch: Number of the epoch, from 0.
        steps: Number of batches in the epoch.
        batch_size: Number of pairs in each batch.
    """
    pairs = epoch_pairs(train, seed, epoch, steps * batch_size)
    for _ in range(steps):
        yield list(itertools.islice(pairs, batch_size))


def pair_generator(seed: int, epoch: int, place: int) -> torch.Generator:
    """What is random in the step of one pair, the same on any number of processes and after any interruption."""
    seeds = np.random.SeedSequence([seed, epoch, place])
    return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def training_source(row: Row, cohort: Cohort) -> Cohort:
    """The cohort whose training people a row learns from.

    That is `cohort`, but for a row that trains on label volumes where training scans have none: then it is the
    embedded cohort at the same resolution, so that no label of a validation person is used.

    Raises:
        ValueError: the embedded cohort's grid is not that of `cohort`.
    """
    if row.trains_on != "labels" or all(subject.labels for subject in cohort.train):
        return cohort
    embedded = load_cohort("embedded", cohort.resolution_mm)
    if embedded.shape != cohort.shape:
        raise ValueError(
            f"{row.name} trains on label volumes, which the training scans of {cohort.path} lack; those of the "
            f"embedded cohort are {embedded.shape} voxels, not {cohort.shape}"
        )
    return embedded
