"""A pair in a notebook: fixed, moving and warped image with the deformation grid, their cursors linked.

In JupyterLab the slices are drawn by NiiVue, which `pip install "lumirlib[lab]"` brings (ipyniivue, whose wheel carries
its JavaScript: no download). Where nothing displays widgets (papermill, nbval, a page on the web) the paper's Fig. 3 of
the pair stands in its place. Axes and units as in :mod:`lumirlib.spatial`.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io

import ipywidgets
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from torch.nn import functional as F

from lumirlib import plots, spatial
from lumirlib._checks import check_choice, check_displacement
from lumirlib.data import Cohort
from lumirlib.evaluation import Method

#: Plane -> the two axes of the array that lie in it.
PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
#: What a user is told whose JupyterLab lacks the viewer.
MISSING = 'For slices to scroll through: `pip install "lumirlib[lab]"`, and run this cell again.'

_SHOWN = "export default { render({ model }) { model.send('shown'); } };"


def warped_grid(displacement: torch.Tensor, plane: str = "axial", every: float = 4, finer: int = 1) -> torch.Tensor:
    """Image of the moving image's grid lines as the displacement carries them onto the fixed image.

    A line is where a component in the plane of x + u(x) is a multiple of `every`; it is a voxel wide and fades to 0.

    Args:
        displacement: Displacement u ``(1, 3, D, H, W)`` in voxels, on the fixed grid.
        plane: Key of :data:`PLANES`: the lines cross it, those that lie in it are not drawn.
        every: Voxels between two lines, above 0.
        finer: Voxels of the image along an edge of a voxel, 1 or more.

    Returns:
        ``(1, 1, finer D, finer H, finer W)`` in [0, 1].

    Raises:
        ValueError: an unknown plane, or a displacement of another shape.
    """
    check_displacement(displacement)
    check_choice(plane, tuple(PLANES), "plane")
    moved = spatial.identity_grid(displacement.shape[2:]) + displacement
    if finer > 1:
        # the displacement is interpolated and not the points, which would stop at the border
        sides = [finer * side for side in displacement.shape[2:]]
        points = (spatial.identity_grid(sides) + 0.5) / finer - 0.5
        moved = points + F.interpolate(displacement, size=sides, mode="trilinear")
    in_plane = moved[:, list(PLANES[plane])]
    distance = (in_plane - every * torch.round(in_plane / every)).abs()
    return (1 - distance).clamp(min=0).amax(dim=1, keepdim=True)


def _nifti(volume: torch.Tensor, spacing_mm: float, finer: int = 1) -> bytes:
    """A volume (1, 1, D, H, W) in [0, 1] as the bytes of a .nii.gz of 8 bits, voxel (0, 0, 0) of the pair at 0 mm."""
    affine = np.diag([spacing_mm / finer] * 3 + [1.0])
    affine[:3, 3] = spacing_mm * (0.5 / finer - 0.5)
    values = (255 * volume[0, 0].clamp(0, 1)).round().to(torch.uint8).numpy()
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1 / 255, 0)
    return gzip.compress(image.to_bytes(), compresslevel=1)


def slice_figure(
    fixed: torch.Tensor, moving: torch.Tensor, displacement: torch.Tensor, spacing_mm: float, title: str = ""
) -> plt.Figure:
    """The paper's Fig. 3 of one pair: what :class:`PairViewer` shows where it cannot be interactive."""
    figure, axes = plt.subplots(1, 5, figsize=(13, 3.3), layout="constrained")
    plots.plot_pair(axes, fixed, moving, displacement, spacing_mm)
    figure.suptitle(title)
    return figure


class PairViewer:
    """A pair to look at: as the last line of a cell it is slices to scroll through, or a figure of them.

    Click or drag in a panel and the cursors of all follow; the wheel goes through the slices, the right button
    changes the window, buttons choose the plane.

    Args:
        fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1].
        moving: Moving image in [0, 1], same shape.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels, on the fixed grid.
        spacing_mm: Edge of a voxel, in mm.
        title: Title that says what is shown, and "simulated" where it is.
        height: Height of a panel, in pixels.

    Attributes:
        interactive: Whether ipyniivue is installed.
        panels: Widgets of NiiVue: moving, fixed, warped, grid; empty until a front end shows the viewer.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(
        self,
        fixed: torch.Tensor,
        moving: torch.Tensor,
        displacement: torch.Tensor,
        spacing_mm: float,
        title: str = "",
        height: int = 300,
    ) -> None:
        check_displacement(displacement)
        wanted = (1, 1, *displacement.shape[2:])
        for name, image in (("fixed", fixed), ("moving", moving)):
            if tuple(image.shape) != wanted:
                raise ValueError(f"{name} must be {wanted}, as the displacement is, got {tuple(image.shape)}")
        fixed, moving, displacement = (volume.detach().cpu().float() for volume in (fixed, moving, displacement))
        self.displacement, self.spacing_mm, self.title, self.height = displacement, spacing_mm, title, height
        self.images = {"moving": moving, "fixed": fixed, "warped": spatial.warp(moving, displacement)}
        self.interactive = importlib.util.find_spec("ipyniivue") is not None
        self.panels: tuple = ()
        figure = slice_figure(fixed, moving, displacement, spacing_mm, title)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=75)
        plt.close(figure)
        self.png = png.getvalue()
        self.box = self._waiting() if self.interactive else None

    def _waiting(self) -> ipywidgets.VBox:
        """The figure, with an invisible widget that says when a front end shows it: only then NiiVue is sent there.

        Without one the notebook that papermill writes would hold NiiVue's five megabytes of JavaScript four times.
        """
        import anywidget

        front_end = anywidget.AnyWidget(_esm=_SHOWN)
        front_end.on_msg(lambda widget, content, buffers: None if self.panels else self._open())
        return ipywidgets.VBox([ipywidgets.Image(value=self.png, format="png"), front_end])

    def _volume(self, name: str, image: torch.Tensor, finer: int = 1) -> dict:
        data = _nifti(image, self.spacing_mm, finer)
        return {"data": data, "name": f"{name}.nii.gz", "cal_min": 0.0, "cal_max": 1.0}

    def _grid_volume(self, plane: str) -> dict:
        # lines some 12 mm apart, drawn on voxels of 1 to 2 mm
        finer = max(1, min(3, round(self.spacing_mm)))
        grid = warped_grid(self.displacement, plane, max(3, round(12 / self.spacing_mm)), finer)
        return self._volume("grid", grid, finer)

    def _open(self) -> None:
        from ipyniivue import NiiVue, SliceType

        types = {name: getattr(SliceType, name.upper()) for name in PLANES}
        volumes = {name: self._volume(name, image) for name, image in self.images.items()}
        volumes["grid"] = self._grid_volume("axial")
        panels = {}
        for name, volume in volumes.items():
            panels[name] = NiiVue(height=self.height, crosshair_width=1.5, crosshair_width_unit="mm")
            panels[name].load_volumes([volume])
        self.panels = tuple(panels.values())
        for panel in self.panels:
            panel.set_slice_type(types["axial"])
            panel.broadcast_to(
                [other for other in self.panels if other is not panel], {"crosshair": True, "zoom_pan": True}
            )
        plane = ipywidgets.ToggleButtons(options=list(PLANES), description="plane")

        def turn(change: dict) -> None:
            panels["grid"].load_volumes([self._grid_volume(change["new"])])
            for panel in self.panels:
                panel.set_slice_type(types[change["new"]])

        plane.observe(turn, names="value")
        names = [ipywidgets.HTML(f"<b>{name}</b>") for name in panels]
        columns = [
            ipywidgets.VBox([name, panel], layout=ipywidgets.Layout(width="25%"))
            for name, panel in zip(names, self.panels, strict=True)
        ]
        self.box.children = (ipywidgets.HTML(self.title), plane, ipywidgets.HBox(columns))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """The widget for front ends that have widgets, the figure for all others."""
        shown = {"text/plain": self.title or "a pair of images", "image/png": base64.b64encode(self.png).decode()}
        if self.box is None:
            return {**shown, "text/plain": f"{shown['text/plain']}\n{MISSING}"}
        return {**self.box._repr_mimebundle_(), **shown}


def view_pair(
    method: Method, cohort: Cohort, name: str, title: str = "", device: torch.device | str = "cpu"
) -> PairViewer:
    """Register a validation pair and look at it: the viewer, as the last line of a cell.

    Args:
        method: Function ``method(fixed, moving) -> displacement``; a network is one.
        cohort: Cohort that gives the images.
        name: Name of a validation pair of the cohort.
        title: Title that says what is shown, and "simulated" where it is; the pair's name is added.
        device: Device that the method runs on.

    Raises:
        ValueError: no pair of that name.
    """
    by_name = {pair.name: pair for pair in cohort.validation_pairs}
    check_choice(name, tuple(by_name), "name")
    fixed, moving = (cohort.image(one).to(device) for one in (by_name[name].fixed, by_name[name].moving))
    with torch.no_grad():
        displacement = method(fixed, moving)
    return PairViewer(fixed, moving, displacement, cohort.resolution_mm, f"{name}: {title}" if title else name)
