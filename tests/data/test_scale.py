"""One intensity scale for a cohort: from its images, or from its JSON."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from small_cohorts import SMALL_SHAPE, smooth_blob, write_small_cohort

from lumirlib import load_cohort
from lumirlib.data import scale
from lumirlib.data.nifti import write_nifti


def cohort_of(folder, maxima, dtype=np.float32, **changes):
    """A cohort of as many training scans, and two for validation with the first two maxima, each with its maximum."""
    path = write_small_cohort(folder, training=len(maxima), validation=2, **changes)
    names = [f"imagesTr/SMALL_{n:04d}_0000.nii.gz" for n in range(len(maxima))]
    names += [f"imagesVal/SMALL_{100 + n:04d}_0000.nii.gz" for n in range(2)]
    for name, top in zip(names, [*maxima, *maxima[:2]], strict=True):
        image = smooth_blob(0).astype(np.float64)
        write_nifti(folder / name, (image / image.max() * top).astype(dtype), np.eye(4))
    return path


def largest(cohort):
    return [float(cohort.image(subject).max()) for subject in cohort.train]


def test_images_whose_white_is_one_are_read_on_one_scale_and_told(tmp_path):
    cohort = load_cohort(cohort_of(tmp_path, [1.45, 1.8]))
    with pytest.warns(UserWarning, match=r"1\.45 in SMALL_0000_0000\.nii\.gz, 1\.8 in SMALL_0001.* divided by 1\.8"):
        assert largest(cohort) == pytest.approx([1.45 / 1.8, 1.0])


@pytest.mark.parametrize("maxima", [[1.2, 1.5], [3.0, 1.0], [0.9, 20.0]])
def test_the_largest_voxel_of_a_cohort_is_its_white_whichever_file_is_read_first(tmp_path, maxima):
    path = cohort_of(tmp_path, maxima)
    with pytest.warns(UserWarning, match="neither about 1 nor about 255"):
        found = [load_cohort(path), load_cohort(path)]
        order = [largest(found[0]), [float(found[1].image(one).max()) for one in reversed(found[1].train)][::-1]]
    assert order[0] == order[1] == pytest.approx([top / max(maxima) for top in maxima])


@pytest.mark.parametrize(("maxima", "white"), [([1.0, 0.9], 1), ([0.7, 1.0], 1), ([255.0, 200.0], 255)])
@pytest.mark.parametrize("resolution", [1, 2])
def test_the_two_usual_scales_are_read_bit_for_bit_and_without_a_word(tmp_path, maxima, white, resolution):
    cohort = load_cohort(cohort_of(tmp_path, maxima), resolution)
    blob = smooth_blob(0).astype(np.float64)
    for subject, top in zip(cohort.train, maxima, strict=True):
        image = torch.from_numpy((blob / blob.max() * top).astype(np.float32))[None, None]
        expected = (torch.nn.functional.avg_pool3d(image, 2) if resolution == 2 else image) / white
        assert torch.equal(cohort.image(subject), expected)


def test_whole_numbers_are_on_the_scale_to_255_beside_fractions_up_to_1(tmp_path):
    path = cohort_of(tmp_path, [1.0, 1.0, 1.0])
    write_nifti(tmp_path / "imagesTr/SMALL_0001_0000.nii.gz", smooth_blob(0), np.eye(4))
    assert largest(load_cohort(path)) == pytest.approx([1, smooth_blob(0).max() / 255, 1])


def test_fractions_stored_as_scaled_integers_are_fractions(tmp_path):
    path = cohort_of(tmp_path, [1.45, 1.8])
    for number, top in enumerate((1.45, 1.8)):
        image = nib.Nifti1Image(smooth_blob(0), np.eye(4))
        image.header.set_slope_inter(top / float(smooth_blob(0).max()), 0)
        nib.save(image, tmp_path / f"imagesTr/SMALL_{number:04d}_0000.nii.gz")
    with pytest.warns(UserWarning, match=r"all are divided by 1\.8"):
        assert largest(load_cohort(path)) == pytest.approx([1.45 / 1.8, 1.0], abs=1e-5)


def test_files_that_are_on_no_common_scale_are_refused_by_name(tmp_path):
    cohort = load_cohort(cohort_of(tmp_path, [1.45, 255.0]))
    with pytest.raises(ValueError, match=r"one scale .* 1\.45 in SMALL_0000_0000\.nii\.gz.* one with 255"):
        cohort.image(cohort.train[1])


def test_files_on_the_two_usual_scales_are_each_read_on_its_own_and_told(tmp_path):
    cohort = load_cohort(cohort_of(tmp_path, [1.0, 255.0]))
    with pytest.warns(UserWarning, match=r"two scales: some reach 255, and others about 1 \(1 in SMALL_0000"):
        assert largest(cohort) == [1, 1]


@pytest.mark.parametrize(
    ("maxima", "dtype", "message"),
    [
        ([0.02, 1.0], np.float32, r"largest voxel is about 1, got 0\.02 in SMALL_0000_0000\.nii\.gz"),
        ([60.0, 255.0], np.float32, r"largest voxel is about 255, got 60 in SMALL_0000_0000\.nii\.gz"),
        ([60, 255], np.uint8, r"largest voxel is about 255, got 60 in SMALL_0000_0000\.nii\.gz"),
        ([255, 12], np.int16, r"largest voxel is about 255, got 12 in SMALL_0001_0000\.nii\.gz"),
    ],
)
def test_an_image_far_darker_than_its_scale_is_told_and_read_on_it(tmp_path, maxima, dtype, message):
    cohort = load_cohort(cohort_of(tmp_path, maxima, dtype))
    white = 1 if max(maxima) == 1 else 255
    with pytest.warns(UserWarning, match=message):
        assert largest(cohort) == pytest.approx([top / white for top in maxima])


def test_the_json_gives_the_scale(tmp_path):
    cohort = load_cohort(cohort_of(tmp_path, [1.45, 1.8], intensity_maximum=2.0))
    assert largest(cohort) == pytest.approx([0.725, 0.9])
    cohort = load_cohort(cohort_of(tmp_path / "raw", [3000, 4000], np.int16, intensity_maximum=4095))
    assert largest(cohort) == pytest.approx([3000 / 4095, 4000 / 4095])


@pytest.mark.parametrize(
    ("maxima", "dtype", "changes", "message"),
    [
        ([3000, 4000], np.int16, {}, r"from 0 to 255 \(or 0 to 1\), got 0 to 3000; 'intensity_maximum' in the dataset"),
        ([300.0, 250.0], np.float32, {}, r"from 0 to 255 \(or 0 to 1\), got 0 to 300"),
        ([1.8, 2.2], np.float32, {"intensity_maximum": 1.5}, r"SMALL_0000.* from 0 to 1\.5, got 0 to 1\.8"),
    ],
)
def test_intensities_beyond_the_scale_are_refused_and_not_cut_off(tmp_path, maxima, dtype, changes, message):
    cohort = load_cohort(cohort_of(tmp_path, maxima, dtype, **changes))
    with pytest.raises(ValueError, match=message):
        cohort.image(cohort.train[0])


def test_signed_intensities_are_refused_and_not_cut_off(tmp_path):
    path = cohort_of(tmp_path, [1.0, 1.0])
    image = smooth_blob(0).astype(np.float32) / smooth_blob(0).max() - 0.5
    write_nifti(tmp_path / "imagesTr/SMALL_0000_0000.nii.gz", image, np.eye(4))
    cohort = load_cohort(path)
    with pytest.raises(ValueError, match=r"SMALL_0000.* from 0 to 255 \(or 0 to 1\), got -0\.5 to 0\.5"):
        cohort.image(cohort.train[0])


@pytest.mark.parametrize("value", [0, -1, "white", True, float("nan")])
def test_a_maximum_that_is_none_is_refused(tmp_path, value):
    path = write_small_cohort(tmp_path, training=2, validation=2, intensity_maximum=value)
    with pytest.raises(ValueError, match="expected a number above 0 as 'intensity_maximum'"):
        load_cohort(path)


def test_a_cache_is_made_anew_when_the_white_of_a_cohort_changes(tmp_path):
    path = cohort_of(tmp_path / "small", [1.45, 1.8], intensity_maximum=1.8)
    first = load_cohort(path).with_cache(tmp_path / "cache", progress=False)
    assert largest(first) == pytest.approx([1.45 / 1.8, 1], abs=2**-11)
    content = json.loads(path.read_text())
    for maximum, made in ((1.8, 0), (2.0, 4)):
        path.write_text(json.dumps({**content, "intensity_maximum": maximum}))
        cached = load_cohort(path).with_cache(tmp_path / "cache", progress=False)
        assert cached.cache.made == made
        assert largest(cached) == pytest.approx([1.45 / maximum, 1.8 / maximum], abs=2**-11)


def test_joined_cohorts_are_each_on_their_own_scale(tmp_path):
    first = cohort_of(tmp_path / "a", [1.45, 1.8], intensity_maximum=1.8)
    second = cohort_of(tmp_path / "b", [255.0, 250.0])
    joined = load_cohort(f"{first}+{second}")
    assert largest(joined) == pytest.approx([1.45 / 1.8, 1, 1, 250 / 255])
    assert float(joined.image(joined.validation_pairs[0].fixed).max()) == 1


def test_maxima_are_remembered_by_the_content_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMIRLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scale, "REMEMBERED_BYTES", 100)
    cohort = load_cohort(cohort_of(tmp_path / "small", [0.9, 1.0]))
    files, read = [subject.image for subject in cohort.train], []

    def maximum(file):
        read.append(file)
        return np.float32([0.9])

    assert scale.float_maxima(files, maximum, "cohort") == scale.float_maxima(files, maximum, "cohort")
    assert sorted(read) == files
    write_nifti(files[0], np.full(SMALL_SHAPE, 0.3, np.float32), np.eye(4))
    scale.float_maxima(files, maximum, "cohort")
    assert read[2:] == files[:1]


def test_no_more_names_are_listed_than_can_be_read(tmp_path):
    maxima = {tmp_path / f"{n}.nii": 1.5 for n in range(9)}
    with pytest.warns(UserWarning, match=r"1\.5 in 4\.nii and 4 more\)"):
        assert scale.common_white(maxima, tmp_path / "dataset.json") == 1.5
