"""Pages to look at: how well scans were prepared, how well two of them were registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lumirlib import plots, spatial
from lumirlib.data.frame import FRAME_SHAPE, template_in_frame
from lumirlib.data.nifti import read_volume

#: Voxel indices i, j, k of the LUMIR frame that the planes go through: the thalamus.
CENTER = (72, 112, 84)
#: Axis across each plane, with its name.
PLANES = ((2, "axial"), (1, "coronal"), (0, "sagittal"))

SCANS_PER_PAGE = 24
#: Edge of a square of the checkerboard and of the grid, in mm.
SQUARE_MM = 16

GRID_MM = 5
#: Contours of the template: its outer edge, and grey against white matter.
CONTOURS = (0.05, 0.8)


def plane_of(volume: torch.Tensor, axis: int, center: Sequence[int] = CENTER) -> np.ndarray:
    """The plane of a volume (..., 160, 224, 192) across an axis, through a voxel: (..., up, right)."""
    return volume.select(volume.ndim - 3 + axis, center[axis]).transpose(-1, -2).numpy()


def _bare(ax: Axes) -> Axes:
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def prepared_figures(scans: Sequence[tuple[dict, Path]], out: str | Path, title: str) -> list[Path]:
    """The QC sheet of a prepared folder: three planes of each scan with the template's contours, the worst first.

    Args:
        scans: Record of each scan (name, template_correlation, brain_ml, doubts) and its image in the frame.
        out: Folder for `qc_1.png`, `qc_1.pdf` and so on, :data:`SCANS_PER_PAGE` scans a page.
        title: Title of the pages.

    Returns:
        The PNGs.
    """
    plots.use_style()
    ranked = sorted(scans, key=lambda scan: scan[0]["template_correlation"])
    template = template_in_frame(1)[0, 0]
    pages = [ranked[first : first + SCANS_PER_PAGE] for first in range(0, len(ranked), SCANS_PER_PAGE)]
    for old in Path(out).glob("qc_*.p[nd][gf]"):
        old.unlink()
    paths = []
    for number, page in enumerate(pages, start=1):
        columns = min(3, len(page))
        rows = -(-len(page) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(6.4 * columns, 2.6 * rows + 0.5), layout="constrained", squeeze=False
        )
        for ax in axes.flat[len(page) :]:
            ax.set_visible(False)
        for ax, (record, path) in zip(axes.flat, page, strict=False):
            image = torch.from_numpy(read_volume(path)[0].astype(np.float32)) / 255
            _plot_three_planes(ax, image, template)
            ax.set_title(
                f"{record['name']}: r = {record['template_correlation']:.3f}, {record['brain_ml']:.0f} ml"
                f"{', hardly a T1 brain' if record['doubts'] else ''}",
                fontsize=9,
            )
        figure.suptitle(f"{title}, page {number} of {len(pages)}: contours of the template, r with it, brain volume")
        plots.save_figure(figure, Path(out) / f"qc_{number}", data=False)
        plt.close(figure)
        paths.append(Path(out) / f"qc_{number}.png")
    return paths


def _plot_three_planes(ax: Axes, image: torch.Tensor, template: torch.Tensor) -> None:
    """Three planes side by side, as high as the frame is long."""
    height = max(FRAME_SHAPE)
    left = 0
    for axis, _ in PLANES:
        plane, contour = plane_of(image, axis), plane_of(template, axis)
        low = (height - plane.shape[0]) / 2
        extent = (left - 0.5, left + plane.shape[1] - 0.5, low - 0.5, low + plane.shape[0] - 0.5)
        ax.imshow(plane, origin="lower", extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.contour(contour, CONTOURS, extent=extent, colors=["C1", "C0"], linewidths=0.6)
        left += plane.shape[1]
    ax.set(xlim=(-0.5, left - 0.5), ylim=(-0.5, height - 0.5), facecolor="black")
    _bare(ax)


def registration_figure(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    warped: torch.Tensor,
    displacement: torch.Tensor,
    determinant: torch.Tensor,
    title: str,
    notes: str = "",
    left_out: Sequence[torch.Tensor | None] = (None, None, None),
    compared: torch.Tensor | None = None,
) -> Figure:
    """The QC page of a registration, in the LUMIR frame.

    Args:
        fixed: Fixed image, ``(1, 1, 160, 224, 192)``, 0 ... 255.
        moving: Moving image after the affine alone, ``(1, 1, 160, 224, 192)``, 0 ... 255.
        warped: Moving image after the whole map, ``(1, 1, 160, 224, 192)``, 0 ... 255.
        displacement: Displacement ``(1, 3, 160, 224, 192)`` in voxels of 1 mm.
        determinant: Determinant of the map's Jacobian, ``(1, 1, 160, 224, 192)``.
        title: Title of the page.
        notes: Lines below the pictures.
        left_out: What a mask leaves out of the fixed image, of the moving one and of the warped one, ``(1, 1, 160, 224,
            192)`` bool; it is outlined, and the planes go through its middle.
        compared: Warped image in the fixed one's contrast, for checkerboard and overlay; None takes it as it is.
    """
    plots.use_style()
    names = (
        "fixed",
        "moving, affine",
        "warped",
        "checkerboard\nfixed, warped",
        "overlay: fixed red,\nwarped cyan",
        "deformation grid",
        "Jacobian determinant",
    )
    figure, axes = plt.subplots(len(PLANES), len(names), figsize=(16, 8.4), layout="constrained")
    images = [image[0, 0].float() / 255 for image in (fixed, moving, warped, warped if compared is None else compared)]
    places = spatial.identity_grid(FRAME_SHAPE)[0] + displacement[0]
    brain = images[0] > 0
    center = CENTER
    masked = [torch.nonzero(mask[0, 0]) for mask in left_out if mask is not None and mask.any()]
    if masked:  # its voxel nearest to its middle: what has several parts is met too
        voxels = torch.cat(masked).double()
        center = voxels[(voxels - voxels.mean(0)).norm(dim=1).argmin()].int().tolist()
    for row, (axis, plane_name) in zip(axes, PLANES, strict=True):
        planes = [np.clip(plane_of(image, axis, center), 0, 1) for image in images]
        squares = np.add.outer(*(np.arange(side) // SQUARE_MM for side in planes[0].shape)) % 2 == 0
        shown = [*planes[:3], np.where(squares, planes[0], planes[3]), np.stack([planes[0], planes[3], planes[3]], -1)]
        for ax, plane in zip(row, shown, strict=False):
            ax.imshow(plane, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for ax, mask in zip(row, left_out, strict=False):
            if mask is not None and (outline := plane_of(mask[0, 0].float(), axis, center)).any():
                ax.contour(outline, [0.5], colors="C1", linewidths=1)
        across, up = (other for other in range(3) if other != axis)
        moved = plane_of(places, axis, center)[[across, up]]  # (2, up, right)
        lines = [moved[:, at].T for at in range(0, moved.shape[1], GRID_MM)]
        lines += [moved[:, :, at].T for at in range(0, moved.shape[2], GRID_MM)]
        row[5].add_collection(LineCollection(lines, colors="C0", linewidths=0.5))
        row[5].set(xlim=(-0.5, planes[0].shape[1] - 0.5), ylim=(-0.5, planes[0].shape[0] - 0.5))
        jacobian = np.ma.masked_where(~plane_of(brain, axis, center), plane_of(determinant[0, 0], axis, center))
        drawn = row[6].imshow(jacobian, origin="lower", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        row[6].contour(jacobian.filled(1) <= 0, [0.5], colors="black", linewidths=0.8)
        bar = figure.colorbar(drawn, ax=row[6], fraction=0.045, pad=0.02)
        bar.ax.grid(False)
        row[0].set_ylabel(plane_name)
        for ax in row:
            _bare(ax)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(notes, fontsize=9.5, x=0.01, horizontalalignment="left")
    return figure
