"""The classical rows: each one's field warps as the program itself does, and it registers.

Each program's own warping needs its package; those tests run where it is installed.
"""

import importlib
import os
import sys
import warnings

import numpy as np
import pytest
import torch

from lumirlib import spatial
from lumirlib.methods import classical
from lumirlib.methods.classical import CLASSICAL, AntsSyN, ConvexAdam, Greedy
from lumirlib.methods.external import MethodUnavailableError, grid_affine

SHAPE = (40, 56, 48)
INSIDE = (..., slice(4, -4), slice(4, -4), slice(4, -4))
SPACING = 2.5


@pytest.fixture(scope="module")
def pair():
    """A head-like image and one that a smooth displacement of some voxels, another along each axis, makes of it."""
    grid = spatial.identity_grid(SHAPE)
    centred = (grid / (torch.tensor(SHAPE).view(1, 3, 1, 1, 1) - 1) - 0.5) * 2
    noise = torch.rand(1, 1, 9, 11, 10, generator=torch.Generator().manual_seed(0))
    moving = spatial.resize(noise, SHAPE) * (1.25 - centred.norm(dim=1, keepdim=True)).clamp(0, 0.4) * 2
    field = torch.cat([2 + centred[:, 1:2], -1.25 + centred[:, 2:] * centred[:, :1], 0.5 + centred[:, :1]], dim=1)
    return spatial.warp(moving, field), moving, field


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second)[INSIDE].abs().mean())


def is_recovered(displacement: torch.Tensor, pair) -> bool:
    fixed, moving, field = pair
    textured = fixed > 0.1
    error, size = ((d * textured).norm(dim=1).sum() / textured.sum() for d in (displacement - field, field))
    warped = spatial.warp(moving, displacement)
    return error < 0.35 * size and difference(warped, fixed) < 0.25 * difference(moving, fixed)


def test_greedys_displacement_warps_as_greedy_does(pair, monkeypatch, tmp_path):
    package = pytest.importorskip("picsl_greedy")
    toolkit = pytest.importorskip("SimpleITK")
    fixed, moving, _ = pair
    used = []
    program = package.Greedy3D
    monkeypatch.setattr(package, "Greedy3D", lambda: used.append(program()) or used[-1])
    method = Greedy(resolution_mm=SPACING, iterations="20x10", threads=1)
    assert method.available() == ""
    displacement = method(fixed, moving)
    affine = grid_affine(SHAPE, SPACING)
    images = {name: classical.sitk_image(toolkit, image, affine) for name, image in (("f", fixed), ("m", moving))}
    again = program()
    toolkit.WriteImage(used[0]["warp"], str(tmp_path / "warp.nii.gz"))  # it takes no vectors from memory
    again.execute(f"-V 0 -threads 1 -rf f -rm m sliced -r {tmp_path / 'warp.nii.gz'}", **images, sliced=None)
    theirs = torch.from_numpy(toolkit.GetArrayFromImage(again["sliced"]).T.copy())[None, None]
    assert (spatial.warp(moving, displacement) - theirs)[INSIDE].abs().max() < 1e-3
    assert is_recovered(displacement, pair)


def test_syns_displacement_warps_as_ants_does(pair, monkeypatch):
    ants = pytest.importorskip("ants")
    fixed, moving, _ = pair
    found = []
    register = ants.registration

    def remember(fixed_image, moving_image, **options):
        result = register(fixed_image, moving_image, **options)
        found.append(torch.from_numpy(result["warpedmovout"].numpy())[None, None])
        return result

    monkeypatch.setattr(ants, "registration", remember)
    method = AntsSyN(resolution_mm=SPACING, iterations=(40, 10))
    assert method.available() == ""
    monkeypatch.delenv("ANTS_RANDOM_SEED", raising=False)
    displacement = method(fixed, moving)
    assert "ANTS_RANDOM_SEED" not in os.environ
    assert (spatial.warp(moving, displacement) - found[0])[INSIDE].abs().max() < 1e-3
    assert is_recovered(displacement, pair)


def test_convexadams_displacement_warps_as_its_package_does(pair, monkeypatch):
    pytest.importorskip("convexAdam")
    fixed, moving, _ = pair
    method = ConvexAdam(resolution_mm=SPACING, grid_spacing=4, steps=60)
    assert method.available() == ""
    monkeypatch.delitem(sys.modules, "convexAdam.convex_adam_MIND", raising=False)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:  # without gradients, as the evaluator calls
        displacement = method(fixed, moving)
        warnings.warn("still heard", stacklevel=1)  # the package silences all warnings when it is imported
    assert [str(warning.message) for warning in caught] == ["still heard"]
    apply = importlib.import_module("convexAdam.apply_convex").apply_convex
    theirs = apply(displacement[0].movedim(0, -1).numpy(), moving[0, 0].numpy())
    ours = spatial.warp(moving, displacement)
    assert (ours - torch.from_numpy(np.asarray(theirs)).float())[INSIDE].abs().max() < 1e-3
    assert is_recovered(displacement, pair)


def test_itks_geometry_of_our_grid_is_that_of_the_nifti_file():
    affine = grid_affine((5, 6, 7), 2.0, "PIR")  # i to the back, j down, k to the right
    spacing, origin, direction = classical.lps_geometry(affine)
    assert spacing == (2, 2, 2)
    # from RAS to LPS the right and the front turn round
    assert np.array_equal(direction, [[0, 0, -1], [1, 0, 0], [0, -1, 0]])
    assert origin == (6.0, -4.0, 5.0)


def test_environment_variables_are_as_before_even_after_an_error(monkeypatch):
    monkeypatch.setenv("LUMIRLIB_ONE", "before")
    with pytest.raises(KeyError), classical.environment_variables(LUMIRLIB_ONE=1, LUMIRLIB_TWO=2):
        assert os.environ["LUMIRLIB_ONE"] == "1" and os.environ["LUMIRLIB_TWO"] == "2"
        raise KeyError
    assert os.environ["LUMIRLIB_ONE"] == "before" and "LUMIRLIB_TWO" not in os.environ


@pytest.mark.parametrize(
    ("row", "step"),
    list(zip(CLASSICAL, ["pip install picsl-greedy==1.4.0.3", "numpy < 2.4", "convexAdam==0.2.0"], strict=True)),
)
def test_what_is_not_installed_says_how_to_install_it(monkeypatch, pair, row, step):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    method = CLASSICAL[row]()
    assert method.name == row and row.endswith("(not in the paper)")
    sentence = method.available()
    assert sentence.startswith("not installed: ") and step in sentence
    with pytest.raises(MethodUnavailableError, match="not installed"):
        method(*pair[:2])


@pytest.mark.parametrize("row", CLASSICAL)
def test_what_is_no_pair_or_no_voxel_size_is_refused(row):
    image = torch.rand(1, 1, 5, 6, 7)
    with pytest.raises(ValueError, match="fixed and moving must share"):
        CLASSICAL[row]()(image, torch.rand(1, 1, 5, 7, 6))
    with pytest.raises(ValueError, match="resolution_mm must be above 0, got -1"):
        CLASSICAL[row](resolution_mm=-1)
