"""Images, labels and points carried by transforms: against ITK reading the same files, and against SciPy."""

import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import preparation
import pytest
import torch
from scipy.ndimage import map_coordinates

from lumirlib import cli, metrics, spatial
from lumirlib.data.frame import frame_affine
from lumirlib.data.nifti import read_nifti, write_nifti
from lumirlib.scans import maps
from lumirlib.scans.apply import apply_to_image, apply_to_points, is_label_map
from lumirlib.scans.register import register
from lumirlib.scans.scan import as_scanned, read_scan, transform, world_slabs
from lumirlib.training.registrar import DEFAULT_WEIGHTS

sitk = pytest.importorskip("SimpleITK")
LPS = np.diag([-1.0, -1, 1, 1])
AFFINE = np.array([[1.02, 0.08, 0, 3], [-0.08, 0.97, 0.04, -2], [0, -0.04, 1.05, 4], [0, 0, 0, 1.0]])


def odd_grid(orientation, spacing, turn):
    """An oblique and anisotropic grid of about 60 mm, (shape, affine)."""
    array, affine, _ = as_scanned(
        torch.zeros(1, 1, 16, 18, 14), np.diag([4.0, 4, 4, 1]), turn, (3, -5, 2), orientation, spacing
    )
    return array.shape, affine


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference, an image, labels and a series on another grid, a field on a third one, and an affine of ITK."""
    folder = tmp_path_factory.mktemp("apply")
    shape, affine = odd_grid("LAS", (2.1, 3.3, 1.7), (12, -7, 20))
    write_nifti(folder / "reference.nii.gz", np.ones(shape, np.uint8), affine)
    shape, affine = odd_grid("PSR", (2.4, 2.0, 3.0), (-5, 9, 4))
    rng = np.random.default_rng(0)
    smooth = spatial.resize(torch.from_numpy(rng.random((1, 1, 6, 5, 6), np.float32)), shape)[0, 0].numpy() * 100 + 1
    write_nifti(folder / "image.nii.gz", smooth, affine)
    write_nifti(folder / "labels.nii.gz", (smooth // 30).astype(np.int32) * 1001 - 1, affine)
    write_nifti(folder / "series.nii.gz", np.stack([smooth, smooth * 2 + 1, smooth**1.1], -1), affine, seconds=1.5)
    shape, affine = odd_grid("RSA", (4.0, 3.5, 3.0), (3, 4, 5))
    shape, affine = tuple(side + 12 for side in shape), affine @ translation(-6)
    field = spatial.resize(torch.from_numpy(rng.normal(size=(1, 3, 5, 6, 5)).astype(np.float32)) * 3, shape)
    field = field[0].movedim(0, -1).numpy()[:, :, :, None]
    write_nifti(folder / "field.nii.gz", field, affine, intent="vector")
    itk = LPS @ AFFINE @ LPS
    sitk.WriteTransform(
        sitk.AffineTransform(itk[:3, :3].ravel().tolist(), itk[:3, 3].tolist()), str(folder / "affine.mat")
    )
    return folder


def translation(by):
    found = np.eye(4)
    found[:3, 3] = by
    return found


def itk_transform(files, names):
    """The transforms as ITK reads the files; the last that is added takes the points."""
    parts = []
    for name in names:
        path = str(files / name)
        if name.endswith(".mat"):
            parts.append(sitk.ReadTransform(path))
        else:
            parts.append(sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64)))
    return sitk.CompositeTransform(parts[::-1])


@pytest.mark.parametrize("names", [["field.nii.gz"], ["affine.mat"], ["field.nii.gz", "affine.mat"]])
@pytest.mark.parametrize(
    ("image", "interpolation", "theirs"),
    [
        ("image.nii.gz", "linear", sitk.sitkLinear),
        ("image.nii.gz", "cubic", sitk.sitkBSpline),
        ("labels.nii.gz", "nearest", sitk.sitkNearestNeighbor),
        ("labels.nii.gz", "label", sitk.sitkLabelLinear),
    ],
)
def test_images_are_those_of_itk_on_odd_grids(files, tmp_path, names, image, interpolation, theirs):
    apply_to_image(
        [files / name for name in names],
        files / image,
        files / "reference.nii.gz",
        tmp_path / "out.nii.gz",
        interpolation,
    )
    found, affine = read_nifti(tmp_path / "out.nii.gz")
    moving = sitk.ReadImage(str(files / image))
    by_itk = sitk.Resample(
        moving, sitk.ReadImage(str(files / "reference.nii.gz")), itk_transform(files, names), theirs, -77.0
    )
    by_itk = sitk.GetArrayFromImage(by_itk).T
    inside = by_itk != -77
    assert inside.mean() > 0.3
    different = np.abs(found - by_itk)[inside] > (0.5 if image == "labels.nii.gz" else 0.05)  # headers are float32
    assert different.mean() < 2e-3
    np.testing.assert_allclose(affine, nib.load(files / "reference.nii.gz").affine, atol=1e-5)
    if image == "labels.nii.gz":
        assert found.dtype == np.int32 and set(np.unique(found)) <= {-1, 1000, 2001, 3002}


def test_several_transforms_are_interpolated_once_as_scipy_has_it(files, tmp_path):
    paths = [files / "field.nii.gz", files / "affine.mat"]
    apply_to_image(paths, files / "image.nii.gz", files / "reference.nii.gz", tmp_path / "out.nii.gz")
    field, grid = read_nifti(files / "field.nii.gz")
    image, own = read_nifti(files / "image.nii.gz")
    reference = nib.load(files / "reference.nii.gz")
    points = nib.affines.apply_affine(reference.affine, np.moveaxis(np.indices(reference.shape), 0, -1))
    at = np.moveaxis(nib.affines.apply_affine(np.linalg.inv(grid), points), -1, 0)
    by = np.stack([map_coordinates(field[:, :, :, 0, axis], at, order=1) for axis in range(3)], -1) * [-1, -1, 1]
    places = nib.affines.apply_affine(np.linalg.inv(own) @ AFFINE, points + by)
    expected = map_coordinates(image, np.moveaxis(places, -1, 0), order=1, cval=-77)
    inside = ((places >= 0) & (places <= np.array(image.shape) - 1)).all(-1)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(read_nifti(tmp_path / "out.nii.gz")[0][inside], expected[inside], atol=0.05)


def test_a_series_is_carried_volume_by_volume_and_keeps_its_time(files, tmp_path):
    paths = ["apply", str(files / "field.nii.gz")]
    more = ["--reference", str(files / "reference.nii.gz"), "--out"]
    assert cli.main([*paths, str(files / "series.nii.gz"), *more, str(tmp_path / "series.nii.gz")]) == 0
    assert cli.main([*paths, str(files / "image.nii.gz"), *more, str(tmp_path / "image.nii.gz")]) == 0
    series = nib.load(tmp_path / "series.nii.gz")
    assert series.shape[3] == 3 and series.header.get_zooms()[3] == 1.5
    np.testing.assert_array_equal(series.get_fdata()[..., 0], nib.load(tmp_path / "image.nii.gz").get_fdata())


def world_points(files, count=40):
    """World points, RAS, in the middle of the field."""
    shape, affine = nib.load(files / "field.nii.gz").shape[:3], nib.load(files / "field.nii.gz").affine
    inner = np.random.default_rng(1).uniform(0.35, 0.65, (count, 3)) * (np.array(shape) - 1)
    return nib.affines.apply_affine(affine, inner)


def write_points(path, points, columns):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", *columns])
        table.writerows([f"0{number}", *map(repr, map(float, point))] for number, point in enumerate(points))
    return path


def points_of(path, columns):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"0{number}" for number in range(len(rows))]
    return np.array([[float(row[column]) for column in columns] for row in rows])


@pytest.mark.parametrize("names", [["field.nii.gz"], ["field.nii.gz", "affine.mat"]])
def test_points_go_with_the_image_and_itk_leads_them_back(files, tmp_path, names):
    """ITK's transform takes points of the reference to the image: the inverse of how the image is carried."""
    theirs = itk_transform(files, names)
    fixed = world_points(files) * [-1, -1, 1]  # LPS
    moving = np.array([theirs.TransformPoint(point.tolist()) for point in fixed])
    write_points(tmp_path / "moving.csv", moving, "xyz")
    paths = [str(files / name) for name in names]
    out = tmp_path / "fixed.csv"
    assert cli.main(["apply", *paths, str(tmp_path / "moving.csv"), "--points", "lps", "--out", str(out)]) == 0
    assert np.linalg.norm(points_of(out, "xyz") - fixed, axis=1).max() < 0.01
    back = [*paths, str(out), "--points", "lps", "--inverse", "--out", str(tmp_path / "back.csv")]
    assert cli.main(["apply", *back]) == 0
    assert np.linalg.norm(points_of(tmp_path / "back.csv", "xyz") - moving, axis=1).max() < 0.01
    write_points(tmp_path / "ras.csv", moving * [-1, -1, 1], "xyz")
    apply_to_points(paths, tmp_path / "ras.csv", "ras", tmp_path / "ras_out.csv")
    np.testing.assert_allclose(
        points_of(tmp_path / "ras_out.csv", "xyz"), points_of(out, "xyz") * [-1, -1, 1], atol=1e-5
    )


def test_points_in_voxels_are_of_the_image_and_then_of_the_reference(files, tmp_path):
    image, reference = (nib.load(files / f"{name}.nii.gz") for name in ("image", "reference"))
    voxels = np.random.default_rng(2).uniform(0.4, 0.6, (20, 3)) * (np.array(image.shape) - 1)
    write_points(tmp_path / "voxels.csv", voxels, "ijk")
    apply_to_points(
        [files / "affine.mat"],
        tmp_path / "voxels.csv",
        "voxels",
        tmp_path / "out.csv",
        files / "reference.nii.gz",
        files / "image.nii.gz",
    )
    expected = nib.affines.apply_affine(np.linalg.inv(reference.affine) @ np.linalg.inv(AFFINE) @ image.affine, voxels)
    np.testing.assert_allclose(points_of(tmp_path / "out.csv", "ijk"), expected, atol=1e-3)


def test_an_inverted_transform_undoes_itself_on_an_image(files, tmp_path):
    """What the transform carried to the reference, the inverse carries back, but for two interpolations."""
    transforms = [files / "field.nii.gz", files / "affine.mat"]
    apply_to_image(transforms, files / "image.nii.gz", files / "reference.nii.gz", tmp_path / "there.nii.gz", "cubic")
    apply_to_image(
        transforms, tmp_path / "there.nii.gz", files / "image.nii.gz", tmp_path / "back.nii.gz", "cubic", inverse=True
    )
    original, back = (read_nifti(path)[0] for path in (files / "image.nii.gz", tmp_path / "back.nii.gz"))
    inner = tuple(slice(side // 3, -(side // 3)) for side in original.shape)
    assert np.abs(original - back)[inner].mean() < 1 < original[inner].std()


@pytest.mark.parametrize("shape", [(7, 5, 6), (1, 5, 6)])
def test_values_at_points_anywhere_are_scipys_and_the_border_goes_on(shape):
    generator = np.random.default_rng(0)
    image, points = generator.random((1, 2, *shape), np.float32), generator.uniform(-3, 9, (1, 3, 11, 13))
    found = maps.sample_at(torch.from_numpy(image), torch.from_numpy(points))
    expected = [map_coordinates(channel, points[0], order=1, mode="nearest") for channel in image[0].astype(float)]
    np.testing.assert_allclose(found[0], expected, atol=1e-12)


def test_the_inverse_of_a_strong_map_is_found_and_measured():
    u = spatial.resize(torch.randn(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1)), (40, 56, 48))
    assert 0 < metrics.jacobian_determinant(u).min() < 0.5
    whole = maps.ScanMap(np.linalg.inv(AFFINE), u, 4, AFFINE @ translation(5))
    for _, points in world_slabs((20, 24, 16), np.diag([6.0, 6, 8, 1]) @ translation(-9)):
        found, error = maps.InverseMap(whole).solve(points)
        torch.testing.assert_close((whole(found) - points).norm(dim=1, keepdim=True), error, atol=1e-9, rtol=0)
        assert error.max() < 1e-3


def test_beside_a_fold_the_inverse_is_found_too():
    u = 1.8 * spatial.resize(torch.randn(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(1)), (40, 56, 48))
    assert 0 < (metrics.jacobian_determinant(u) <= 0).double().mean() < 1e-3
    whole = maps.ScanMap(np.eye(4), u, 4, np.eye(4))
    for _, points in world_slabs(u.shape[2:], frame_affine(4)):
        found, error = maps.InverseMap(whole).solve(points)
        assert error.max() < 1e-3 and (whole(found) - points).norm(dim=1).max() < 1e-3


def test_transforms_are_read_as_itk_writes_them(files, tmp_path):
    image = sitk.ReadImage(str(files / "field.nii.gz"), sitk.sitkVectorFloat64)
    parts = [sitk.ReadTransform(str(files / "affine.mat")), sitk.DisplacementFieldTransform(image)]
    sitk.WriteTransform(sitk.CompositeTransform(parts), str(tmp_path / "both.h5"))
    points = torch.from_numpy(world_points(files).T[None].copy())
    apart = maps.ChainMap((maps.read_transform(files / "field.nii.gz"), maps.read_transform(files / "affine.mat")))
    torch.testing.assert_close(maps.read_transform(tmp_path / "both.h5")(points), apart(points), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        maps.read_transform(files / "affine.mat")(points), transform(AFFINE, points), atol=1e-6, rtol=0
    )


def test_label_maps_are_told_from_images(files):
    labels, image = (read_nifti(files / f"{name}.nii.gz")[0] for name in ("labels", "image"))
    assert is_label_map(labels) and is_label_map(labels.astype(np.float32)) and not is_label_map(image)
    assert not is_label_map(np.random.default_rng(0).integers(0, 200, (9, 9, 9)))


def test_what_does_not_fit_is_one_clear_error_and_nothing_is_overwritten(files, tmp_path):
    image, reference, field = files / "image.nii.gz", files / "reference.nii.gz", [files / "field.nii.gz"]
    out = tmp_path / "out.nii.gz"
    with pytest.raises(ValueError, match=r"labels.nii.gz: a label map .* linear interpolation .* take nearest"):
        apply_to_image(field, files / "labels.nii.gz", reference, out, "linear")
    with pytest.raises(ValueError, match=r"image.nii.gz: expected a label map .* for interpolation label"):
        apply_to_image(field, image, reference, out, "label")
    shape, affine = odd_grid("LAS", (2.1, 3.3, 1.7), (12, -7, 20))
    write_nifti(tmp_path / "far.nii.gz", np.ones(shape, np.uint8), translation(900) @ affine)
    with pytest.raises(ValueError, match=r"far.nii.gz: 100 % of its voxels lie where the transform is not defined"):
        apply_to_image(field, image, tmp_path / "far.nii.gz", out)
    with pytest.raises(ValueError, match=r"image.nii.gz: no voxel of far.nii.gz leads into it"):
        apply_to_image([files / "affine.mat"], image, tmp_path / "far.nii.gz", out)
    sheared = affine.copy()
    sheared[:3, 1] += 0.3 * sheared[:3, 0]
    write_nifti(tmp_path / "sheared.nii.gz", np.ones(shape, np.float32), sheared)
    for paths in ((tmp_path / "sheared.nii.gz", reference), (image, tmp_path / "sheared.nii.gz")):
        with pytest.raises(ValueError, match=r"sheared.nii.gz: expected axes at right angles"):
            apply_to_image(field, *paths, out)
    with pytest.raises(ValueError, match=r"image.nii.gz: expected a displacement field \(D, H, W, 1, 3\)"):
        apply_to_image([image], image, reference, out)
    write_nifti(tmp_path / "nan.nii.gz", np.full(shape, np.nan, np.float32), affine)
    with pytest.raises(ValueError, match=r"nan.nii.gz: expected finite voxels"):
        apply_to_image(field, tmp_path / "nan.nii.gz", reference, out)
    assert not out.exists()
    apply_to_image(field, image, reference, out)
    with pytest.raises(FileExistsError, match="exists already; --overwrite replaces it"):
        apply_to_image(field, image, reference, out)
    apply_to_image(field, image, reference, out, overwrite=True)


def test_points_that_do_not_fit_are_named(files, tmp_path, capsys):
    field, out = [files / "field.nii.gz"], tmp_path / "out.csv"
    write_points(tmp_path / "far.csv", [[0, 0, 0], [900, 0, 0]], "xyz")
    with pytest.raises(ValueError, match=r"far.csv: 1 of 2 points lie where .* line 3 \(900, 0, 0\)"):
        apply_to_points(field, tmp_path / "far.csv", "ras", out)
    with pytest.raises(ValueError, match=r"far.csv: expected columns i, j, k, got name, x, y, z"):
        apply_to_points(field, tmp_path / "far.csv", "voxels", out, files / "reference.nii.gz", files / "image.nii.gz")
    write_points(tmp_path / "outside.csv", [[1, 1, 1], [500, 1, 1]], "ijk")
    with pytest.raises(ValueError, match=r"outside.csv: 1 of 2 points lie outside image.nii.gz.* line 3"):
        apply_to_points(
            field, tmp_path / "outside.csv", "voxels", out, files / "reference.nii.gz", files / "image.nii.gz"
        )
    (tmp_path / "broken.csv").write_text("x,y,z\n1,2,three\n")
    with pytest.raises(ValueError, match=r"broken.csv: expected three finite numbers in line 2"):
        apply_to_points(field, tmp_path / "broken.csv", "lps", out)
    assert cli.main(["apply", str(field[0]), str(tmp_path / "far.csv"), "--out", str(out)]) == 2
    assert "a CSV of points needs --points" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
def test_points_of_real_brains_go_within_a_tenth_of_a_mm_of_where_itk_takes_them(tmp_path, monkeypatch):
    """By both transforms that a registration writes: LAS, oblique, anisotropic."""
    monkeypatch.setattr("lumirlib.plots.save_figure", lambda figure, path, data: None)
    scanners = (
        ((9, -12, 14), (15, -9, 12), "LAS", (2.0, 2.6, 1.8)),
        ((-13, 8, 10), (-14, 20, 6), "PIR", (2, 1.9, 2.4)),
    )
    root = Path(os.environ["LUMIR_BRAINS"])
    people = zip((1000, 1007), scanners, strict=True)
    paths = [preparation.scanned(root, person, scanner, tmp_path)[0] for person, scanner in people]
    given = {"pretrained": DEFAULT_WEIGHTS, "resolution_mm": 4, "skip": ["strip"], "progress": False}
    found = register(*paths, tmp_path, **given)
    assert found.measures["ncc"] > found.measures["ncc_affine"] + 0.02
    for name, reference in (("transform", paths[0]), ("inverse_transform", paths[1])):
        scan = read_scan(reference)
        inside = torch.nonzero(scan.values[0, 0] > 0).numpy()
        voxels = inside[np.random.default_rng(0).choice(len(inside), 300)]
        points = nib.affines.apply_affine(scan.affine, voxels) * [-1, -1, 1]
        file = found.files[name]
        theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(file), sitk.sitkVectorFloat64))
        expected = np.array([theirs.TransformPoint(point.tolist()) for point in points])
        assert np.linalg.norm(expected - points, axis=1).mean() > 15  # poses are in it
        write_points(tmp_path / f"{name}.csv", points, "xyz")
        apply_to_points([file], tmp_path / f"{name}.csv", "lps", tmp_path / f"{name}_there.csv", inverse=True)
        there = points_of(tmp_path / f"{name}_there.csv", "xyz")
        apply_to_points([file], tmp_path / f"{name}_there.csv", "lps", tmp_path / f"{name}_back.csv")
        back = [theirs.TransformPoint(point.tolist()) for point in points_of(tmp_path / f"{name}_back.csv", "xyz")]
        apart = [np.linalg.norm(one - expected, axis=1).max() for one in (there, back)]
        print(f"{name}: {apart[0]:.4f} mm, and back {apart[1]:.4f} mm from ITK's")
        assert max(apart) < 0.1
