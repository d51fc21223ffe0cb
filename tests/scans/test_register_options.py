"""Registering without a choice, with masks, of any contrast."""

import json
import os
from dataclasses import replace
from pathlib import Path

import holes
import numpy as np
import pytest
import torch

from lumirlib import cli, spatial
from lumirlib.data.frame import frame_affine, template_in_frame
from lumirlib.data.nifti import read_nifti, read_volume, write_nifti
from lumirlib.methods.contrast import for_contrast
from lumirlib.scans import maps
from lumirlib.scans.prepare import STEPS
from lumirlib.scans.scan import as_scanned
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
    arguments = [*scans, "--out", str(out), "--skip", *STEPS, "--fast", "--quiet", "--device", "cpu"]
    assert cli.main(["register", *arguments]) == 0
    assert f"registered by {DEFAULT_WEIGHTS}" in capsys.readouterr().out
    report = json.loads((out / "registration.json").read_text())
    assert report["resolution_mm"] == 2 and report["measures"]["ncc"] > report["measures"]["ncc_affine"]
    assert report["measures"]["inverse_p99_mm"] < 0.05 and report["measures"]["inverse_outside_percent"] < 1
    assert cli.main(["register", *arguments]) == 2
    assert "exists already; --overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["register", *arguments, "--method", "affine", "--overwrite"]) == 2
    assert "fast goes with the packaged weights" in capsys.readouterr().err
    # each image is what the transform makes of the other one, and the Jacobian is the transform's
    for image, by, grid, written in (
        (scans[1], "transform", scans[0], "warped"),
        (scans[0], "inverse_transform", scans[1], "warped_fixed"),
    ):
        field = maps.read_transform(out / f"{by}.nii.gz")
        values, own = read_volume(image)
        carried = maps.carry(values.astype(np.float32), maps.in_voxels(field, own), "linear", 0)
        found, affine = read_volume(out / f"{written}.nii.gz")
        np.testing.assert_allclose(found, carried, atol=0.01)
        np.testing.assert_allclose(affine, read_volume(grid)[1], atol=1e-4)
    jacobian, affine = read_volume(out / "jacobian.nii.gz")
    u = read_nifti(out / "transform.nii.gz")[0][:, :, :, 0] * [-1, -1, 1]
    slopes = np.stack([np.gradient(u[..., axis], axis=(0, 1, 2)) for axis in range(3)], -1)
    slopes = np.moveaxis(slopes, 0, -1) @ np.linalg.inv(affine[:3, :3]) + np.eye(3)
    inner = tuple(slice(side // 3, -(side // 3)) for side in jacobian.shape)
    expected = np.linalg.det(slopes)
    assert np.corrcoef(jacobian[inner].ravel(), expected[inner].ravel())[0, 1] > 0.8
    assert jacobian[inner].mean() == pytest.approx(expected[inner].mean(), rel=0.05)


def test_masked_voxels_have_no_say_in_the_optimization():
    """By a network that predicts nothing, as it sees all."""
    fixed = template_in_frame(1).clone() * 255
    moving = torch.nn.functional.interpolate(spatial.warp(template_in_frame(4), wave(0.6)), scale_factor=4.0) * 255
    registrar = choose_registrar(pretrained=DEFAULT_WEIGHTS, device="cpu")
    with torch.no_grad():
        for estimator in registrar.method.estimators:
            for weight in estimator.conv3.parameters():
                weight.zero_()
    masks = [torch.zeros(1, 1, 160, 224, 192, dtype=torch.bool) for _ in range(2)]
    masks[0][..., 60:84, 100:124, 80:100] = True
    masks[1][..., 90:106, 60:84, 60:84] = True
    found = []
    for value in (0.0, 250.0):
        images = [image.masked_fill(mask, value) for image, mask in zip((fixed, moving), masks, strict=True)]
        found.append(registrar.optimized(*masks).displacement(*images, "cpu"))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    assert found[0].abs().max() > 0.3
    unmasked = registrar.optimized().displacement(*images, "cpu")
    assert (unmasked - found[1]).abs().max() > 0.1


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_a_mask_helps_labels_around_a_hole_of_a_real_brain():
    table, _ = holes.dice_around(Path(os.environ["LUMIR_BRAINS"]), holes.CASES[1:2], holes.WAYS[:3])
    network, optimized, masked = table["dice_percent"]
    assert masked > network + 2 and masked > optimized + 2


def test_an_inverted_scan_is_registered_as_the_scan_itself():
    fixed = template_in_frame(1).clone() * 255
    moving = torch.nn.functional.interpolate(spatial.warp(template_in_frame(4), wave(0.6)), scale_factor=4.0) * 255
    inverted = torch.where(moving > 0, 256 - moving, 0.0)
    plain = choose_registrar(pretrained=DEFAULT_WEIGHTS, device="cpu")
    matched = replace(plain, method=for_contrast(plain.method, "any"))
    of_inverted = matched.displacement(fixed, inverted, "cpu")
    torch.testing.assert_close(of_inverted, matched.displacement(fixed, moving, "cpu"), atol=1e-3, rtol=0)
    wanted = plain.displacement(fixed, moving, "cpu")
    off, far = ((one - wanted).norm(dim=1).mean() for one in (of_inverted, plain.displacement(fixed, inverted, "cpu")))
    assert off < 0.25 * far


def test_masks_of_another_grid_or_with_a_method_are_refused(scans, tmp_path, capsys):
    write_nifti(tmp_path / "mask.nii.gz", np.eye(5, dtype=np.uint8)[:, :, None].repeat(5, 2), np.eye(4))
    base = [*scans, "--out", str(tmp_path / "out"), "--skip", *STEPS, "--quiet"]
    assert cli.main(["register", *base, "--fixed-mask", str(tmp_path / "mask.nii.gz")]) == 2
    assert "mask.nii.gz: expected the grid of sub-00_T1w.nii.gz" in capsys.readouterr().err
    values, affine = read_volume(scans[0])
    for fill, what in ((0, "none"), (1, "all")):
        write_nifti(tmp_path / "mask.nii.gz", np.full(values.shape, fill, np.uint8), affine)
        assert cli.main(["register", *base, "--fixed-mask", str(tmp_path / "mask.nii.gz")]) == 2
        assert f"expected a mask of a part of the scan, got {what} of it" in capsys.readouterr().err
    assert cli.main(["register", *base, "--fixed-mask", "x.nii", "--method", "deedsBCV"]) == 2
    assert "deedsBCV: masks need a network" in capsys.readouterr().err
