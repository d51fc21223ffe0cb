"""What a GPU would compute, at 160 x 224 x 192 voxels, without one: right shapes, dtypes and devices, and no waits."""

from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from fake_cuda import bfloat16, fake_cuda, gradients, on_cuda
from torch.utils._python_dispatch import _disable_current_modes

from lumirlib import losses, spatial
from lumirlib.data import loader
from lumirlib.data.cache import StoredVolume
from lumirlib.data.loader import PairLoader
from lumirlib.evaluation import evaluate_method
from lumirlib.losses.ndv import ndv_loss
from lumirlib.methods import parse_row
from lumirlib.methods.base import PAPER
from lumirlib.methods.presets import get_preset
from lumirlib.study.paper import table_rows
from lumirlib.training.trainer import make_optimizer
from lumirlib.training.validation import validate

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs PyTorch's build for CUDA, though no GPU: see benchmarks/on_gpu.sh"
)
SHAPE = (160, 224, 192)
FIELD = ("cuda", torch.float32, (1, 3, *SHAPE))
#: The rows of both tables that are networks; deedsBCV works on the CPU.
NETWORKS = [name for name in table_rows(["table1", "table2"]) if parse_row(name).trains_on != "nothing"]
#: Besides them, all of our own options.
TRAINED = [*NETWORKS, "ours+TISSUE+FORCE"]
#: Values that a step brings to the processor: whether two images are finite, or within [0, 1].
CHECKS = {"VoxelMorph": 2, "TransMorph": 2, "uniGradICON": 2}
#: Makes the masks of its shifted windows on the processor.
MASKED = "TransMorph"


def pair(trains_on="images"):
    if trains_on == "labels":
        return [torch.zeros(1, 1, *SHAPE, dtype=torch.int16, device="cuda") for _ in range(2)]
    return [torch.rand(1, 1, *SHAPE, device="cuda") for _ in range(2)]


def facts(tensor):
    return tensor.device.type, tensor.dtype, tuple(tensor.shape)


def built(name, watch, layout=torch.preserve_format, preset=PAPER, **options):
    """A row at a preset, the preset that it trains at, and its network on the GPU."""
    row = parse_row(name, **options)
    preset = row.training_preset(preset)
    row = preset.apply(row)
    with _disable_current_modes():  # weights that are drawn anew until all fit would never be, without values
        model = row.build()
    model = on_cuda(model, layout)
    watch.left.clear()
    return row, preset, model


def train_a_step(row, preset, model, watch):
    images = pair(row.trains_on)
    optimizer = make_optimizer(model, preset, getattr(row, "optimizer", "adam"))
    with bfloat16():
        terms = row.loss_terms(model, *images, preset, torch.Generator().manual_seed(0))
    assert {facts(term) for term in terms.values()} == {("cuda", torch.float32, ())}
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, gradients(terms["total"], parameters), strict=True):
        assert facts(gradient) == facts(parameter)
        parameter.grad = gradient
    optimizer.step()
    assert {state.device.type for one in optimizer.state.values() for state in one.values() if state.ndim} == {"cuda"}
    return terms


@needs_cuda_build
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_training_stays_on_the_gpu_and_waits_for_checks_of_its_images_alone(name):
    with fake_cuda() as watch:
        row, preset, model = built(name, watch)
        terms = train_a_step(row, preset, model, watch)
        assert set(terms) >= {"total", "similarity", "smoothness"}
        if row.trains_on == "labels":  # images are made of labels by numbers drawn on the processor
            return
        assert watch.waits == ["aten::_local_scalar_dense"] * CHECKS.get(name, 0)
        assert watch.left == [] or name == MASKED


@needs_cuda_build
@pytest.mark.parametrize(
    ("layout", "checkpointing", "options"),
    [
        (torch.channels_last_3d, False, {}),
        (torch.preserve_format, True, {}),
        (torch.preserve_format, False, {"similarity": "mse", "unit": "mm", "pyramid_blur": "authors"}),
    ],
)
def test_options_of_training_stay_on_the_gpu_too(layout, checkpointing, options):
    with fake_cuda() as watch:
        row, preset, model = built("BF+CA", watch, layout, get_preset("paper", **options))
        model.checkpointing = checkpointing
        train_a_step(row, preset, model, watch)
        assert watch.waits == [] and watch.left == []


@needs_cuda_build
@pytest.mark.parametrize("name", [*NETWORKS, "ours", "ours+UNFOLD", "BF-post"])
def test_a_registration_stays_on_the_gpu_and_waits_for_the_check_of_its_images_alone(name):
    with fake_cuda() as watch, torch.no_grad():
        row, preset, model = built(name, watch)
        images = pair()
        assert facts(row.as_method(model.eval(), preset)(*images)) == FIELD
        assert watch.waits in ([], ["aten::_local_scalar_dense"] * 2)
        assert watch.left == [] or name == MASKED


@needs_cuda_build
def test_instance_optimization_stays_on_the_gpu():
    with fake_cuda() as watch, mock.patch("torch.autograd.grad", gradients), mock.patch("torch.cuda.synchronize"):
        row, preset, model = built("LC-2+IO", watch, instance_steps=1)
        with torch.no_grad():
            assert facts(row.as_method(model.eval(), preset)(*pair())) == FIELD
        assert watch.left == []


class Cohort(SimpleNamespace):
    """What an evaluation asks a cohort at 1 mm for."""

    resolution_mm, downsampling, shape, labels = 1.0, 1, SHAPE, (4, 11, 23)

    @property
    def at_own_resolution(self):
        return self

    def image(self, subject):
        return torch.rand(1, 1, *SHAPE)

    def label_volume(self, subject):
        return torch.zeros(1, 1, *SHAPE, dtype=torch.int16)


PERSON = SimpleNamespace(name="A", labels="A")
PAIR = SimpleNamespace(name="A_B", fixed=PERSON, moving=PERSON)


@needs_cuda_build
def test_an_evaluation_brings_one_float32_displacement_to_the_processor(monkeypatch):
    scored = []
    monkeypatch.setattr("lumirlib.evaluation.score_displacement", lambda *given: scored.append(given[2]) or {})
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    with fake_cuda() as watch:
        _, _, model = built("LC-2", watch)
        evaluate_method(model, Cohort(), (PAIR,), "cuda", progress=False, consistency=True)
        assert [facts(one) for one in scored] == [("cpu", torch.float32, FIELD[2])]


@needs_cuda_build
def test_the_validation_of_an_epoch_brings_counts_of_labels_alone_to_the_processor(monkeypatch):
    brought = []

    def numpy(tensor):
        assert tensor.device.type == "cpu"
        brought.append(tensor.numel())
        return np.ones(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    with fake_cuda() as watch:
        _, _, model = built("backbone", watch)
        found = validate(model, Cohort(), (PAIR,), torch.device("cuda"), 9)
        assert set(found) == {"val_dice", "val_similarity", "val_ndv_percent"}
        assert brought and max(brought) <= len(Cohort.labels)


class AtOnce:
    """A pool without threads, which have no fake tensors."""

    def __init__(self, *_, **__):
        pass

    def submit(self, work, *given):
        done = Future()
        done.set_result(work(*given))
        return done

    def shutdown(self, **_):
        pass


@needs_cuda_build
@pytest.mark.parametrize(
    ("dtype", "scale", "found"),
    [
        (torch.uint8, 255, torch.float32),
        (torch.int16, 2040, torch.float32),
        (torch.float16, 1, torch.float32),
        (torch.int16, None, torch.int16),
    ],
)
def test_volumes_cross_to_the_gpu_as_they_are_stored_and_are_decoded_there(dtype, scale, found, monkeypatch):
    monkeypatch.setattr(loader, "ThreadPoolExecutor", AtOnce)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(f"torch.cuda.{name}", mock.MagicMock())
    monkeypatch.setattr("torch.Tensor.record_stream", lambda *_: None)
    with fake_cuda():
        read = lambda subject: StoredVolume(torch.zeros(1, 1, *SHAPE, dtype=dtype), scale)  # noqa: E731
        with PairLoader(read, [(PAIR, PAIR)], "cuda") as loading:
            (batch,) = loading
        assert facts(batch.fixed) == facts(batch.moving) == ("cuda", found, (2, 1, *SHAPE))


@needs_cuda_build
def test_hand_written_backward_passes_keep_device_and_dtype():
    with fake_cuda() as watch:
        field = torch.zeros(1, 3, *SHAPE, device="cuda", requires_grad=True)
        half = torch.zeros(1, 4, *SHAPE, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        warped, fixed = (torch.zeros(1, 1, *SHAPE, device="cuda", requires_grad=True) for _ in range(2))
        for result, inputs in (
            (spatial.warp(half, field), [half, field]),
            (spatial.integrate(field), [field]),
            (losses.ncc_loss(warped, fixed), [warped, fixed]),
            (losses.diffusion_loss(field), [field]),
            (ndv_loss(field), [field]),
        ):
            found = gradients(result, inputs)
            assert [facts(one) for one in found] == [facts(one) for one in inputs]
        assert watch.waits == [] and watch.left == []


# the tool itself -----------------------------------------------------------------------------------------------------


@needs_cuda_build
def test_what_is_left_on_the_processor_or_waited_for_is_seen():
    with fake_cuda() as watch:
        image = torch.zeros(1, 1, 20, 20, 20)
        with pytest.raises(RuntimeError, match="device"):
            image + image.cuda()
        assert len(watch.left) == 1 and watch.waits == []
        assert bool(image.cuda().isfinite().all()) and len(watch.waits) == 1


@pytest.mark.parametrize("name", ["LC-2+BF", "ours+CA", "VoxelMorph"])
def test_gradients_from_node_to_node_are_those_of_the_engine(name):
    torch.manual_seed(0)
    row, preset = parse_row(name), get_preset("smoke", channel_divisor=16, levels=2, window=3)
    row = preset.apply(row)
    model = row.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    images, parameters = torch.rand(2, 1, 1, 16, 32, 16), list(model.parameters())
    if hasattr(model, "checkpointing"):
        model.checkpointing = True
    found, expected = (
        of(row.loss_terms(model, *images, preset, torch.Generator())["total"], parameters)
        for of in (gradients, torch.autograd.grad)
    )
    found, expected = (torch.cat([one.flatten() for one in each]) for each in (found, expected))
    assert 0 < (found - expected).norm() + expected.norm() < (1 + 1e-5) * expected.norm()  # sums in another order
