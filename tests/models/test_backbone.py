"""The backbone: parameter counts, order of modules, cascade, any size, gradients, and the names of variants."""

import pytest
import torch
from known_fields import ConstantVelocity, known_velocity
from torch import nn

from lumirlib import build_model, parse_variant, spatial
from lumirlib.methods.variants import Variant
from lumirlib.models import RegistrationNetwork

PUBLISHED = [
    (16, 27, 294_272),
    (32, 27, 909_232),
    (36, 27, 1_114_812),
    (64, 27, 3_134_480),
    (64, 108, 4_567_370),
    (64, 216, 6_477_890),
]


def pair(shape=(11, 18, 21), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 1, *shape, generator=generator), torch.rand(1, 1, *shape, generator=generator)


def small(**options):
    torch.manual_seed(0)
    return RegistrationNetwork(**{"start_channels": 4, "head_channels": 5, "levels": 3, **options})


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "head", "expected"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(channels, head, expected):
    assert count(build_model("backbone", start_channels=channels, head_channels=head)) == expected


def test_named_variants_have_the_papers_widths_and_cascades():
    assert parse_variant("backbone") == Variant("backbone", 32, 27, "additive")
    assert parse_variant("LC-1") == Variant("LC-1", 64, 108, "additive")
    assert parse_variant("backbone+lc-2") == Variant("LC-2", 64, 108, "compositional")
    assert count(build_model("LC-2")) == 4_567_370


def test_modules_are_registered_encoder_first_then_estimators_from_the_finest():
    names = [name for name, module in build_model("backbone").named_modules() if isinstance(module, nn.Conv3d)]
    expected = [f"encoder.block{n}.conv" for n in (1, 2, 3)]
    expected += [f"estimators.{level}.conv{n}" for level in range(5) for n in (1, 2, 3)]
    assert names == expected


@pytest.mark.parametrize("cascade", ["additive", "compositional"])
@pytest.mark.parametrize("shape", [(16, 32, 48), (11, 18, 21), (5, 7, 30)])
def test_any_image_size_gives_a_displacement_of_that_size(shape, cascade):
    fixed, moving = pair(shape)
    displacement = small(cascade=cascade, levels=5)(fixed, moving)
    assert displacement.shape == (1, 3, *shape)
    assert displacement.dtype == torch.float32
    assert torch.isfinite(displacement).all()


def test_levels_halve_where_sides_divide_by_16():
    assert RegistrationNetwork().level_shapes((160, 224, 192)) == [
        (160, 224, 192),
        (80, 112, 96),
        (40, 56, 48),
        (20, 28, 24),
        (10, 14, 12),
    ]


@pytest.mark.parametrize("cascade", ["additive", "compositional"])
def test_every_parameter_gets_a_gradient(cascade):
    model = small(cascade=cascade)
    model(*pair()).square().mean().backward()
    for name, parameter in model.named_parameters():
        # the norm removes what a bias before it adds
        if name.startswith("encoder") and name.endswith("conv.bias"):
            assert parameter.grad is not None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("cascade", ["additive", "compositional"])
def test_cascade_joins_the_levels_as_defined(cascade):
    model = small(cascade=cascade, levels=2)
    model.estimators = nn.ModuleList([ConstantVelocity(known_velocity(1.5)), ConstantVelocity(known_velocity(1.0))])
    shape, coarse_shape = (12, 16, 20), (6, 8, 10)
    fields = model.fields(*pair(shape))
    own = spatial.integrate(known_velocity(1.5)(shape), 7)
    coarse = spatial.integrate(known_velocity(1.0)(coarse_shape), 7)
    upsampled = 2 * nn.functional.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)
    expected = own + upsampled if cascade == "additive" else own + spatial.warp(upsampled, own)
    assert torch.allclose(fields.displacements[1], coarse)
    assert torch.allclose(fields.displacements[0], expected, atol=1e-6)
    assert (own + upsampled - own - spatial.warp(upsampled, own)).abs().max() > 0.05  # the two forms differ


def test_encoder_is_shared_and_treats_each_image_alone():
    model = small()
    fixed, moving = pair()
    features = model.encode(fixed, moving)
    assert torch.allclose(features[0], model.encoder(fixed), atol=1e-4)
    assert torch.allclose(features[1], model.encoder(moving), atol=1e-4)


def test_batch_entries_do_not_see_each_other():
    model = small().eval()
    first, second = pair(seed=1), pair(seed=2)
    together = model(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    assert torch.allclose(together[:1], model(*first), atol=1e-5)
    assert torch.allclose(together[1:], model(*second), atol=1e-5)


def test_weights_round_trip_through_a_file(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = RegistrationNetwork(start_channels=4, head_channels=5, levels=3)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(*pair()), other(*pair()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_forward_on_cuda_under_autocast_stays_float32_and_close():
    model = small().cuda().eval()
    fixed, moving = (image.cuda() for image in pair())
    with torch.no_grad():
        plain = model(fixed, moving)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            mixed = model(fixed, moving)
    assert mixed.dtype == torch.float32
    assert (plain - mixed).abs().max() < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_model("LG-1"), r"unknown variant 'LG-1': 'LG-1' is not one of backbone, LK, LC-1, LC-2, CA, BF"),
        (lambda: build_model("LC-1+LC-2"), "contradict each other: cascade would be 'additive' and 'compositional'"),
        (lambda: build_model("backbone", width=3), "unknown option width .* choose from start_channels, head_ch"),
        (lambda: build_model("backbone", cascade="sum"), "cascade must be one of additive, compositional; got 'sum'"),
        (lambda: build_model("backbone", start_channels=0), "start_channels must be a whole number from 1, got 0"),
        (lambda: small()(torch.rand(1, 1, 8, 9, 10), torch.rand(1, 1, 8, 9, 11)), "fixed and moving must have one sh"),
        (lambda: small()(torch.rand(8, 9, 10), torch.rand(8, 9, 10)), r"fixed must be \(B, 1, D, H, W\), got \(8, 9"),
        (lambda: build_model("backbone", start_channels="32"), "start_channels must be a whole number, got .32."),
        (lambda: build_model("backbone", squarings=-1), "squarings must be a whole number from 0, got -1"),
        (lambda: build_model(Variant(), width=3), "unknown option width"),
        (
            lambda: small()(torch.full((1, 1, 8, 9, 10), torch.nan), torch.rand(1, 1, 8, 9, 10)),
            "fixed must hold finite values only, got 720 NaN",
        ),
    ],
)
def test_wrong_options_and_images_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_images_of_another_dtype_than_the_weights_are_refused():
    double = torch.rand(1, 1, 8, 9, 10, dtype=torch.float64)
    message = r"fixed and moving must have the network's torch\.float32, got torch\.float64 and torch\.float64"
    with pytest.raises(TypeError, match=message):
        small()(double, double)
    assert small().double()(double, double).shape == (1, 3, 8, 9, 10)


def test_bfloat16_autocast_on_the_cpu_stays_float32_and_close():
    model = small().eval()
    with torch.no_grad():
        plain = model(*pair())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(*pair())
    assert mixed.dtype == torch.float32
    assert (plain - mixed).abs().max() < 0.1


def test_images_of_integers_are_refused():
    whole = torch.ones(1, 1, 8, 9, 10, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"fixed must have a floating-point dtype, got torch\.uint8"):
        small()(whole, whole)


# antisymmetric velocities (ANTI) --------------------------------------------------------------------------------------


def test_exchanged_images_change_the_sign_of_an_antisymmetric_velocity_and_invert_its_field():
    fixed, moving = (spatial.resize(image, (12, 14, 16)) for image in pair((4, 5, 6)))
    model = small(levels=1, antisymmetric=True).eval()
    with torch.no_grad():
        model.estimators[0].conv3.weight.mul_(20)  # fresh weights move nothing
        (_,), (there_velocity,) = model.fields(fixed, moving)
        (back,), (back_velocity,) = model.fields(moving, fixed)
        still = model(fixed, fixed)
    assert there_velocity.abs().max() > 0.1
    assert torch.allclose(there_velocity, -back_velocity, atol=1e-5)
    assert torch.equal(still, torch.zeros_like(still))
    assert torch.allclose(back, spatial.integrate(-there_velocity, model.squarings), atol=1e-4)


def test_an_antisymmetric_velocity_is_half_the_difference_of_both_orders():
    row = parse_variant("COMP+ANTI")
    assert row.antisymmetric and "antisymmetric" in row.describe()
    plain, anti = small(cascade="compositional"), small(cascade="compositional", antisymmetric=True)
    anti.load_state_dict({name: plain.state_dict()[name] for name in anti.state_dict()})
    left_out = set(plain.state_dict()) - set(anti.state_dict())  # what cancels
    assert left_out == {f"estimators.{level}.conv3.bias" for level in range(len(plain.estimators))}
    features = [torch.rand(2, plain.encoder.block3.conv.out_channels, 7, 8, 9) for _ in range(2)]
    expected = (plain.estimators[1](*features) - plain.estimators[1](*features[::-1])) / 2
    assert torch.allclose(anti.estimators[1](*features), expected, atol=1e-6) and expected.abs().max() > 1e-3
    anti.fields(*pair()).displacements[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in anti.encoder.parameters())


# forces (FORCE) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_forces_change_nothing_before_training_and_are_learned_from_the_first_step(antisymmetric):
    options = {"cascade": "compositional", "passes": 2, "antisymmetric": antisymmetric}
    plain, driven = small(**options), small(**options, driven=True)
    left_out = driven.load_state_dict(plain.state_dict(), strict=False)
    assert left_out.missing_keys == [f"estimators.{level}.of_forces.weight" for level in range(len(plain.estimators))]
    fixed, moving = (spatial.resize(image, (12, 14, 16)) for image in pair((4, 5, 6)))
    found = driven.fields(fixed, moving)
    for one, other in zip(found.velocities, plain.fields(fixed, moving).velocities, strict=True):
        torch.testing.assert_close(one, other)
    sum(displacement.square().mean() for displacement in found.displacements).backward()
    assert all(estimator.of_forces.weight.grad.abs().max() > 0 for estimator in driven.estimators)
    row = parse_variant("COMP+FORCE")
    assert row.driven and "driven by forces" in row.describe() and row.build().driven


def test_exchanged_images_change_the_sign_of_a_driven_antisymmetric_velocity():
    fixed, moving = (spatial.resize(image, (12, 14, 16)) for image in pair((4, 5, 6)))
    model = small(levels=1, antisymmetric=True, driven=True).eval()
    torch.nn.init.normal_(model.estimators[0].of_forces.weight)
    with torch.no_grad():
        (there,), (back,) = model.fields(fixed, moving).velocities, model.fields(moving, fixed).velocities
        still = model(fixed, fixed)
    torch.testing.assert_close(there, -back)
    assert there.abs().max() > 1e-4
    assert torch.equal(still, torch.zeros_like(still))
