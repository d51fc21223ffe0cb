"""The loss on non-diffeomorphic volume: that it is the measure, its gradient, and that it is minimized."""

import pytest
import torch

from lumirlib import build_model, metrics, parse_variant
from lumirlib.losses.ndv import DENSE, folded_of_all, folded_voxels, ndv_loss
from lumirlib.methods.presets import get_preset


def rough(shape=(5, 6, 7), scale=1.5, dtype=torch.float64, batch=1):
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(batch, 3, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 6, 7), (21, 6, 5)])  # the last in two slabs
def test_it_is_the_measured_non_diffeomorphic_volume(shape):
    displacement = rough(shape)
    volume, voxels = metrics.ndv_volume(displacement)
    assert volume > 0
    assert float(ndv_loss(displacement)) == pytest.approx(volume / voxels, rel=1e-12)
    assert float(ndv_loss(displacement.float())) == pytest.approx(volume / voxels, rel=1e-5)


def test_a_flipped_axis_is_one_and_a_shift_or_a_stretch_nothing():
    points = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(1, 1, 7, 6, 5)
    still = torch.zeros_like(points)
    assert float(ndv_loss(torch.cat([-2 * points, still, still], dim=1))) == pytest.approx(1)
    assert float(ndv_loss(torch.cat([0.5 * points, still + 2, still], dim=1))) == 0


def test_of_a_batch_it_is_the_mean():
    displacement = rough(batch=2)
    single = [float(ndv_loss(one)) for one in displacement.split(1)]
    assert float(ndv_loss(displacement)) == pytest.approx(sum(single) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_voxels_fold_by_the_compiled_loop_and_by_whole_tensors(dtype):
    displacement = rough((9, 8, 7), 0.3, dtype, 2)
    displacement[1, 2, 4, 4, 4] = torch.nan
    found = folded_voxels(displacement)
    assert torch.equal(found, folded_of_all(displacement)) and found[1, 3, 3, 3] and 0.1 < found.double().mean() < 0.9
    among = torch.rand(2, 9, 8, 7) < 0.5
    assert torch.equal(folded_voxels(displacement, among), found & among[:, 1:-1, 1:-1, 1:-1])


def test_its_gradient_equals_finite_differences():
    assert torch.autograd.gradcheck(ndv_loss, rough((4, 5, 4)).requires_grad_(), fast_mode=True)
    assert torch.autograd.gradcheck(ndv_loss, rough((19, 3, 3)).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("scale", [0.0, 0.15, 0.25, 1.5])  # nothing folds, few voxels, some, most
def test_the_gradient_of_few_folded_voxels_is_that_of_all(scale, monkeypatch):
    displacement = rough((21, 9, 8), scale, batch=2).requires_grad_()
    share = float(folded_voxels(displacement).double().mean())
    assert (share == 0) if scale < 0.1 else (share < DENSE) if scale == 0.15 else share > 0
    found = torch.autograd.grad(ndv_loss(displacement), displacement)[0]
    monkeypatch.setattr("lumirlib.losses.ndv.DENSE", -1.0)
    loss = ndv_loss(displacement)
    assert torch.allclose(found, torch.autograd.grad(loss, displacement)[0], rtol=1e-12, atol=1e-15)
    assert (found != 0).any() == (scale > 0.1) and float(loss.detach()) == pytest.approx(
        float(ndv_loss(displacement.detach()))
    )


def test_what_is_not_a_number_is_not_taken_for_unfolded():
    displacement = torch.zeros(1, 3, 5, 5, 5).requires_grad_()
    with torch.no_grad():
        displacement[0, 1, 2, 2, 2] = float("nan")
    assert ndv_loss(displacement).isnan()


def test_descending_it_unfolds():
    displacement = rough(scale=0.4).requires_grad_()
    optimizer = torch.optim.Adam([displacement], lr=0.02)
    before = float(ndv_loss(displacement.detach()))
    for _ in range(100):
        optimizer.zero_grad()
        ndv_loss(displacement).backward()
        optimizer.step()
    assert before > 0.01 and float(ndv_loss(displacement.detach())) < 0.1 * before


def test_it_is_added_to_the_loss_of_a_row_and_logged():
    torch.manual_seed(0)
    model = build_model("backbone", start_channels=4, head_channels=5, levels=2)
    torch.nn.init.normal_(model.estimators[0].conv3.weight, std=2.0)  # folds
    images = torch.rand(2, 1, 1, 9, 8, 7)
    preset = get_preset("smoke", window=3)
    plain, folded = (
        parse_variant(name).loss_terms(model, *images, preset, torch.Generator()) for name in ("backbone", "NDV")
    )
    with torch.no_grad():
        percent = metrics.ndv_percent(model(*images))
    assert percent > 0 and 100 * float(folded["ndv"]) == pytest.approx(percent, rel=1e-3)
    assert float(folded["total"]) == pytest.approx(float(plain["total"]) + 10 * float(folded["ndv"]), rel=1e-5)
    assert "ndv" not in plain
    folded["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="displacement must have sides from 3 voxels"):
        ndv_loss(torch.zeros(1, 3, 2, 5, 5))
    with pytest.raises(ValueError, match="ndv_weight must be 0 or more, got -1"):
        parse_variant("NDV", ndv_weight=-1)
