"""Classical registration programs from PyPI, as extra rows: none of them is in the paper.

They come with ``pip install "lumirlib[classical]"``. antspyx 0.6.3 asks for numpy < 2.4 and scipy < 1.16, older than
those of requirements.txt, so that extra needs an environment of its own; Greedy and ConvexAdam do not. Packages are
imported when a method is called, not before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from lumirlib.data.field_formats import RAS_TO_LPS, channels_last_to_voxel, itk_to_voxel
from lumirlib.data.nifti import read_nifti
from lumirlib.methods.external import ExternalTool, grid_affine

#: Why antspyx cannot stand beside requirements.txt, for its "not installed" sentence.
ANTS_PINS = "antspyx 0.6.3 needs numpy < 2.4 and scipy < 1.16, older than those of requirements.txt"


@dataclass(frozen=True)
class Greedy(ExternalTool):
    """Greedy diffeomorphic registration (Yushkevich et al., 2016), PyPI ``picsl-greedy``; not in the paper.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel, in mm.
        metric: Value of the program's option ``-m``.
        iterations: Value of the program's option ``-n``, coarse to fine.
        smoothing: Value of the program's option ``-s``, for the updates and for the whole warp.
        threads: Number of threads; 0 takes all cores.
    """

    name: str = "Greedy (not in the paper)"
    resolution_mm: float = 1.0
    metric: str = "NCC 2x2x2"
    iterations: str = "100x50x10"
    smoothing: str = "1.732vox 0.7071vox"
    threads: int = 0

    def available(self) -> str:
        """Empty where the package is installed, else what to do."""
        if importlib.util.find_spec("picsl_greedy") is None:
            return "not installed: run `pip install picsl-greedy==1.4.0.3`"
        return ""

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        toolkit = importlib.import_module("SimpleITK")
        program = importlib.import_module("picsl_greedy").Greedy3D()
        affine = grid_affine(fixed.shape[2:], self.resolution_mm)
        threads = f"-threads {self.threads} " if self.threads else ""
        program.execute(
            f"-V 0 {threads}-i fixed moving -m {self.metric} -n {self.iterations} -s {self.smoothing} -o warp",
            fixed=sitk_image(toolkit, fixed, affine),
            moving=sitk_image(toolkit, moving, affine),
            warp=None,
        )
        field = toolkit.GetArrayFromImage(program["warp"])  # (W, H, D, 3), LPS mm
        return itk_to_voxel(field.transpose(2, 1, 0, 3), affine)


@dataclass(frozen=True)
class AntsSyN(ExternalTool):
    """Symmetric normalization of ANTs (Avants et al., MedIA 2008), PyPI ``antspyx``; not in the paper.

    ANTs aligns affinely before it deforms; both are composed into one displacement. ITK takes all cores, or as many
    as ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS says when the package is first used; with more than one the result
    differs a little from run to run.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel, in mm.
        transform: Value of ANTsPy's ``type_of_transform``; "SyNOnly" skips the affine part, "SyNCC" takes
            cross-correlation.
        iterations: Iterations of the deformable part, coarse to fine; ANTsPy itself leaves out the finest level, (40,
            20, 0).
        seed: Random seed of the samples that the affine part takes.
    """

    name: str = "SyN of ANTs (not in the paper)"
    resolution_mm: float = 1.0
    transform: str = "SyN"
    iterations: tuple[int, ...] = (40, 20, 20)
    seed: int = 1

    def available(self) -> str:
        """Empty where the package is installed, else what to do."""
        if importlib.util.find_spec("ants") is None:
            return (
                f'not installed: {ANTS_PINS}; run `pip install "lumirlib[classical]"` in a fresh environment, '
                "without requirements.txt"
            )
        return ""

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        ants = importlib.import_module("ants")
        affine = grid_affine(fixed.shape[2:], self.resolution_mm)
        fixed_image, moving_image = _ants_image(ants, fixed, affine), _ants_image(ants, moving, affine)
        with (
            tempfile.TemporaryDirectory(prefix="lumirlib-ants-") as folder,
            environment_variables(ANTS_RANDOM_SEED=self.seed),
        ):
            found = ants.registration(
                fixed_image,
                moving_image,
                type_of_transform=self.transform,
                reg_iterations=self.iterations,
                outprefix=os.path.join(folder, "found_"),
            )
            composed = ants.apply_transforms(
                fixed_image, moving_image, found["fwdtransforms"], compose=os.path.join(folder, "composed_")
            )
            field, _ = read_nifti(composed)
            return itk_to_voxel(field, affine)


@dataclass(frozen=True)
class ConvexAdam(ExternalTool):
    """Coupled convex optimization and Adam on MIND features (Siebert et al., 2024), PyPI ``convexAdam``.

    Not in the paper. Runs where the images are.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel in mm, for the common interface; the method counts in voxels.
        regularization: Weight of the smoothness in the Adam part.
        grid_spacing: Spacing of the discrete part's control points, in voxels.
        search_radius: Search radius of the discrete part, in control points.
        steps: Number of Adam's steps.
    """

    name: str = "ConvexAdam (not in the paper)"
    resolution_mm: float = 1.0
    regularization: float = 1.25
    grid_spacing: int = 6
    search_radius: int = 4
    steps: int = 80

    def available(self) -> str:
        """Empty where the package is installed, else what to do."""
        if importlib.util.find_spec("convexAdam") is None:
            return "not installed: run `pip install convexAdam==0.2.0`"
        return ""

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        with warnings.catch_warnings(), torch.enable_grad():
            package = importlib.import_module("convexAdam.convex_adam_MIND")  # silences the whole process's warnings
            warnings.simplefilter("ignore", UserWarning)  # torch's, of the package's calls
            field = package.convex_adam_pt(
                fixed[0, 0].detach(),
                moving[0, 0].detach(),
                lambda_weight=self.regularization,
                grid_sp=self.grid_spacing,
                disp_hw=self.search_radius,
                selected_niter=self.steps,
                dtype=torch.float32,
                device=fixed.device,
            )
        return channels_last_to_voxel(field)


@contextlib.contextmanager
def environment_variables(**variables: object) -> Iterator[None]:
    """Environment variables set for a while, and as before afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def lps_geometry(affine: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...], np.ndarray]:
    """Spacing, origin and direction (3 x 3) that ITK gives a NIfTI file with this voxel-to-RAS matrix."""
    to_world = RAS_TO_LPS @ affine[:3]
    spacing = np.linalg.norm(to_world[:, :3], axis=0)
    return tuple(spacing.tolist()), tuple(to_world[:, 3].tolist()), to_world[:, :3] / spacing


def _array(image: torch.Tensor) -> np.ndarray:
    return image[0, 0].detach().cpu().float().numpy()


def sitk_image(toolkit: ModuleType, image: torch.Tensor, affine: np.ndarray) -> object:
    """An image ``(1, 1, D, H, W)`` as SimpleITK's, at its place in the world."""
    spacing, origin, direction = lps_geometry(affine)
    made = toolkit.GetImageFromArray(np.ascontiguousarray(_array(image).T))  # ITK's first index is the last here
    made.SetSpacing(spacing)
    made.SetOrigin(origin)
    made.SetDirection(direction.ravel().tolist())
    return made


def _ants_image(ants: ModuleType, image: torch.Tensor, affine: np.ndarray) -> object:
    spacing, origin, direction = lps_geometry(affine)
    return ants.from_numpy(_array(image), origin=origin, spacing=spacing, direction=direction)


#: The methods by the name of their row.
CLASSICAL: dict[str, type] = {method.name: method for method in (Greedy, AntsSyN, ConvexAdam)}
