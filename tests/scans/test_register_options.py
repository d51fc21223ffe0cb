"""Registering without a choice, with masks, of any contrast."""

import json
import os
from dataclasses import replace
from pathlib import Path

import holes
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lumirlib import cli, spatial
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_nifti, read_volume, write_nifti
from lumirlib.methods.contrast import for_contrast
from lumirlib.scans import maps, register
from lumirlib.scans.prepare import STEPS
from lumirlib.scans.qc import PLANES, plane_of, registration_figure
from lumirlib.scans.scan import as_scanned, read_scan, transform
from lumirlib.training.registrar import DEFAULT_WEIGHTS, choose_registrar, default_registrar

pytest.importorskip("SimpleITK")


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Two brains of 4 mm that differ by a wave; no page is drawn."""
    monkeypatch.setattr("lumirlib.plots.save_figure", lambda figure, path, data: None)
    template = template_in_frame(4)
    paths = []
    for number, (moved, turn) in enumerate(((template, 0), (spatial.warp(template, wave(0.5)), 4))):
        array, affine, _ = as_scanned(moved, frame_affine(4), (turn, 0, -turn), spacing_mm=(4, 5, 4))
        paths.append(write_nifti(tmp_path / f"sub-0{number}_T1w.nii.gz", array, affine))
    return [str(path) for path in paths]


def wave(size, shape=(40, 56, 48)):
    generator = torch.Generator().manual_seed(3)
    return spatial.resize(torch.randn(1, 3, 4, 5, 5, generator=generator) * size, shape)


def test_without_a_choice_the_best_packaged_weights_work_at_1_mm_or_2(scans, tmp_path, capsys):
    assert default_registrar(device="cpu").resolution_mm == 1
    assert default_registrar(fast=True, device="cpu").resolution_mm == 2
    out = tmp_path / "out"
    arguments = [*scans, "--out", str(out), "--skip", *STEPS, "--fast", "--device", "cpu"]
    assert cli.main(["register", *arguments]) == 0
    told = capsys.readouterr()
    assert f"packaged weights {DEFAULT_WEIGHTS}-2mm, on voxels of 2 mm, as in training" in told.out
    assert "to go" in told.err and "Warning" not in told.err
    report = json.loads((out / "registration.json").read_text())
    measures = report["measures"]
    assert report["resolution_mm"] == 2 and measures["ncc"] > measures["ncc_affine"]
    assert measures["inverse_moving_outside_percent"] < 1 and measures["inverse_fixed_outside_percent"] < 1
    # transform and inverse lead back between voxels too, both ways, for which the inverse's are finer than the scan's
    forward, inverse = (maps.read_transform(out / f"{name}transform.nii.gz") for name in ("", "inverse_"))
    for brain, scan, first, then in (("fixed", scans[0], forward, inverse), ("moving", scans[1], inverse, forward)):
        values, affine = read_volume(scan)
        inside = np.argwhere(values > 0) + np.random.default_rng(1).random((np.count_nonzero(values > 0), 3)) - 0.5
        points = transform(affine, torch.from_numpy(inside.T[None]))
        p99 = float(np.nanpercentile((then(first(points)) - points).norm(dim=1), 99))
        assert 0.01 < p99 < register.MAX_INVERSE_MM
        assert measures[f"inverse_{brain}_p99_mm"] == pytest.approx(p99, rel=0.15)
    assert np.linalg.norm(inverse.affine[:3, :3], axis=0).max() < 4 == read_scan(scans[1]).spacing_mm.min()
    assert cli.main(["register", *arguments]) == 2
    assert "exists already; --overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["register", *arguments, "--method", "affine", "--overwrite"]) == 2
    assert "fast goes with the packaged weights" in capsys.readouterr().err
    # each image is what the transform makes of the other one, and the Jacobian is the transform's
    for image, by, grid, written in (
        (scans[1], "transform", scans[0], "warped"),
        (scans[0], "inverse_transform", scans[1], "warped_fixed"),
    ):
        done = ["apply", str(out / f"{by}.nii.gz"), image, "--out", str(tmp_path / "a.nii.gz"), "--overwrite"]
        assert cli.main([*done, "--reference", image]) == 2
        assert f"{image}: has the grid of the scan that {by}.nii.gz leads to" in capsys.readouterr().err
        assert cli.main([*done, "--reference", grid, "--inverse"]) == 2
        assert f"{grid}: has the grid of the scan that {by}.nii.gz inverted leads to" in capsys.readouterr().err
        assert cli.main([*done, "--reference", grid]) == 0 and not capsys.readouterr().err
        (found, affine), (carried, own) = (
            read_volume(one) for one in (out / f"{written}.nii.gz", tmp_path / "a.nii.gz")
        )
        np.testing.assert_allclose(found, carried, atol=0.01)
        np.testing.assert_allclose(affine, own, atol=1e-4)
    middle = np.eye(4)
    middle[:3, 3] = 12
    write_nifti(tmp_path / "other.nii.gz", np.zeros((9, 9, 9), np.uint8), read_volume(scans[0])[1] @ middle)
    done = ["apply", str(out / "transform.nii.gz"), scans[1], "--out", str(tmp_path / "a.nii.gz"), "--overwrite"]
    assert cli.main([*done, "--reference", str(tmp_path / "other.nii.gz")]) == 0
    assert "remark: other.nii.gz has another grid than the scan that transform.nii.gz leads" in capsys.readouterr().err
    jacobian, affine = read_volume(out / "jacobian.nii.gz")
    brain = read_volume(scans[0])[0] > 0
    for name, value in (("min", jacobian[brain].min()), ("max", jacobian[brain].max())):
        assert measures[f"jacobian_{name}"] == pytest.approx(value, abs=1e-5)
    u = read_nifti(out / "transform.nii.gz")[0][:, :, :, 0] * [-1, -1, 1]
    slopes = np.stack([np.gradient(u[..., axis], axis=(0, 1, 2)) for axis in range(3)], -1)
    slopes = np.moveaxis(slopes, 0, -1) @ np.linalg.inv(affine[:3, :3]) + np.eye(3)
    inner = tuple(slice(side // 3, -(side // 3)) for side in jacobian.shape)
    expected = np.linalg.det(slopes)
    assert np.corrcoef(jacobian[inner].ravel(), expected[inner].ravel())[0, 1] > 0.8
    assert jacobian[inner].mean() == pytest.approx(expected[inner].mean(), rel=0.05)


def test_masked_voxels_have_no_say_and_ask_for_no_displacement():
    fixed = template_in_frame(1).clone() * 255
    moving = torch.nn.functional.interpolate(spatial.warp(template_in_frame(4), wave(0.6)), scale_factor=4.0) * 255
    registrar = choose_registrar(pretrained=DEFAULT_WEIGHTS, resolution_mm=4, device="cpu")
    masks = [torch.zeros(1, 1, 160, 224, 192, dtype=torch.bool) for _ in range(2)]
    masks[0][..., 60:84, 100:124, 80:100] = True
    masks[1][..., 70:106, 60:110, 60:90] = True  # the two overlap
    masked, found = registrar.masked(*masks), []
    for value in (0.0, 250.0):
        images = [image.masked_fill(mask, value) for image, mask in zip((fixed, moving), masks, strict=True)]
        found.append(masked.displacement(*images, "cpu"))
    assert torch.equal(*found) and found[0].abs().max() > 0.3
    wanted, seen = (registrar.displacement(*pair, "cpu") for pair in ((fixed, moving), images))
    off, far = ((one - wanted).norm(dim=1).mean() for one in (found[1], seen))
    assert off < 0.5 * far
    assert registrar.masked() is registrar
    # equal brains stay where they are, whatever is masked
    still = registrar.masked(masks[0]).displacement(images[0], fixed, "cpu")
    assert still.abs().max() < 0.05


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_a_mask_helps_labels_around_a_hole_of_a_real_brain():
    table, _ = holes.dice_around(Path(os.environ["LUMIR_BRAINS"]), holes.CASES[1:2])
    seen, masked, whole = table["dice_percent"]
    assert masked > seen + 5 and masked > whole - 1


def test_an_inverted_scan_is_registered_as_the_scan_itself():
    fixed = template_in_frame(1).clone() * 255
    moving = torch.nn.functional.interpolate(spatial.warp(template_in_frame(4), wave(0.6)), scale_factor=4.0) * 255
    inverted = torch.where(moving > 0, 256 - moving, 0.0)
    plain = choose_registrar(pretrained=DEFAULT_WEIGHTS, resolution_mm=4, device="cpu")
    matched = replace(plain, method=for_contrast(plain.method, "any"))
    of_inverted = matched.displacement(fixed, inverted, "cpu")
    torch.testing.assert_close(of_inverted, matched.displacement(fixed, moving, "cpu"), atol=5e-3, rtol=0)
    wanted = plain.displacement(fixed, moving, "cpu")
    off, far = ((one - wanted).norm(dim=1).mean() for one in (of_inverted, plain.displacement(fixed, inverted, "cpu")))
    assert off < 0.25 * far


def test_brains_of_two_contrasts_are_compared_in_one(scans, tmp_path):
    values, affine = read_volume(scans[1])
    inverted = write_nifti(tmp_path / "inverted.nii.gz", np.where(values > 0, 1.01 - values, 0), affine)
    given = {"method": "affine", "resolution_mm": 4, "skip": STEPS, "progress": False, "contrast": "any"}
    measures = register.register(scans[0], inverted, tmp_path / "out", **given).measures
    assert measures["ncc_affine"] == measures["ncc"] > 0.6  # of what is inverted it is negative
    assert measures["local_ncc"] > 0.15


def test_page_shows_what_a_mask_leaves_out_and_compares_in_one_contrast():
    image = template_in_frame(1) * 255
    mask = torch.zeros(1, 1, 160, 224, 192, dtype=torch.bool)
    mask[..., 40:51, 150:161, 60:71] = True
    still, keeps = torch.zeros(1, 3, 160, 224, 192), torch.ones(1, 1, 160, 224, 192)
    page = registration_figure(image, image, 255 - image, still, keeps, "title", "notes", (None, mask, mask), image)
    rows = np.reshape([ax for ax in page.axes if ax.get_label() != "<colorbar>"], (3, 7))
    for row, (axis, _) in zip(rows, PLANES, strict=True):
        plane = plane_of(image[0, 0], axis, (45, 155, 65)) / 255
        for ax in row[[0, 3]]:  # what is compared is the fixed image itself
            np.testing.assert_allclose(ax.images[0].get_array(), plane.clip(0, 1), atol=1e-6)
        assert [len(ax.collections) for ax in row[:5]] == [0, 1, 1, 0, 0]
    plt.close(page)


def test_masks_of_another_grid_are_refused(scans, tmp_path, capsys):
    write_nifti(tmp_path / "mask.nii.gz", np.eye(5, dtype=np.uint8)[:, :, None].repeat(5, 2), np.eye(4))
    base = [*scans, "--out", str(tmp_path / "out"), "--skip", *STEPS, "--quiet"]
    mask = str(tmp_path / "mask.nii.gz")
    values, affine = read_volume(scans[0])
    sides = " x ".join(map(str, values.shape))
    assert cli.main(["register", *base, "--fixed-mask", mask]) == 2
    wanted = f"--fixed-mask {mask} must lie on the grid of {scans[0]}, {sides} voxels of 4 x 5 x 4 mm, LIA; "
    assert f"{wanted}got 5 x 5 x 5 voxels of 1 x 1 x 1 mm, RAS\n" in capsys.readouterr().err
    shift = np.zeros((4, 4))
    shift[0, 3] = 5
    write_nifti(mask, values, affine + shift)
    assert cli.main(["register", *base, "--fixed-mask", mask]) == 2
    assert f"{wanted}got {sides} voxels of 4 x 5 x 4 mm, LIA, elsewhere or turned\n" in capsys.readouterr().err
    for fill, what in ((0, "none"), (1, "all")):
        write_nifti(tmp_path / "mask.nii.gz", np.full(values.shape, fill, np.uint8), affine)
        assert cli.main(["register", *base, "--fixed-mask", str(tmp_path / "mask.nii.gz")]) == 2
        assert f"expected a mask of a part of the scan, got {what} of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
