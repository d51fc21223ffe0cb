"""The viewer of a pair: the volumes that it shows, and what it is where nothing can show it."""

import base64
import gzip

import nibabel as nib
import numpy as np
import pytest
import torch

from lumirlib import load_cohort, spatial
from lumirlib.viewer import MISSING, PairViewer, view_pair, warped_grid

SHAPE = (5, 6, 7)


def pair(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    fixed, moving = torch.rand(2, 1, 1, *SHAPE, generator=generator)
    return fixed, moving, 0.8 * torch.randn(1, 3, *SHAPE, generator=generator)


@pytest.mark.parametrize(("plane", "crossed"), [("axial", (0, 1)), ("coronal", (0, 2)), ("sagittal", (1, 2))])
def test_grid_without_displacement_has_a_line_every_few_voxels_along_both_axes_of_the_plane(plane, crossed):
    grid = warped_grid(torch.zeros(1, 3, *SHAPE), plane, every=3)
    places = np.indices(SHAPE)
    expected = np.any([places[axis] % 3 == 0 for axis in crossed], axis=0)
    assert np.array_equal(grid[0, 0].numpy(), expected.astype(np.float32))


def test_grid_lines_are_where_the_moving_image_is_read():
    displacement = torch.zeros(1, 3, *SHAPE)
    displacement[:, 1] = -1.25  # voxel j reads j - 1.25 of the moving image
    displacement[:, 2] = 40  # across an axial slice: does not show in it
    line = warped_grid(displacement, "axial", every=100)[0, 0, 2, :, 3]
    assert torch.allclose(line, torch.tensor([0.0, 0.75, 0.25, 0.0, 0.0, 0.0]))


def test_finer_grid_keeps_voxel_centers_in_place():
    displacement = pair()[2]
    coarse, fine = warped_grid(0 * displacement, every=2), warped_grid(0 * displacement, every=2, finer=3)
    assert fine.shape == (1, 1, 15, 18, 21)
    assert torch.allclose(fine[..., 1::3, 1::3, 1::3], coarse, atol=1e-6)


def test_grid_with_an_unknown_plane_names_the_choices():
    with pytest.raises(ValueError, match=r"plane must be one of axial, coronal, sagittal.*oblique"):
        warped_grid(torch.zeros(1, 3, *SHAPE), "oblique")


def test_viewer_refuses_images_that_do_not_fit():
    fixed, moving, displacement = pair()
    with pytest.raises(ValueError, match=r"moving must be \(1, 1, 5, 6, 7\), .* got \(1, 1, 4, 6, 7\)"):
        PairViewer(fixed, moving[:, :, :4], displacement, 1)


def test_viewer_says_how_to_install_what_is_missing_and_shows_the_figure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    viewer = PairViewer(*pair(), 1, "simulated")
    bundle = viewer._repr_mimebundle_()
    assert not viewer.interactive and set(bundle) == {"text/plain", "image/png"}
    assert MISSING in bundle["text/plain"] and base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_viewer_sends_slices_only_where_a_front_end_shows_them():
    pytest.importorskip("ipyniivue", reason="needs ipyniivue, of requirements.txt")
    fixed, moving, displacement = pair()
    viewer = PairViewer(fixed, moving, displacement, 3, "simulated")
    bundle = viewer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} < set(bundle) and not viewer.panels
    front_end = viewer.box.children[-1]
    front_end._handle_custom_msg("shown", [])
    opened = viewer.panels
    assert [panel.volumes[0].name for panel in opened] == [
        "moving.nii.gz",
        "fixed.nii.gz",
        "warped.nii.gz",
        "grid.nii.gz",
    ]
    assert all(set(panel.other_nv) == set(opened) - {panel} for panel in opened)
    images = [nib.Nifti1Image.from_bytes(gzip.decompress(panel.volumes[0].data)) for panel in opened]
    for image, expected in zip(images, (moving, fixed, spatial.warp(moving, displacement)), strict=False):
        assert np.array_equal(image.affine, np.diag([3, 3, 3, 1]))
        assert np.abs(image.get_fdata() - expected[0, 0].numpy()).max() <= 0.51 / 255
    # the grid's voxels are a third as long, and its middle one is where the pair's first voxel is
    assert images[3].shape == (15, 18, 21)
    assert np.allclose(images[3].affine @ [1, 1, 1, 1], [0, 0, 0, 1])
    front_end._handle_custom_msg("shown", [])
    assert viewer.panels is opened  # shown twice, opened once


def test_buttons_turn_all_panels_and_draw_the_grid_of_the_plane():
    ipyniivue = pytest.importorskip("ipyniivue", reason="needs ipyniivue, of requirements.txt")
    viewer = PairViewer(*pair(), 1)
    viewer.box.children[-1]._handle_custom_msg("shown", [])
    viewer.box.children[1].value = "sagittal"
    assert {panel.opts.slice_type for panel in viewer.panels} == {ipyniivue.SliceType.SAGITTAL}
    shown = nib.Nifti1Image.from_bytes(gzip.decompress(viewer.panels[3].volumes[0].data)).get_fdata()
    expected = warped_grid(viewer.displacement, "sagittal", every=12)[0, 0].numpy()
    assert np.abs(shown - expected).max() <= 0.51 / 255


def test_pair_is_registered_and_named(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    chosen = cohort.validation_pairs[1]
    shift = torch.tensor([1.0, 0.0, -2.0]).view(1, 3, 1, 1, 1)
    viewer = view_pair(lambda fixed, moving: shift.expand(1, 3, *fixed.shape[2:]), cohort, chosen.name, "small")
    assert viewer.title == f"{chosen.name}: small" and viewer.spacing_mm == 1
    assert torch.equal(viewer.images["fixed"], cohort.image(chosen.fixed))
    assert torch.equal(viewer.images["moving"], cohort.image(chosen.moving))
    assert torch.equal(viewer.images["warped"][0, 0, :-1, :, 2:], cohort.image(chosen.moving)[0, 0, 1:, :, :-2])
    with pytest.raises(ValueError, match=r"name must be one of SMALL_0100_SMALL_0101.*got 'SMALL'"):
        view_pair(lambda fixed, moving: fixed, cohort, "SMALL")
