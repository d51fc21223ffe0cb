"""Whether a prepared scan looks like a T1 brain; maps, masks, labels and other contrasts do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from lumirlib.data.frame import template_in_frame
from lumirlib.scans.prepare import BRAIN_ML, TEMPLATE_MM, PreparedScan, template_correlation

#: Correlation with the template, at least. Real brains have 0.52 and more, also cut by a fifth or under a strong bias
#: field; atlases, inverted contrasts and heads that do not lie as their header says have 0.41 and less.
MIN_CORRELATION = 0.45
#: Share of the template's brain that may be darker than :data:`DARK` of white matter. In real brains at most 0.12 is,
#: of maps of white matter 0.38 and more.
MAX_DARK = 0.3

DARK = 0.1
#: Share of the brain that may have one and the same of 255 values; a mask has it in nearly all of its voxels.
MAX_FLAT = 0.5


@dataclass(frozen=True)
class Likeness:
    """How like a T1 brain something is, in the frame.

    Attributes:
        template_correlation: Pearson correlation with the template, -1 to 1.
        brain_ml: Volume of what was taken for brain in the scan, in ml.
        dark_share: Share of the template's brain that is darker than a tenth of the 99.9th percentile, 0 to 1.
        flat_share: Share of the voxels above zero that have the most frequent of 255 values, 0 to 1.
    """

    template_correlation: float
    brain_ml: float
    dark_share: float
    flat_share: float

    @property
    def doubts(self) -> str:
        """Why it is hardly a T1 brain; empty if it may well be one."""
        found = []
        if self.template_correlation < MIN_CORRELATION:
            found.append(f"correlates {self.template_correlation:.3f} with the template, below {MIN_CORRELATION}")
        if not BRAIN_ML[0] <= self.brain_ml <= BRAIN_ML[1]:
            found.append(f"has {self.brain_ml:.0f} ml of brain, expected {BRAIN_ML[0]:.0f} to {BRAIN_ML[1]:.0f}")
        if self.dark_share > MAX_DARK:
            found.append(f"is dark or empty in {100 * self.dark_share:.0f} % of the brain, as a map of one tissue is")
        if self.flat_share > MAX_FLAT:
            found.append(f"has one value in {100 * self.flat_share:.0f} % of the brain, as a mask has")
        return "; ".join(found)

    def rounded(self) -> dict[str, float]:
        """Its figures, for a record."""
        return {name: round(value, 1 if name == "brain_ml" else 4) for name, value in asdict(self).items()}


def likeness(prepared: PreparedScan) -> Likeness:
    """How like a T1 brain a prepared scan is."""
    image = prepared.in_frame
    template = template_in_frame(TEMPLATE_MM)
    coarse = torch.nn.functional.avg_pool3d(image, TEMPLATE_MM)[template > 0.02]
    counts = np.bincount(image.to(torch.uint8).flatten().numpy(), minlength=2)[1:]  # of the background none
    return Likeness(
        template_correlation(image),
        prepared.brain_ml,
        float((coarse < DARK * 255).float().mean()),
        float(counts.max() / counts.sum()),
    )
