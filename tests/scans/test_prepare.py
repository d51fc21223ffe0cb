"""Scans from a scanner to the LUMIR frame."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import preparation
import pytest
import torch
from scipy.ndimage import map_coordinates

from lumirlib import cli
from lumirlib.data.frame import FRAME_SHAPE, frame_affine, template_in_frame
from lumirlib.data.nifti import write_nifti
from lumirlib.scans import prepare
from lumirlib.scans.scan import Scan, as_scanned, read_scan, sample_world, transform

RAMP = (0.7, -0.4, 0.25, 60.0)  # along world x, y, z, and at the origin


def ramp_scan(tmp_path, orientation="LIA", rotation=(10.0, -15.0, 20.0)):
    """A scan whose value is a linear function of its world, which trilinear interpolation keeps."""
    empty = torch.zeros(1, 1, 20, 22, 24)
    shape_of, affine, _ = as_scanned(empty, np.diag([2.0, 2, 2, 1]), rotation, (3, 4, 5), orientation)
    grid = np.stack(np.meshgrid(*map(np.arange, shape_of.shape), indexing="ij"), -1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    path = tmp_path / f"{orientation}.nii.gz"
    write_nifti(path, (world @ RAMP[:3] + RAMP[3]).astype(np.float32), affine)
    return read_scan(path)


def ramp(points):
    return sum(weight * points[:, axis] for axis, weight in enumerate(RAMP[:3])) + RAMP[3]


def points_inside(scan, margin=1, count=200):
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(1, 3, count, 1, 1, generator=generator, dtype=torch.float64)
    voxels = margin + share * (torch.tensor(scan.shape).view(1, 3, 1, 1, 1) - 1 - 2 * margin)
    return transform(scan.affine, voxels)


def small_brain():
    """The template as a scan of 4 mm voxels, (image, affine), a brain of the true size in few voxels."""
    return template_in_frame(4) * 900, frame_affine(4)


@pytest.mark.parametrize("orientation", ["RAS", "LIA", "PSR", "ASL"])
def test_values_stand_at_their_place_in_the_world_whatever_the_order_of_the_axes(tmp_path, orientation):
    scan = ramp_scan(tmp_path, orientation)
    assert nib.aff2axcodes(scan.affine) == tuple(orientation) or orientation not in ("RAS", "LIA")
    points = points_inside(scan)
    values = sample_world(scan.values, scan.affine, points)
    torch.testing.assert_close(values[:, 0].double(), ramp(points), atol=1e-3, rtol=0)


def test_affine_of_the_preparation_and_that_of_the_file_are_joined_exactly(tmp_path):
    scan = ramp_scan(tmp_path)
    to_scan = np.array([[1.1, 0.1, 0, 3], [-0.1, 0.9, 0.05, -2], [0, 0.02, 1.05, 1], [0, 0, 0, 1]])
    prepared = prepare.PreparedScan(scan, scan.values, torch.ones_like(scan.values, dtype=torch.bool), to_scan, ())
    in_scan = points_inside(scan, margin=6)  # at the border a spline is level
    in_frame = transform(np.linalg.inv(to_scan), in_scan)
    by_hand = ramp(
        torch.einsum("ab,nbdhw->nadhw", torch.tensor(to_scan[:3, :3]), in_frame)
        + torch.tensor(to_scan[:3, 3]).view(1, 3, 1, 1, 1)
    ).clamp(min=0)
    found = prepared.brain_at(transform(to_scan, in_frame))[:, 0].double()
    torch.testing.assert_close(found, by_hand, atol=1e-2, rtol=0)


def test_detail_between_voxels_is_kept_and_no_voxel_of_the_brain_becomes_background():
    side = torch.arange(24.0)
    fine = 100 + 80 * torch.sin(2 * torch.pi * side / 4 + 0.4)  # a wave of four voxels
    values = fine.view(1, 1, 24, 1, 1).expand(1, 1, 24, 24, 24).contiguous()
    values[0, 0, 12, 12, 12] = 0.5  # a spline through this one falls below zero beside it
    mask = torch.ones_like(values, dtype=torch.bool)
    prepared = prepare.PreparedScan(Scan(Path("wave"), values, np.eye(4)), values, mask, np.eye(4), ())
    between = torch.tensor([[x + 0.5, 5.0, 5.0] for x in range(6, 18)]).double().T.reshape(1, 3, -1, 1, 1)
    truth = 100 + 80 * torch.sin(2 * torch.pi * between[0, 0].flatten() / 4 + 0.4)
    error = (prepared.brain_at(between).flatten() - truth).abs().max()
    by_lines = (sample_world(values, np.eye(4), between).flatten() - truth).abs().max()
    assert error < 0.3 * by_lines
    around = points_inside(prepared.scan, margin=10, count=5000)
    assert (prepared.brain_at(around) > 0).all()


def test_scan_that_lies_on_the_frame_is_not_interpolated(tmp_path):
    generator = np.random.default_rng(0)
    image = np.zeros(FRAME_SHAPE, np.uint8)
    image[40:120, 50:170, 40:140] = generator.integers(1, 256, (80, 120, 100))
    write_nifti(tmp_path / "a.nii.gz", image, frame_affine(1))
    found = prepare.prepare_scan(tmp_path / "a.nii.gz", prepare.STEPS).in_frame
    assert found.shape == (1, 1, *FRAME_SHAPE)
    expected = np.clip(np.rint(image * (255 / np.percentile(image[image > 0], 99.9))), 0, 255)
    np.testing.assert_array_equal(found[0, 0].numpy(), expected)


def test_intensities_are_those_of_the_cohorts():
    values = torch.zeros(1, 1, 10, 10, 20)
    values[..., :10] = torch.linspace(0.001, 700, 1000).reshape(10, 10, 10)
    found = prepare.as_cohort(values, "a scan")
    assert (found == 0).sum() == 1000 and found[values > 0].min() == 1  # the brain is never zero
    assert found.max() == 255 and torch.equal(found, found.round())
    assert np.percentile(found[found > 0].numpy(), 99.9) == 255
    with pytest.raises(ValueError, match="a scan: no brain lies in the LUMIR frame"):
        prepare.as_cohort(torch.zeros(1, 1, 4, 4, 4), "a scan")


def test_pose_of_a_head_is_found(tmp_path):
    pytest.importorskip("SimpleITK")
    image, affine = small_brain()
    array, seen_affine, pose = as_scanned(image, affine, (12, -9, 14), (9, -12, 15), "LIA", (3.5, 5.0, 4.0))
    write_nifti(tmp_path / "a.nii.gz", array, seen_affine)
    scan = read_scan(tmp_path / "a.nii.gz")
    found = prepare.affine_to_frame(scan.values, prepare.stripped_mask(scan), scan.affine)
    brain = torch.nonzero(template_in_frame(4)[0, 0] > 0.02).T.reshape(1, 3, -1, 1, 1)
    places = transform(affine, brain)
    apart = (transform(found, places) - transform(pose, places)).norm(dim=1)
    assert apart.mean() < 0.8  # voxels are of 4 mm; the search starts 15 mm and more from there


def test_bias_field_is_taken_out(tmp_path, monkeypatch):
    pytest.importorskip("SimpleITK")
    monkeypatch.setattr(prepare, "BIAS_MM", 8)  # voxels are of 4 mm
    image, affine = small_brain()
    along = torch.linspace(-0.6, 0.6, image.shape[3]).exp().view(1, 1, 1, -1, 1)
    write_nifti(tmp_path / "a.nii.gz", (image * along)[0, 0].numpy(), affine)
    scan = read_scan(tmp_path / "a.nii.gz")
    mask = prepare.stripped_mask(scan)
    corrected = prepare.corrected_bias(scan, mask)
    white = image > 0.9 * image.max()

    def spread(values):
        return float(values[white].std() / values[white].mean())

    assert spread(scan.values) > 0.12 and spread(corrected) < 0.5 * spread(scan.values)


def test_brain_is_found_in_a_simulated_head(tmp_path):
    pytest.importorskip("deepbet")
    brain, affine = template_in_frame(2), frame_affine(2)
    shape = torch.nn.functional.max_pool3d
    filled = (brain > 0.02).float()
    inner, outer = shape(filled, 9, 1, 4), shape(shape(filled, 9, 1, 4), 7, 1, 3)
    head = brain * 800 + (outer - inner) * 600  # a bright shell around a dark gap, as scalp around skull
    array, seen, _ = as_scanned(head, affine, (0, 0, 8), (5, -5, 5), "PSR", (2.0, 2.5, 2.0))
    write_nifti(tmp_path / "head.nii.gz", array, seen)
    scan = read_scan(tmp_path / "head.nii.gz")
    truth = as_scanned(filled, affine, (0, 0, 8), (5, -5, 5), "PSR", (2.0, 2.5, 2.0))[0] > 0.5
    mask = prepare.brain_mask(scan)[0, 0].numpy()
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("flat", r"a\.nii\.gz: expected an image, got the constant"),
        ("thin", r"a\.nii\.gz: expected at least 8 voxels along each axis"),
        ("four", r"a\.nii\.gz: expected a 3-D volume"),
        ("nowhere", r"a\.nii\.gz: the header has no orientation"),
    ],
)
def test_scan_that_cannot_be_used_is_named_with_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "a.nii.gz"
    shape = {"thin": (9, 9, 3), "four": (9, 9, 9, 4)}.get(change, (9, 9, 9))
    array = np.full(shape, 3, np.float32) if change == "flat" else np.random.default_rng(0).random(shape, np.float32)
    image = nib.Nifti1Image(array, np.eye(4))
    if change == "nowhere":
        image.header["qform_code"], image.header["sform_code"] = 0, 0
        image = nib.Nifti1Image(array, None, image.header)
    nib.save(image, path)
    with pytest.raises(ValueError, match=message):
        read_scan(path)


def test_header_with_two_orientations_is_remarked(tmp_path):
    image = nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9), np.float32), np.eye(4))
    image.set_sform(np.diag([1, 1, 1, 1]), 1)
    image.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.warns(UserWarning, match="sform and qform differ"):
        read_scan(tmp_path / "a.nii.gz")


def test_head_whose_skull_is_not_stripped_cannot_skip_that(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).random((9, 9, 9), np.float32) + 1, np.eye(4))
    with pytest.raises(ValueError, match="expected a stripped brain on zero background"):
        prepare.prepare_scan(tmp_path / "a.nii.gz", ["strip"])


def z_scored(image, background=0.0):
    """An image with mean 0 and standard deviation 1 inside the brain, on a constant background."""
    brain = image > 0
    inside = (image - image[brain].mean()) / image[brain].std()
    return torch.where(brain, inside, torch.tensor(background))


@pytest.mark.parametrize("background", [0.0, -5.0])
def test_no_voxel_of_a_z_scored_brain_is_lost(tmp_path, background):
    image, affine = small_brain()
    write_nifti(tmp_path / "plain.nii.gz", image[0, 0].numpy(), affine)
    write_nifti(tmp_path / "z.nii.gz", z_scored(image, background)[0, 0].numpy(), affine)
    plain = prepare.prepare_scan(tmp_path / "plain.nii.gz", prepare.STEPS)
    with pytest.warns(UserWarning, match=r"z\.nii\.gz: values in the brain go from -.* was added to all"):
        signed = prepare.prepare_scan(tmp_path / "z.nii.gz", prepare.STEPS)
    assert (z_scored(image)[image > 0] < 0).float().mean() > 0.3
    assert torch.equal(signed.mask | (image == 0), torch.ones_like(signed.mask))
    assert signed.brain_ml == pytest.approx(plain.brain_ml, rel=0.01)  # zeros that the brain encloses belong to it
    assert (signed.in_frame > 0).sum() >= (plain.in_frame > 0).sum()
    assert (signed.in_frame - plain.in_frame).abs().mean() < 2


def test_a_brain_whose_darkest_tissue_alone_is_negative_keeps_it(tmp_path):
    image, affine = small_brain()
    dark = torch.where(image > 0, image - 0.2 * image.max(), 0.0)
    share = float((dark < 0).sum() / (image > 0).sum())
    write_nifti(tmp_path / "a.nii.gz", dark[0, 0].numpy(), affine)
    with pytest.warns(UserWarning, match="was added to all"):
        found = prepare.prepare_scan(tmp_path / "a.nii.gz", prepare.STEPS)
    assert 0.01 < share < 0.3 and found.mask[image > 0].all()
    assert (found.in_frame[torch.nn.functional.interpolate(image, scale_factor=4) > 0] > 0).float().mean() > 0.99


def test_what_interpolation_leaves_around_a_brain_is_background_and_said(tmp_path):
    image, affine = small_brain()
    filled = (image > 0).float()
    rim = torch.nn.functional.max_pool3d(filled, 3, 1, 1) - filled
    write_nifti(tmp_path / "a.nii.gz", (image - 5 * rim)[0, 0].numpy(), affine)
    write_nifti(tmp_path / "plain.nii.gz", image[0, 0].numpy(), affine)
    with pytest.warns(UserWarning, match="voxels below zero at the rim of the brain"):
        found = prepare.prepare_scan(tmp_path / "a.nii.gz", prepare.STEPS)
    plain = prepare.prepare_scan(tmp_path / "plain.nii.gz", prepare.STEPS)
    assert torch.equal(found.mask, plain.mask)


def test_negative_values_without_a_constant_background_are_refused(tmp_path):
    noise = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    write_nifti(tmp_path / "a.nii.gz", noise, np.eye(4))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: expected a stripped brain on a constant background"):
        prepare.prepare_scan(tmp_path / "a.nii.gz", ["strip"])


def test_single_negative_voxels_of_a_head_are_dark_and_not_background(tmp_path):
    values = torch.full((1, 1, 12, 12, 12), 100.0)
    values[..., 6, 6, 6] = -3
    scan = Scan(tmp_path / "a.nii.gz", values, np.eye(4))
    with pytest.warns(UserWarning, match="the 1 voxels below zero were set to"):
        found = prepare.above_zero(scan, torch.ones_like(values, dtype=torch.bool))
    assert found[..., 6, 6, 6] == pytest.approx(100 / 255) and (found == 100).sum() == 12**3 - 1


def test_a_signed_head_is_above_zero_wherever_the_brain_is():
    values = torch.linspace(-2, 2, 1000).reshape(1, 1, 10, 10, 10)
    mask = values > -1.5
    with pytest.warns(UserWarning, match="was added to all"):
        found = prepare.above_zero(Scan(Path("a.nii.gz"), values, np.eye(4)), mask)
    assert found[mask].min() > 0 and found.min() == 0
    step = found[mask].diff()
    torch.testing.assert_close(step[5:], torch.full_like(step[5:], 4 / 999), atol=1e-5, rtol=0)


def test_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    image, affine = small_brain()
    write_nifti(tmp_path / "scans" / "a.nii.gz", image[0, 0].numpy(), affine)
    arguments = [str(tmp_path / "scans"), "--out", str(tmp_path / "out"), "--skip", "strip"]
    assert cli.main(["prepare", *arguments]) == 2
    assert 'SimpleITK, which is not installed: pip install "lumirlib[prepare]"' in capsys.readouterr().err
    with pytest.raises(ValueError, match="skip must be one of strip, bias, affine; got 'skull'"):
        prepare.check_skip(["skull"])


def test_the_recipe_of_the_organizers_interpolates_twice_cuts_at_a_percentile_and_lets_the_rim_fade(
    tmp_path, monkeypatch
):
    pytest.importorskip("SimpleITK")
    monkeypatch.setattr(prepare, "TEMPLATE_MM", 4)
    image, affine = small_brain()
    array, seen, _ = as_scanned(image, affine, (4, -3, 5), (3, -4, 5), "LIA", (3.5, 5.0, 4.0))
    array[array > 0] += 20
    array[20, 20, 20] = 30000  # a vessel
    write_nifti(tmp_path / "a.nii.gz", array, seen)
    prepared = prepare.prepare_scan(tmp_path / "a.nii.gz", ["strip", "bias"], recipe="lumir")
    # by hand: 99.9th percentile of what is above zero, spline of order 2, then linear
    brain = np.clip(array / np.percentile(array[array > 0], 99.9), 0, 1)
    fine = map_coordinates(
        brain,
        np.meshgrid(
            *[np.linspace(0, n - 1, round(n * mm)) for n, mm in zip(brain.shape, (3.5, 5, 4), strict=True)],
            indexing="ij",
        ),
        order=2,
        prefilter=False,
    )
    grid = np.stack(np.meshgrid(*map(np.arange, (160, 224, 192)), indexing="ij")).reshape(3, -1)[:, ::97]
    world = prepared.to_scan @ frame_affine(1) @ np.vstack([grid, np.ones(grid.shape[1])])
    places = (np.linalg.inv(seen) @ world)[:3].T * (np.array(fine.shape) - 1) / (np.array(brain.shape) - 1)
    expected = map_coordinates(fine, places.T, order=1)
    found = prepared.in_frame[0, 0].numpy()
    np.testing.assert_allclose(found[tuple(grid)], 255 * expected, atol=0.52)
    assert np.array_equal(found, np.rint(found)) and found.min() >= 0 and 240 < found.max() <= 255
    direct = replace(prepared, recipe="direct").in_frame[0, 0].numpy()
    dim = [((image > 0) & (image < 20)).mean() for image in (found, direct)]
    assert dim[0] > 1.5 * dim[1]  # the rim
    # the affine of least squares comes out near that of the correlation
    other = prepare.prepare_scan(tmp_path / "a.nii.gz", ["strip", "bias"])
    points = transform(frame_affine(4), torch.nonzero(template_in_frame(4)[0, 0] > 0.02).T[None].double())
    assert (transform(prepared.to_scan, points) - transform(other.to_scan, points)).norm(dim=1).mean() < 2
    assert not np.array_equal(prepared.to_scan, other.to_scan)
    with pytest.raises(ValueError, match="recipe"):
        prepare.prepare_scan(tmp_path / "a.nii.gz", recipe="lumir2")


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_neither_recipe_changes_dice_of_real_brains_by_a_point():
    pytest.importorskip("SimpleITK")
    table = preparation.dice_of(Path(os.environ["LUMIR_BRAINS"]), preparation.PEOPLE[:2])
    means = table.groupby("preparation")["dice_percent"].mean()
    assert means[preparation.FRAME] > 60
    for recipe in prepare.RECIPES:
        assert abs(means[recipe] - means[preparation.FRAME]) < 1
