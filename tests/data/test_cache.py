"""The memory-mapped cache of volumes: exact, resumable, and refusing what is not its own."""

import errno
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_cohorts import SMALL_SHAPE, smooth_blob, write_small_cohort

from lumirlib import cli, load_cohort
from lumirlib.data import cache as module
from lumirlib.data.cache import encode
from lumirlib.data.nifti import write_nifti


def volumes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("SMALL_*.npy"))}


def people(cohort):
    return [*cohort.train, *dict.fromkeys(pair.fixed for pair in cohort.validation_pairs)]


@pytest.fixture
def built(small_cohort_json, tmp_path):
    """A cohort, its cache's folder, and the cached cohort."""
    cohort = load_cohort(small_cohort_json)
    return SimpleNamespace(
        cohort=cohort,
        folder=tmp_path / "cache",
        cached=cohort.with_cache(tmp_path / "cache", progress=False),
        first=next((tmp_path / "cache").glob("*/images/SMALL_0000_*.npy")),
        again=lambda **options: cohort.with_cache(tmp_path / "cache", progress=False, **options),
    )


@pytest.mark.parametrize(("resolution", "dtype"), [(1, torch.uint8), (2, torch.int16), (4, torch.int16)])
def test_uint8_scans_are_cached_bit_for_bit_at_their_resolution_and_downsampled(
    small_cohort_json, tmp_path, resolution, dtype
):
    cohort = load_cohort(small_cohort_json, resolution)
    cached = cohort.with_cache(tmp_path / "cache", progress=False)
    assert cached.cache.describe() == f"7 images in {str(dtype)[6:]}, exact; 7 label volumes"
    assert cached.digest == cohort.digest
    for subject in people(cohort):
        assert cached.stored_image(subject).values.dtype == dtype
        assert torch.equal(cached.image(subject), cohort.image(subject))
        if subject.labels:
            assert torch.equal(cached.label_volume(subject), cohort.label_volume(subject))
    assert cached.labels == cohort.labels
    assert not cached.memory


def test_every_gray_value_and_every_block_sum_is_exact():
    gray = torch.arange(256).reshape(1, 1, 4, 8, 8)
    assert encode(gray.float() / 255, "auto", 1)[0].values.equal(gray.to(torch.uint8))
    for block in (8, 64):
        sums = torch.arange(255 * block + 1).reshape(1, 1, 1, 1, -1)
        stored, error = encode((sums.float() / block) / 255, "auto", block)
        assert stored.values.dtype in (torch.uint8, torch.int16) and error == 0
        assert stored.decode().equal((sums.float() / block) / 255)


def test_scans_of_fractions_are_rounded_to_float16_within_the_stated_error(tmp_path):
    path = write_small_cohort(tmp_path / "small")
    for number in range(4):
        image = np.random.default_rng(number).random(SMALL_SHAPE, dtype=np.float32)
        write_nifti(tmp_path / f"small/imagesTr/SMALL_{number:04d}_0000.nii.gz", image, np.eye(4))
    cohort = load_cohort(path)
    cached = cohort.with_cache(tmp_path / "cache", progress=False)
    errors = [float((cached.image(one) - cohort.image(one)).abs().max()) for one in cohort.train]
    assert 1e-4 < max(errors) <= 2**-12
    assert (
        f"4 images in float16, rounded by at most {max(errors):.1e}; 3 images in uint8, exact; 7 label volumes"
        in cached.cache.describe()
    )
    exact = cohort.with_cache(tmp_path / "cache", dtype="float32", progress=False)
    assert all(torch.equal(exact.image(one), cohort.image(one)) for one in people(cohort))
    half = cohort.with_cache(tmp_path / "cache", dtype="float16", progress=False)
    assert all(half.stored_image(one).values.dtype == torch.float16 for one in people(cohort))


def test_without_a_cache_a_stored_image_is_the_image(small_cohort_json):
    cohort = load_cohort(small_cohort_json)
    assert torch.equal(cohort.stored_image(cohort.train[0]).decode(), cohort.image(cohort.train[0]))


def test_what_a_caller_writes_into_a_volume_does_not_reach_the_cache(built):
    before = volumes(built.folder)
    subject = built.cohort.validation_pairs[0].fixed
    for volume in (built.cached.image(subject), built.cached.label_volume(subject)):
        volume.zero_()
    built.cached.stored_image(subject).values.zero_()
    assert volumes(built.folder) == before
    assert torch.equal(built.cached.image(subject), built.cohort.image(subject))


def test_cached_volumes_open_with_numpy(built):
    assert np.array_equal(np.load(built.first)[0, 0], smooth_blob(0))


def test_a_second_build_makes_nothing_and_needs_no_writable_folder(built, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.filelock, "FileLock", refuse)
    assert built.cached.cache.made == 14
    assert built.again(verify=True).cache.made == 0


def test_a_folder_that_cannot_be_written_is_named_with_a_way_out(small_cohort_json, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.filelock, "FileLock", refuse)
    with pytest.raises(PermissionError, match=r"cannot write.*Read-only file system.*LUMIRLIB_CACHE.*small_1mm_auto"):
        load_cohort(small_cohort_json).with_cache(tmp_path / "cache", progress=False)


def truncate_data(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def truncate_record(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def swap(file: Path) -> None:
    shutil.copy(next(file.parent.glob("SMALL_0001_*.npy")), file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate_data, "truncated or foreign"),
        (truncate_record, "truncated or foreign"),
        (swap, r"made from .*SMALL_0001_0000.nii.gz, not from .*SMALL_0000_0000.nii.gz"),
        (lambda file: file.write_text("something else"), "truncated or foreign"),
        (lambda file: file.write_bytes(b""), "truncated or foreign"),
        (lambda file: np.save(file, np.zeros((1, 1, *SMALL_SHAPE), np.uint8)), "truncated or foreign"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"|u1", b"|i1")), "expected shape and dtype"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"volume-1", b"volume-9")), "'lumirlib-volume-9'"),
    ],
)
def test_a_truncated_or_foreign_file_is_refused_by_name_and_mended_on_request(built, harm, message, capfd):
    before = volumes(built.folder)
    harm(built.first)
    with pytest.raises(ValueError, match=rf"{built.first.name}.*{message}.*--repair"):
        built.again()
    mended = built.again(repair=True)
    assert mended.cache.made == 1 and volumes(built.folder) == before
    assert built.first.name in capfd.readouterr().err


def flip_voxel(content: bytes) -> bytes:
    return content[:4000] + bytes([content[4000] ^ 16]) + content[4001:]


@pytest.mark.parametrize("harm", [flip_voxel, lambda content: content.replace(b'"scale": 255', b'"scale": 251')])
def test_a_flipped_bit_is_found_when_the_volume_is_first_read_or_all_are_verified(built, harm):
    before = volumes(built.folder)
    built.first.write_bytes(harm(built.first.read_bytes()))
    opened = built.again()
    with pytest.raises(ValueError, match=rf"{built.first.name}: damaged, its checksum .*--repair"):
        opened.image(built.cohort.train[0])
    opened.image(built.cohort.train[1])
    with pytest.raises(ValueError, match=rf"{built.first.name}: damaged"):
        built.again(verify=True)
    assert built.again(repair=True).cache.made == 1
    assert volumes(built.folder) == before


def test_a_scan_that_has_changed_is_cached_anew(built):
    scan = built.cohort.train[0].image
    write_nifti(scan, smooth_blob(77), np.eye(4))
    fresh = load_cohort(built.cohort.path)
    cached = fresh.with_cache(built.folder, progress=False)
    assert cached.cache.made == 1
    assert torch.equal(cached.image(cached.train[0]), fresh.image(fresh.train[0]))


def test_a_list_that_grows_or_shrinks_reuses_what_is_there(small_cohort_json, tmp_path):
    content = json.loads(small_cohort_json.read_text())
    made = []
    for training in (2, 4, 1):
        small_cohort_json.write_text(json.dumps({**content, "training": content["training"][:training]}))
        cohort = load_cohort(small_cohort_json).with_cache(tmp_path / "cache", progress=False)
        made.append(cohort.cache.made)
        assert cohort.cache.describe().startswith(f"{training + 3} images")
    assert made == [10, 4, 0]


def test_a_full_disk_is_told_with_sizes_and_what_is_done_stays(small_cohort_json, tmp_path, monkeypatch):
    real, written = module.write_atomically, []

    def write(path, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(path, content))

    monkeypatch.setattr(module, "write_atomically", write)
    cohort = load_cohort(small_cohort_json)
    with pytest.raises(OSError, match=r"disk full: 11 more volumes need 84,480 bytes, and [\d,]+ are free.*\.npy"):
        cohort.with_cache(tmp_path / "cache", workers=1, progress=False)
    assert len(volumes(tmp_path / "cache")) == 3
    monkeypatch.undo()
    assert cohort.with_cache(tmp_path / "cache", progress=False).cache.made == 11


def test_a_disk_without_room_is_told_before_it_is_filled(small_cohort_json, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"13 more volumes need [\d,]+ bytes, and 50,000 are free; choose another folder"):
        load_cohort(small_cohort_json).with_cache(tmp_path / "cache", progress=False)
    assert len(volumes(tmp_path / "cache")) == 1


def test_a_scan_that_cannot_be_read_stops_the_build_by_name(small_cohort_json, tmp_path):
    scan = small_cohort_json.parent / "imagesTr/SMALL_0002_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"SMALL_0002_0000.nii.gz as NIfTI \(truncated or corrupt"):
        load_cohort(small_cohort_json).with_cache(tmp_path / "cache", progress=False)


def test_choices_that_make_no_sense_are_refused(small_cohort_json, tmp_path):
    cohort = load_cohort(small_cohort_json)
    with pytest.raises(ValueError, match="dtype must be one of auto, float16, float32; got 'int8'"):
        cohort.with_cache(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        cohort.with_cache(tmp_path, workers=0)


def build(path: Path, folder: Path, made: Path | None = None) -> None:
    """In a process of its own."""
    cached = load_cohort(path).with_cache(folder, workers=2, progress=False)
    if made:
        made.write_text(str(cached.cache.made))


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported the library before they start, but not used it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lumirlib.data"])
    return context


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A cohort of 60 scans with labels, and its cache as an undisturbed build leaves it."""
    root = tmp_path_factory.mktemp("many")
    path = write_small_cohort(root / "small", training=57)
    load_cohort(path).with_cache(root / "reference", progress=False)
    return path, volumes(root / "reference")


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(many, processes, tmp_path):
    path, reference = many
    generator = np.random.default_rng(0)
    killed = 0
    for wanted in (0, 1, 15, 40, 70, 100):
        process = processes.Process(target=build, args=(path, tmp_path))
        process.start()
        while process.is_alive() and len(list(tmp_path.rglob("SMALL_*.npy"))) < wanted:
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.01))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert volumes(tmp_path).items() <= reference.items()
    assert killed >= 4
    load_cohort(path).with_cache(tmp_path, progress=False, verify=True)
    assert volumes(tmp_path) == reference
    assert not list(tmp_path.rglob(".partial-*"))


def test_two_builders_at_once_make_each_volume_once(many, processes, tmp_path):
    path, reference = many
    counts = [tmp_path / "first", tmp_path / "second"]
    pair = [processes.Process(target=build, args=(path, tmp_path / "cache", count)) for count in counts]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    assert sum(int(count.read_text()) for count in counts) == len(reference)
    assert volumes(tmp_path / "cache") == reference


def test_a_builder_that_waits_too_long_for_another_says_so(small_cohort_json, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.3)
    folder = tmp_path / "small_1mm_auto"
    folder.mkdir()
    with (
        module.filelock.FileLock(folder / ".lock"),
        pytest.raises(TimeoutError, match=r"small_1mm_auto: another process has held its lock for 0.3 s"),
    ):
        load_cohort(small_cohort_json).with_cache(tmp_path, progress=False)
    assert "another process is building" in capfd.readouterr().err


def test_command_line_says_what_was_made_and_what_lumir_would_take(small_cohort_json, tmp_path, capsys):
    arguments = ["--cohort", str(small_cohort_json), "--resolution", "2", "--folder", str(tmp_path), "--quiet"]
    assert cli.main(["cache", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "7 images in int16, exact; 7 label volumes" in printed and "14 volumes made" in printed
    assert "LUMIR's 3384 scans" in printed and "minutes to make" in printed
    assert cli.main(["cache", *arguments, "--verify"]) == 0
    assert "0 volumes made" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "dmeo"], "preset must be one of smoke, demo"),
        (["--resolution", "3"], "resolution_mm must be a whole multiple"),
        (["--resolution", "1", "--dtype", "int8"], "dtype must be one of auto"),
    ],
)
def test_command_line_explains_what_it_cannot_use(small_cohort_json, tmp_path, capsys, arguments, message):
    assert cli.main(["cache", "--cohort", str(small_cohort_json), "--folder", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_command_line_ends_an_interruption_without_a_traceback(small_cohort_json, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode", interrupt)
    arguments = ["--cohort", str(small_cohort_json), "--resolution", "1", "--folder", str(tmp_path), "--quiet"]
    assert cli.main(["cache", *arguments]) == 130
    assert "goes on from here" in capsys.readouterr().err
