"""NIfTI headers as people have them: units, two orientations of which one is broken, and more than the voxels."""

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
from small_cohorts import write_small_cohort

from lumirlib import load_cohort
from lumirlib.data.nifti import read_grid, read_header, read_volume, write_nifti
from lumirlib.evaluation import evaluate_method, zero_displacement
from lumirlib.scans.scan import read_scan

IMAGE = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)
AFFINE = np.array([[0, -1.5, 0, 20], [2, 0, 0, -30], [0, 0, 1.2, 7], [0, 0, 0, 1.0]])
#: Millimetres per unit, by NIfTI's name of the unit.
UNITS = {"meter": 1000, "mm": 1, "micron": 0.001, "unknown": 1}


def save(path, affine=AFFINE, unit="mm", image=IMAGE, form="sform"):
    """Write an image whose affine is given in a unit, as sform, qform or both."""
    made = nib.Nifti1Image(image, None)
    made.header.set_xyzt_units(unit)
    made.header.set_sform(affine, 1 if form != "qform" else 0)
    made.header.set_qform(affine, 1 if form != "sform" else 0)
    nib.save(made, path)
    return path


@pytest.mark.parametrize("form", ["sform", "qform", "both"])
@pytest.mark.parametrize("unit", UNITS)
def test_the_affine_is_in_mm_whatever_the_unit_of_the_header(tmp_path, unit, form):
    scaled = np.diag([1 / UNITS[unit]] * 3 + [1]) @ AFFINE
    path = save(tmp_path / "image.nii.gz", scaled, unit, form=form)
    for found in (read_volume(path)[1], read_grid(path)[1]):
        np.testing.assert_allclose(found, AFFINE, rtol=1e-6, atol=1e-5)
    header = read_header(path)
    assert (header.sform is None) == (form == "qform") and (header.qform is None) == (form == "sform")


def test_metres_give_the_voxel_size_to_the_last_digit(tmp_path):
    path = save(tmp_path / "image.nii", np.diag([0.004, 0.004, 0.004, 1]), "meter")
    assert np.array_equal(read_grid(path)[1], np.diag([4.0, 4, 4, 1]))


def test_the_same_cohort_in_metres_has_the_same_figures(tmp_path):
    tables = []
    for unit in ("mm", "meter"):
        path = write_small_cohort(tmp_path / unit, training=1, validation=2)
        for file in path.parent.rglob("*.nii.gz"):
            save(file, np.diag([1 / UNITS[unit]] * 3 + [1]), unit, np.asarray(nib.load(file).dataobj))
        cohort = load_cohort(path)
        assert cohort.resolution_mm == 1
        table = evaluate_method(zero_displacement, cohort, cohort.validation_pairs, progress=False)
        tables.append(table[table["metric"] != "seconds"].reset_index(drop=True))
    assert tables[0].equals(tables[1])
    assert tables[0].query("metric == 'hd95_mm'")["value"].gt(0).all()


def test_files_of_two_units_are_on_one_grid_and_a_unit_that_does_not_fit_is_told(tmp_path):
    path = write_small_cohort(tmp_path, training=2, validation=2)
    subject = load_cohort(path).train[1]
    image = np.asarray(nib.load(subject.image).dataobj)
    expected = load_cohort(path).image(subject)
    save(subject.image, np.diag([1000, 1000, 1000, 1.0]), "micron", image)
    assert load_cohort(path).image(subject).equal(expected)
    save(subject.image, np.eye(4), "micron", image)
    with pytest.raises(ValueError, match=r"got 0\.001x0\.001x0\.001 mm in RAS"):
        load_cohort(path).image(subject)


def test_a_unit_that_makes_no_sense_is_told(tmp_path):
    path = write_small_cohort(tmp_path, training=2, validation=2)
    for file in path.parent.rglob("*.nii.gz"):
        save(file, np.eye(4), "meter", np.asarray(nib.load(file).dataobj))
    with pytest.raises(ValueError, match=r"SMALL_0000_0000.nii.gz: expected voxels of 0.01 to 1000 mm, got 1000 mm"):
        load_cohort(path)


def test_a_scan_whose_header_says_metres_and_means_millimetres_is_told(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 10)).astype(np.uint8)
    assert read_scan(save(tmp_path / "small.nii", np.diag([0.001, 0.001, 0.001, 1]), "meter", image)).affine[0, 0] == 1
    assert read_scan(save(tmp_path / "mouse.nii", np.diag([10, 10, 10, 1]), "micron", image)).affine[0, 0] == 0.01
    for unit, affine, edge in (("meter", np.eye(4), "1000"), ("unknown", np.diag([0.001, 0.001, 0.001, 1]), "0.001")):
        expected = rf"scan\.nii: expected voxels of 0.01 to 100 mm, got {edge} x {edge} x {edge} mm: is its unit right"
        with pytest.raises(ValueError, match=expected):
            read_scan(save(tmp_path / "scan.nii", affine, unit, image))


def test_metres_whose_unit_is_not_named_are_told_and_not_read_as_mm(tmp_path):
    path = write_small_cohort(tmp_path, training=2, validation=2)
    for file in path.parent.rglob("*.nii.gz"):
        save(file, np.diag([0.001, 0.001, 0.001, 1]), "unknown", np.asarray(nib.load(file).dataobj))
    with pytest.raises(ValueError, match=r"SMALL_0000_0000.nii.gz: expected voxels of 0.01 to 1000 mm, got 0.001 mm"):
        load_cohort(path)


def test_written_files_say_mm(tmp_path):
    path = write_nifti(tmp_path / "image.nii.gz", IMAGE, AFFINE)
    assert nib.load(path).header.get_xyzt_units()[0] == "mm"


# two orientations ----------------------------------------------------------------------------------------------------


def with_quaternion(path, length, sform_code):
    header = nib.Nifti1Image(IMAGE, AFFINE).header.copy()
    header.set_sform(AFFINE, sform_code)
    header.set_qform(np.diag([-1.0, -1, 1, 1]), 1)
    header["quatern_b"] = header["quatern_c"] = np.float32(length) / np.sqrt(2)
    header["quatern_d"] = 0
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(header.binaryblock + bytes(4) + IMAGE.tobytes(order="F"))
    return path


@pytest.mark.parametrize("length", [1 + 2e-6, 1.0005, 1.2])
def test_a_quaternion_above_one_beside_a_good_sform_is_told_and_the_sform_taken(tmp_path, length):
    path = with_quaternion(tmp_path / "image.nii", length, sform_code=1)
    with pytest.warns(UserWarning, match=r"image\.nii: .*quaternion.*; its sform is taken"):
        array, affine = read_volume(path)
    assert np.array_equal(array, IMAGE)
    np.testing.assert_allclose(affine, AFFINE, rtol=1e-6)


def test_a_quaternion_that_rounding_made_too_long_is_taken_as_one_where_there_is_no_sform(tmp_path):
    path = with_quaternion(tmp_path / "image.nii", 1 + 2e-6, sform_code=0)
    with pytest.warns(UserWarning, match=r"2\.0e-06 longer than 1; its qform is taken"):
        affine = read_volume(path)[1]
    # half a turn about the axis between x and y: x becomes y, y becomes x, z points down
    np.testing.assert_allclose(affine[:3, :3], [[0, 1, 0], [1, 0, 0], [0, 0, -1]], atol=1e-5)


def test_a_quaternion_far_too_long_and_no_sform_is_refused(tmp_path):
    path = with_quaternion(tmp_path / "image.nii", 1.2, sform_code=0)
    with pytest.raises(ValueError, match=r"image\.nii as NIfTI .*expected a quaternion of length 1, got 1\.2"):
        read_grid(path)


@pytest.mark.parametrize(("form", "told"), [("qform", 1), ("none", 1), ("sform", 0)])
def test_an_edge_of_zero_is_told_where_it_counts(tmp_path, form, told):
    path = save(tmp_path / "image.nii", np.diag([2.0, 2, 2, 1]), form="sform" if form == "none" else form)
    content = bytearray(path.read_bytes())
    content[84:88] = bytes(4)  # pixdim[2]
    if form == "none":
        content[254:256] = bytes(2)  # sform_code
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        affine = read_volume(path)[1]
    assert [str(one.message) for one in caught] == told * [f"{path}: an edge of 0 in its pixdim is taken for 1"]
    assert np.linalg.norm(affine[:3, :3], axis=0).tolist() == ([2, 1, 2] if told else [2, 2, 2])


def test_an_sform_of_zeros_beside_a_good_qform_is_told_and_the_qform_taken(tmp_path):
    path = save(tmp_path / "image.nii", form="both")
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"three directions as its sform.*; its qform is taken"):
        affine = read_volume(path)[1]
    np.testing.assert_allclose(affine, AFFINE, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*its sform is taken")
def test_a_users_scan_is_read_by_its_sform_where_the_quaternion_is_broken(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 10)).astype(np.uint8)
    header = nib.Nifti1Image(image, AFFINE).header.copy()
    header.set_sform(AFFINE, 1)
    header["qform_code"], header["quatern_b"] = 1, 1.5
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "scan.nii"
    path.write_bytes(header.binaryblock + bytes(4) + image.tobytes(order="F"))
    np.testing.assert_allclose(read_scan(path).affine, AFFINE, rtol=1e-6)


# more than the voxels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [1, 14, 3_400_000])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_bytes_behind_the_voxels_are_told_and_the_voxels_read(tmp_path, ending, more):
    path = save(tmp_path / f"image{ending}")
    content = path.read_bytes()
    raw = gzip.decompress(content) if ending == ".nii.gz" else content
    path.write_bytes(gzip.compress(raw + bytes(more)) if ending == ".nii.gz" else raw + bytes(more))
    with pytest.warns(UserWarning, match=rf"image{ending}: what follows its voxels is left out: {more:,} bytes"):
        assert np.array_equal(read_volume(path)[0], IMAGE)


def test_something_behind_the_gzip_itself_is_told_and_the_voxels_read(tmp_path):
    path = save(tmp_path / "image.nii.gz")
    path.write_bytes(path.read_bytes() + b"no gzip")
    with pytest.warns(UserWarning, match="what follows its voxels is left out"):
        assert np.array_equal(read_volume(path)[0], IMAGE)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_lacks_a_byte_is_refused(tmp_path, ending):
    path = save(tmp_path / f"image{ending}")
    raw = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()
    path.write_bytes(gzip.compress(raw[:-1]) if ending == ".nii.gz" else raw[:-1])
    with pytest.raises(ValueError, match=r"truncated or corrupt\?\): expected 562 bytes .* got 561"):
        read_volume(path)


def test_trailing_sides_of_one_are_left_out(tmp_path):
    path = save(tmp_path / "image.nii.gz", image=IMAGE[..., None, None])
    assert read_grid(path)[0] == (5, 6, 7)
    assert np.array_equal(read_volume(path)[0], IMAGE)
