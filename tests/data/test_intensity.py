"""Random contrast: the range and the kinds of maps, what stays, and that only the network sees it."""

import pytest
import torch
from small_runs import small_run

from lumirlib import build_model, parse_variant
from lumirlib.data import intensity
from lumirlib.data.intensity import draw_intensity_map, randomize_intensity
from lumirlib.methods.presets import get_preset

SHAPE = (9, 8, 7)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brain(seed=0, batch=1):
    image = torch.rand(batch, 1, *SHAPE, generator=seeded(seed))
    return image * (image > 0.3)


def test_maps_are_of_every_kind_and_stay_between_zero_and_one():
    maps = [draw_intensity_map(seeded(seed)) for seed in range(60)]
    assert all(one.shape == (256,) and one.min() >= 0 and one.max() <= 1 for one in maps)
    rising = [bool((one.diff() >= -1e-6).all()) for one in maps]
    falling = [bool((one.diff() <= 1e-6).all()) for one in maps]
    assert 20 < sum(rising) < 40 and 5 < sum(falling) < 25 and len(maps) - sum(rising) - sum(falling) > 5
    assert all(one[0] == 0 and one[-1] == pytest.approx(1) for one, up in zip(maps, rising, strict=True) if up)


@pytest.mark.parametrize("kind", intensity.KINDS)
def test_the_background_stays_zero_and_a_map_that_is_not_monotone_leaves_the_brain_above_it(kind, monkeypatch):
    monkeypatch.setattr(intensity, "KINDS", (kind,))
    image = brain()
    changed = randomize_intensity(image, seeded(4))
    assert changed.shape == image.shape and changed.dtype == image.dtype
    assert (changed[image == 0] == 0).all() and changed.min() >= 0 and changed.max() <= 1
    if kind in ("inverted", "piecewise"):
        assert (changed[image > 0] >= intensity.LOWEST - 1e-6).all()
    steps = changed.flatten()[image.flatten().argsort()][(image == 0).sum() :].diff()  # in the brain, by intensity
    rises, falls = bool((steps >= -1e-6).all()), bool((steps <= 1e-6).all())
    assert (rises, falls) == {"gamma": (True, False), "monotone": (True, False), "inverted": (False, True)}.get(
        kind, (False, False)
    )


def test_the_map_is_applied_to_each_voxel_alone_and_linear_between_its_table():
    image = torch.full((1, 1, *SHAPE), 100.25 / 255)
    table = draw_intensity_map(seeded(7))
    expected = 0.75 * table[100] + 0.25 * table[101]
    assert torch.allclose(randomize_intensity(image, seeded(7)), expected, atol=1e-5)
    assert torch.allclose(randomize_intensity(torch.ones_like(image), seeded(7)), table[-1])


def test_each_image_of_a_batch_has_its_own_map_and_a_seed_repeats_them():
    image = brain().expand(2, 1, *SHAPE)
    first, second = randomize_intensity(image, seeded(1)).split(1)
    assert not torch.allclose(first, second, atol=0.01)
    assert torch.equal(randomize_intensity(image, seeded(1)), torch.cat([first, second]))


def test_only_the_network_sees_the_random_contrast():
    torch.manual_seed(0)
    model = build_model("backbone", start_channels=4, head_channels=5, levels=2)
    fixed, moving, preset = brain(1), brain(2), get_preset("smoke", window=3)
    variant = parse_variant("INT", intensity_probability=1.0)
    terms = variant.loss_terms(model, fixed, moving, preset, seeded(5))
    generator = seeded(5)
    seen = []
    for image in (fixed, moving):
        torch.rand(1, generator=generator)
        seen.append(randomize_intensity(image, generator))
    expected = variant.objective(model.fields(*seen), fixed, moving, preset)
    assert torch.equal(terms["total"], expected["total"])
    never = parse_variant("INT", intensity_probability=0.0).loss_terms(model, fixed, moving, preset, seeded(5))
    assert float(never["total"]) != float(terms["total"])
    assert float(never["total"]) == float(
        parse_variant("backbone").loss_terms(model, fixed, moving, preset, seeded(6))["total"]
    )


def test_a_row_trains_with_it_the_same_way_twice(small_cohort_json, tmp_path):
    results = [
        small_run(small_cohort_json, tmp_path / str(number), variant="INT", epochs=1).train(progress=False)
        for number in range(2)
    ]
    weights = [result.model.state_dict() for result in results]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"image must be in \[0, 1\], got 0 to 2"):
        randomize_intensity(2 * torch.eye(3)[None, None, None].expand(1, 1, 3, 3, 3), seeded())
    with pytest.raises(ValueError, match="size must be 2 or more, got 1"):
        draw_intensity_map(seeded(), 1)
    with pytest.raises(ValueError, match="intensity_probability must be from 0 to 1, got 2"):
        parse_variant("INT", intensity_probability=2)
