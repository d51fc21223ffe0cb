"""Two scans of heads as they come from a scanner, registered; results in their own spaces.

    lumirlib register FIXED MOVING --out DIR

Both scans are brought to the LUMIR frame (:mod:`lumirlib.scans.prepare`). There a trained network, or a method that
needs no training, gives the displacement between them. Affine, displacement and affine are joined into one map from
the fixed scan's voxels to the moving scan's, through which the moving file is interpolated once; its inverse carries
the fixed scan to the moving one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lumirlib import losses, metrics, provenance, spatial
from lumirlib._checks import check_choice
from lumirlib.data import field_formats
from lumirlib.data.frame import frame_affine
from lumirlib.data.intensity import match_contrast
from lumirlib.data.nifti import read_grid, read_volume, write_nifti
from lumirlib.files import check_new, write_json
from lumirlib.methods.contrast import CONTRASTS, for_contrast
from lumirlib.scans.bids import BidsName, check_derivative, root_of, write_description, write_sidecar
from lumirlib.scans.maps import (
    FieldMap,
    GriddedMap,
    InverseMap,
    ScanMap,
    WorldMap,
    WrittenMap,
    carry,
    field_on,
    in_voxels,
    is_orthogonal,
    made_for,
    sample_at,
)
from lumirlib.scans.plausibility import likeness
from lumirlib.scans.prepare import (
    STEPS,
    PreparedScan,
    as_cohort,
    background_value,
    check_skip,
    check_tools,
    prepare_scan,
    stripped_mask,
)
from lumirlib.scans.scan import Scan, collected_warnings, correlation, read_scan, transform, world_slabs
from lumirlib.training.engine import pick_device
from lumirlib.training.registrar import choose_registrar, default_registrar

#: What :func:`register` writes, as a rule and if displacements are asked for.
FILES = {
    "warped": "warped.nii.gz",
    "warped_fixed": "warped_fixed.nii.gz",
    "transform": "transform.nii.gz",
    "inverse_transform": "inverse_transform.nii.gz",
    "jacobian": "jacobian.nii.gz",
    "qc": "qc.png",
    "report": "registration.json",
}
DISPLACEMENTS = {"displacement": "displacement.nii.gz", "inverse_displacement": "inverse_displacement.nii.gz"}
#: Displacements are rounded to a part of a mm or voxel, which the eye of no interpolation sees and gzip does.
FINEST = 1024
#: Correlation of two registered brains, at least. Of real ones it is 0.43 and more after an affine alone.
MIN_NCC = 0.4
#: Brains as their headers place them are compared at every second voxel along each axis.
HEADERS_EVERY = 2
#: The map and its inverse, one behind the other, lead back within this at 99 % of either brain, or it is said.
MAX_INVERSE_MM = 0.5
#: Voxels of the inverse's grid are made smaller, down to this edge, until a guess is below this part of that.
MIN_INVERSE_EDGE_MM, ENOUGH = 0.7, 0.9
#: Random points of each brain at which the inverse is measured, and of these those that the guess is made from.
INVERSE_POINTS, GUESSED_POINTS = 20_000, 4_000
#: Seconds of each part on two cores, whose ratios make the progress bar's guess at what is left.
USUAL_SECONDS = {"strip": 12, "bias": 4, "affine": 4, "frame": 4, "displacement": 25}
USUAL_SECONDS |= {"forward": 12, "inverse": 30, "qc": 20}


@dataclass(frozen=True)
class Registration:
    """What :func:`register` has found.

    Attributes:
        map: Map from the fixed scan's world to the moving scan's.
        files: Paths that were written, by kind, see :data:`FILES` and :data:`DISPLACEMENTS`.
        measures: Measures by name: ncc_* (Pearson correlation of the two brains inside the fixed one, by the headers
            alone, after the affine, and after the whole map), local_ncc_* (1 - the paper's NCC loss, after the affine
            and after the whole map), ndv_percent, jacobian_min and jacobian_max (of the map that is written, inside
            the fixed brain); inverse_moving_p50_mm, _p99_mm and _max_mm (how far from where it was a point of the
            moving brain is after the inverse transform and the transform, as they are written, at random points) and
            inverse_moving_outside_percent (of them, those that are led out of the fixed scan); the same of the fixed
            brain, named inverse_fixed likewise (after the transform and its inverse). What is masked counts in no ncc;
            of contrast "any" they are of the moving brain in the fixed one's.
        seconds: Seconds of each part.
        remarks: Remarks made on the way, and on what about the scans or the result is hardly right.
    """

    map: ScanMap
    files: dict[str, Path]
    measures: dict[str, float]
    seconds: dict[str, float]
    remarks: list[str] = field(default_factory=list)


class _Progress:
    """A bar with the time that is left, by the usual seconds of each part; and what each part took."""

    def __init__(self, parts: Sequence[str], show: bool) -> None:
        total = sum(USUAL_SECONDS[part] for part in parts)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} to go"
        self.bar = tqdm(total=total, smoothing=0, bar_format=form, disable=not show)
        self.seconds: dict[str, float] = {}
        self._begun = 0.0

    def advance(self, part: str, share: float = 1.0) -> None:
        """Say that a share of a part is done."""
        self._advance_to(self.bar.n + share * USUAL_SECONDS[part])

    def _advance_to(self, place: float) -> None:
        self.bar.update(max(0.0, min(place, self.bar.total) - self.bar.n))

    def timed(self, name: str, part: str, work: Callable):
        """The result of a part's work, which may advance the bar itself; what it has not, is done when it is."""
        self.bar.set_description_str(name.replace("_", " "))
        end, started = self.bar.n + USUAL_SECONDS[part], time.perf_counter()
        found = work()
        self.seconds[name] = round(time.perf_counter() - started, 2)
        self._advance_to(end)
        return found


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
    fast: bool = False,
    contrast: str = "t1",
    fixed_mask: str | Path = "",
    moving_mask: str | Path = "",
    displacements: bool = False,
    bids: bool = False,
    overwrite: bool = False,
) -> Registration:
    """Register two scans and write the results in the spaces of both.

    The files, in `out`:

    * `warped.nii.gz`: the moving scan on the fixed scan's grid, interpolated once, in its own units;
      `warped_fixed.nii.gz`: the fixed scan on the moving scan's grid, by the inverse;
    * `transform.nii.gz`: the displacement field of ITK and ANTs on the fixed scan's grid, in mm, LPS, affine included:
      ``antsApplyTransforms -t``; where the scan's axes are not at right angles, on a grid of right angles that covers
      it. `inverse_transform.nii.gz`: its inverse, on the moving scan's grid or a finer one, see :func:`inverse_grid`;
    * `jacobian.nii.gz`: determinant of the whole map on the fixed scan's grid: volume of the moving scan per volume of
      the fixed one, affine included;
    * `qc.png`, `qc.pdf`: the page to look at; `registration.json`: measures, remarks, timings, provenance;
    * on demand `displacement.nii.gz` and `inverse_displacement.nii.gz`: the same as the transforms, ``(D, H, W, 3)`` in
      voxels of the grid (Learn2Reg's layout).

    Without `weights`, `run`, `method` and `pretrained` the best packaged weights are taken, see
    :func:`lumirlib.training.registrar.default_registrar`. What is masked is filled from the other brain
    (:class:`lumirlib.methods.masks.Filled`).

    Args:
        fixed: NIfTI file of a head, any orientation and spacing.
        moving: NIfTI file of another head, any orientation and spacing.
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
        progress: Whether to show a progress bar, with the time that is left.
        command: Command for the provenance.
        pretrained: Name of weights that the package carries, see :func:`choose_registrar`.
        fast: Whether the packaged weights work at 2 mm in place of 1 mm, where nothing else is chosen.
        contrast: Contrast of the scans: "t1", or "any" for others, and for two that differ; then the moving scan is
            given to the method in the fixed one's contrast, so of a T1 and another scan the T1 should be fixed.
        fixed_mask: NIfTI file on the fixed scan's grid, not zero where it is not to count (lesion, resection).
        moving_mask: NIfTI file on the moving scan's grid, the same.
        displacements: Whether to write the displacements in voxels too.
        bids: Whether to name the files as derivatives of BIDS; scans need names of BIDS.
        overwrite: Whether files that are there may be replaced.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as :func:`choose_registrar` and
            :func:`lumirlib.scans.prepare.prepare_scan`; masks of another grid.
        FileExistsError: a result is there already.
        OSError: `out` cannot be written.

    What can be told from the files alone is told before anything is prepared.
    """
    check_choice(contrast, CONTRASTS, "contrast")
    if any((weights, run, method, pretrained)):
        if fast:
            raise ValueError("fast goes with the packaged weights; with a choice of your own give the resolution")
        registrar = choose_registrar(weights, run, method, results, resolution_mm, device, pretrained)
    else:
        if fast and resolution_mm is not None:
            raise ValueError(f"fast is a resolution of 2 mm; got a resolution of {resolution_mm} mm besides")
        registrar = default_registrar(fast, device, resolution_mm)
    target, out = pick_device(device), Path(out)
    paths = Path(fixed), Path(moving)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such NIfTI file: {path}")
    names = _bids_names(*paths, out) if bids else {kind: out / name for kind, name in (FILES | DISPLACEMENTS).items()}
    names = names if displacements else {kind: path for kind, path in names.items() if kind not in DISPLACEMENTS}
    for path in names.values():
        check_new(path, overwrite)
    if bids:
        check_derivative(out)
    skips = [check_skip({*skip, *own}) for own in (skip_fixed, skip_moving)]
    for steps in skips:
        check_tools(steps)
    read: list[Scan] = []
    remarks: list[str] = []
    for path, steps in zip(paths, skips, strict=True):
        with collected_warnings() as told:
            read.append(read_scan(path))
        remarks += [one.replace(str(path), path.name) for one in told]
        if "strip" in steps:
            with collected_warnings():  # told when it is prepared
                stripped_mask(read[-1])
    given_masks = {"--fixed-mask": (fixed_mask, fixed), "--moving-mask": (moving_mask, moving)}
    masks = [read_mask(mask, path, option) if mask else None for option, (mask, path) in given_masks.items()]
    parts = [*STEPS, *STEPS, "frame", "displacement", "forward", "inverse", "qc"]
    work = _Progress(parts, progress)
    with work.bar:
        scans: list[PreparedScan] = []
        for scan, steps in zip(read, skips, strict=True):
            work.bar.set_description_str(f"prepare {scan.path.name}")
            with collected_warnings() as told:
                scans.append(prepare_scan(scan, steps, target, work.advance, contrast))
            remarks += [one.replace(str(scan.path), scan.path.name) for one in told]
        for role, prepared in zip(("fixed", "moving"), scans, strict=True):
            work.seconds |= {f"{step}_{role}": spent for step, spent in prepared.seconds.items()}
        in_frame = work.timed("resample_to_frame", "frame", lambda: [prepared.in_frame for prepared in scans])
        left_out = [
            None if mask is None else prepared.mask_in_frame(mask) for mask, prepared in zip(masks, scans, strict=True)
        ]
        registrar = registrar.masked(*left_out)
        registrar = replace(registrar, method=for_contrast(registrar.method, contrast))
        displacement = work.timed("displacement", "displacement", lambda: registrar.displacement(*in_frame, target))
        whole = ScanMap(np.linalg.inv(scans[0].to_scan), displacement, registrar.resolution_mm, scans[1].to_scan)
        determinant = metrics.jacobian_determinant(whole.displacement_1mm())
        determinant *= float(np.linalg.det(whole.linear[:3, :3]))
        points = tuple(_points_in(prepared, INVERSE_POINTS) for prepared in scans)
        written = write_both(whole, *read, names, determinant, work, points)
        of_brain = written.jacobian[scans[0].mask]
        known = {"jacobian_min": float(of_brain.min()), "jacobian_max": float(of_brain.max())}
        known |= inverse_error(written.forward, written.inverse, *points)
        measures = work.timed(
            "qc",
            "qc",
            lambda: _check(whole, *scans, left_out, determinant, known, registrar.name, contrast, names["qc"]),
        )
    if not is_orthogonal(scans[0].scan.affine) or not is_orthogonal(scans[1].scan.affine):
        remarks.append(
            "the axes of a scan are not at right angles, which ITK and ANTs do not read; the transform that starts "
            "from it lies on a grid of right angles that covers it, and maps the same points"
        )
    remarks += _doubts(scans, measures, contrast)
    for remark in remarks:
        tqdm.write(f"remark: {remark}", file=sys.stderr)
    worked_on = target if isinstance(registrar.method, nn.Module) else torch.device("cpu")
    about = {
        "fixed": _about(scans[0]),
        "moving": _about(scans[1]),
        "method": registrar.name,
        "resolution_mm": registrar.resolution_mm,
        **registrar.facts,
        **getattr(registrar.method, "last_run", {}),
        "contrast": contrast,
        "masks": [Path(mask).name if mask else None for mask in (fixed_mask, moving_mask)],
        "affine_determinant": float(np.linalg.det(whole.linear[:3, :3])),
        "measures": measures,
        "remarks": remarks,
        "seconds": work.seconds,
        "command": command,
        "device": provenance.describe_device(worked_on),
        "commit": provenance.commit(),
        "written": provenance.now(),
        "versions": provenance.versions(),
    }
    write_json(names["report"], about)
    if bids:
        _write_bids(*paths, out, names)
    return Registration(whole, names, measures, work.seconds, remarks)


def read_mask(path: str | Path, scan: str | Path, option: str = "mask") -> torch.Tensor:
    """A mask of a scan, ``(1, 1, D, H, W)`` bool: what is not zero.

    Args:
        path: NIfTI file of the mask.
        scan: NIfTI file of the scan.
        option: Name of the option, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another grid than the scan's, or all or nothing masked.
    """
    shape, affine = read_grid(scan)

    def fits(sides: tuple[int, ...], own: np.ndarray) -> None:
        if sides != shape or not np.allclose(own, affine, atol=1e-3):
            mine, wanted = describe_grid(sides, own), describe_grid(shape, affine)
            same = ", elsewhere or turned" if mine == wanted else ""
            raise ValueError(f"{option} {path} must lie on the grid of {scan}, {wanted}; got {mine}{same}")

    found = torch.from_numpy(np.ascontiguousarray(read_volume(path, fits)[0] != 0))[None, None]
    if not found.any() or found.all():
        got = "all" if found.any() else "none"
        raise ValueError(f"{option} {path}: expected a mask of a part of the scan, got {got} of it")
    return found


def describe_grid(shape: Sequence[int], affine: np.ndarray) -> str:
    """A grid in short: sides, voxels in mm and orientation."""
    edges = " x ".join(f"{edge:.4g}" for edge in np.linalg.norm(affine[:3, :3], axis=0))
    codes = "".join(code or "?" for code in nib.aff2axcodes(affine))
    return f"{' x '.join(map(str, shape))} voxels of {edges} mm, {codes}"


def _doubts(scans: Sequence[PreparedScan], measures: Mapping[str, float], contrast: str) -> list[str]:
    """What is hardly right about two scans, or about their registration."""
    found = [
        f"{prepared.scan.path.name}: hardly a T1 brain; it {doubts}"
        for prepared in scans
        if contrast == "t1" and (doubts := likeness(prepared).doubts)
    ]
    fixed, moving = (prepared.scan for prepared in scans)
    if fixed.values.equal(moving.values) and np.allclose(fixed.affine, moving.affine, atol=1e-3):
        found.append("both scans have the same voxels in the same place: are they one file?")
    if contrast == "t1" and measures["ncc"] < MIN_NCC:
        found.append(f"the brains correlate {measures['ncc']:.3f} after the registration, below {MIN_NCC}")
    for brain in ("moving", "fixed"):
        if not (p99 := measures[f"inverse_{brain}_p99_mm"]) <= MAX_INVERSE_MM:
            found.append(
                f"transform and inverse lead back within {p99:.2f} mm at 99 % of the {brain} brain, expected "
                f"{MAX_INVERSE_MM} mm: the map folds, or the voxels are too coarse for it"
            )
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


def orthogonal_grid(
    shape: Sequence[int], affine: np.ndarray, edge_mm: float = np.inf
) -> tuple[tuple[int, ...], np.ndarray]:
    """Sides and affine of a grid of right angles that covers another, turned as that is, with voxels of its edges.

    Args:
        shape: Sides of the other grid in voxels.
        affine: Matrix 4 x 4 from its voxels to the world, in mm.
        edge_mm: Edge of a voxel in mm, at most.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if is_orthogonal(affine) and spacing.max() <= edge_mm:
        return tuple(shape), affine
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    directions = left @ right
    spacing = np.minimum(spacing, edge_mm)
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in shape])).reshape(3, -1)
    along = directions.T @ (affine[:3, :3] @ corners + affine[:3, 3:])
    new = np.eye(4)
    new[:3, :3] = directions * spacing
    new[:3, 3] = directions @ along.min(1)
    return tuple(int(side) for side in np.ceil((along.max(1) - along.min(1)) / spacing - 1e-6) + 1), new


def inverse_grid(
    forward: FieldMap, back: InverseMap, moving: Scan, in_fixed: torch.Tensor, in_moving: torch.Tensor
) -> tuple[tuple[int, ...], np.ndarray]:
    """Sides and affine of the grid that an inverse is written on: the moving scan's, or a finer one.

    Between its voxels an inverse is interpolated, and where the map is steep that is not enough. What it would be on a
    grid is computed at some points, and the voxels are made smaller until it is good enough.

    Args:
        forward: Transform as it is written.
        back: Inverse of it.
        moving: Moving scan.
        in_fixed: World points ``(1, 3, N)`` of the fixed brain.
        in_moving: World points ``(1, 3, N)`` of the moving brain.
    """
    points = in_fixed[..., :GUESSED_POINTS], in_moving[..., :GUESSED_POINTS]
    edge = float(moving.spacing_mm.max())
    while True:
        shape, affine = orthogonal_grid(moving.shape, moving.affine, edge)
        found = inverse_error(forward, GriddedMap(back, affine), *points)
        worst = max(found["inverse_fixed_p99_mm"], found["inverse_moving_p99_mm"]) / (ENOUGH * MAX_INVERSE_MM)
        if worst <= 1 or not np.isfinite(worst) or edge <= MIN_INVERSE_EDGE_MM:
            return shape, affine
        edge = max(MIN_INVERSE_EDGE_MM, edge * float(np.clip(1 / worst, 0.5, 0.9)))


@dataclass(frozen=True)
class Written:
    """What :func:`write_both` has written.

    Attributes:
        forward: Transform.
        inverse: Its inverse.
        jacobian: Determinant of the map on the fixed scan's grid, ``(1, 1, D, H, W)``.
    """

    forward: FieldMap
    inverse: FieldMap
    jacobian: torch.Tensor


def write_both(
    whole: ScanMap,
    fixed: Scan,
    moving: Scan,
    names: Mapping[str, Path],
    determinant: torch.Tensor,
    work: _Progress | None = None,
    points: Sequence[torch.Tensor] = (),
) -> Written:
    """Write images, transforms and what else lies on the grid of a scan.

    Args:
        whole: Map from the fixed scan's world to the moving scan's.
        fixed: Fixed scan.
        moving: Moving scan.
        names: Path of each kind of file, see :data:`FILES`; displacements are written where they have one.
        determinant: Determinant of the map's Jacobian in the frame at 1 mm, ``(1, 1, 160, 224, 192)``.
        work: Progress to tell.
        points: World points ``(1, 3, N)`` of the fixed brain and of the moving one, at which the inverse has to be good
            enough, see :func:`inverse_grid`; without them it is written on the moving scan's grid.
    """
    work = work or _Progress(list(USUAL_SECONDS), False)
    grid = orthogonal_grid(fixed.shape, fixed.affine)
    forward = work.timed(
        "forward",
        "forward",
        lambda: _write_direction(whole, fixed, moving, grid, names, "", "warped", work, "forward"),
    )
    found = torch.empty(1, 1, *fixed.shape)
    to_frame = np.linalg.inv(frame_affine(1)) @ whole.fixed_to_frame
    for planes, points_ in world_slabs(fixed.shape, fixed.affine):
        found[:, :, planes] = sample_at(determinant, transform(to_frame, points_)).float()
    write_nifti(names["jacobian"], found[0, 0].numpy(), fixed.affine)
    back = InverseMap(WrittenMap(forward, whole))  # what is written undoes what is written

    def inverted() -> FieldMap:
        onto = inverse_grid(forward, back, moving, *points) if points else orthogonal_grid(moving.shape, moving.affine)
        return _write_direction(back, moving, fixed, onto, names, "inverse_", "warped_fixed", work, "inverse")

    return Written(forward, work.timed("inverse", "inverse", inverted), found)


def _write_direction(
    by: WorldMap,
    onto: Scan,
    of: Scan,
    grid: tuple[tuple[int, ...], np.ndarray],
    names: Mapping[str, Path],
    prefix: str,
    warped: str,
    work: _Progress,
    part: str,
) -> FieldMap:
    """Write a transform on a grid, and one scan as it brings it onto the grid of the other; the transform."""
    field_ = _rounded(field_on(by, *grid, lambda share: work.advance(part, share)))
    array = field_.displacement[0].movedim(0, -1).numpy() @ field_formats.RAS_TO_LPS.astype(np.float32)
    about = made_for(onto.shape, onto.affine, made_for(of.shape, of.affine))
    write_nifti(names[f"{prefix}transform"], array[:, :, :, None], field_.affine, intent="vector", description=about)
    del array
    own = field_ if grid[1] is onto.affine else field_on(WrittenMap(field_, by), onto.shape, onto.affine)
    background = background_value(of.values)
    outside = float(of.values.min()) if background is None else background
    image = carry(of.values[0, 0].numpy(), in_voxels(own, of.affine), "linear", outside)
    write_nifti(names[warped], image, onto.affine)
    if f"{prefix}displacement" in names:
        of_grid = in_voxels(own, onto.affine)
        write_nifti(names[f"{prefix}displacement"], np.round(of_grid * FINEST) / FINEST, onto.affine)
    return field_


def _rounded(field_: FieldMap) -> FieldMap:
    """A field whose numbers have fewer digits, so that its file is smaller by a third."""
    return replace(field_, displacement=(field_.displacement * FINEST).round_().div_(FINEST))


def _points_in(prepared: PreparedScan, count: int) -> torch.Tensor:
    """World points ``(1, 3, count)`` of a brain, anywhere in its voxels, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.nonzero(prepared.mask[0, 0])
    chosen = inside[torch.randint(len(inside), (count,), generator=generator)]
    within = torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5
    return transform(prepared.scan.affine, (chosen + within).T[None])


def inverse_error(
    forward: WorldMap, inverse: WorldMap, in_fixed: torch.Tensor, in_moving: torch.Tensor
) -> dict[str, float]:
    """How well two transforms, as they are written, undo each other, in mm.

    Args:
        forward: Transform from the fixed scan to the moving one.
        inverse: Its inverse.
        in_fixed: World points ``(1, 3, N)`` of the fixed brain.
        in_moving: World points ``(1, 3, N)`` of the moving brain.

    Returns:
        Of each brain (moving: inverse first; fixed: transform first) the median, 99th percentile and maximum of how far
        from where it was a point is led, and the percentage of points that are led out of the other scan.
    """
    found: dict[str, float] = {}
    ways = {"moving": (in_moving, inverse, forward), "fixed": (in_fixed, forward, inverse)}
    for brain, (points, first, then) in ways.items():
        there = first(points)
        known = there.isfinite().all(1, keepdim=True)
        there = there.nan_to_num()
        known &= then.defined(there)
        error = (then.extended(there) - points).norm(dim=1)[known[:, 0]].numpy()
        of_error = np.percentile(error, (50, 99, 100)).round(5).tolist() if error.size else [np.inf] * 3
        found |= {f"inverse_{brain}_{name}_mm": x for name, x in zip(("p50", "p99", "max"), of_error, strict=True)}
        found[f"inverse_{brain}_outside_percent"] = round(100 * float(1 - known.double().mean()), 4)
    return found


def _check(
    whole: ScanMap,
    fixed: PreparedScan,
    moving: PreparedScan,
    left_out: Sequence[torch.Tensor | None],
    determinant: torch.Tensor,
    known: Mapping[str, float],
    method: str,
    contrast: str,
    page: Path,
) -> dict[str, float]:
    """Measures of a registration in the frame at 1 mm, beside those that are known, and its QC page with all."""
    import matplotlib.pyplot as plt

    from lumirlib.plots import save_figure
    from lumirlib.scans.qc import registration_figure

    image, brain = fixed.in_frame, fixed.in_frame > 0
    some = (..., *[slice(None, None, HEADERS_EVERY)] * 3)
    by_headers = moving.resampled(lambda points: transform(fixed.to_scan, points), HEADERS_EVERY)
    warped = as_cohort(moving.resampled(whole.from_frame), str(moving.scan.path))
    displacement = whole.displacement_1mm()
    of_fixed, of_moving = left_out
    carried = None if of_moving is None else spatial.warp(of_moving.float(), displacement) > 0

    def counting(*masks: torch.Tensor | None) -> torch.Tensor:
        found = torch.ones_like(brain)
        for mask in masks:
            found = found if mask is None else found & ~mask
        return found

    def local(image_: torch.Tensor, *masks: torch.Tensor | None) -> float:
        if all(mask is None for mask in left_out):
            return 1 - float(losses.ncc_loss(image_ / 255, image / 255))
        return 1 - float(losses.masked_ncc_loss(image_ / 255, image / 255, counting(*masks).float()))

    def alike(image_: torch.Tensor, to: torch.Tensor = image) -> torch.Tensor:
        """In the fixed image's contrast, if it may be another."""
        return match_contrast(image_, to) if contrast == "any" and ((to > 0) & (image_ > 0)).any() else image_

    moved, by_affine = alike(warped), alike(moving.in_frame)
    affine, both = brain & counting(of_fixed, of_moving), brain & counting(of_fixed, carried)
    measures = {
        "ncc_headers": correlation(alike(by_headers, image[some]), image[some], (brain & counting(of_fixed))[some]),
        "ncc_affine": correlation(by_affine, image, affine),
        "ncc": correlation(moved, image, both),
        "local_ncc_affine": local(by_affine, of_fixed, of_moving),
        "local_ncc": local(moved, of_fixed, carried),
        "ndv_percent": metrics.ndv_percent(displacement, brain),
        **known,
    }
    title = f"{method} at {whole.resolution_mm} mm: {moving.scan.name} onto {fixed.scan.name}"
    notes = explained(measures)
    outlined = of_fixed, of_moving, carried
    if any(mask is not None for mask in outlined):
        notes += "\nOrange: what a mask leaves out. The planes go through its middle."
    if contrast == "any":
        notes += "\nNCC, checkerboard and overlay are of the moving brain in the fixed one's contrast."
    figure = registration_figure(
        image, moving.in_frame, warped, displacement, determinant, title, notes, outlined, compared=moved
    )
    save_figure(figure, page.with_suffix(""), data=False)
    plt.close(figure)
    return {name: round(value, 6) for name, value in measures.items()}


def explained(measures: Mapping[str, float]) -> str:
    """What the measures of a registration mean, a line each."""
    m = measures
    return "\n".join(
        (
            "NCC, how alike the brains' brightness is inside the fixed brain, 1 at best: "
            f"{m['ncc_headers']:.3f} as the headers place them, {m['ncc_affine']:.3f} after the affine, {m['ncc']:.3f} "
            f"registered. Local NCC, squared, in windows of 9 mm: {m['local_ncc_affine']:.3f} after the affine, "
            f"{m['local_ncc']:.3f} registered.",
            f"Folds, where the map turns tissue inside out: {m['ndv_percent']:.4f} % of the fixed brain; 0 at best.",
            "Jacobian, volume in the moving scan per volume in the fixed one, affine included: "
            f"{m['jacobian_min']:.2f} to {m['jacobian_max']:.2f} in the fixed brain; 1 keeps a volume, below 0 is a "
            "fold.",
            "Inverse error, how far from where it was a point is after one transform and then the other: 99 % of the "
            f"moving brain within {m['inverse_moving_p99_mm']:.2f} mm, of the fixed brain within "
            f"{m['inverse_fixed_p99_mm']:.2f} mm.",
        )
    )


# BIDS -----------------------------------------------------------------------------------------------------------------
def _bids_names(fixed: Path, moving: Path, out: Path) -> dict[str, Path]:
    """Path of each kind of file as BIDS names derivatives; an image stands with its own person."""
    to, of = BidsName.of(fixed), BidsName.of(moving)
    if to.label == of.label:
        raise ValueError(f"{fixed} and {moving}: expected names of BIDS that differ in a person, session or other part")
    there, back = {"space": to.label}, {"space": of.label}
    page = of.with_(**there, desc="registered")
    return {
        "warped": out / of.with_(**there, desc="warped").file(),
        "warped_fixed": out / to.with_(**back, desc="warped").file(),
        "transform": out / of.with_("xfm", **{"from": of.label, "to": to.label}, mode="image").file(),
        "inverse_transform": out / to.with_("xfm", **{"from": to.label, "to": of.label}, mode="image").file(),
        "jacobian": out / of.with_(**there, desc="jacobian").file(),
        "displacement": out / of.with_("xfm", **{"from": of.label, "to": to.label}, mode="image", desc="voxels").file(),
        "inverse_displacement": out
        / to.with_("xfm", **{"from": to.label, "to": of.label}, mode="image", desc="voxels").file(),
        "qc": out / "figures" / f"{page.stem}.png",
        "report": out / "logs" / f"{page.stem}.json",
    }


def _write_bids(fixed: Path, moving: Path, out: Path, names: Mapping[str, Path]) -> None:
    """Description and sidecars of :func:`_bids_names`."""
    name = {fixed: BidsName.of(fixed), moving: BidsName.of(moving)}
    roots = {path: root_of(path, one) for path, one in name.items()}
    write_description(out, roots.values(), "lumirlib register")
    source = {roots[fixed]: "raw"} | {roots[moving]: "raw2" if roots[moving] != roots[fixed] else "raw"}
    uri = {path: f"bids:{source[roots[path]]}:{one.file(_ending(path)).as_posix()}" for path, one in name.items()}
    words = {
        "warped": (moving, fixed, "The moving scan on the fixed scan's grid, interpolated once."),
        "warped_fixed": (fixed, moving, "The fixed scan on the moving scan's grid, interpolated once."),
        "jacobian": (moving, fixed, "Determinant of the map's Jacobian: volume of the moving scan per volume here."),
    }
    for kind, (of, onto, description) in words.items():
        sources = {"Sources": [uri[of], uri[onto]], "SpatialReference": uri[onto]}
        write_sidecar(names[kind], {"Description": description, **sources, "SkullStripped": False})
    for kind in ("transform", "inverse_transform", "displacement", "inverse_displacement"):
        if kind in names:
            unit = "voxels, Learn2Reg's layout" if "displacement" in kind else "mm, LPS, as ITK and ANTs have it"
            write_sidecar(names[kind], {"Description": f"Displacement field in {unit}.", "Sources": list(uri.values())})


def _ending(path: Path) -> str:
    return ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"
