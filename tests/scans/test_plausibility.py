"""What is hardly a T1 brain."""

import pytest

from lumirlib.scans.plausibility import Likeness


@pytest.mark.parametrize(
    ("figures", "doubts"),
    [
        ((0.76, 1500.0, 0.05, 0.02), ""),
        ((0.52, 2400.0, 0.21, 0.02), ""),
        ((0.406, 1500.0, 0.05, 0.02), "correlates 0.406 with the template, below 0.45"),
        ((-0.31, 1500.0, 0.05, 0.02), "correlates -0.310 with the template, below 0.45"),
        ((0.76, 3000.0, 0.05, 0.02), "has 3000 ml of brain, expected 400 to 2500"),
        ((0.62, 1500.0, 0.38, 0.02), "is dark or empty in 38 % of the brain, as a map of one tissue is"),
        ((0.69, 1500.0, 0.05, 0.9), "has one value in 90 % of the brain, as a mask has"),
    ],
)
def test_figures_that_no_t1_brain_has_are_doubted_by_name(figures, doubts):
    assert Likeness(*figures).doubts == doubts


def test_every_doubt_is_named():
    assert Likeness(0.1, 100.0, 0.9, 0.9).doubts.count("; ") == 3
    assert Likeness(0.12345, 1500.06, 0.1, 0.1).rounded()["template_correlation"] == 0.1235
