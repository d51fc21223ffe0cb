"""Figure of SynthMorph's generator; style and conventions are those of :mod:`lumirlib.figures`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lumirlib._checks import check_labels
from lumirlib.data.synthesis import SynthesisOptions, deform_labels, synthesize
from lumirlib.figures import plot_slice


def plot_labels(ax: Axes, labels: torch.Tensor, slice_index: int) -> Axes:
    """Axial slice of a label map (1, 1, D, H, W): a colour for each label, the background black."""
    present, place = labels.unique(return_inverse=True)
    colours = np.array(sns.color_palette("husl", len(present)))
    # neighbouring numbers are often neighbours in the brain: spread the hues
    colours = colours[np.random.default_rng(0).permutation(len(present))]
    colours[present.cpu().numpy() == 0] = 0.0
    plot_slice(ax, place, slice_index)
    ax.images[-1].set(cmap=ListedColormap(colours), clim=(-0.5, len(present) - 0.5))
    return ax


def synthesis_figure(
    labels: torch.Tensor, generator: torch.Generator, n: int = 6, options: SynthesisOptions | None = None
) -> Figure:
    """A label map and images synthesized from it, middle axial slices in one row, as training sees them.

    Args:
        labels: ``(1, 1, D, H, W)`` integers.
        generator: of random numbers, on the CPU.
        n: number of images.
        options: see :class:`lumirlib.data.synthesis.SynthesisOptions`; its `resolution_mm` must be that of `labels`.

    Returns:
        The figure; each image has its own deformation and contrast.

    Raises:
        ValueError: `n` below 1, or `labels` that are not a label map.
    """
    check_labels(labels)
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    middle = labels.shape[4] // 2
    figure, axes = plt.subplots(1, n + 1, figsize=(1.9 * (n + 1), 2.9), layout="constrained")
    plot_labels(axes[0], labels, middle).set_title("label map")
    for number, ax in enumerate(axes[1:], start=1):
        moved = deform_labels(labels, generator, options)
        plot_slice(ax, synthesize(moved, generator, options), middle).set_title(f"synthetic {number}")
    return figure
