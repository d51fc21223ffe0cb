"""VoxelMorph: the U-Net, the network, and the row that trains it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lumirlib import spatial
from lumirlib.losses import diffusion_loss, ncc_loss
from lumirlib.methods.base import PAPER
from lumirlib.methods.presets import get_preset
from lumirlib.methods.unet import UNet, parse_widths
from lumirlib.methods.voxelmorph import VoxelMorph, VoxelMorphNetwork

DEMO = get_preset("demo")


def pair(shape=(13, 18, 15)):
    fixed, moving = torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(1))
    return fixed, moving


def narrow(divisor=4, **options):
    torch.manual_seed(0)
    return replace(VoxelMorph(), **options).narrowed(divisor).build()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def package_decoder(widths):
    """Decoder of the package voxelmorph, whose last width is the one before it."""
    return (*reversed(widths), widths[0])


# U-Net ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 8), (13, 18, 15), (5, 6, 7), (40, 56, 48)])
@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize("upsampling", ["nearest", "trilinear"])
def test_the_unet_keeps_any_size(shape, downsampling, upsampling):
    unet = UNet(1, (2, 3, 4), (4, 4, 3, 2), 5, downsampling=downsampling, upsampling=upsampling)
    assert unet(torch.rand(1, 1, *shape)).shape == (1, 5, *shape) and unet.channels == 5


def test_without_a_last_convolution_the_unet_gives_the_decoders_features():
    unet = UNet(2, (3, 4), (4, 3, 6))
    assert unet.channels == 6
    assert unet(torch.rand(2, 2, 7, 8, 9)).shape == (2, 6, 7, 8, 9)
    assert UNet(2, (3, 4), (4, 3)).channels == 3 + 2  # the input is the skip at full resolution


def test_a_strided_unet_of_one_level_is_what_its_parts_compute():
    torch.manual_seed(0)
    unet = UNet(1, (2,), (3, 4), 1)
    image = torch.rand(1, 1, 6, 8, 4)
    half = nn.functional.leaky_relu(unet.encoder[0](image), 0.2)
    assert half.shape[2:] == (3, 4, 2)
    low = nn.functional.leaky_relu(unet.decoder[0](half), 0.2)
    doubled = low.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = unet.out(nn.functional.leaky_relu(unet.decoder[1](torch.cat([doubled, image], 1)), 0.2))
    assert torch.allclose(unet(image), expected)


@pytest.mark.parametrize("side", range(2, 40))
def test_nearest_upsampling_to_an_odd_side_is_doubling_and_cutting_off_the_last_voxel(side):
    coarse = torch.arange((side + 1) // 2, dtype=torch.float32).view(1, 1, -1, 1, 1)
    found = nn.functional.interpolate(coarse, size=(side, 1, 1), mode="nearest")
    assert torch.equal(found, coarse.repeat_interleave(2, 2)[:, :, :side])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UNet(1, (), (1,)), "encoder must be whole numbers from 1, at least one, got ()"),
        (lambda: UNet(1, (4, 0), (1, 1)), r"encoder must be whole numbers from 1, at least one, got \(4, 0\)"),
        (lambda: UNet(1, (4, 4), (4,)), "decoder must have at least the 2 widths of encoder, got 1"),
        (lambda: UNet(1, (4,), (4,), downsampling="mean"), "downsampling must be one of stride, pool; got 'mean'"),
        (lambda: UNet(1, (4,), (4,), upsampling="cubic"), "upsampling must be one of nearest, trilinear; got 'cubic'"),
        (lambda: UNet(1, (4,), (4,), 3, out_kernel=2), "out_kernel must be odd and positive, got 2"),
        (lambda: VoxelMorphNetwork(squarings=-1), "squarings must be a whole number from 0, got -1"),
        (lambda: VoxelMorphNetwork(layout="mine"), "layout must be one of organisers, package; got 'mine'"),
        (lambda: VoxelMorph(encoder="16,32").build(), "encoder must be whole numbers from 1 joined by '-'"),
        (lambda: VoxelMorph(decoder="16-0").build(), "decoder must be whole numbers from 1 joined by '-'"),
        (lambda: VoxelMorph().narrowed(0), "divisor must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_widths_are_read_from_text():
    assert parse_widths("16-32-32", "encoder") == (16, 32, 32)


# parameters ----------------------------------------------------------------------------------------------------------


def test_the_default_has_the_301_411_parameters_of_the_organisers_voxelmorph_2():
    convolutions = [(2, 16), (16, 32), (32, 32), (32, 32)]  # encoder
    convolutions += [(32, 32), (32 + 32, 32), (32 + 32, 32), (32 + 16, 32)]  # decoder, coarse to fine
    convolutions += [(32 + 2, 32), (32, 16), (16, 16), (16, 3)]  # at full resolution, with the input; the flow
    by_hand = sum(27 * width_in * width_out + width_out for width_in, width_out in convolutions)
    assert count(VoxelMorph().build()) == by_hand == 301_411  # published: 0.3 M


def test_the_organisers_narrower_voxelmorph_1_has_its_published_274_387_parameters():
    row = VoxelMorph(encoder="8-32-32-32", decoder="32-32-32-32-32-8-8")
    assert count(row.build()) == 274_387


@pytest.mark.parametrize(
    ("widths", "parameters"),
    # measured with voxelmorph 0.3.4 from PyPI: VxmPairwise(3, 1, 1, nb_features=widths); the first is its default
    [((16,) * 5, 105_017), ((16, 32, 32, 32), 250_233), ((16, 32, 32, 32, 32), 333_241)],
)
def test_with_the_packages_layout_there_are_as_many_parameters_as_in_the_package(widths, parameters):
    assert count(VoxelMorphNetwork(widths, package_decoder(widths), layout="package")) == parameters


def test_with_its_weights_the_packages_layout_computes_what_the_package_does():
    voxelmorph = pytest.importorskip("voxelmorph", reason="needs the package voxelmorph 0.3, with neurite")
    widths = (4, 6, 8)
    torch.manual_seed(0)
    theirs = voxelmorph.nn.models.VxmPairwise(
        3, 1, 1, nb_features=widths, activations=nn.LeakyReLU(0.2), flow_initializer=0.1, integration_steps=0
    )
    ours = VoxelMorphNetwork(widths, package_decoder(widths), layout="package")
    assert count(ours) == count(theirs)
    flow, *unet = (parameter.data for parameter in theirs.parameters())  # its flow layer was registered first
    bias, *unet = unet
    for own, other in zip(ours.parameters(), [*unet, flow, bias], strict=True):
        assert own.shape == other.shape
        own.data.copy_(other)
    fixed, moving = pair((16, 24, 8))
    with torch.no_grad():
        assert torch.allclose(ours(fixed, moving), theirs(moving, fixed), atol=1e-5)


# network -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["organisers", "package"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (13, 18, 15), (40, 56, 48)])
def test_any_size_is_registered_and_nearly_not_displaced_at_first(shape, layout):
    model = narrow(layout=layout)
    with torch.no_grad():
        displacement = model(*pair(shape))
    assert displacement.shape == (1, 3, *shape) and displacement.dtype == torch.float32
    assert 0 < displacement.abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["organisers", "package"])
@pytest.mark.parametrize("squarings", [0, 7])
def test_every_parameter_gets_a_gradient(layout, squarings):
    model = narrow(layout=layout, squarings=squarings)
    (model(*pair()) - 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_with_squarings_the_output_is_integrated():
    model = narrow()
    nn.init.normal_(model.flow.weight, std=0.3)
    integrated = copy.deepcopy(model)
    integrated.squarings = 5
    with torch.no_grad():
        field = model(*pair())
        assert field.abs().max() > 0.1
        assert torch.allclose(integrated(*pair()), spatial.integrate(field, 5))


def test_one_seed_gives_one_network():
    assert all(torch.equal(a, b) for a, b in zip(narrow().parameters(), narrow().parameters(), strict=True))


def test_images_of_a_batch_do_not_see_each_other():
    model = narrow()
    nn.init.normal_(model.flow.weight, std=0.3)
    fixed, moving = pair()
    with torch.no_grad():
        together = model(torch.cat([fixed, moving]), torch.cat([moving, fixed]))
        assert torch.allclose(together[:1], model(fixed, moving), atol=1e-5)
        assert torch.allclose(together[1:], model(moving, fixed), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f, m: (f[0], m), ValueError, r"fixed must be \(B, 1, D, H, W\)"),
        (lambda f, m: (f, m[..., :-1]), ValueError, "fixed and moving must have one shape"),
        (lambda f, m: (f.double(), m.double()), TypeError, "must have the network's torch.float32, got torch.float64"),
        (lambda f, m: (f, m * torch.nan), ValueError, "moving must hold finite values only"),
        (lambda f, m: (f.numpy(), m), TypeError, "fixed must be a torch.Tensor, got ndarray"),
    ],
)
def test_bad_images_are_named(change, error, message):
    with pytest.raises(error, match=message):
        narrow()(*change(*pair()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_on_cuda_under_autocast_is_finite_float32():
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        displacement = narrow().cuda()(*(image.cuda() for image in pair()))
    assert displacement.dtype == torch.float32 and torch.isfinite(displacement).all()


# row -----------------------------------------------------------------------------------------------------------------


def test_for_the_papers_preset_the_row_has_the_organisers_recipe():
    row = VoxelMorph()
    adapted = row.training_preset(PAPER)
    assert (adapted.learning_rate, adapted.similarity_weight, adapted.smoothness_weight) == (1e-4, 1, 1)
    assert (adapted.window, adapted.amsgrad, adapted.decay_power) == (9, True, 0.9)
    assert (adapted.epochs, adapted.steps_per_epoch) == (PAPER.epochs, PAPER.steps_per_epoch)
    assert (row.name, row.trains_on) == ("VoxelMorph", "images")
    demo = get_preset("demo")
    assert row.training_preset(demo).learning_rate == demo.learning_rate * row.coarse_learning_rate_factor


def test_a_narrowed_row_has_its_widths_divided():
    row = VoxelMorph().narrowed(4)
    assert (row.encoder, row.decoder) == ("4-8-8-8", "8-8-8-8-8-4-4")
    assert VoxelMorph().narrowed(1) == VoxelMorph()
    assert VoxelMorph().narrowed(1000).encoder == "2-2-2-2"


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_similarity_and_diffusion_of_the_models_displacement(symmetric):
    fixed, moving = pair()
    row = VoxelMorph(smoothness_weight=0.5, symmetric=symmetric)
    model = narrow()
    nn.init.normal_(model.flow.weight, std=0.3)
    with torch.no_grad():
        terms = row.loss_terms(model, fixed, moving, row.training_preset(DEMO), torch.Generator())
        similarity, smoothness = [], []
        for to, of in [(fixed, moving), (moving, fixed)][: 1 + symmetric]:
            displacement = model(to, of)
            similarity.append(ncc_loss(spatial.warp(of, displacement), to, DEMO.window))
            smoothness.append(diffusion_loss(displacement))
    assert torch.allclose(terms["similarity"], torch.stack(similarity).mean())
    assert torch.allclose(terms["smoothness"], torch.stack(smoothness).mean())
    assert torch.allclose(terms["total"], terms["similarity"] + 0.5 * terms["smoothness"])


def test_overfitting_a_pair_halves_the_way_to_a_known_translation():
    fixed = spatial.resize(torch.rand(1, 1, 5, 6, 7, generator=torch.Generator().manual_seed(2)), (14, 16, 18))
    shift = torch.zeros(1, 3, 14, 16, 18)
    shift[:, 1] = 2.0
    moving = spatial.warp(fixed, -shift)  # moving(p) = fixed(p - shift)
    row, model = VoxelMorph(smoothness_weight=0.1, symmetric=False), narrow()
    preset, generator = row.training_preset(DEMO), torch.Generator()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(30):
        terms = row.loss_terms(model, fixed, moving, preset, generator)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        history.append(float(terms["total"].detach()))
    assert history[-1] < 0.5 * history[0]
    with torch.no_grad():
        inside = (model(fixed, moving) - shift)[:, :, 4:-4, 4:-4, 4:-4]
    assert inside.square().sum(1).sqrt().mean() < 1.0
