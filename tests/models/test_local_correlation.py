"""Local correlation: what is correlated, both uses of it, parameter counts, and the start as the backbone."""

import pytest
import torch

from lumirlib import build_model, parse_variant
from lumirlib.methods.presets import get_preset
from lumirlib.models import RegistrationNetwork
from lumirlib.models.local_correlation import CorrelationAttention, local_correlation, window_offsets
from lumirlib.study import costs

SHAPE = (5, 6, 7)
NAMES = ["CORR", "CORR-att", "LC-2+CA+BF+CORR", "LK+CORR-att"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(shape=(9, 12, 15)):
    return [random(1, 1, *shape, seed=seed, dtype=torch.float32).sigmoid() for seed in (1, 2)]


def narrow(name, **options):
    torch.manual_seed(0)
    return build_model(name, **{"start_channels": 4, "head_channels": 5, "levels": 3, **options})


def awake(model):
    """The model with its correlations in use, which start at zero."""
    for part in model.correlation:
        torch.nn.init.constant_(part.strength if isinstance(part, CorrelationAttention) else part.conv.weight, 0.1)
    for attention in model.co_attention.values():
        torch.nn.init.constant_(attention.strength, 0.5)
    return model


@pytest.mark.parametrize("window", [3, 5])
def test_correlation_is_the_cosine_with_each_neighbour_and_zero_outside(window):
    fixed, moving = random(2, 3, *SHAPE, seed=3), random(2, 3, *SHAPE, seed=4)
    found = local_correlation(fixed, moving, window)
    assert found.shape == (2, window**3, *SHAPE)
    for place in [(0, 0, 0), (2, 3, 4), (4, 5, 6)]:
        for number, offset in enumerate(window_offsets(window)):
            there = [at + by for at, by in zip(place, offset, strict=True)]
            if all(0 <= at < side for at, side in zip(there, SHAPE, strict=True)):
                expected = torch.cosine_similarity(fixed[(..., *place)], moving[(..., *there)])
            else:
                expected = torch.zeros(2, dtype=torch.float64)
            assert torch.allclose(found[(slice(None), number, *place)], expected)


def test_features_of_zero_length_correlate_with_nothing_and_have_a_finite_gradient():
    fixed = torch.zeros(1, 3, *SHAPE, requires_grad=True)
    found = local_correlation(fixed, random(1, 3, *SHAPE, dtype=torch.float32))
    assert (found == 0).all()
    found.sum().backward()
    assert fixed.grad.isfinite().all()


def test_gradients_equal_finite_differences():
    fixed, moving = (random(1, 2, 3, 4, 3, seed=seed).requires_grad_() for seed in (5, 6))
    assert torch.autograd.gradcheck(local_correlation, (fixed, moving))


def test_attention_points_to_where_the_same_features_are():
    fixed = random(1, 8, *SHAPE, seed=7)
    moving = fixed.roll((1, -1), dims=(2, 4))  # what is at p lies at p + (1, 0, -1)
    attention = CorrelationAttention(3).double()
    torch.nn.init.constant_(attention.strength, 1.0)
    torch.nn.init.constant_(attention.log_sharpness, 6.0)
    inside = attention(fixed, moving)[0, :, 1:-1, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).view(3, 1, 1, 1), atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_it_starts_as_the_one_without(name):
    plain = narrow("+".join(part for part in name.split("+") if not part.startswith("CORR")) or "backbone")
    extended = narrow(name)
    found = extended.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys and all(key.startswith("correlation.") for key in found.missing_keys)
    assert torch.allclose(extended(*images()), plain(*images()), atol=1e-6)
    assert not torch.allclose(awake(extended)(*images()), plain(*images()), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(name, checkpointing):
    model = awake(narrow(name))
    model.checkpointing = checkpointing
    model(*images()).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        before_norm = parameter_name.startswith("encoder") and parameter_name.endswith("bias")
        assert parameter.grad is not None
        assert before_norm or parameter.grad.abs().max() > 0, parameter_name


def test_channels_learn_from_the_first_step_on():
    model = narrow("CORR")
    model(*images()).square().mean().backward()
    assert all(part.conv.weight.grad.abs().max() > 0 for part in model.correlation)


def test_parameters_are_those_of_a_hand_count():
    def count(name, **options):
        return sum(parameter.numel() for parameter in build_model(name, **options).parameters())

    assert count("CORR") == 909_232 + 5 * 27 * 64
    assert count("CORR", correlation_window=5) == 909_232 + 5 * 125 * 64
    assert count("CORR-att") == 909_232 + 5 * 2


def test_both_directions_and_weights_in_a_file_work(tmp_path):
    model = awake(narrow("CORR"))
    fixed, moving = images()
    both = model.fields(fixed, moving, both_directions=True).displacements[0]
    assert torch.allclose(both, torch.cat([model(fixed, moving), model(moving, fixed)]), atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = narrow("CORR")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(fixed, moving), model(fixed, moving))


def test_its_multiply_adds_are_counted():
    rows = [get_preset("demo").apply(parse_variant(name)) for name in ("backbone", "CORR")]
    shape = (8, 8, 8)
    voxels = sum((8 // 2**level) ** 3 if level < 3 else 8 for level in range(4))  # sides of at least 2
    plain, extended = (costs.multiply_adds(row, shape) for row in rows)
    assert extended - plain == 27 * 16 * voxels


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RegistrationNetwork(4, correlation_window=4), "correlation_window must be odd and 3 or more, got 4"),
        (lambda: parse_variant("CORR", correlation_mode="sum"), "correlation_mode must be one of channels, attention"),
        (lambda: parse_variant("CORR+CORR-att"), "contradict each other: correlation_mode"),
        (lambda: local_correlation(random(1, 2, *SHAPE), random(1, 3, *SHAPE)), "fixed and moving must have one shape"),
    ],
)
def test_wrong_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
