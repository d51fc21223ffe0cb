"""Two T1 scans as they come from a scanner, registered; results in the fixed scan's own space.

    lumirlib register FIXED MOVING --out DIR --method deedsBCV

Both scans are brought to the LUMIR frame (:mod:`lumirlib.scans.prepare`). There a trained network, or a method that
needs no training, gives the displacement between them. Affine, displacement and affine are joined into one map from
the fixed scan's voxels to the moving scan's, through which the moving file is interpolated once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, provenance, spatial
from lumirlib.data import field_formats
from lumirlib.data.frame import frame_affine
from lumirlib.data.nifti import write_nifti
from lumirlib.files import check_writable_file, write_json
from lumirlib.scans.plausibility import likeness
from lumirlib.scans.prepare import PreparedScan, as_cohort, background_value, check_skip, prepare_scan
from lumirlib.scans.scan import Scan, collected_warnings, correlation, sample_world, transform, world_slabs
from lumirlib.training.engine import pick_device
from lumirlib.training.registrar import choose_registrar

#: What :func:`register` writes.
FILES = {
    "warped": "warped.nii.gz",
    "displacement": "displacement.nii.gz",
    "transform": "transform.nii.gz",
    "qc": "qc.png",
    "report": "registration.json",
}
#: Cosine of the angle between two axes, at most; ITK refuses files from between 1e-4 and 3e-4.
MAX_SHEAR = 5e-5
#: Correlation of two registered brains, at least. Of real ones it is 0.43 and more after an affine alone.
MIN_NCC = 0.4


@dataclass(frozen=True)
class ScanMap:
    """The whole map from the world of a fixed scan to that of a moving one: affine, displacement, affine.

    Attributes:
        fixed_to_frame: Matrix 4 x 4 from the fixed scan's world to the frame, in mm.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels of `resolution_mm`, on the frame's grid.
        resolution_mm: Edge of the displacement's voxels in mm: 1, 2 or 4.
        frame_to_moving: Matrix 4 x 4 from the frame to the moving scan's world, in mm.
    """

    fixed_to_frame: np.ndarray
    displacement: torch.Tensor
    resolution_mm: int
    frame_to_moving: np.ndarray

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """World points ``(1, 3, ...)`` of the fixed scan, in mm, in the world of the moving scan, float64."""
        return self.from_frame(transform(self.fixed_to_frame, points))

    def from_frame(self, points: torch.Tensor) -> torch.Tensor:
        """World points of the frame in the world of the moving scan."""
        grid = frame_affine(self.resolution_mm)
        voxels = transform(np.linalg.inv(grid), points)
        return transform(self.frame_to_moving, transform(grid, voxels + self.displacement_at(voxels)))

    def displacement_at(self, voxels: torch.Tensor) -> torch.Tensor:
        """Displacement at voxel coordinates of its own grid, trilinear; outside, that of the nearest border point."""
        last = torch.tensor(self.displacement.shape[2:], dtype=torch.float64).view(1, 3, 1, 1, 1) - 1
        within = torch.minimum(voxels.clamp(min=0), last)
        return spatial.sample(self.displacement, within).double()

    def displacement_1mm(self) -> torch.Tensor:
        """The displacement on the frame's own grid, ``(1, 3, 160, 224, 192)`` in voxels of 1 mm."""
        return spatial.to_finer_grid(self.displacement, self.resolution_mm)

    def on_scan(self, fixed: Scan, moving: Scan) -> tuple[torch.Tensor, torch.Tensor]:
        """The moving scan on the fixed scan's grid, and the displacement that carries it there.

        Returns:
            ``(1, 1, D, H, W)``, interpolated once, with the moving scan's background (zero where nothing is negative,
            else its most frequent or lowest value) outside it; ``(1, 3, D, H, W)`` in voxels of the
            fixed scan, the affine included: ``warped(p)`` is what lies at ``p + u(p)`` of the fixed scan's grid in
            the moving scan's world.
        """
        warped, displacement = torch.empty(1, 1, *fixed.shape), torch.empty(1, 3, *fixed.shape)
        background = background_value(moving.values)
        outside = float(moving.values.min()) if background is None else background
        raised = moving.values - outside
        for planes, points in world_slabs(fixed.shape, fixed.affine):
            places = self(points)
            warped[:, :, planes] = sample_world(raised, moving.affine, places) + outside
            displacement[:, :, planes] = _in_voxels(fixed.affine, places - points)
        return warped, displacement

    def displacement_on(self, shape: Sequence[int], affine: np.ndarray) -> torch.Tensor:
        """The displacement of the whole map on a grid in the fixed scan's world, ``(1, 3, *shape)`` in its voxels."""
        displacement = torch.empty(1, 3, *shape)
        for planes, points in world_slabs(shape, affine):
            displacement[:, :, planes] = _in_voxels(affine, self(points) - points)
        return displacement


def _in_voxels(affine: np.ndarray, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors ``(1, 3, ...)`` in mm along the world's axes, in voxels along a grid's."""
    turned = np.eye(4)
    turned[:3, :3] = np.linalg.inv(affine[:3, :3])
    return transform(turned, vectors)


@dataclass(frozen=True)
class Registration:
    """What :func:`register` has found.

    Attributes:
        map: Map from the fixed scan's world to the moving scan's.
        files: Paths that were written, by kind: warped, displacement, transform, qc, report.
        measures: Measures by name: ncc_* (Pearson correlation of the two brains inside the fixed one, by the headers
            alone, after the affine, and after the whole map), local_ncc_* (1 - the paper's NCC loss, after the affine
            and after the whole map), ndv_percent, jacobian_min and jacobian_max.
        seconds: Seconds of each part.
        remarks: Remarks made on the way, and on what about the scans or the result is hardly right.
    """

    map: ScanMap
    files: dict[str, Path]
    measures: dict[str, float]
    seconds: dict[str, float]
    remarks: list[str] = field(default_factory=list)


def register(
    fixed: str | Path,
    moving: str | Path,
    out: str | Path,
    weights: str | Path = "",
    run: str = "",
    method: str = "",
    results: str | Path = "",
    resolution_mm: int | None = None,
    skip: Iterable[str] = (),
    skip_fixed: Iterable[str] = (),
    skip_moving: Iterable[str] = (),
    device: str = "auto",
    progress: bool = True,
    command: str = "lumirlib.scans.register.register",
    pretrained: str = "",
) -> Registration:
    """Register two T1 scans and write the results in the fixed scan's own space.

    The files, in `out`:

    * `warped.nii.gz`: the moving scan on the fixed scan's grid, interpolated once, in its own units;
    * `displacement.nii.gz`: ``(D, H, W, 3)`` in voxels of the fixed scan (Learn2Reg's layout), affine included;
    * `transform.nii.gz`: the same as displacement field of ITK and ANTs, in mm, LPS: ``antsApplyTransforms -t``; where
      the fixed scan's axes are not at right angles, on a grid of right angles that covers it;
    * `qc.png`, `qc.pdf`: the page to look at; `registration.json`: measures, remarks, timings, provenance.

    Args:
        fixed: NIfTI file of a T1 head, any orientation and spacing.
        moving: NIfTI file of another T1 head, any orientation and spacing.
        out: Folder of the results; it is made.
        weights: Path of a best.pt, see :func:`choose_registrar`, as for `run`, `method`, `results` and `resolution_mm`.
        run: Name of a run.
        method: Name of a method that is not trained.
        results: Results folder of `run`.
        resolution_mm: Edge of the voxels to work on, 1, 2 or 4, see :func:`choose_registrar`.
        skip: Steps of :func:`lumirlib.scans.prepare.prepare_scan` to skip for both scans.
        skip_fixed: Steps to skip for the fixed scan besides.
        skip_moving: Steps to skip for the moving scan besides.
        device: Device's name: "auto", "cpu", "cuda" ...
        progress: Whether to show progress bars.
        command: Command for the provenance.
        pretrained: Name of weights that the package carries, see :func:`choose_registrar`.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as :func:`choose_registrar` and
            :func:`lumirlib.scans.prepare.prepare_scan`.
        OSError: `out` cannot be written, said before anything is prepared.
    """
    registrar = choose_registrar(weights, run, method, results, resolution_mm, device, pretrained)
    target, out = pick_device(device), Path(out)
    for path in (fixed, moving):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such NIfTI file: {path}")
    for name in FILES.values():
        check_writable_file(out / name)
    skips = [check_skip({*skip, *own}) for own in (skip_fixed, skip_moving)]
    seconds: dict[str, float] = {}
    remarks: list[str] = []
    scans = []
    for path, steps in zip((fixed, moving), skips, strict=True):
        with collected_warnings() as told:
            scans.append(prepare_scan(path, steps, target, progress))
        remarks += [one.replace(str(path), Path(path).name) for one in told]
    for role, prepared in zip(("fixed", "moving"), scans, strict=True):
        seconds |= {f"{step}_{role}": spent for step, spent in prepared.seconds.items()}
    with tqdm(total=4, desc="register", unit="part", disable=not progress) as bar:

        def timed(part: str, work):
            started = time.perf_counter()
            found = work()
            seconds[part] = round(time.perf_counter() - started, 2)
            bar.update()
            return found

        in_frame = timed("resample_to_frame", lambda: [prepared.in_frame for prepared in scans])
        displacement = timed("displacement", lambda: registrar.displacement(*in_frame, target))
        whole = ScanMap(np.linalg.inv(scans[0].to_scan), displacement, registrar.resolution_mm, scans[1].to_scan)
        files = timed("map_and_write", lambda: write_registration(whole, scans[0].scan, scans[1].scan, out))
        measures = timed("qc", lambda: _check(whole, *scans, registrar.name, out))
    files |= {"qc": out / FILES["qc"]}
    if not is_orthogonal(scans[0].scan.affine):
        remarks.append(
            f"{scans[0].scan.path.name}: its axes are not at right angles, which ITK and ANTs do not read; "
            f"{FILES['transform']} lies on a grid of right angles that covers it, and maps the same points"
        )
    remarks += _doubts(scans, measures)
    for remark in remarks:
        tqdm.write(f"remark: {remark}", file=sys.stderr)
    worked_on = target if isinstance(registrar.method, nn.Module) else torch.device("cpu")
    about = {
        "fixed": _about(scans[0]),
        "moving": _about(scans[1]),
        "method": registrar.name,
        "resolution_mm": registrar.resolution_mm,
        **registrar.facts,
        "measures": measures,
        "remarks": remarks,
        "seconds": seconds,
        "command": command,
        "device": provenance.describe_device(worked_on),
        "commit": provenance.commit(),
        "written": provenance.now(),
        "versions": provenance.versions(),
    }
    files["report"] = write_json(out / FILES["report"], about)
    return Registration(whole, files, measures, seconds, remarks)


def _doubts(scans: Sequence[PreparedScan], measures: Mapping[str, float]) -> list[str]:
    """What is hardly right about two scans, or about their registration."""
    found = [
        f"{prepared.scan.path.name}: hardly a T1 brain; it {doubts}"
        for prepared in scans
        if (doubts := likeness(prepared).doubts)
    ]
    fixed, moving = (prepared.scan for prepared in scans)
    if fixed.values.equal(moving.values) and np.allclose(fixed.affine, moving.affine, atol=1e-3):
        found.append("both scans have the same voxels in the same place: are they one file?")
    if measures["ncc"] < MIN_NCC:
        found.append(f"the brains correlate {measures['ncc']:.3f} after the registration, below {MIN_NCC}")
    return found


def _about(prepared: PreparedScan) -> dict[str, object]:
    return {
        "file": prepared.scan.path.name,
        "shape": list(prepared.scan.shape),
        "spacing_mm": prepared.scan.spacing_mm.round(4).tolist(),
        **likeness(prepared).rounded(),
        "skipped_steps": list(prepared.skipped),
        "frame_to_scan_mm": prepared.to_scan.tolist(),
    }


def is_orthogonal(affine: np.ndarray) -> bool:
    """Whether a grid's axes are at right angles, as ITK wants them of a file."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < MAX_SHEAR)


def orthogonal_grid(shape: Sequence[int], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Sides and affine of a grid of right angles that covers another, turned as that is, with voxels of its edges."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    directions = left @ right
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in shape])).reshape(3, -1)
    along = directions.T @ (affine[:3, :3] @ corners + affine[:3, 3:])
    new = np.eye(4)
    new[:3, :3] = directions * spacing
    new[:3, 3] = directions @ along.min(1)
    return tuple(int(side) for side in np.ceil((along.max(1) - along.min(1)) / spacing - 1e-6) + 1), new


def write_registration(whole: ScanMap, fixed: Scan, moving: Scan, out: Path) -> dict[str, Path]:
    """Write warped image, displacement and transform of :func:`register`; their paths by kind."""
    warped, displacement = whole.on_scan(fixed, moving)
    in_voxels, grid, for_others = field_formats.voxel_to_channels_last(displacement), fixed.affine, displacement
    if not is_orthogonal(grid):
        shape, grid = orthogonal_grid(fixed.shape, fixed.affine)
        for_others = whole.displacement_on(shape, grid)
    for_itk = field_formats.voxel_to_itk(for_others, grid)
    return {
        "warped": write_nifti(out / FILES["warped"], warped[0, 0].numpy(), fixed.affine),
        "displacement": write_nifti(out / FILES["displacement"], in_voxels, fixed.affine),
        "transform": write_nifti(out / FILES["transform"], for_itk, grid, intent="vector"),
    }


def _check(whole: ScanMap, fixed: PreparedScan, moving: PreparedScan, method: str, out: Path) -> dict[str, float]:
    """Measures of a registration in the frame at 1 mm, and its QC page."""
    import matplotlib.pyplot as plt

    from lumirlib.plots import save_figure
    from lumirlib.scans.qc import registration_figure

    image, brain = fixed.in_frame, fixed.in_frame > 0
    by_headers = moving.resampled(lambda points: transform(fixed.to_scan, points))
    warped = as_cohort(moving.resampled(whole.from_frame), str(moving.scan.path))
    displacement = whole.displacement_1mm()
    determinant = metrics.jacobian_determinant(displacement)
    measures = {
        "ncc_headers": correlation(by_headers, image, brain),
        "ncc_affine": correlation(moving.in_frame, image, brain),
        "ncc": correlation(warped, image, brain),
        "local_ncc_affine": 1 - float(losses.ncc_loss(moving.in_frame / 255, image / 255)),
        "local_ncc": 1 - float(losses.ncc_loss(warped / 255, image / 255)),
        "ndv_percent": metrics.ndv_percent(displacement, brain),
        "jacobian_min": float(determinant[brain].min()),
        "jacobian_max": float(determinant[brain].max()),
    }
    title = (
        f"{method} at {whole.resolution_mm} mm: {moving.scan.name} onto {fixed.scan.name}\n"
        f"NCC by headers {measures['ncc_headers']:.3f}, affine {measures['ncc_affine']:.3f}, "
        f"registered {measures['ncc']:.3f}; folds {measures['ndv_percent']:.3g} % of the brain"
    )
    figure = registration_figure(image, moving.in_frame, warped, displacement, determinant, title)
    save_figure(figure, (out / FILES["qc"]).with_suffix(""))
    plt.close(figure)
    return {name: round(value, 6) for name, value in measures.items()}
