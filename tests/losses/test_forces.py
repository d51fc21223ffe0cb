"""Forces: what they are the slopes of, and where they lead."""

import pytest
import torch

from lumirlib import spatial
from lumirlib.data.frame import template_in_frame
from lumirlib.losses import force_maps, forces, ncc_loss, tissue_loss
from lumirlib.losses.forces import SCALE, WINDOW


@pytest.fixture(scope="module")
def brains():
    """The template, and the same moved by up to half a voxel."""
    fixed = template_in_frame(4)
    torch.manual_seed(0)
    there = spatial.resize(torch.randn(1, 3, 4, 4, 4), fixed.shape[2:])
    return fixed, spatial.warp(fixed, there)


def maps(*images):
    return [force_maps(image, [image.shape[2:]])[0] for image in images]


def slope(loss, moving, fixed):
    """Slope of ``loss(moving, fixed, displacement)`` at rest: the mean of those at both sides, where a warp has one."""
    sides = [torch.full((1, 3, *fixed.shape[2:]), side).requires_grad_() for side in (1e-5, -1e-5)]
    return sum(torch.autograd.grad(loss(moving, fixed, side), side)[0] for side in sides) / 2 * fixed.numel()


def test_they_are_the_slopes_of_both_losses_as_either_image_is_moved(brains):
    def correlation(moving, fixed, displacement):
        return ncc_loss(spatial.warp(moving, displacement), fixed, WINDOW)

    fixed, moving = brains
    found = forces(*maps(fixed, moving)).split(3, dim=1)
    for force, loss, scale in zip(found, (correlation, tissue_loss), (SCALE, 1.5), strict=True):
        expected = scale * (slope(loss, fixed, moving) - slope(loss, moving, fixed))
        assert expected.abs().max() > 0.2
        agree = torch.isclose(force, expected.clamp(-5, 5), atol=2e-3, rtol=2e-3)  # but at the grid's border
        assert agree[force != 0].float().mean() > 0.999


def test_a_step_along_them_makes_the_images_more_alike(brains):
    fixed, moving = brains
    for force in forces(*maps(fixed, moving)).split(3, dim=1):
        step = 0.2 * force / force.abs().max()
        assert ncc_loss(spatial.warp(moving, step), fixed, WINDOW) < ncc_loss(moving, fixed, WINDOW)
        assert tissue_loss(moving, fixed, step) < tissue_loss(moving, fixed, torch.zeros_like(step))


def test_exchanged_images_change_their_sign_and_equal_ones_have_none(brains):
    of_fixed, of_moving = maps(*brains)
    there = forces(of_fixed, of_moving)
    assert torch.equal(there, -forces(of_moving, of_fixed))
    assert there.abs().max() > 0.1
    assert not forces(of_fixed, of_fixed).any()


def test_a_pair_of_a_batch_has_the_forces_that_it_has_alone(brains):
    of_fixed, of_moving = maps(*brains)
    both = forces(torch.cat([of_fixed, of_moving]), torch.cat([of_moving, of_fixed]))
    torch.testing.assert_close(both[:1], forces(of_fixed, of_moving))


def test_each_level_has_its_image_and_tissues_and_a_side_of_two_voxels_no_force(brains):
    shapes = [tuple(brains[0].shape[2:]), (20, 28, 24), (2, 3, 2)]
    found = [force_maps(image, shapes) for image in brains]
    assert [tuple(level.shape) for level in found[0]] == [(1, 4, *shape) for shape in shapes]
    small = forces(*(levels[-1] for levels in found))
    assert small.shape == (1, 6, *shapes[-1])
    assert not small[:, [0, 2, 3, 5]].any()
