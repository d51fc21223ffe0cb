"""Two T1 scans as they come from a scanner, registered; results in the fixed scan's own space.

    lumirlib register FIXED MOVING --out DIR --method deedsBCV

Both scans are brought to the LUMIR frame (:mod:`lumirlib.scans.prepare`). There a trained network, or a method that
needs no training, gives the displacement between them. Affine, displacement and affine are joined into one map from
the fixed scan's voxels to the moving scan's, through which the moving file is interpolated once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, provenance, spatial
from lumirlib.data import field_formats
from lumirlib.data.frame import frame_affine
from lumirlib.data.nifti import write_nifti
from lumirlib.files import write_json
from lumirlib.scans.prepare import PreparedScan, as_cohort, background_value, check_skip, prepare_scan
from lumirlib.scans.scan import Scan, correlation, sample_world, transform, world_slabs
from lumirlib.training.engine import pick_device
from lumirlib.training.registrar import choose_registrar


@dataclass(frozen=True)
class ScanMap:
    """The whole map from the world of a fixed scan to that of a moving one: affine, displacement, affine.

    Attributes:
        fixed_to_frame: 4 x 4, in mm.
        displacement: ``(1, 3, D, H, W)`` in voxels of `resolution_mm`, on the frame's grid.
        resolution_mm: 1, 2 or 4.
        frame_to_moving: 4 x 4, in mm.
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
        warped = torch.empty(1, 1, *fixed.shape)
        displacement = torch.empty(1, 3, *fixed.shape)
        to_voxels = np.eye(4)
        to_voxels[:3, :3] = np.linalg.inv(fixed.affine[:3, :3])
        background = background_value(moving.values)
        outside = float(moving.values.min()) if background is None else background
        raised = moving.values - outside
        for planes, points in world_slabs(fixed.shape, fixed.affine):
            places = self(points)
            warped[:, :, planes] = sample_world(raised, moving.affine, places) + outside
            displacement[:, :, planes] = transform(to_voxels, places - points)
        return warped, displacement


@dataclass(frozen=True)
class Registration:
    """What :func:`register` has found.

    Attributes:
        map: from the fixed scan's world to the moving scan's.
        files: what was written, by kind: warped, displacement, transform, qc, report.
        measures: ncc_* (Pearson correlation of the two brains inside the fixed one, by the headers alone, after the
            affine, and after the whole map), local_ncc_* (1 - the paper's NCC loss, likewise, without headers),
            ndv_percent, jacobian_min and jacobian_max.
        seconds: of each part.
    """

    map: ScanMap
    files: dict[str, Path]
    measures: dict[str, float]
    seconds: dict[str, float]


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
    * `transform.nii.gz`: the same as displacement field of ITK and ANTs, in mm, LPS: ``antsApplyTransforms -t``;
    * `qc.png`, `qc.pdf`: the page to look at; `registration.json`: measures, timings, provenance.

    Args:
        fixed: NIfTI file of a T1 head, any orientation and spacing.
        moving: likewise.
        out: folder; it is made.
        weights: see :func:`choose_registrar`, as for `run`, `method`, `results` and `resolution_mm`.
        run: name of a run.
        method: name of one that is not trained.
        results: folder of `run`.
        resolution_mm: of `method`.
        skip: steps of :func:`lumirlib.scans.prepare.prepare_scan` to skip for both scans.
        skip_fixed: for the fixed scan besides.
        skip_moving: for the moving scan besides.
        device: "auto", "cpu", "cuda" ...
        progress: show progress bars.
        command: for the provenance.
        pretrained: see :func:`choose_registrar`.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as :func:`choose_registrar` and
            :func:`lumirlib.scans.prepare.prepare_scan`.
    """
    registrar = choose_registrar(weights, run, method, results, resolution_mm, device, pretrained)
    target, out = pick_device(device), Path(out)
    for path in (fixed, moving):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such NIfTI file: {path}")
    skips = [check_skip({*skip, *own}) for own in (skip_fixed, skip_moving)]
    seconds: dict[str, float] = {}
    scans = [prepare_scan(path, steps, target, progress) for path, steps in zip((fixed, moving), skips, strict=True)]
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
    files |= {"qc": out / "qc.png"}
    worked_on = target if isinstance(registrar.method, nn.Module) else torch.device("cpu")
    about = {
        "fixed": _about(scans[0]),
        "moving": _about(scans[1]),
        "method": registrar.name,
        "resolution_mm": registrar.resolution_mm,
        **registrar.facts,
        "measures": measures,
        "seconds": seconds,
        "command": command,
        "device": provenance.describe_device(worked_on),
        "commit": provenance.commit(),
        "written": provenance.now(),
        "versions": provenance.versions(),
    }
    files["report"] = write_json(out / "registration.json", about)
    return Registration(whole, files, measures, seconds)


def _about(prepared: PreparedScan) -> dict[str, object]:
    return {
        "file": prepared.scan.path.name,
        "shape": list(prepared.scan.shape),
        "spacing_mm": prepared.scan.spacing_mm.round(4).tolist(),
        "brain_ml": round(prepared.brain_ml, 1),
        "skipped_steps": list(prepared.skipped),
        "frame_to_scan_mm": prepared.to_scan.tolist(),
    }


def write_registration(whole: ScanMap, fixed: Scan, moving: Scan, out: Path) -> dict[str, Path]:
    """Write the warped moving scan and the displacement on the fixed scan's grid, the latter for ITK too."""
    warped, displacement = whole.on_scan(fixed, moving)
    in_voxels = field_formats.voxel_to_channels_last(displacement)
    for_itk = field_formats.voxel_to_itk(displacement, fixed.affine)
    return {
        "warped": write_nifti(out / "warped.nii.gz", warped[0, 0].numpy(), fixed.affine),
        "displacement": write_nifti(out / "displacement.nii.gz", in_voxels, fixed.affine),
        "transform": write_nifti(out / "transform.nii.gz", for_itk, fixed.affine, intent="vector"),
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
    save_figure(figure, out / "qc")
    plt.close(figure)
    return {name: round(value, 6) for name, value in measures.items()}
