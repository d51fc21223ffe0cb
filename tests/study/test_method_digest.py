"""What tells one method from another."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lumirlib.evaluation import zero_displacement
from lumirlib.methods import parse_row
from lumirlib.study.method_digest import method_digest


@dataclass
class Shift:
    by: float = 1.0
    table: np.ndarray | None = None

    def __call__(self, fixed, moving):
        return torch.full((1, 3, *fixed.shape[2:]), self.by)


def within(value):
    return lambda fixed, moving: value


def also_within(value):
    return lambda fixed, moving: value + 1


def convolution(seed=0, **options):
    torch.manual_seed(seed)
    return torch.nn.Conv3d(2, 3, 3, **options)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: convolution(), lambda: convolution(seed=1)),
        (lambda: convolution(padding=1), lambda: convolution(padding=0)),
        (lambda: Shift(1.0), lambda: Shift(2.0)),
        (lambda: Shift(1.0), lambda: Shift(1.0).__call__),
        (lambda: Shift(1.0, np.zeros(3)), lambda: Shift(1.0, np.ones(3))),
        (lambda: within(1.0), lambda: within(2.0)),
        (lambda: within(1.0), lambda: also_within(1.0)),
        (lambda: within(torch.zeros(2)), lambda: within(torch.ones(2))),
        (lambda: functools.partial(within, 1), lambda: functools.partial(within, 2)),
        (lambda: parse_row("deedsBCV"), lambda: parse_row("TransMorph")),
        (lambda: zero_displacement, lambda: within),
    ],
)
def test_another_method_has_another_digest_and_the_same_one_the_same(first, second):
    assert method_digest(first()) == method_digest(first())
    assert method_digest(second()) == method_digest(second())
    assert method_digest(first()) != method_digest(second())


def test_a_digest_stays_while_a_method_works():
    network = convolution()
    before = method_digest(network)
    network.eval().last_run = {"optimization_steps": 3.0}
    network(torch.zeros(1, 2, 5, 6, 7))
    assert method_digest(network) == before
    assert len(before) == 16 and int(before, 16) >= 0
