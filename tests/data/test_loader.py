"""The loader that reads pairs ahead: order, threads, errors, devices."""

import itertools
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lumirlib import load_cohort
from lumirlib.data import Pair, PairLoader, Subject
from lumirlib.data.cache import StoredVolume
from lumirlib.data.loader import LoadError

SUBJECTS = [Subject(f"person{number}", Path(f"person{number}.nii.gz")) for number in range(12)]
PAIRS = [Pair(SUBJECTS[number], SUBJECTS[(5 * number + 1) % 12]) for number in range(12)]


def volume(subject: Subject) -> torch.Tensor:
    return torch.full((1, 1, 5, 6, 7), float(subject.name.removeprefix("person")))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("PairLoader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 2), (3, 2), (4, 9)])
def test_batches_come_in_order_whatever_the_number_of_workers(workers, depth):
    def read(subject):
        time.sleep(0.004 * (SUBJECTS.index(subject) % 3))
        return volume(subject)

    with PairLoader(read, ([pair] for pair in PAIRS), depth=depth, workers=workers) as loader:
        found = list(loader)
    assert [batch.pairs for batch in found] == [(pair,) for pair in PAIRS]
    for batch, pair in zip(found, PAIRS, strict=True):
        assert torch.equal(batch.fixed, volume(pair.fixed)) and torch.equal(batch.moving, volume(pair.moving))
    assert loader.batches_given == 12


def test_batches_of_two_are_joined_along_the_first_axis():
    with PairLoader(volume, [PAIRS[:2], PAIRS[2:4], PAIRS[4:5]]) as loader:
        first, _, last = loader
    assert first.fixed.shape == (2, 1, 5, 6, 7) and last.fixed.shape == (1, 1, 5, 6, 7)
    assert torch.equal(first.moving, torch.cat([volume(pair.moving) for pair in PAIRS[:2]]))


def test_stored_integers_are_decoded_as_the_cohort_reads_them(small_cohort_json, tmp_path):
    for resolution in (1, 2):
        cohort = load_cohort(small_cohort_json, resolution)
        cached = cohort.with_cache(tmp_path / "cache", progress=False)
        pairs = list(cohort.validation_pairs)
        with PairLoader(cached.stored_image, [pairs[:2], pairs[2:4]]) as loader:
            for batch in loader:
                assert batch.fixed.dtype == torch.float32
                assert torch.equal(batch.fixed, torch.cat([cohort.image(pair.fixed) for pair in batch.pairs]))
                assert torch.equal(batch.moving, torch.cat([cohort.image(pair.moving) for pair in batch.pairs]))


def test_label_volumes_stay_integers_and_are_copies(small_cohort_json, tmp_path):
    cohort = load_cohort(small_cohort_json)
    pair = cohort.validation_pairs[0]
    for source in (cohort, cohort.with_cache(tmp_path / "cache", progress=False)):
        with PairLoader(source.label_volume, [[pair]]) as loader:
            (batch,) = loader
        assert batch.fixed.dtype == torch.int16
        batch.fixed.zero_()
        assert source.label_volume(pair.fixed).any()


def test_reading_is_ahead_by_depth_and_no_further():
    taken = []

    def batches():
        for pair in itertools.cycle(PAIRS):
            taken.append(pair)
            yield [pair]

    with PairLoader(volume, batches(), depth=3) as loader:
        ahead = [len(taken) - given for given, _ in zip(range(1, 6), loader, strict=False)]
    assert ahead == [3] * 5


def test_waiting_is_measured():
    def slow(subject):
        time.sleep(0.02)
        return volume(subject)

    with PairLoader(slow, [[pair] for pair in PAIRS[:3]]) as loader:
        for _ in loader:
            pass
    assert 0.1 < loader.waited <= loader.total
    with PairLoader(volume, [[pair] for pair in PAIRS[:3]]) as loader:
        for _ in loader:
            time.sleep(0.1)
    assert loader.waited < loader.total / 2 and loader.total > 0.3


def test_a_failed_read_surfaces_in_its_turn_with_the_subject_and_the_reason():
    def read(subject):
        if subject.name == "person3":
            raise ValueError("person3.nii.gz: expected an image, got the constant 0")
        return volume(subject)

    given = []
    with PairLoader(read, [[pair] for pair in PAIRS], depth=4, workers=2) as loader:  # noqa: SIM117
        with pytest.raises(
            LoadError, match=r"cannot read person3: person3.nii.gz: expected an image, got the constant"
        ):
            given.extend(loader)
    assert len(given) == next(n for n, pair in enumerate(PAIRS) if SUBJECTS[3] in (pair.fixed, pair.moving)) == 3


def test_an_error_of_the_batches_surfaces_too():
    def batches():
        yield [PAIRS[0]]
        raise KeyError("the sampler's own")

    with pytest.raises(KeyError, match="the sampler's own"), PairLoader(volume, batches()) as loader:
        list(loader)


def test_an_exception_of_the_consumer_ends_the_threads():
    with (
        pytest.raises(ZeroDivisionError),
        PairLoader(volume, ([p] for p in itertools.cycle(PAIRS)), workers=2) as loader,
    ):
        for _ in loader:
            assert threads()
            1 / 0  # noqa: B018


def test_leaving_the_loop_early_ends_the_threads():
    with PairLoader(volume, ([pair] for pair in itertools.cycle(PAIRS))) as loader:
        next(iter(loader))
    loader.close()
    assert loader.batches_given == 1


def test_an_interruption_while_waiting_ends_the_threads():
    def slow(subject):
        time.sleep(0.3)
        return volume(subject)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    timer = threading.Timer(0.1, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt), PairLoader(slow, [[pair] for pair in PAIRS]) as loader:
        list(loader)
    timer.join()
    signal.signal(signal.SIGINT, before)


def test_a_loader_is_iterated_over_once():
    with PairLoader(volume, [[PAIRS[0]]]) as loader:
        list(loader)
        with pytest.raises(RuntimeError, match="iterated over once"):
            list(loader)


@pytest.mark.parametrize("option", ["depth", "workers"])
def test_depth_and_workers_must_be_positive(option):
    with pytest.raises(ValueError, match="depth and workers must be at least 1"):
        PairLoader(volume, [], **{option: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.uint8, 255), (torch.int16, 16320), (torch.float16, 1)])
def test_on_a_gpu_stored_numbers_decode_to_the_same_bits_as_on_the_cpu(dtype, scale):
    values = torch.randint(0, scale + 1, (1, 1, 40, 41, 42), generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = StoredVolume(values, scale)
    expected = stored.decode()
    with PairLoader(lambda _: stored, ([pair] for pair in PAIRS * 5), "cuda") as loader:
        for batch in loader:
            busy = torch.randn(800, 800, device="cuda")
            for _ in range(5):
                busy = busy @ busy
            assert batch.fixed.is_cuda and torch.equal(batch.fixed.cpu(), expected)
