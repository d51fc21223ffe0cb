"""Rows "released" of Table 1: programs and weights that others published, where the user has them.

Each adapter is ``method(fixed, moving) -> displacement`` like every row, and knows whether it can run here:
:meth:`available` is empty, or the sentence "not installed: ..." that the row shows instead of figures. Nothing is
downloaded. The adapters convert what a program writes with one named function for each convention.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lumirlib import spatial
from lumirlib._checks import check_choice
from lumirlib.data.field_formats import RAS_TO_LPS, channels_first_to_voxel, itk_to_voxel
from lumirlib.data.nifti import read_nifti, write_nifti
from lumirlib.methods.external import ExternalTool, grid_affine, run_program

UNIGRADICON_VARIABLE = "UNIGRADICON_WEIGHTS"

DEEDS_VARIABLE = "DEEDS_BIN"


def ras_to_voxel(field: np.ndarray, affine: np.ndarray) -> torch.Tensor:
    """Displacement of FreeSurfer ("disp_ras"), in mm along the world axes of RAS, in voxels of the fixed image.

    Holds where both images have the same affine. Surfa and FreeSurfer define the field on the fixed grid, as the
    moving minus the fixed RAS position.

    Args:
        field: Displacement field ``(D, H, W, 3)``, or ``(D, H, W, 1, 3)`` as newer versions store it.
        affine: Matrix 4 x 4 of the fixed image, voxels to RAS in mm.

    Returns:
        ``(1, 3, D, H, W)`` float32 in voxels.

    Raises:
        ValueError: another shape, or an affine that has no inverse.
    """
    return itk_to_voxel(np.asarray(field) @ RAS_TO_LPS, affine)


def icon_to_voxel(phi: torch.Tensor, identity: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Map of ICON's networks, in [0, 1] between the outermost voxel centres, as our displacement on another grid.

    ``(phi - identity) * (n - 1)`` is in voxels of the network's grid, ``phi_AB`` on the grid of B and pointing into
    A. The package resamples images with aligned outer *edges* of the volume (not corner voxels), so a voxel of the
    network is side / n voxels of the image.

    Args:
        phi: Map of the network at each of its voxels, ``(1, 3, n, n, n)``, channel 0 along the first axis.
        identity: Identity map of the network, same shape.
        shape: Sides (D, H, W) of the images' grid.

    Returns:
        ``(1, 3, D, H, W)`` in voxels.
    """
    grid = phi.shape[2:]
    inner = torch.tensor([n - 1 for n in grid], dtype=phi.dtype, device=phi.device).view(1, 3, 1, 1, 1)
    outer = [side / n for side, n in zip(shape, grid, strict=True)]
    resized = F.interpolate((phi - identity) * inner, size=tuple(shape), mode="trilinear", align_corners=False)
    return resized * torch.tensor(outer, dtype=phi.dtype, device=phi.device).view(1, 3, 1, 1, 1)


def deeds_to_voxel(values: np.ndarray, shape: Sequence[int], spacing: int) -> torch.Tensor:
    """The content of deedsBCV's ``*_displacements.dat``, in voxels at its last control points, as our displacement.

    Three volumes of ``(D // spacing, H // spacing, W // spacing)`` control points follow each other, the first axis
    fastest: the displacements along j, along i and along k. Control point g stands at voxel ``g * side / (side //
    spacing)``; between them the program interpolates trilinearly, and repeats the last one beyond.

    Args:
        values: Float32 numbers of the file, one-dimensional.
        shape: Sides (D, H, W) of the images.
        spacing: Spacing of the last level's control points, in voxels.

    Returns:
        ``(1, 3, D, H, W)`` float32 in voxels.

    Raises:
        ValueError: not as many numbers as that grid has.
    """
    points = tuple(side // spacing for side in shape)
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 1 or values.size != 3 * math.prod(points):
        raise ValueError(
            f"values must be {3 * math.prod(points)} numbers, three for each of {points} control points, "
            f"got shape {values.shape}"
        )
    along_j, along_i, along_k = (part.reshape(points, order="F") for part in np.split(values, 3))
    control = channels_first_to_voxel(np.stack([along_i, along_j, along_k]))
    places = spatial.identity_grid(shape)
    for axis, (side, count) in enumerate(zip(shape, points, strict=True)):
        places[:, axis].mul_(count / side).clamp_(max=count - 1)
    return spatial.sample(control, places)


@dataclass(frozen=True)
class ReleasedSynthMorph(ExternalTool):
    """FreeSurfer's ``mri_synthmorph``, deformable model (Hoffmann et al., TMI 2022; Imaging Neuroscience 2024).

    Calls ``mri_synthmorph -m deform``, which takes the images as affinely aligned. Its network sees them on voxels
    of 1 mm in a cube of `extent` mm.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel, in mm.
        orientation: Directions of the array's axes; the program turns the head upright by them.
        regularization: Value of the program's option ``-r``, between 0 and 1; 0 leaves the program's own (0.5 where it
            has the option).
        extent: Side of the network's cube in mm, 192 or 256.
        threads: Number of threads for TensorFlow; 0 leaves the choice to it.
        gpu: Whether the program may take a GPU.
    """

    name: str = "SynthMorph (released)"
    resolution_mm: float = 1.0
    orientation: str = "RAS"
    regularization: float = 0.0
    extent: int = 256
    threads: int = 0
    gpu: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        grid_affine((2, 2, 2), self.resolution_mm, self.orientation)
        if not 0 <= self.regularization < 1:
            raise ValueError(f"regularization must be in [0, 1), got {self.regularization}")

    def available(self) -> str:
        """Empty where ``mri_synthmorph`` is on the PATH, else what to do."""
        if shutil.which("mri_synthmorph"):
            return ""
        return (
            "not installed: install FreeSurfer 7.4 or newer (surfer.nmr.mgh.harvard.edu; it brings mri_synthmorph and "
            "its weights), set FREESURFER_HOME and run `source $FREESURFER_HOME/SetUpFreeSurfer.sh`, so that "
            "mri_synthmorph is on the PATH"
        )

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        shape = tuple(fixed.shape[2:])
        affine = grid_affine(shape, self.resolution_mm, self.orientation)
        with tempfile.TemporaryDirectory(prefix="lumirlib-synthmorph-") as made:
            folder = Path(made)
            _write_image(folder / "fixed.nii.gz", fixed, affine)
            _write_image(folder / "moving.nii.gz", moving, affine)
            # without the word "register", which older versions do not know and newer ones take for granted
            command = [shutil.which("mri_synthmorph"), "-m", "deform", "-e", str(self.extent), "-t", "warp.nii.gz"]
            command += ["-r", f"{self.regularization:g}"] if self.regularization else []
            command += ["-j", str(self.threads)] if self.threads else []
            command += ["-g"] if self.gpu else []
            said = run_program([*command, "moving.nii.gz", "fixed.nii.gz"], folder)
            if not (folder / "warp.nii.gz").is_file():
                raise RuntimeError(f"mri_synthmorph wrote no transform: {said or 'it printed nothing'}")
            field, _ = read_nifti(folder / "warp.nii.gz")
            if field.shape[:3] != shape:
                raise RuntimeError(f"mri_synthmorph wrote a field of shape {field.shape} for images of {shape}")
            displacement = ras_to_voxel(field, affine)
        return displacement


@dataclass(frozen=True)
class ReleasedUniGradICON(ExternalTool):
    """The package ``unigradicon`` with its released weights (Tian et al., MICCAI 2024).

    Follows the package's own program: images clipped at a quantile and scaled to [0, 1], axes in the order of ITK's
    arrays, resampled to the network's grid (175 voxels each way). Runs on a GPU where the package finds one; there
    is no other choice in it. On 2 CPU cores the network takes half a minute and 3 GB, a step of instance
    optimization several times that.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel in mm, for the common interface; the network knows no mm.
        weights: Path of the weights file; "" takes the environment variable ``UNIGRADICON_WEIGHTS``.
        io_steps: Steps of instance optimization; the package's own program takes 50.
        io_learning_rate: Learning rate of the Adam of instance optimization.
        upper_quantile: Quantile of the intensities that becomes 1.
        array_order: Order of the array's axes: "kji" as ITK, and so the package, reads NIfTI files into arrays; "ijk"
            as nibabel does.
        seed: Random seed of the points in the loss of instance optimization.
    """

    name: str = "uniGradICON (released)"
    resolution_mm: float = 1.0
    weights: str = ""
    io_steps: int = 0
    io_learning_rate: float = 2e-5
    upper_quantile: float = 0.99
    array_order: str = "kji"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.array_order, ("kji", "ijk"), "array_order")
        if self.io_steps < 0:
            raise ValueError(f"io_steps must be 0 or more, got {self.io_steps}")
        if not 0 < self.upper_quantile <= 1:
            raise ValueError(f"upper_quantile must be in (0, 1], got {self.upper_quantile}")

    def available(self) -> str:
        """Empty where the package and the weights file are there, else what to do."""
        weights = (
            "download Step_2_final.trch from the release unigradicon_weights of github.com/uncbiag/uniGradICON and set "
            f"{UNIGRADICON_VARIABLE} to its path"
        )
        for package in ("unigradicon", "icon_registration"):
            if importlib.util.find_spec(package) is None:
                return (
                    f"not installed: the package {package} is missing; run `pip install --no-deps unigradicon==1.0.6 "
                    "icon-registration==1.1.9` (with their dependencies pip may replace torch by a CUDA build), then "
                    + weights
                )
        path = self._weights_path()
        if not path:
            return f"not installed: {weights}"
        if not Path(path).is_file():
            return f"not installed: there is no weights file {path}; set {UNIGRADICON_VARIABLE} to the path of one"
        return ""

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        path = Path(self._weights_path()).resolve()
        network = unigradicon_network(str(path), path.stat().st_mtime_ns)
        identity = network.identity_map
        fixed_input, moving_input = (
            self._prepare(image, name, identity) for image, name in ((fixed, "fixed"), (moving, "moving"))
        )
        phi = self._register(network, fixed_input, moving_input)
        shape = self._reorder(fixed).shape[2:]
        displacement = self._reorder(icon_to_voxel(phi, identity, shape))
        if self.array_order == "kji":
            displacement = displacement.flip(1)
        return displacement.float().contiguous()

    def _weights_path(self) -> str:
        return self.weights or os.environ.get(UNIGRADICON_VARIABLE, "")

    def _reorder(self, volume: torch.Tensor) -> torch.Tensor:
        return volume.permute(0, 1, 4, 3, 2) if self.array_order == "kji" else volume

    def _prepare(self, image: torch.Tensor, name: str, identity: torch.Tensor) -> torch.Tensor:
        image = image.detach().float()
        rank = max(1, min(int(self.upper_quantile * image.numel()), image.numel()))
        low, high = image.min(), image.flatten().kthvalue(rank).values
        if not low < high:
            raise ValueError(
                f"{name} must vary below its quantile {self.upper_quantile:g}, got {float(low):g} to {float(high):g}"
            )
        image = self._reorder((image.clamp(low, high) - low) / (high - low)).to(identity.device)
        return F.interpolate(image, size=tuple(identity.shape[2:]), mode="trilinear", align_corners=False)

    def _register(self, network: torch.nn.Module, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """The network's map at its own voxels, after instance optimization if asked for; its weights stay."""
        if self.io_steps:
            kept = {key: value.detach().clone() for key, value in network.state_dict().items()}
        try:
            if self.io_steps:
                devices = [fixed.device] if fixed.device.type == "cuda" else []
                with torch.random.fork_rng(devices), torch.enable_grad():
                    torch.manual_seed(self.seed)
                    optimizer = torch.optim.Adam(network.parameters(), lr=self.io_learning_rate)
                    for _ in range(self.io_steps):
                        optimizer.zero_grad()
                        network(moving, fixed).all_loss.backward()
                        optimizer.step()
            network.identity_map.isIdentity = True  # the package's own mark: spares it an interpolation
            with torch.no_grad():
                return network.regis_net(moving, fixed)(network.identity_map)
        finally:
            if self.io_steps:
                network.load_state_dict(kept)
                network.zero_grad(set_to_none=True)


class _NoItk(types.ModuleType):
    """Stands in for ITK (1.5 GB) while unigradicon is imported, which names its types for reading files only."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@lru_cache(maxsize=1)
def unigradicon_network(path: str, changed: int) -> torch.nn.Module:
    """The released network with the weights of a file; `changed` is the file's time, so that a new file is read."""
    stand_in = "itk" not in sys.modules and importlib.util.find_spec("itk") is None
    if stand_in:
        sys.modules["itk"] = _NoItk("itk")
    try:
        package = importlib.import_module("unigradicon")
    finally:
        if stand_in:
            del sys.modules["itk"]
    network = package.get_unigradicon(weights_location=path)
    return network.eval()


@dataclass(frozen=True)
class ReleasedDeeds(ExternalTool):
    """The original program ``deedsBCV`` (Heinrich et al., TMI 2013), compiled, with the settings of the LUMIR row.

    Images are written as grey levels from 0 to 255: the program adds 1024 to them in float32, which would cost images
    in [0, 1] most of their digits. It counts in voxels, whatever their size.

    Attributes:
        name: Name of the row.
        resolution_mm: Edge of a voxel in mm, written into the images' headers, which the program does not look at.
        program: Path of the executable; "" takes the environment variable ``DEEDS_BIN``.
        alpha: Weight of the regularization.
        grid_spacing: Spacing of the control points at each level, in voxels.
        search_radius: Largest displacement at each level, in steps.
        quantization: Step at each level, in voxels.
    """

    name: str = "deedsBCV (released)"
    resolution_mm: float = 1.0
    program: str = ""
    alpha: float = 1.6
    grid_spacing: tuple[int, ...] = (6, 5, 4, 3, 2)
    search_radius: tuple[int, ...] = (6, 5, 4, 3, 2)
    quantization: tuple[int, ...] = (5, 4, 3, 2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {len(self.grid_spacing), len(self.search_radius), len(self.quantization)}
        if lengths != {5}:  # the program prints five descriptor steps, whether there are as many or not
            raise ValueError(
                "grid_spacing, search_radius and quantization must have five levels each, got "
                f"{self.grid_spacing}, {self.search_radius} and {self.quantization}"
            )

    def available(self) -> str:
        """Empty where the executable is there, else what to do."""
        path = self._program_path()
        if not path:
            return (
                "not installed: get the source github.com/mattiaspaul/deedsBCV, run `make` there (`make SLOW=1` on "
                f"processors without AVX2; it needs g++ and zlib) and set {DEEDS_VARIABLE} to the path of deedsBCV"
            )
        if shutil.which(path) is None:
            return f"not installed: {path} is no executable file; set {DEEDS_VARIABLE} to the path of deedsBCV"
        return ""

    def register(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExternalTool.register`."""
        shape = tuple(fixed.shape[2:])
        affine = grid_affine(shape, self.resolution_mm)
        with tempfile.TemporaryDirectory(prefix="lumirlib-deeds-") as made:
            folder = Path(made)
            _write_image(folder / "fixed.nii.gz", fixed * 255, affine)
            _write_image(folder / "moving.nii.gz", moving * 255, affine)
            levels = ("x".join(map(str, each)) for each in (self.grid_spacing, self.search_radius, self.quantization))
            options = [text for pair in zip(("-G", "-L", "-Q"), levels, strict=True) for text in pair]
            program = str(Path(shutil.which(self._program_path())).resolve())
            said = run_program(
                [
                    program,
                    "-F",
                    "fixed.nii.gz",
                    "-M",
                    "moving.nii.gz",
                    "-O",
                    "found",
                    "-a",
                    f"{self.alpha:g}",
                    "-l",
                    str(len(self.grid_spacing)),
                    *options,
                ],
                folder,
            )
            written = folder / "found_displacements.dat"
            if not written.is_file():
                raise RuntimeError(f"{Path(program).name} wrote no displacements: {said or 'it printed nothing'}")
            values = np.fromfile(written, dtype="<f4")
        return deeds_to_voxel(values, shape, self.grid_spacing[-1]).to(fixed.device)

    def _program_path(self) -> str:
        return self.program or os.environ.get(DEEDS_VARIABLE, "")


def _write_image(path: Path, image: torch.Tensor, affine: np.ndarray) -> None:
    write_nifti(path, image[0, 0].detach().cpu().float().numpy(), affine)


#: The adapters by the name of their row.
RELEASED: dict[str, type] = {
    adapter.name: adapter for adapter in (ReleasedSynthMorph, ReleasedUniGradICON, ReleasedDeeds)
}
