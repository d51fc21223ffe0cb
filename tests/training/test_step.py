"""The fast training step against the plain one of benchmarks/plain.py: fields, gradients, mixed precision, memory."""

import math
import shutil
from functools import cache

import plain
import pytest
import torch

from lumirlib import build_model, parse_variant, spatial
from lumirlib.methods.presets import get_preset
from lumirlib.models.layers import Conv3d, compile_model, instance_norm_prelu, place
from lumirlib.models.memory import freed_memory_kept

NAMES = ["backbone", "LC-2", "LK", "CA", "BF"]
SHAPE = (21, 26, 19)


def blobs(seed: int, shape=SHAPE) -> torch.Tensor:
    """A smooth random image in [0, 1]."""
    noise = torch.rand(1, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed))
    return spatial.resize(noise, shape)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed image and a moving one some voxels away from it."""
    fixed = blobs(seed)
    noise = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(seed + 50))
    return fixed, spatial.warp(fixed, 2.5 * spatial.resize(noise, SHAPE)).clamp(0, 1)


@cache
def trained(name: str, levels: int = 3) -> torch.nn.Module:
    """A narrow network trained until it moves by voxels; at fresh weights it moves nothing and tells nothing."""
    torch.manual_seed(0)
    variant = parse_variant(name, start_channels=6, head_channels=9, levels=levels)
    model = place(variant.build(), "cpu")
    for attention in model.co_attention.values():
        torch.nn.init.constant_(attention.strength, 0.5)
    preset = get_preset("demo", window=5, smoothness_weight=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(25):
        loss = variant.loss_terms(model, *pair(step % 3), preset, torch.Generator())["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_plain_path_in_float32_and_under_bfloat16_autocast(name):
    model = trained(name)
    fixed, moving = pair(7)
    with torch.no_grad():
        expected, velocities = plain.fields(model, fixed, moving)
        found = model.fields(fixed, moving)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.fields(fixed, moving)
    assert expected[0].norm(dim=1).max() > 1.0  # voxels
    for level in range(len(expected)):
        assert (found.displacements[level] - expected[level]).abs().max() < 1e-4
        assert (found.velocities[level] - velocities[level]).abs().max() < 1e-4
        assert mixed.displacements[level].dtype == torch.float32
    assert 0 < (mixed.displacements[0] - expected[0]).abs().max() < 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_plain_path(name):
    model = trained(name)
    fixed, moving = pair(7)
    preset = get_preset("demo", window=5, smoothness_weight=1.0)
    terms = parse_variant(name).loss_terms(model, fixed, moving, preset, torch.Generator())
    expected_loss = plain.loss(model, fixed, moving, 1.0, 5)
    assert torch.allclose(terms["total"], expected_loss, rtol=1e-4)
    expected, found = gradients(model, expected_loss), gradients(model, terms["total"])
    assert (found - expected).norm() < 1e-2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        terms = parse_variant(name).loss_terms(model, fixed, moving, preset, torch.Generator())
    mixed = gradients(model, terms["total"])
    assert torch.cosine_similarity(mixed, expected, dim=0) > 0.98


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixed", [False, True])
def test_checkpointing_changes_no_gradient(name, mixed):
    model = trained(name)
    found = []
    for on in (False, True):
        model.checkpointing = on
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model.fields(*pair(7)).displacements[0].square().mean()
        found.append(gradients(model, loss))
    model.checkpointing = False
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_checkpointing_keeps_less_for_the_backward_pass():
    model = trained("backbone")
    kept = []
    for on in (False, True):
        model.checkpointing = on
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            model.fields(*pair(7))
        kept.append(sum(sizes))
    model.checkpointing = False
    assert kept[1] < kept[0] / 2


# warps and squarings ---


def field(seed: int = 1, size: float = 3.0, dtype=torch.float64, shape=(7, 5, 6), batch=2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(batch, 3, *shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("warp", [spatial.warp, spatial.warp_by_grid_sample])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_warp_and_its_gradients_are_those_of_grid_sample_beyond_the_border_too(warp, channels):
    image = torch.rand(2, channels, 7, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = torch.rand(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for one in (warp, plain.warp):
        inputs = image.clone().requires_grad_(), field().requires_grad_()
        warped = one(*inputs)
        results.append((warped, *torch.autograd.grad(warped, inputs, given)))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("integrate", [spatial.integrate, spatial.integrate_by_grid_sample])
def test_integration_and_its_gradient_are_those_of_grid_sample(integrate):
    results = []
    for one in (integrate, plain.integrate):
        velocity = field(size=1.0).requires_grad_()
        integrated = one(velocity, 5)
        results.append((integrated, *torch.autograd.grad(integrated, velocity, field(9))))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-9)


def test_gradients_equal_finite_differences():
    image = torch.rand(1, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inside = (0.4 * field(shape=(4, 3, 5), batch=1).tanh() + 0.5).requires_grad_()  # kinks lie at whole voxels
    assert torch.autograd.gradcheck(spatial.warp, (image, inside))
    slope = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(instance_norm_prelu, (image, slope))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    shape = (23, 14, 17)
    image = torch.rand(1, 4, *shape, generator=torch.Generator().manual_seed(0))

    def everything():
        inputs = image.clone().requires_grad_(), field(2, 4.0, torch.float32, shape, 1).requires_grad_()
        slope = torch.tensor([0.25], requires_grad=True)
        found = [spatial.warp(*inputs), spatial.integrate(inputs[1]), instance_norm_prelu(inputs[0], slope)]
        total = sum(one.sin().sum() for one in found)
        return [*found, *torch.autograd.grad(total, (*inputs, slope))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(threads)
        together = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_displacement_that_is_not_finite_reads_zero():
    image = torch.ones(1, 1, 5, 6, 7)
    displacement = torch.zeros(1, 3, 5, 6, 7)
    displacement[0, 0, 1, 2, 3], displacement[0, 2, 2, 2, 2] = torch.nan, -torch.inf
    warped = spatial.warp(image, displacement)
    assert warped.sum() == image.numel() - 2 and warped[0, 0, 1, 2, 3] == 0


# layers ---


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_normalization_and_prelu_are_those_of_torch_and_keep_the_layout(layout):
    generator = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(2, 3, 9, 21, 30, generator=generator).to(memory_format=layout).requires_grad_()
    slope, given = torch.tensor([0.2], requires_grad=True), torch.randn(features.shape, generator=generator)
    found = instance_norm_prelu(features, slope)
    expected = torch.nn.functional.prelu(torch.nn.functional.instance_norm(features), slope)
    assert found.is_contiguous(memory_format=layout)
    assert torch.allclose(found, expected, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (features, slope), given) for y in (found, expected)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_the_norm_takes_the_features_memory_only_where_it_may_and_no_gradient_is_asked_for(layout):
    given = torch.randn(2, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    slope = torch.full((1,), 0.2)
    expected = instance_norm_prelu(given.clone(memory_format=torch.preserve_format), slope)
    for overwrite, gradient in ((False, False), (True, True)):
        features = given.clone(memory_format=torch.preserve_format)
        with torch.set_grad_enabled(gradient):
            assert torch.equal(instance_norm_prelu(features, slope, overwrite), expected)
        assert torch.equal(features, given)
    features = given.clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        found = instance_norm_prelu(features, slope, overwrite=True)
    assert torch.equal(found, expected)
    if layout is torch.channels_last_3d:
        assert found.data_ptr() == features.data_ptr()


def test_statistics_of_bfloat16_features_are_float32():
    features = 30 + torch.randn(1, 2, 8, 9, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = instance_norm_prelu(features, torch.ones(1))
    assert found.dtype == torch.bfloat16
    assert found.float().mean().abs() < 2e-3 and abs(found.float().std() - 1) < 1e-2


@pytest.mark.parametrize("depth", [2, 7, 10])
def test_convolution_in_two_halves_is_the_convolution(depth):
    torch.manual_seed(0)
    layer = Conv3d(3, 4, kernel_size=3, padding=1)
    features = torch.rand(1, 3, depth, 5, 6, requires_grad=True)
    results = []
    for convolved in (layer(features), torch.nn.functional.conv3d(features, layer.weight, layer.bias, padding=1)):
        inputs = (features, layer.weight, layer.bias)
        results.append((convolved, *torch.autograd.grad(convolved.square().sum(), inputs)))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("channels", "width", "voxels"), [(3, 12, 4), (3, 6, 2), (7, 6, 2), (3, 5, 1), (9, 12, 1)])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
def test_few_channels_are_convolved_for_neighbors_at_once(channels, width, voxels, mixed, monkeypatch):
    torch.manual_seed(0)
    layer = Conv3d(5, channels, kernel_size=3, padding=1).to(memory_format=torch.channels_last_3d)
    features = torch.randn(2, 5, 4, 3, width).to(memory_format=torch.channels_last_3d)
    strides, convolve = [], torch.nn.functional.conv3d

    def conv3d(*given, **options):
        strides.append(options.get("stride", given[3] if len(given) > 3 else (1, 1, 1)))
        return convolve(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "conv3d", conv3d)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        with torch.no_grad():
            found = layer(features)
        expected = layer(features)
    assert strides == [(1, 1, voxels), (1, 1, 1)]
    assert found.dtype == expected.dtype and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


def test_compiled_parts_have_no_graph_breaks_and_give_the_same_fields():
    # the "eager" backend traces as "inductor" would, and needs no C++ compiler
    model, fixed, moving = trained("backbone"), *pair(7)
    traced = compile_model(build_model("backbone", start_channels=6, head_channels=9, levels=3), "eager").eval()
    traced.load_state_dict(model.state_dict())
    assert list(traced.state_dict()) == list(model.state_dict())
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        found = traced(fixed, moving)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert (found - model(fixed, moving)).abs().max() < 1e-4


@pytest.mark.parametrize(("mixed", "tolerance"), [(True, 1e-2), (False, 1e-4)], ids=["mixed", "float32"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_networks_give_the_same_fields_and_gradients(backend, mixed, tolerance):
    # "aot_eager" makes inductor's graphs, forward and backward, and has PyTorch run them
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("needs a C++ compiler")
    model, fixed, moving = trained("backbone", levels=1), *pair(7)
    compiled = place(build_model("backbone", start_channels=6, head_channels=9, levels=1), "cpu")
    compiled.load_state_dict(model.state_dict())
    compile_model(compiled, backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found, expected = (one.fields(fixed, moving).displacements[0] for one in (compiled, model))
    assert (found - expected).abs().max() < tolerance
    ours, theirs = gradients(compiled, found.square().mean()), gradients(model, expected.square().mean())
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_fields_and_gradients_on_cuda_are_those_of_the_plain_path(name, channels_last, compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = parse_variant(name, start_channels=6, head_channels=9, levels=3).build()
    model.load_state_dict(trained(name).state_dict())
    place(model, "cuda", channels_last)
    fixed, moving = (image.cuda() for image in pair(7))
    expected, _ = plain.fields(model, fixed, moving)
    if compiled:
        compile_model(model)
    found = model.fields(fixed, moving).displacements
    assert (found[0] - expected[0]).abs().max() < 1e-4
    of_plain, ours = (gradients(model, one[0].square().mean()) for one in (expected, found))
    assert (ours - of_plain).norm() < 1e-2 * of_plain.norm()
    with torch.autocast("cuda", torch.bfloat16):
        mixed = model.fields(fixed, moving).displacements
    assert (mixed[0] - expected[0]).abs().max() < 1e-2
    assert torch.cosine_similarity(gradients(model, mixed[0].square().mean()), of_plain, dim=0) > 0.98


def leave_nan_in_freed_memory():
    """Fill memory with NaN and free it, so that what nobody writes to shows."""
    for size in (64, 256, 1024, 4096, 16384, 65536):
        held = [torch.full((size,), math.nan) for _ in range(20)]
        del held


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 2, 5), (2, 5, 2), (2, 2, 2), (3, 3, 3)])
def test_thin_volumes_are_convolved_in_bfloat16_as_in_float32(shape):
    torch.manual_seed(0)
    convolution = Conv3d(8, 8, 3, padding=1).to(memory_format=torch.channels_last_3d)
    features = torch.randn(2, 8, *shape).to(memory_format=torch.channels_last_3d).requires_grad_()
    gradient = torch.randn(2, 8, *shape)

    def gradients(autocast):
        with freed_memory_kept():
            leave_nan_in_freed_memory()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = convolution(features)
            assert result.dtype == (torch.bfloat16 if autocast else torch.float32)
            leave_nan_in_freed_memory()
            return torch.autograd.grad(result, (features, *convolution.parameters()), gradient.to(result.dtype))

    for one, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, expected, rtol=0.03, atol=0.03 * float(expected.abs().max()))
