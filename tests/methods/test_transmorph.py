"""TransMorph-TVF: windows, attention, the network, and the row that trains it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lumirlib import spatial
from lumirlib.losses import diffusion_loss, ncc_loss
from lumirlib.methods.base import PAPER
from lumirlib.methods.presets import get_preset
from lumirlib.methods.transmorph import (
    PatchMerging,
    SwinBlock,
    TransMorph,
    TransMorphTVF,
    WindowAttention,
    join_windows,
    partition,
    window_mask,
)

DEMO = get_preset("demo")


def pair(shape=(13, 18, 15)):
    fixed, moving = torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(1))
    return fixed, moving


def narrow(divisor=8, flow_std=None, **options):
    """A narrow network; `flow_std` of its last convolutions, where they shall not start near zero."""
    torch.manual_seed(0)
    model = replace(TransMorph(), **options).narrowed(divisor).build()
    if flow_std is not None:
        for step in model.steps:
            nn.init.normal_(step.flow.weight, std=flow_std)
    return model


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# windows -------------------------------------------------------------------------------------------------------------


def test_windows_are_cut_and_joined_again():
    tokens = torch.arange(2 * 4 * 6 * 3 * 5).reshape(2, 4, 6, 3, 5)
    windows = partition(tokens, (2, 3, 1))
    assert windows.shape == (2 * 2 * 2 * 3, 6, 5)
    assert torch.equal(windows[1], tokens[0, :2, :3, 1:2].reshape(6, 5))  # the next one along the last axis
    assert torch.equal(join_windows(windows, (2, 3, 1), (4, 6, 3)), tokens)


def test_whole_windows_that_are_not_moved_need_no_mask():
    assert window_mask((4, 6, 3), (2, 3, 1), (0, 0, 0)) is None
    assert window_mask((4, 6, 3), (2, 3, 1), (1, 0, 0)) is not None
    assert window_mask((3, 6, 3), (2, 3, 1), (0, 0, 0)) is not None


@pytest.mark.parametrize("shape", [(5, 3, 4), (2, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("window", [(2, 3, 3), (2, 2, 2), (3, 1, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_attention_stays_within_one_window_and_never_crosses_the_border(shape, window, shifted):
    """Which tokens see which, found by gradients, is which share a window of the unrolled grid, counted by hand."""
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, window, shifted).double()
    tokens = torch.rand(1, *shape, 4, dtype=torch.float64, requires_grad=True)
    found = attention(tokens).sum(-1).flatten()
    seen = torch.stack(
        [torch.autograd.grad(each, tokens, retain_graph=True)[0][0].abs().sum(-1).flatten() > 0 for each in found]
    )
    places = torch.cartesian_prod(*(torch.arange(side) for side in shape)).reshape(-1, 3)
    width = torch.tensor(window)
    moved = width // 2 * int(shifted) * (torch.tensor(shape) > width)  # a window that covers an axis is not moved
    own = (places - moved).div(width, rounding_mode="floor")
    assert torch.equal(seen, (own[:, None] == own[None]).all(-1))


def test_what_stands_in_the_padding_does_not_matter():
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, (2, 3, 3), shifted=True)
    nn.init.normal_(attention.position_bias)
    tokens = torch.rand(1, 5, 7, 4, 4)
    padded = nn.functional.pad(tokens, (0, 0, 0, 2, 0, 2, 0, 1))  # to whole windows, as tokens of their own
    inside = attention(padded)[:, :4, :6, :3]  # windows that reach no padding
    assert torch.allclose(attention(tokens)[:, :4, :6, :3], inside, atol=1e-6)


def test_attention_is_a_softmax_of_scaled_products_and_the_bias_of_the_relative_position():
    torch.manual_seed(0)
    attention = WindowAttention(6, 2, (1, 2, 3), shifted=False)
    nn.init.normal_(attention.position_bias)
    tokens = torch.rand(1, 1, 2, 3, 6)
    query, key, value = (tokens.reshape(6, 6) @ attention.projections.weight.T).reshape(6, 3, 2, 3).unbind(1)
    table = attention.position_bias.reshape(1, 3, 5, 2)
    heads = []
    for head in range(2):
        scores = query[:, head] @ key[:, head].T / 3**0.5
        for a in range(6):
            for b in range(6):
                scores[a, b] += table[0, a // 3 - b // 3 + 1, a % 3 - b % 3 + 2, head]
        heads.append(scores.softmax(-1) @ value[:, head])
    expected = attention.out(torch.cat(heads, 1)).reshape(tokens.shape)
    assert torch.allclose(attention(tokens), expected, atol=1e-6)


def test_images_of_a_batch_attend_alone():
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, (2, 3, 3), shifted=True)
    tokens = torch.rand(2, 5, 6, 7, 4)
    assert torch.allclose(attention(tokens)[1:], attention(tokens[1:]), atol=1e-6)


def test_merging_halves_the_grid_and_an_odd_side_gets_a_zero_token():
    torch.manual_seed(0)
    merging = PatchMerging(3)
    tokens = torch.rand(1, 4, 5, 3, 3)
    merged = merging(tokens)
    assert merged.shape == (1, 2, 3, 2, 6)
    corner = torch.zeros(2, 2, 2, 3)
    corner[:, :1, :1] = tokens[0, 2:, 4:, 2:]
    assert torch.allclose(merged[0, 1, 2, 1], merging.reduction(merging.norm(corner.flatten())), atol=1e-6)


# drop path -----------------------------------------------------------------------------------------------------------


def test_paths_are_left_out_in_training_only():
    torch.manual_seed(0)
    block = SwinBlock(4, 2, (2, 2, 2), False, drop_path=0.5)
    tokens = torch.rand(400, 1, 1, 1, 4)
    whole = block.eval()(tokens)
    assert torch.equal(whole, block(tokens))
    dropped = block.train()(tokens, torch.Generator().manual_seed(0))
    unchanged = (dropped == tokens).flatten(1).all(1).double().mean()
    assert 0.18 < unchanged < 0.32  # a quarter lose both paths


def test_paths_that_stay_make_up_for_those_left_out():
    torch.manual_seed(0)
    block = SwinBlock(4, 2, (2, 2, 2), False, drop_path=0.25).train()
    path = torch.ones(20_000, 1, 1, 1, 1)
    kept = block.drop(path, torch.Generator().manual_seed(0))
    assert sorted(set(kept.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)


def test_the_probability_grows_from_zero_at_the_first_block_to_its_largest_at_the_last():
    rates = [block.drop_path for level in narrow().transformer.levels for block in level]
    assert len(rates) == 4 + 4 + 5 and rates[0] == 0 and rates[-1] == pytest.approx(0.3)
    assert rates[1] == pytest.approx(0.3 / 12)


def test_training_is_random_by_its_generator_alone_and_evaluation_is_not():
    model, (fixed, moving) = narrow(flow_std=0.1, drop_path=0.5), pair()
    with torch.no_grad():
        first, same, other = (model.train()(fixed, moving, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, same) and not torch.equal(first, other)
        assert torch.equal(model.eval()(fixed, moving), model(fixed, moving))


# parameters ----------------------------------------------------------------------------------------------------------


def test_the_default_has_the_17_4_million_parameters_of_a_hand_count():
    """Classic TransMorph has 46.8 M by the same count: a fourth level of width 768, and one decoder block more."""

    def swin(width, depth, heads, window):
        bias = heads * (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        attention = 3 * width**2 + width**2 + width + bias
        perceptron = 2 * 4 * width**2 + 5 * width
        return depth * (4 * width + attention + perceptron)

    def merge(width):
        return 16 * width + 16 * width**2

    def embed(width):
        return 2 * 4**3 * width + 3 * width  # convolution with bias, normalization

    def decode(width, skip, out):
        return 27 * (width + skip + out) * out

    def flow(width):
        return 27 * 3 * width + 3

    window, classic = (2, 3, 3), (5, 6, 7)
    encoder = embed(96) + sum(swin(*each, 8, window) + 2 * each[0] for each in ((96, 4), (192, 4), (384, 5)))
    encoder += merge(96) + merge(192)
    skip = 27 * 2 * 48 + 2 * 48  # convolution, batch normalization
    decoder = decode(384, 192, 192) + decode(192, 96, 96) + decode(96, 48, 48)
    steps = 7 * (skip + decode(48, 48, 16) + flow(16))
    assert count(TransMorph().build()) == encoder + skip + decoder + steps == 17_448_285

    encoder = embed(96) + merge(96) + merge(192) + merge(384)
    for width, depth, heads in ((96, 2, 4), (192, 2, 4), (384, 4, 8), (768, 2, 8)):
        encoder += swin(width, depth, heads, classic) + 2 * width
    decoder = decode(768, 384, 384) + decode(384, 192, 192) + decode(192, 96, 96) + decode(96, 48, 48)
    assert encoder + decoder + decode(48, 16, 16) + 27 * 2 * (48 + 16) + flow(16) == 46_771_251


def test_a_narrowed_row_keeps_the_width_of_a_head():
    row = TransMorph().narrowed(4)
    assert (row.embedding, row.heads, row.head_channels) == (24, 2, 4)
    assert TransMorph().narrowed(1) == TransMorph()
    assert (TransMorph().narrowed(100).embedding, TransMorph().narrowed(100).heads) == (12, 1)
    assert count(row.build()) == 1_106_967


# network -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 8), (13, 18, 15), (9, 25, 32)])
@pytest.mark.parametrize("training", [False, True])
def test_any_size_is_registered_and_nearly_not_displaced_at_first(shape, training):
    model = narrow().train(training)
    with torch.no_grad():
        displacement = model(*pair(shape))
    assert displacement.shape == (1, 3, *shape) and displacement.dtype == torch.float32
    assert 0 < displacement.abs().max() < 0.02


def test_every_parameter_gets_a_gradient():
    model = narrow(8, flow_std=0.05, drop_path=0.0)
    displacement = model(*pair((40, 40, 40)))  # of smaller ones the coarsest level has but one token
    (displacement - 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_displacement_is_built_up_as_previous_plus_flow_of_flow():
    model, (fixed, moving) = narrow(flow_std=0.1).eval(), pair((24, 32, 40))
    seen = []
    for step in model.steps:
        step.register_forward_hook(lambda module, given, flow: seen.append((given[1], flow)))
    with torch.no_grad():
        result = model(fixed, moving)
        half_moving = nn.functional.avg_pool3d(moving, 2)
        displacement = torch.zeros(1, 3, 12, 16, 20)
        for images, flow in seen:
            assert torch.allclose(images[:, :1], spatial.warp(half_moving, displacement), atol=1e-5)
            assert torch.equal(images[:, 1:], nn.functional.avg_pool3d(fixed, 2))
            displacement = displacement + spatial.warp(flow, flow)
    assert len(seen) == 7 and displacement.abs().max() > 0.1
    inner = result[:, :, 5:19, 5:27, 5:35]
    grid = (spatial.identity_grid((24, 32, 40))[:, :, 5:19, 5:27, 5:35] - 0.5) / 2  # full voxels in half voxels
    assert torch.allclose(inner, 2 * spatial.sample(displacement, grid), atol=1e-4)


def test_zeros_appended_by_hand_change_nothing():
    model, (fixed, moving) = narrow(flow_std=0.1).eval(), pair((24, 29, 31))
    padded = [nn.functional.pad(image, (0, 1, 0, 3)) for image in (fixed, moving)]
    with torch.no_grad():
        assert torch.allclose(model(fixed, moving), model(*padded)[..., :29, :31], atol=1e-5)


def test_one_seed_gives_one_network():
    assert all(torch.equal(a, b) for a, b in zip(narrow().parameters(), narrow().parameters(), strict=True))


def test_weights_round_trip_through_a_file(tmp_path):
    model, other = narrow(flow_std=0.1).eval(), narrow().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(model(*pair()), other(*pair()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f, m: (f[0], m), ValueError, r"fixed must be \(B, 1, D, H, W\)"),
        (lambda f, m: (f, m[..., :-1]), ValueError, "fixed and moving must have one shape"),
        (lambda f, m: (f.half(), m.half()), TypeError, "must have the network's torch.float32, got torch.float16"),
        (lambda f, m: (f / 0, m), ValueError, "fixed must hold finite values only"),
    ],
)
def test_bad_images_are_named(change, error, message):
    with pytest.raises(error, match=message):
        narrow()(*change(*pair()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TransMorphTVF(embedding=20, heads=8), "embedding must be even and divisible by the 8 heads, got 20"),
        (lambda: TransMorphTVF(embedding=9, heads=3), "embedding must be even and divisible by the 3 heads, got 9"),
        (lambda: TransMorphTVF(depths=(2, 2)), "depths and window must have three numbers each"),
        (lambda: TransMorphTVF(time_steps=0), "time_steps must be whole numbers from 1"),
        (lambda: TransMorphTVF(drop_path=1.0), "drop_path must be from 0 to below 1, got 1.0"),
        (lambda: TransMorph(window="2x3x3").build(), "window must be whole numbers from 1 joined by '-'"),
        (lambda: TransMorph().narrowed(0), "divisor must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_under_autocast_is_finite_and_float32():
    row, model = TransMorph(), narrow(flow_std=0.1).cuda()
    fixed, moving = (image.cuda() for image in pair())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        displacement = model(fixed, moving)
        terms = row.loss_terms(model, fixed, moving, row.training_preset(DEMO), torch.Generator())
    terms["total"].backward()
    assert displacement.dtype == torch.float32 and torch.isfinite(displacement).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# row -----------------------------------------------------------------------------------------------------------------


def test_stages_have_voxels_half_as_large_as_the_network_halves_them():
    row, staged = TransMorph(), get_preset("real-2mm")
    own = row.training_preset(staged)
    assert [stage.resolution_mm for stage in own.stages] == [2, 1] and own.resolution_mm == 1
    assert own.learning_rate == staged.learning_rate * row.coarse_learning_rate_factor and own.epochs == staged.epochs
    natural = replace(staged, stages=tuple(replace(one, resolution_mm=1) for one in staged.stages))
    assert row.training_preset(natural).resolution_mm == 1, "never finer than 1 mm"
    assert row.training_preset(DEMO).resolution_mm == DEMO.resolution_mm, "a preset of one stage stays"


def test_for_the_papers_preset_the_row_has_the_organisers_recipe():
    row = TransMorph()
    adapted = row.training_preset(PAPER)
    assert (adapted.learning_rate, adapted.similarity_weight, adapted.smoothness_weight) == (1e-4, 1, 1)
    assert (adapted.window, adapted.amsgrad, adapted.decay_power) == (9, True, 0.9)
    assert (adapted.epochs, adapted.steps_per_epoch) == (PAPER.epochs, PAPER.steps_per_epoch)
    assert (row.name, row.trains_on) == ("TransMorph", "images")
    demo = get_preset("demo")
    assert row.training_preset(demo).learning_rate == demo.learning_rate * row.coarse_learning_rate_factor


def test_the_loss_is_the_mean_over_both_directions():
    fixed, moving = pair()
    row, model = TransMorph(smoothness_weight=0.5), narrow(flow_std=0.1).eval()
    with torch.no_grad():
        terms = row.loss_terms(model, fixed, moving, row.training_preset(DEMO), torch.Generator())
        there, back = model(fixed, moving), model(moving, fixed)
        similarity = ncc_loss(spatial.warp(moving, there), fixed, 5) + ncc_loss(spatial.warp(fixed, back), moving, 5)
        smoothness = diffusion_loss(there) + diffusion_loss(back)
    assert not torch.allclose(there, back, atol=1e-3)
    assert torch.allclose(terms["similarity"], similarity / 2)
    assert torch.allclose(terms["smoothness"], smoothness / 2)
    assert torch.allclose(terms["total"], terms["similarity"] + 0.5 * terms["smoothness"])


def test_a_training_step_depends_on_nothing_but_its_generator():
    row, (fixed, moving) = TransMorph(), pair()

    def losses(seed):
        model, generator = narrow(flow_std=0.1), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + int(torch.randint(9, ()).item()))  # the global one must not matter
        return float(row.loss_terms(model, fixed, moving, row.training_preset(DEMO), generator)["total"].detach())

    assert losses(0) == losses(0) != losses(1)


def test_overfitting_a_pair_makes_the_loss_fall():
    fixed = spatial.resize(torch.rand(1, 1, 5, 6, 7, generator=torch.Generator().manual_seed(2)), (24, 24, 24))
    shift = torch.zeros(1, 3, 24, 24, 24)
    shift[:, 1] = 2.0
    moving = spatial.warp(fixed, -shift)  # moving(p) = fixed(p - shift)
    row, model = TransMorph(smoothness_weight=0.1), narrow(drop_path=0.0)
    preset, generator = row.training_preset(DEMO), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    history = []
    for _ in range(20):
        terms = row.loss_terms(model, fixed, moving, preset, generator)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append(float(terms["total"].detach()))
    assert history[-1] < 0.75 * history[0]
