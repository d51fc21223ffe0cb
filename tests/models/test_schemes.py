"""LK, CA and BF: what each computes, how many parameters it adds, and that they combine."""

import pytest
import torch
from scipy.ndimage import gaussian_filter

from lumirlib import build_model, parse_variant
from lumirlib.models import RegistrationNetwork
from lumirlib.models.bilateral_filter import JointBilateralFilter, joint_bilateral_filter
from lumirlib.models.co_attention import CoAttention
from lumirlib.models.large_kernel import LargeKernelBlock

NAMES = ["LK", "LC-1", "LC-2", "CA", "BF", "BF-post", "CA+BF", "LK+BF", "LC-2+CA+BF", "LK+LC-2+CA+BF"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(shape=(9, 12, 15)):
    return random(1, 1, *shape, seed=1), random(1, 1, *shape, seed=2)


def narrow(name, **options):
    torch.manual_seed(0)
    return build_model(name, **{"start_channels": 4, "head_channels": 5, "levels": 3, **options})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# names ---------------------------------------------------------------------------------------------------------------


def test_table_2_has_the_papers_widths():
    widths = {"backbone": 32, "BF": 32, "CA": 32, "CA+BF": 32, "LK": 36, "LC-1": 64, "LC-2": 64}
    assert {name: parse_variant(name).start_channels for name in widths} == widths


def test_order_and_case_of_schemes_do_not_matter():
    assert parse_variant("bf+ca") == parse_variant("CA+BF") == parse_variant("backbone+CA+BF")
    assert parse_variant("BF+CA").name == "CA+BF"


def test_of_two_widths_the_larger_one_is_taken():
    assert parse_variant("LK+LC-2").start_channels == 64
    assert parse_variant("LK+LC-2", start_channels=8).start_channels == 8


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_registers_at_odd_sizes_and_every_parameter_gets_a_gradient(name):
    model = narrow(name)
    for attention in model.co_attention.values():  # at zero strength nothing behind it has a gradient
        torch.nn.init.constant_(attention.strength, 0.5)
    displacement = model(*pair())
    assert displacement.shape == (1, 3, 9, 12, 15) and torch.isfinite(displacement).all()
    displacement.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        before_norm = parameter_name.startswith("encoder") and parameter_name.endswith("bias")
        assert parameter.grad is not None
        assert before_norm or parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_weights_round_trip_through_a_file(name, tmp_path):
    model = narrow(name)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = narrow(name)
    torch.nn.init.zeros_(other.estimators[0].conv3.weight)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(*pair()), other(*pair()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_forward_on_cuda_under_autocast_is_finite_float32(name):
    model = narrow(name).cuda().eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        displacement = model(*(image.cuda() for image in pair()))
    assert displacement.dtype == torch.float32 and torch.isfinite(displacement).all()


def test_weights_of_a_backbone_load_into_its_extensions():
    backbone, extended = narrow("backbone"), narrow("CA+BF")
    missing = extended.load_state_dict(backbone.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("co_attention", "bilateral_filter")) for key in missing.missing_keys)


# large kernel --------------------------------------------------------------------------------------------------------


def test_large_kernel_parameters_are_those_of_a_hand_count():
    def block(a, b):
        return a * b * (5**3 + 3**3 + 1) + 3 * b + 1  # three branches with bias, one PReLU

    encoder = block(1, 36) + block(36, 72) + block(72, 36)
    assert count(build_model("LK").encoder) == encoder
    estimator = 27 * (72 * 72 + 72 * 27 + 27 * 3) + 72 + 27 + 3
    assert count(build_model("LK")) == encoder + 5 * estimator


def test_large_kernel_block_is_the_sum_of_its_normalized_branches_and_the_input():
    torch.manual_seed(0)
    block = LargeKernelBlock(3, 3, kernel_size=5)
    features = random(1, 3, 7, 8, 9)
    expected = features.clone()
    for (conv, _), size in zip(block.branches, (5, 3, 1), strict=True):
        assert conv.kernel_size == (size,) * 3
        result = conv(features)
        mean, spread = result.mean((2, 3, 4), keepdim=True), result.var((2, 3, 4), unbiased=False, keepdim=True)
        expected = expected + (result - mean) / (spread + 1e-5).sqrt()
    expected = torch.where(expected > 0, expected, 0.25 * expected)  # PReLU starts at 0.25
    assert torch.allclose(block(features), expected, atol=1e-4)
    assert not LargeKernelBlock(3, 4).identity


def test_kernel_size_is_a_parameter_and_checked():
    assert narrow("LK", large_kernel=7).encoder.block1.branches[0][0].kernel_size == (7, 7, 7)
    with pytest.raises(ValueError, match="large_kernel must be odd and 5 or more, got 4"):
        narrow("LK", large_kernel=4)


# co-attention --------------------------------------------------------------------------------------------------------


def test_co_attention_starts_as_the_backbone():
    backbone, attentive = narrow("backbone"), narrow("CA")
    attentive.load_state_dict(backbone.state_dict(), strict=False)
    assert torch.equal(backbone(*pair()), attentive(*pair()))


def test_co_attention_parameters_are_those_of_a_hand_count():
    assert count(CoAttention(32)) == 32 * 32 + (32 * 32 + 32) + (64 * 32 + 32) + 1
    assert count(build_model("CA")) == 909_232 + 4 * 32**2 + 2 * 32 + 1


def test_co_attention_is_a_softmax_of_one_affinity_along_either_direction():
    torch.manual_seed(0)
    attention = CoAttention(4)
    torch.nn.init.constant_(attention.strength, 0.7)
    fixed, moving = random(1, 4, 2, 3, 2, seed=3), random(1, 4, 2, 3, 2, seed=4)
    f, m = fixed.flatten(2)[0].T, moving.flatten(2)[0].T
    affinity = (f @ attention.affinity.weight.T) @ m.T / 2  # sqrt(4)
    found = attention(fixed, moving)
    for own, other, weights, result in (
        (f, m, affinity.softmax(1), found[0]),
        (m, f, affinity.softmax(0).T, found[1]),
    ):
        gathered = weights @ attention.value(other)
        gate = torch.sigmoid(attention.gate(torch.cat([own, gathered], 1)))
        assert torch.allclose(result.flatten(2)[0].T, own + 0.7 * gate * gathered, atol=1e-5)


def test_co_attention_works_at_the_coarsest_levels():
    assert list(narrow("CA", co_attention_levels=2).co_attention) == ["1", "2"]
    with pytest.raises(ValueError, match="co_attention_levels must be from 0 to the 3 levels, got 4"):
        narrow("CA", co_attention_levels=4)


# bilateral filter ----------------------------------------------------------------------------------------------------

SHAPE = (6, 7, 8)
SIGMA = torch.tensor([0.9, 1.1, 0.8, 0.2], dtype=torch.float64)


def field_and_guide(dtype=torch.float64, batch=1):
    return random(batch, 3, *SHAPE, seed=5, dtype=dtype) - 0.5, random(batch, 1, *SHAPE, seed=6, dtype=dtype)


def test_bilateral_filter_equals_a_loop_over_voxels():
    field, guide = field_and_guide()
    filtered = joint_bilateral_filter(field, guide, SIGMA, window=3)
    for place in [(0, 0, 0), (2, 3, 4), (5, 6, 7), (0, 4, 7)]:
        total, weights = torch.zeros(3, dtype=torch.float64), 0.0
        for offset in torch.cartesian_prod(*[torch.arange(-1, 2)] * 3):
            other = tuple((torch.tensor(place) + offset).tolist())
            if all(0 <= at < side for at, side in zip(other, SHAPE, strict=True)):
                distance = (offset**2 / SIGMA[:3] ** 2).sum()
                distance += (guide[(0, 0, *other)] - guide[(0, 0, *place)]) ** 2 / SIGMA[3] ** 2
                weight = torch.exp(-distance / 2)
                total, weights = total + weight * field[(0, slice(None), *other)], weights + weight
        assert torch.allclose(filtered[(0, slice(None), *place)], total / weights)


def test_bilateral_filter_gradients_equal_finite_differences():
    field, guide = (tensor[..., :4, :5, :4].contiguous() for tensor in field_and_guide())
    sigma = SIGMA.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, s: joint_bilateral_filter(u, guide, s, window=5), (field.requires_grad_(), sigma), fast_mode=True
    )


def test_a_constant_displacement_is_a_fixed_point():
    _, guide = field_and_guide()
    constant = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, *SHAPE)
    assert torch.allclose(joint_bilateral_filter(constant, guide, SIGMA), constant)


def test_infinite_range_width_is_a_gaussian_filter():
    field, guide = field_and_guide()
    sigma = torch.tensor([0.5, 0.5, 0.5, 1e9], dtype=torch.float64)
    filtered = joint_bilateral_filter(field, guide, sigma, window=5)[0, 1]
    expected = gaussian_filter(field[0, 1].numpy(), 0.5, radius=2, mode="constant")
    inside = (slice(2, -2),) * 3  # at the border ours is normalized
    assert torch.allclose(filtered[inside], torch.from_numpy(expected)[inside])


@pytest.mark.parametrize("sigma", [[0.0, 0.0, 0.0, 0.1], [1e-9, 1e-9, 1e-9, 1e-9]])
def test_vanishing_spatial_widths_are_the_identity(sigma):
    field, guide = field_and_guide(torch.float32)
    assert torch.allclose(joint_bilateral_filter(field, guide, torch.tensor(sigma)), field)


def test_bilateral_filter_keeps_an_edge_that_the_guide_has():
    field, guide = torch.zeros(1, 3, *SHAPE), torch.zeros(1, 1, *SHAPE)
    field[..., 4:], guide[..., 4:] = 1.0, 1.0
    sharp = joint_bilateral_filter(field, guide, torch.tensor([1.0, 1.0, 1.0, 0.05]))
    blurred = joint_bilateral_filter(field, guide * 0, torch.tensor([1.0, 1.0, 1.0, 0.05]))
    assert torch.allclose(sharp, field, atol=1e-6)
    assert (blurred - field).abs().max() > 0.2


def test_bilateral_filter_treats_batch_entries_alone():
    field, guide = field_and_guide(batch=2)
    together = joint_bilateral_filter(field, guide, SIGMA)
    assert torch.allclose(together[1:], joint_bilateral_filter(field[1:], guide[1:], SIGMA))


def test_bilateral_filter_adds_four_trainable_widths_and_smooths():
    assert count(build_model("BF")) == 909_232 + 4
    layer = JointBilateralFilter()
    assert torch.allclose(layer.log_sigma.exp(), torch.tensor([1.0, 1.0, 1.0, 0.1]))
    plain, filtered = narrow("backbone"), narrow("BF")
    filtered.load_state_dict(plain.state_dict(), strict=False)
    fixed, moving = pair()
    expected = filtered.bilateral_filter(plain(fixed, moving), fixed)
    assert torch.allclose(filtered(fixed, moving), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: joint_bilateral_filter(*field_and_guide(), SIGMA[:3]), "sigma must hold four widths"),
        (lambda: joint_bilateral_filter(*field_and_guide(), SIGMA, window=4), "window must be odd and positive, got 4"),
        (lambda: joint_bilateral_filter(field_and_guide()[0], torch.rand(1, 1, 6, 7, 9), SIGMA), "displacement and gu"),
        (lambda: RegistrationNetwork(4, bilateral_window=3), "bilateral_window must be odd and 5 or more, got 3"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
