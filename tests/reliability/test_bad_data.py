"""Bad data at every reader: each generated or hand-made input is read right, or refused by an error of ours by name."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import struct
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from faults import (
    BYTE_HARM,
    JSON_VALUES,
    LONG,
    PLACES,
    QUICK,
    Content,
    at_most,
    harmed,
    json_harm,
    refused_or,
    try_inputs,
)
from hypothesis import strategies as st
from small_cohorts import SMALL_SHAPE, smooth_blob, write_small_cohort

from lumirlib import evaluation, load_cohort, metrics, parse_variant, spatial
from lumirlib.data import cache as volumes
from lumirlib.data.landmark_files import read_landmarks
from lumirlib.data.nifti import read_label_volume, read_volume, write_nifti
from lumirlib.evaluation import evaluate_method, zero_displacement
from lumirlib.losses import diffusion_loss, mse_loss, ncc_loss
from lumirlib.losses.similarity import ncc_in_parts
from lumirlib.methods.presets import PRESETS
from lumirlib.metrics.pair import evaluate_pair
from lumirlib.study import results, submission
from lumirlib.study.report import runs, tables
from lumirlib.study.results import write_results
from lumirlib.study.run import Run
from lumirlib.training.checkpoints import CHECKPOINT_FORMAT, TrainingState
from lumirlib.training.config import make_config
from lumirlib.training.engine import Engine
from lumirlib.training.launch import train
from lumirlib.training.trainer import Trainer
from lumirlib.training.weights import load_model

amounts = pytest.mark.parametrize("inputs", [QUICK, pytest.param(LONG, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_small_cohort(tmp_path_factory.mktemp("bad") / "small").parent


@pytest.fixture
def kept(folder):
    """A cohort whose files are as they were before when the test has ended."""
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    yield load_cohort(folder / "dataset.json")
    for file, content in files.items():
        file.write_bytes(content)


# NIfTI ---------------------------------------------------------------------------------------------------------------

EXTREME_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 1e38, -1e38, 1.0, 348.0, 352.0])
#: Fields of the header, where they are and how they are packed, and what to put there.
FIELDS = st.one_of(
    st.tuples(st.just((0, "i")), st.sampled_from([0, -1, 540, 347, 2**31 - 1])),
    st.tuples(st.sampled_from([(40 + 2 * axis, "h") for axis in range(8)]), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(
        st.sampled_from([(70, "h"), (72, "h")]),
        st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2304, -1]),
    ),
    st.tuples(st.sampled_from([(76 + 4 * axis, "f") for axis in range(8)]), EXTREME_NUMBERS),
    st.tuples(st.just((108, "f")), st.one_of(EXTREME_NUMBERS, st.floats(width=32))),
    st.tuples(st.sampled_from([(112, "f"), (116, "f")]), st.one_of(EXTREME_NUMBERS, st.floats(width=32))),
    st.tuples(st.sampled_from([(252, "h"), (254, "h")]), st.integers(-2, 5)),
    st.tuples(st.sampled_from([(256 + 4 * n, "f") for n in range(18)]), EXTREME_NUMBERS),
    st.tuples(st.just((344, "i")), st.sampled_from([0, 0x0031696E, 0x0031322B, -1])),
)
NIFTI_HARM = st.one_of(
    st.tuples(st.just("packed"), BYTE_HARM),
    st.tuples(st.just("raw"), BYTE_HARM),
    st.tuples(st.just("header"), st.lists(FIELDS, min_size=1, max_size=3)),
)


def harm_nifti(packed: bytes, harm) -> bytes:
    kind, how = harm
    if kind == "packed":
        return harmed(packed, how)
    raw = gzip.decompress(packed)
    if kind == "raw":
        return gzip.compress(harmed(raw, how), 1)
    raw = bytearray(raw)
    for (offset, form), value in how:
        struct.pack_into(f"<{form}", raw, offset, value)
    return gzip.compress(bytes(raw), 1)


def by_nibabel(path: Path) -> np.ndarray:
    """An independent reader's voxels, in float64; only of files that ours has read, so that sizes are sane."""
    with gzip.open(path) as stream:
        kind = nib.Nifti2Image if stream.read(2) == b"\x1c\x02" else nib.Nifti1Image
    array = np.asanyarray(kind.from_filename(path).dataobj).astype(np.float64)
    return array[..., 0] if array.ndim == 4 else array


@amounts
@pytest.mark.filterwarnings("ignore:.*(form is taken|what follows its voxels|largest voxel):UserWarning")
@pytest.mark.parametrize("kind", ["image", "labels"])
def test_a_harmed_nifti_file_is_refused_by_name_or_read_as_another_reader_does(kept, inputs, kind):
    subject = kept.validation_pairs[0].fixed
    path = getattr(subject, kind)
    packed = path.read_bytes()

    def check(harm):
        path.write_bytes(harm_nifti(packed, harm))
        kept.memory.clear()
        read = {"image": kept.image, "labels": kept.label_volume}[kind]
        found = refused_or(f"NIfTI {kind}", lambda: read(subject), path.name)
        if found is None:
            return
        expected = by_nibabel(path)
        if harm[0] == "packed":
            assert np.array_equal(expected, nib.Nifti1Image.from_bytes(gzip.decompress(packed)).dataobj)
        if kind == "image":
            top = 255 if expected.max() > 1.5 else 1
            expected = torch.from_numpy(expected.astype(np.float32)).clamp(0, top) / top
        assert torch.equal(found[0, 0], torch.as_tensor(expected).to(found.dtype))

    try_inputs(inputs, NIFTI_HARM, check)


def header_with(**fields) -> bytes:
    image = nib.Nifti1Image(smooth_blob(0), np.eye(4))
    image.header.set_xyzt_units("mm")
    raw = bytearray(image.to_bytes())
    for offset, form, value in fields.values():
        struct.pack_into(f"<{form}", raw, offset, *(value if isinstance(value, tuple) else (value,)))
    return bytes(raw)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": (42, "3h", (32767, 32767, 32767))}, r"at most 1,073,741,824 voxels, got shape \(32767, 32767"),
        ({"dim": (42, "3h", (1000, 1000, 1000))}, r"expected 1000000352 bytes for shape .* got 8032"),
        ({"dim": (42, "3h", (-16, 20, 24))}, r"expected sides of at least 1 voxel, got shape \(-16, 20, 24\)"),
        ({"dim": (42, "3h", (16, 0, 24))}, r"expected sides of at least 1 voxel, got shape \(16, 0, 24\)"),
        ({"dim": (40, "h", 0)}, "expected 1 to 7 dimensions, got 0"),
        ({"dim": (40, "h", 99)}, "expected 1 to 7 dimensions, got 99"),
        ({"type": (70, "2h", (32, 64))}, "expected real numbers of at most 64 bits, got data type 32, complex64"),
        ({"type": (70, "2h", (128, 24))}, "expected real numbers of at most 64 bits, got data type 128"),
        ({"type": (70, "2h", (77, 8))}, "cannot read .* as NIfTI"),
        ({"offset": (108, "f", math.nan)}, "cannot read .* as NIfTI"),
        ({"offset": (108, "f", 1e9)}, "expected voxels from byte 352 to 67108864, got from 1e"),
        ({"magic": (344, "4s", b"ni1\0")}, "expected the magic n.1 or n.2 of one file, got b'ni1'"),
        ({"magic": (344, "4s", b"nope")}, "cannot read .* as NIfTI"),
        ({"size": (0, "i", 349)}, "expected a header of 348 or 540 bytes, got 5d010000"),
        ({"affine": (280, "f", math.inf)}, "expected a finite affine"),
    ],
)
def test_a_header_that_claims_nonsense_is_refused_without_memory_for_it(tmp_path, ending, fields, message):
    path = tmp_path / f"claims{ending}"
    raw = header_with(**fields)
    path.write_bytes(gzip.compress(raw) if ending == ".nii.gz" else raw)
    with pytest.raises(ValueError, match=message) as caught:
        refused_or_raise(path)
    assert path.name in str(caught.value)


def refused_or_raise(path: Path):
    with at_most(100):
        return read_volume(path)


def test_a_flipped_bit_of_a_gzip_that_still_unpacks_is_found_by_its_checksum(tmp_path):
    path = write_nifti(tmp_path / "image.nii.gz", smooth_blob(0), np.eye(4))
    raw = gzip.decompress(path.read_bytes())
    packed = bytearray(gzip.compress(raw, 0))  # stored, so that a flip changes a voxel and nothing else
    packed[-400] ^= 1
    path.write_bytes(bytes(packed))
    assert not np.array_equal(nib.load(path).dataobj, smooth_blob(0))  # nibabel reads no further than the voxels
    with pytest.raises(ValueError, match=r"image\.nii\.gz as NIfTI .*CRC check failed"):
        read_volume(path)


def test_a_gzip_bomb_is_unpacked_a_little_further_than_its_volume(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header_with() + bytes(300 * 2**20), 1))
    with pytest.raises(ValueError, match=r"bomb.nii.gz .*expected 8032 bytes for shape .* 64 megabytes more"):
        refused_or_raise(path)


def test_a_volume_on_another_grid_is_refused_before_its_voxels_are_unpacked(kept):
    subject = kept.train[0]
    subject.image.write_bytes(gzip.compress(header_with(dim=(42, "3h", (600, 600, 600))) + bytes(216_000_000), 1))
    found = refused_or("NIfTI by hand", lambda: kept.image(subject), "expected shape (16, 20, 24)", memory=60)
    assert found is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.full(SMALL_SHAPE, np.nan, np.float32), "expected finite voxels, got 7680 NaN or infinite of 7680"),
        (lambda: np.where(smooth_blob(0) > 90, np.inf, 0).astype(np.float32), "expected finite voxels"),
        (lambda: np.zeros(SMALL_SHAPE, np.uint8), "expected an image, got the constant 0"),
        (lambda: smooth_blob(0).astype(np.float64) * 1e300, "expected intensities from 0 to 255"),
        (lambda: -smooth_blob(0).astype(np.int16), "expected intensities from 0 to 255"),
        (lambda: np.stack([smooth_blob(0)] * 3, -1), r"expected a 3-D volume, got shape \(16, 20, 24, 3\)"),
        (lambda: smooth_blob(0)[:, :, :1], r"expected shape \(16, 20, 24\), like the cohort's other images"),
        (lambda: smooth_blob(0)[0], r"expected a 3-D volume, got shape \(20, 24\)"),
        (lambda: smooth_blob(0).transpose(2, 1, 0), r"expected shape \(16, 20, 24\), .* got \(24, 20, 16\)"),
    ],
)
def test_voxels_that_are_no_image_are_refused(kept, make, message):
    subject = kept.train[1]
    write_nifti(subject.image, make(), np.eye(4))
    with pytest.raises(ValueError, match=message) as caught:
        kept.image(subject)
    assert subject.image.name in str(caught.value)


def write_as(path: Path, array: np.ndarray, affine=None, slope=1.0, inter=0.0, order="<", kind=nib.Nifti1Image) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype.newbyteorder(order))
    header.set_sform(np.eye(4) if affine is None else affine, 1)
    header.set_slope_inter(slope, inter)
    header["vox_offset"] = 544 if kind is nib.Nifti2Image else 352
    header["magic"] = b"n+2\0\r\n\x1a\n" if kind is nib.Nifti2Image else b"n+1\0"
    raw = header.binaryblock + bytes(4) + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    path.write_bytes(gzip.compress(raw))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int64"])
def test_every_byte_order_and_number_is_read_to_the_same_image(kept, order, kind, dtype):
    subject = kept.train[0]
    expected = kept.image(subject).clone()
    kept.memory.clear()
    write_as(subject.image, smooth_blob(0).astype(dtype), order=order, kind=kind)
    assert torch.equal(kept.image(subject), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_slope_and_intercept_are_applied(kept, order):
    subject = kept.train[0]
    stored = smooth_blob(0).astype(np.int16) * 4 - 100
    write_as(subject.image, stored, slope=0.25, inter=25.0, order=order)
    array, _ = read_volume(subject.image)
    assert np.array_equal(array, stored * 0.25 + 25)
    assert torch.equal(kept.image(subject)[0, 0], torch.from_numpy(smooth_blob(0)).float() / 255)


def test_a_fourth_side_of_one_is_dropped(kept):
    subject = kept.train[0]
    write_nifti(subject.image, smooth_blob(0)[..., None], np.eye(4))
    assert torch.equal(kept.image(subject)[0, 0], torch.from_numpy(smooth_blob(0)).float() / 255)


TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])


@pytest.mark.parametrize(
    "directions",
    [np.diag([-1.0, 1, 1]), np.eye(3)[[1, 2, 0]], -np.eye(3), TURN, 2 * TURN],
    ids=["LAS", "permuted", "turned round", "oblique", "oblique 2 mm"],
)
def test_a_cohort_in_any_orientation_is_read_along_its_axes_and_measured_in_mm(tmp_path, directions):
    affine = np.eye(4)
    affine[:3, :3] = directions
    affine[:3, 3] = 5, -7, 11
    path = write_small_cohort(tmp_path / "turned")
    for file in path.parent.rglob("*.nii.gz"):
        write_nifti(file, np.asarray(nib.load(file).dataobj), affine)
    cohort = load_cohort(path)
    edge = np.linalg.norm(directions[:, 0])
    assert cohort.resolution_mm == pytest.approx(edge) and np.allclose(cohort.affine, affine)
    subject = cohort.validation_pairs[0].fixed
    assert torch.equal(cohort.image(subject)[0, 0], torch.from_numpy(smooth_blob(100)).float() / 255)
    shift = torch.zeros(1, 3, *SMALL_SHAPE)
    shift[:, 1] = 2
    points = [(7.0, 8, 9), (5.0, 6, 7)]
    moved = {str(n): (x, y + 2, z) for n, (x, y, z) in enumerate(points)}
    fixed = {str(n): point for n, point in enumerate(points)}
    assert metrics.tre_points_mm(shift, fixed, moved, cohort.resolution_mm) == pytest.approx(0, abs=1e-6)
    zero = metrics.tre_points_mm(0 * shift, fixed, moved, cohort.resolution_mm)
    world = [np.linalg.norm((affine @ [*moved[n], 1] - affine @ [*fixed[n], 1])[:3]) for n in fixed]
    assert zero == pytest.approx(np.mean(world), rel=1e-5)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1.0, 1, 2, 1]), r"expected cubic voxels, got spacing \(1\.0, 1\.0, 2\.0\) mm"),
        (np.diag([1.0, 1, 0, 1]), r"expected cubic voxels, got spacing \(1\.0, 1\.0, 0\.0\) mm"),
        (np.array([[1.0, 0.6, 0, 0], [0, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "expected axes at right angles"),
    ],
)
def test_a_cohort_whose_voxels_are_no_cubes_is_refused(tmp_path, affine, message):
    path = write_small_cohort(tmp_path / "bent")
    for file in path.parent.rglob("*.nii.gz"):
        write_as(file, smooth_blob(0), affine)
    with pytest.raises(ValueError, match=message):
        load_cohort(path)


def test_labels_with_other_numbers_are_refused_or_left_unscored(kept):
    fixed = kept.validation_pairs[0].fixed
    labels = kept.label_volume(fixed)[0, 0].numpy().copy()
    for array, message in (
        (np.where(labels == 4, 40_000, labels).astype(np.int32), "whole label numbers from 0 to 32767"),
        (-labels, "whole label numbers from 0 to 32767"),
        (labels + np.float32(0.5), "whole label numbers"),
        (labels.astype(np.float64) * 1e300, "whole label numbers"),
    ):
        kept.memory.clear()
        write_nifti(fixed.labels, array, np.eye(4))
        with pytest.raises(ValueError, match=message) as caught:
            kept.label_volume(fixed)
        assert fixed.labels.name in str(caught.value)
    unknown = np.where(labels == 4, 31_000, labels).astype(np.int16)
    write_nifti(fixed.labels, unknown, np.eye(4))
    kept.memory.clear()
    found = evaluation.score_displacement(kept, kept.validation_pairs[0], torch.zeros(1, 3, *SMALL_SHAPE))
    moving = kept.label_volume(kept.validation_pairs[0].moving)
    as_background_of_neither = metrics.dice(moving, torch.from_numpy(unknown)[None, None], moving, kept.labels)
    assert found["dice"] == as_background_of_neither and 31_000 not in kept.labels


# JSON: landmarks and datasets ----------------------------------------------------------------------------------------

LANDMARKS = {"names": ["first", "second"], "points": [[7.0, 9.0, 11.5], [9.0, 6, 8.0]]}


@amounts
def test_harmed_landmarks_are_refused_by_name_or_read_as_they_stand(tmp_path, inputs):
    path = tmp_path / "points.json"
    text = json.dumps(LANDMARKS).encode()

    def check(case):
        raw = harmed(text, case) if isinstance(case, tuple) else json.dumps(case).encode()
        path.write_bytes(raw)
        found = refused_or("landmarks JSON", lambda: read_landmarks(path), "points.json")
        if found is not None:
            given = json.loads(raw)
            assert list(found) == [str(name) for name in given["names"]]
            assert list(map(list, found.values())) == given["points"]

    try_inputs(inputs, st.one_of(BYTE_HARM, json_harm(LANDMARKS), JSON_VALUES), check)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"names": ["a"], "points": [[1, 2, 1' + "0" * 400 + "]]}", "expected three finite voxel coordinates"),
        ('{"names": ["a"], "points": [[1, 2, 1' + "0" * 5000 + "]]}", "not valid JSON"),
        ('{"names": ["a"], "points": [[1, 2, NaN]]}', "expected three finite voxel coordinates"),
        ('{"names": ["a"], "points": [[1, 2, true]]}', "expected three finite voxel coordinates"),
        ('{"names": ["a"], "names": ["b"], "points": [[1, 2, 3]]}', "the key 'names' comes twice"),
        ('{"names": ["a", "a"], "points": [[1, 2, 3], [1, 2, 3]]}', "landmark 'a' is named twice"),
        ('{"names": [["a"]], "points": [[1, 2, 3]]}', "expected text or a number as name"),
        ("[" * 100_000, "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
    ],
)
def test_landmarks_that_json_allows_and_anatomy_does_not_are_refused(tmp_path, text, message):
    path = tmp_path / "points.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_landmarks(path)
    assert "points.json" in str(caught.value)


def test_an_image_or_nothing_in_place_of_a_landmark_volume_is_refused(kept):
    subject = replace(kept.validation_pairs[0].fixed, landmarks=kept.train[0].image)
    for voxels, count in ((np.arange(7680, dtype=np.int16).reshape(SMALL_SHAPE), 7679), (np.zeros(SMALL_SHAPE), 0)):
        write_nifti(subject.landmarks, voxels.astype(np.int16), np.eye(4))
        with pytest.raises(ValueError, match=rf"{subject.landmarks.name}: expected 1 to 1000 landmarks.* got {count}"):
            kept.landmark_points(subject)


@amounts
@pytest.mark.filterwarnings("ignore:.*not understood and left out:UserWarning")
def test_a_harmed_dataset_is_refused_by_name_or_stays_inside_its_folder(folder, inputs, tmp_path):
    path = folder / "harmed.json"
    content = json.loads((folder / "dataset.json").read_text())

    def check(case):
        raw = harmed(json.dumps(content).encode(), case) if isinstance(case, tuple) else json.dumps(case).encode()
        path.write_bytes(raw)
        found = refused_or("dataset JSON", lambda: load_cohort(path), "harmed.json", "no such", ".nii.gz")
        if found is None:
            return
        people = [*found.train, *(one for pair in found.validation_pairs for one in (pair.fixed, pair.moving))]
        assert all(one.image.is_file() and one.image.is_relative_to(folder.resolve()) for one in people)
        assert not set(found.train) & {one for pair in found.validation_pairs for one in (pair.fixed, pair.moving)}
        given = json.loads(raw)
        assert len(set(found.validation_pairs)) == len(found.validation_pairs)
        assert found.name == given.get("name", "harmed") and found.simulated is given.get("simulated", False)
        for pair in found.validation_pairs:
            assert kept_pair(given, pair)

    try_inputs(inputs, st.one_of(BYTE_HARM, json_harm(content), JSON_VALUES), check)
    path.unlink()


def kept_pair(given: dict, pair) -> bool:
    """Whether a pair is one of the listed ones, or of all ordered pairs of labelled scans."""
    names = json.dumps(given)
    return pair.fixed.image.name in names and pair.moving.image.name in names and pair.fixed != pair.moving


def rewrite(folder: Path, name: str, change) -> Path:
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["training"].append("../../etc/passwd"), r"'\.\./\.\./etc/passwd', which leaves the data root"),
        (lambda c: c["training"].append("imagesTr/../../x"), "leaves the data root"),
        (lambda c: c["training"].append("..\\..\\x"), "leaves the data root"),
        (lambda c: c["training"].append("/etc/passwd"), r"names '/etc/passwd' .*small/etc/passwd does not exist"),
        (lambda c: c["training"].append("C:\\Windows\\x"), "does not exist"),
        (lambda c: c["training"].append("imagesTr"), "does not exist"),
        (lambda c: c["training"].append("a\0b"), "expected a path for"),
        (lambda c: c["training"].append("x" * 300), "does not exist"),
        (lambda c: c["training"].append("x" * 10**6), r"expected a path for .* of 1000000 characters"),
        (lambda c: c["labelled"][0].update(seg="../x.nii.gz"), "leaves the data root"),
        (lambda c: c["labelled"][0].update(landmarks=["x"]), "expected a path for landmarks of labelled"),
        (lambda c: c["validation"][0].update(moving=c["validation"][0]["fixed"]), "one image as 'fixed' and 'moving'"),
        (lambda c: c.update(simulated="no"), "expected bool as 'simulated', got 'no'"),
        (lambda c: c.update(name=["x"]), "expected str as 'name'"),
    ],
)
def test_a_dataset_that_leaves_its_folder_or_makes_no_sense_is_refused(folder, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_cohort(rewrite(folder, "hand.json", change))
    assert "hand.json" in str(caught.value)


def test_keys_that_come_twice_are_refused_and_pairs_that_do_count_once(folder):
    path = folder / "twice.json"
    path.write_text((folder / "dataset.json").read_text().replace("{", '{"training": [], ', 1))
    with pytest.raises(ValueError, match=r"twice\.json: not valid JSON: the key 'training' comes twice"):
        load_cohort(path)
    found = load_cohort(rewrite(folder, "twice.json", lambda c: c.update(validation=3 * c["validation"])))
    assert len(found.validation_pairs) == 6


def test_two_pairs_of_one_name_are_refused(folder):
    (folder / "more").mkdir(exist_ok=True)
    copy = folder / "more/SMALL_0100_0000.nii.gz"
    write_nifti(copy, smooth_blob(5), np.eye(4))
    change = {"fixed": "more/SMALL_0100_0000.nii.gz", "moving": "./imagesVal/SMALL_0101_0000.nii.gz"}
    with pytest.raises(ValueError, match="two validation pairs would both be named SMALL_0100_SMALL_0101"):
        load_cohort(rewrite(folder, "named.json", lambda c: c["validation"].append(change)))
    shutil.rmtree(folder / "more")


def test_a_hundred_thousand_entries_are_read_in_seconds_and_not_all_paired(folder):
    images = [f"imagesTr/SMALL_{number % 4:04d}_0000.nii.gz" for number in range(10**5)]
    started = time.process_time()
    found = load_cohort(rewrite(folder, "many.json", lambda c: c.update(training=images)))
    assert len(found.train) == 4 and time.process_time() - started < 30
    labelled = []
    for number in range(101):
        link = folder / f"more/SMALL_{1000 + number}_0000.nii.gz"
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.hardlink_to(folder / "imagesTr/SMALL_0000_0000.nii.gz")
        labelled.append({"image": f"more/{link.name}", "seg": "labelsVal/SMALL_0100_0000.nii.gz"})
    with pytest.raises(ValueError, match=r"many\.json: names no validation pair with labels, and 101 labelled scans"):
        load_cohort(rewrite(folder, "many.json", lambda c: c.update(labelled=labelled, validation=[])))
    shutil.rmtree(folder / "more")


# the cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    cohort = load_cohort(write_small_cohort(tmp_path_factory.mktemp("cached") / "small", training=2, validation=2))
    target = tmp_path_factory.mktemp("cache")
    cohort.with_cache(target, progress=False)
    return SimpleNamespace(cohort=cohort, target=target, file=next(target.glob("*/images/SMALL_0000_*.npy")))


@pytest.fixture(autouse=True)
def results_and_caches_stay(request):
    """Files of the module's fixtures are as they were before when a test has ended."""
    shared = {"cached": "target", "measured": "out", "trained": "root"}
    roots = [getattr(request.getfixturevalue(n), shared[n]) for n in shared if n in request.fixturenames]
    files = {file: file.read_bytes() for root in roots for file in root.rglob("*") if file.is_file()}
    yield
    for file, content in files.items():
        if not file.is_file() or file.read_bytes() != content:
            file.write_bytes(content)


def crafted(content: bytes, changes: dict) -> bytes:
    """A cached volume with other words in its header and record, and a checksum that fits."""
    array = np.load(io.BytesIO(content))
    record = json.loads(content[128 + array.nbytes :])
    header = content[10:128].decode("latin1")
    for old, new in changes.get("header", {}).items():
        header = header.replace(old, new)
    record |= changes.get("record", {})
    about = {key: value for key, value in record.items() if key != "crc32"}
    record["crc32"] = zlib.crc32(array, zlib.crc32(json.dumps(about).encode()))
    packed = header.rstrip()[:117].ljust(117) + "\n"
    return content[:10] + packed.encode("latin1", "replace") + array.tobytes() + json.dumps(record).encode()


CACHE_HARM = st.one_of(
    BYTE_HARM,
    st.tuples(st.just("head"), st.tuples(PLACES, st.binary(min_size=1, max_size=8))),
    st.tuples(
        st.just("craft"),
        st.fixed_dictionaries(
            {},
            optional={
                "header": st.dictionaries(
                    st.sampled_from(["(1, 1, 16, 20, 24)", "|u1", "False", "descr", "{"]),
                    st.one_of(
                        st.sampled_from(
                            [
                                "(1, 1, 99999, 99999, 24)",
                                "(-1, 1, 16, 20, 24)",
                                "|O",
                                ">i2",
                                "<f8",
                                "True",
                                "(16,)",
                                "V1",
                                "[[" * 20,
                                "(1, 1, 16, 10, 48)",
                            ]
                        ),
                        st.text(max_size=5),
                    ),
                    max_size=2,
                ),
                "record": st.dictionaries(
                    st.sampled_from(["scale", "dtype", "error", "format", "size", "source", "mtime_ns"]),
                    JSON_VALUES,
                    max_size=2,
                ),
            },
        ),
    ),
)


@amounts
def test_a_harmed_cache_is_refused_by_name_or_gives_the_same_image(cached, inputs):
    content, subject = cached.file.read_bytes(), cached.cohort.train[0]
    expected = cached.cohort.image(subject)

    def check(harm):
        if harm[0] == "craft":
            cached.file.write_bytes(crafted(content, harm[1]))
        elif harm[0] == "head":
            cached.file.write_bytes(harmed(content[:128], ("fill", harm[1])) + content[128:])
        else:
            cached.file.write_bytes(harmed(content, harm))
        read = lambda: cached.cohort.with_cache(cached.target, progress=False).image(subject)  # noqa: E731
        found = refused_or("cached volume", read, cached.file.name)
        assert found is None or torch.equal(found, expected)

    try_inputs(inputs, CACHE_HARM, check)


@pytest.mark.parametrize("scale", [0, -255, None, True, 1.5])
def test_a_cached_image_of_an_impossible_scale_is_refused(cached, scale):
    content = cached.file.read_bytes()
    cached.file.write_bytes(crafted(content, {"record": {"scale": scale}}))
    with pytest.raises(ValueError, match=rf"{cached.file.name}.*no images are stored as uint8 with the scale {scale}"):
        cached.cohort.with_cache(cached.target, progress=False)
    assert volumes.FORMAT.encode() in content


# submissions ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    cohort = load_cohort(write_small_cohort(tmp_path_factory.mktemp("submitted") / "small"))
    pairs = cohort.validation_pairs[:2]
    path = tmp_path_factory.mktemp("zip") / "good.zip"
    field = spatial.resize(torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)), SMALL_SHAPE)
    submission.write_submission(lambda fixed, moving: field, cohort, path, pairs, progress=False)
    return SimpleNamespace(cohort=cohort, pairs=pairs, path=path, field=field, content=path.read_bytes())


@st.composite
def zip_harm(draw, content: bytes):
    """A zip with a harm to its bytes, or to the bytes of a file in it."""
    kind = draw(st.sampled_from(["bytes", "ends", "member", "field"]))
    if kind == "bytes":
        return Content(harmed(content, draw(BYTE_HARM)))
    if kind == "ends":  # the directory of the zip
        return Content(content[:-300] + harmed(content[-300:], draw(BYTE_HARM)))
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        members = {name: source.read(name) for name in source.namelist()}
    name = draw(st.sampled_from(sorted(members)))
    members[name] = (
        harmed(members[name], draw(BYTE_HARM)) if kind == "member" else harm_nifti(members[name], draw(NIFTI_HARM))
    )
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", draw(st.sampled_from([0, 8, 12, 14]))) as archive:
        for member, packed in members.items():
            archive.writestr(member, packed)
    return Content(target.getvalue())


@amounts
def test_a_harmed_submission_is_refused_by_name_or_read_as_it_stands(submitted, inputs, tmp_path):
    path = tmp_path / "harmed.zip"

    def check(content):
        path.write_bytes(content)
        read = lambda: list(submission.read_submission(path, submitted.cohort, submitted.pairs))  # noqa: E731
        found = refused_or("submission zip", read, "harmed.zip", "disp_")
        validate = lambda: submission.validate_submission(  # noqa: E731
            path, submitted.cohort, submitted.pairs, progress=False
        )
        findings = refused_or("submission zip, validated", validate, "harmed.zip")
        if found is None:
            assert findings is None or any(finding.fatal for finding in findings)
            return
        with zipfile.ZipFile(path) as archive:
            for pair, displacement in found:
                raw = gzip.decompress(archive.read(submission.file_name(pair)))
                array = np.asanyarray(nib.Nifti1Image.from_bytes(raw).dataobj)
                if array.shape[0] != 3:
                    array = np.moveaxis(array, -1, 0)
                assert torch.equal(displacement[0], torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)))

    try_inputs(inputs, zip_harm(submitted.content), check)


# checkpoints ---------------------------------------------------------------------------------------------------------

TINY = replace(
    PRESETS["smoke"], name="tiny", resolution_mm=1, epochs=1, steps_per_epoch=2, channel_divisor=16, levels=2
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    cohort = load_cohort(write_small_cohort(root / "small"))
    config = make_config(parse_variant("backbone"), TINY, cohort, 0, head_channels=4)
    result = train(config, cohort, root, "cpu", progress=False)
    best, last = result.checkpoint, result.checkpoint.with_name("last.pt")
    return SimpleNamespace(
        cohort=cohort,
        config=config,
        root=root,
        best=best,
        last=last,
        best_content=best.read_bytes(),
        last_content=last.read_bytes(),
    )


def stored_weights(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


@st.composite
def checkpoint_harm(draw, content: bytes):
    if draw(st.booleans()):
        return "bytes", Content(harmed(content, draw(BYTE_HARM)))
    found = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(draw(st.integers(1, 2))):
        holder = found
        for _ in range(draw(st.integers(0, 3))):
            values = holder.values() if isinstance(holder, dict) else holder
            inner = [part for part in values if isinstance(part, (dict, list)) and part]
            if not inner:
                break
            holder = draw(st.sampled_from(inner))
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        if draw(st.booleans()):
            holder[key] = draw(
                st.one_of(
                    JSON_VALUES,
                    st.sampled_from(
                        [
                            torch.zeros(3),
                            torch.full((), math.nan),
                            torch.zeros(1).expand(10**6),
                            torch.arange(2),
                        ]
                    ),
                )
            )
        else:
            del holder[key]
        if not found:
            break
    target = io.BytesIO()
    torch.save(found, target)
    return "schema", Content(target.getvalue())


@amounts
def test_a_harmed_checkpoint_is_refused_by_name_or_gives_the_weights_that_it_holds(trained, inputs, tmp_path):
    path = tmp_path / "harmed.pt"
    whole = torch.load(io.BytesIO(trained.best_content), weights_only=True)["model"]

    def check(harm):
        kind, content = harm
        path.write_bytes(content)
        model = refused_or("checkpoint, best.pt", lambda: load_model(path, "cpu"), "harmed.pt", memory=600)
        if model is not None:
            stored = whole if kind == "bytes" else torch.load(path, weights_only=True)["model"]
            weights = model.state_dict()
            assert weights.keys() == stored.keys()
            assert all(torch.equal(weights[name], stored[name]) and weights[name].isfinite().all() for name in weights)

    try_inputs(inputs, checkpoint_harm(trained.best_content), check)


@amounts
def test_a_run_goes_on_from_a_harmed_checkpoint_where_that_is_whole_and_else_refuses_it(trained, inputs):
    whole = torch.load(io.BytesIO(trained.last_content), weights_only=True)

    def check(harm):
        kind, content = harm
        trained.last.write_bytes(content)
        trainer = Trainer(trained.config, trained.cohort, trained.root, Engine("cpu"), progress=False)
        if refused_or("checkpoint, last.pt", trainer.resume, "last.pt", memory=600):
            stored = whole if kind == "bytes" else torch.load(io.BytesIO(content), weights_only=True)
            assert trainer.state == TrainingState(**stored["state"])
            assert all(torch.equal(one, stored["model"][name]) for name, one in trainer.model.state_dict().items())
            assert trainer.optimizer.param_groups[0]["amsgrad"] is TINY.amsgrad
            trainer.run()  # what it takes over can be worked with

    try_inputs(inputs, checkpoint_harm(trained.last_content), check)


def resave(path: Path, change) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path.with_name("changed.pt"))
    return path.with_name("changed.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("config"), "config must be dict, got nothing"),
        (lambda c: c.update(model=[1]), "model must be dict, got list"),
        (lambda c: c["config"]["variant"].update(depth=3), "describes no row of this package: unknown option depth"),
        (lambda c: c["config"]["variant"].update(levels="2"), "describes no row .* levels must be a whole number"),
        (lambda c: c["config"]["variant"].pop("name"), "describes no row of this package: 'name'"),
        (lambda c: c["config"]["variant"].update(start_channels=10**9), "start_channels must be at most 4096"),
        (lambda c: c["config"]["variant"].update(start_channels=4000), "weights do not fit the network: .* differ"),
        (lambda c: c["config"]["variant"].update(levels=0), "describes no network: levels must be a whole number"),
        (lambda c: c["config"].update(seed=0, more=torch.zeros(3)), "config must hold plain values only: .*Tensor"),
        (lambda c: c["config"]["preset"].update(more=c["config"]), "config must hold plain values only: Circular"),
        (lambda c: c["model"].pop("estimators.0.conv1.bias"), "estimators.0.conv1.bias is missing instead of"),
        (lambda c: next(iter(c["model"].values())).fill_(math.nan), r"model\..* must hold finite values only"),
        (lambda c: c["model"].update(more=torch.zeros(3)), r"more is \(3,\) instead of absent"),
        (lambda c: c["model"].update(more=torch.zeros(1).expand(10**9)), "fill the memory they are stored in"),
    ],
)
def test_a_checkpoint_of_another_form_is_refused_without_memory_for_it(trained, change, message):
    path = resave(trained.best, change)
    with at_most(600), pytest.raises(ValueError, match=message) as caught:
        load_model(path, "cpu")
    assert "changed.pt" in str(caught.value)


def test_a_flipped_bit_in_a_weight_is_found_though_pytorch_reads_on(trained, tmp_path):
    path = tmp_path / "flipped.pt"
    name, weight = next((n, w) for n, w in stored_items(trained.best) if w.numel() > 20)
    raw = bytearray(trained.best_content)
    raw[trained.best_content.index(weight.contiguous().numpy().tobytes()) + 6] ^= 8
    path.write_bytes(bytes(raw))
    assert not torch.equal(torch.load(path, weights_only=True)["model"][name], weight)
    with pytest.raises(ValueError, match=r"flipped\.pt .*the checksum is not the one it was written with"):
        load_model(path)


def stored_items(path: Path):
    return torch.load(path, weights_only=True)["model"].items()


def test_a_checkpoint_of_a_later_option_of_adam_is_gone_on_from(trained):
    content = torch.load(io.BytesIO(trained.last_content), weights_only=True)
    content["optimizer"]["param_groups"][0]["an_option_of_another_version"] = 1
    torch.save(content, trained.last)
    trainer = Trainer(trained.config, trained.cohort, trained.root, Engine("cpu"), progress=False)
    assert trainer.resume() and trainer.state.epoch == 1
    assert content["format"] == CHECKPOINT_FORMAT


# results -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results folder with a run and zero displacement."""
    root = tmp_path_factory.mktemp("measured")
    cohort = write_small_cohort(root / "small")
    run = Run.prepare(
        "backbone",
        "smoke",
        str(cohort),
        out=str(root / "out"),
        engine="cpu",
        options={"resolution_mm": 1, "channel_divisor": 16, "levels": 2, "epochs": 1, "steps_per_epoch": 2},
    )
    run.evaluate(run.train(progress=False), progress=False)
    run.before_registration(progress=False)
    return run


def load(run: Run) -> runs.Runs:
    return runs.load_runs(run.out, ["backbone"], "smoke", "small", run.options)


@amounts
def test_harmed_provenance_is_refused_by_name_or_says_what_stands_in_it(measured, inputs):
    path = measured.metrics_path.with_suffix(".json")
    text = path.read_bytes()
    content = json.loads(text)

    def check(case):
        raw = harmed(text, case) if isinstance(case, tuple) else json.dumps(case).encode()
        path.write_bytes(raw)
        said = ("has no run of", "no zero displacement", "different states", path.with_suffix(".csv").name)
        found = refused_or("results JSON", lambda: load(measured), path.name, *said)
        if found is not None:
            fact, given = found.facts.iloc[0], json.loads(raw)
            assert all(fact[name] == given[name] for name in ("seed", "run", "cohort_digest", "evaluated_pairs"))
            assert np.isfinite(tables.table2(found)["ours"]).any()

    try_inputs(inputs, st.one_of(BYTE_HARM, json_harm(content), JSON_VALUES), check)


@amounts
@pytest.mark.parametrize("checksum", [True, False])
def test_a_harmed_table_is_refused_by_name_or_is_the_one_that_was_written(measured, inputs, checksum):
    path, about = measured.metrics_path, measured.metrics_path.with_suffix(".json")
    text, known = path.read_bytes(), about.read_bytes()
    if not checksum:  # as the first results are
        about.write_text(json.dumps({k: v for k, v in json.loads(known).items() if k != "table_sha256"}))
    expected = load(measured).values

    def check(harm):
        path.write_bytes(harmed(text, harm))
        found = refused_or(f"results CSV{'' if checksum else ' without checksum'}", lambda: load(measured), path.name)
        if found is not None and checksum:
            pd.testing.assert_frame_equal(found.values, expected)
        elif found is not None:
            assert len(found.values) == len(expected) and found.values["value"].dtype == float

    try_inputs(inputs, BYTE_HARM, check)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cut off"),
        ("pair,metric,value\n", "expected numbers as values"),
        ("pair,metric,value\np,dice,0.5", "cut off"),
        ("pair,metric,value\np,dice,much\n", "expected numbers as values, got"),
        ("pair,metric,value\np,dice,0.5\np,dice,0.6\n", "every pair and metric once"),
        ("pair,metric,value\n,dice,0.5\n", "every pair and metric once"),
        ("pair,metric\np,dice\n", "lacks the column\\(s\\) value"),
        ('pair,metric,value\n"p,dice,0.5\n', "cannot be read as CSV"),
        ("pair,metric,value\np,dice,0.5,7,8\np,dice\n", r"run\.csv"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "run.csv").write_text(text)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=message) as caught:
        results.read_results(tmp_path / "run.csv")
    assert "run.csv" in str(caught.value)


def test_a_table_that_git_gave_other_line_ends_is_the_same(tmp_path):
    table = pd.DataFrame({"pair": ["p", "q"], "metric": "dice", "value": [0.5, 0.25]})
    path = write_results(table, tmp_path / "run.csv", {})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(results.read_results(path)[0], table)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9"))
    with pytest.raises(ValueError, match=r"run\.csv: damaged or changed, its SHA-256 is not the one in run\.json"):
        results.read_results(path)


def test_a_table_that_lacks_pairs_is_not_summed_up(measured):
    path, about = measured.metrics_path, measured.metrics_path.with_suffix(".json")
    text, known = path.read_bytes(), about.read_bytes()
    about.write_text(json.dumps({k: v for k, v in json.loads(known).items() if k != "table_sha256"}))
    lines = text.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match="expected 3 pairs with all metrics, as its provenance says, got"):
        load(measured)


# numbers -------------------------------------------------------------------------------------------------------------

EXTREMES = {
    "zero": lambda shape: torch.zeros(shape),
    "constant": lambda shape: torch.full(shape, 0.7),
    "a million": lambda shape: 1e6 * noise(shape),
    "beyond float16": lambda shape: 1e9 * noise(shape),
    "tiny": lambda shape: 1e-30 * noise(shape),
    "a million and a bit": lambda shape: 1e6 + noise(shape),
    "one voxel": lambda shape: (torch.arange(math.prod(shape)) == 777).float().view(shape),
    "largest": lambda shape: torch.full(shape, 3e38).mul_(noise(shape).sign()),
}


def noise(shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("warped", EXTREMES)
@pytest.mark.parametrize("fixed", EXTREMES)
def test_ncc_and_its_gradient_stay_finite_on_extreme_images(warped, fixed):
    shape = (1, 1, 12, 13, 14)
    first, second = EXTREMES[warped](shape).requires_grad_(), EXTREMES[fixed](shape)
    loss = ncc_loss(first, second)
    loss.backward()
    assert 0 <= loss.item() <= 1 and torch.isfinite(first.grad).all()
    other, gradient = ncc_in_parts(first.detach(), second, 9, True)  # what GPUs compute
    assert 0 <= float(other) <= 1 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_cannot_overflow_as_they_are_taken_in_float64(dtype):
    image = (60_000 * noise((1, 1, 12, 13, 14))).to(dtype)
    assert not torch.isfinite(image.half().square()).all()
    assert float(ncc_loss(image, image)) == pytest.approx(0, abs=1e-3)
    assert torch.isfinite(mse_loss(image, 0 * image))
    assert torch.isfinite(diffusion_loss((60_000 * noise((1, 3, 5, 6, 7))).to(dtype)))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e2, 1e6, 1e20, 3e38])
def test_integration_warping_and_folds_stay_finite_far_beyond_the_volume(size):
    velocity = (size * (2 * noise((1, 3, 8, 9, 10)) - 1)).requires_grad_()
    displacement = spatial.integrate(velocity)
    image = noise((1, 1, 8, 9, 10))
    warped = spatial.warp(image, displacement)
    warped.sum().backward()
    assert torch.isfinite(displacement).all() and torch.isfinite(warped).all() and torch.isfinite(velocity.grad).all()
    assert math.isfinite(metrics.ndv_percent(displacement.detach()))
    assert 0 <= float(warped.max()) <= 1
    by_grid_sample = spatial.integrate_by_grid_sample(velocity.detach(), 7)  # what GPUs compute
    assert torch.isfinite(by_grid_sample).all()
    labels = torch.ones(1, 1, 8, 9, 10, dtype=torch.int16)
    nearest = spatial.warp(labels, displacement.detach(), "nearest")
    assert set(nearest.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_before_it_becomes_a_figure(bad, kept):
    displacement = torch.zeros(1, 3, *SMALL_SHAPE)
    displacement[0, 1, 3, 4, 5] = bad
    for call in (
        lambda: metrics.ndv_percent(displacement),
        lambda: evaluate_pair(displacement),
        lambda: evaluate_method(lambda f, m: displacement, kept, kept.validation_pairs[:1], progress=False),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()
    table = evaluate_method(zero_displacement, kept, kept.validation_pairs[:1], progress=False)
    assert np.isfinite(table["value"]).all()


def test_labels_are_read_the_same_from_either_reader(kept):
    path = kept.validation_pairs[0].fixed.labels
    assert np.array_equal(read_label_volume(path)[0], read_volume(path)[0])
