"""Adapters to released models, against stand-in programs and a stand-in package that speak the tools' conventions.

Each stand-in writes a known field, converted from ours by its own few lines of NumPy; the adapter must give it back.
"""

import os
import signal
import stat
import sys
import textwrap
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from lumirlib import spatial
from lumirlib.methods.external import MethodUnavailableError, grid_affine, run_program
from lumirlib.methods.released import (
    RELEASED,
    ReleasedDeeds,
    ReleasedSynthMorph,
    ReleasedUniGradICON,
    deeds_to_voxel,
    icon_to_voxel,
    ras_to_voxel,
)

SHAPE = (21, 26, 31)
INSIDE = (..., slice(5, -5), slice(5, -5), slice(5, -5))


def known_field(shape=SHAPE) -> torch.Tensor:
    """A translation of another size along each axis, and a smooth part that is no axis' mirror image."""
    i, j, k = (along / side for along, side in zip(spatial.identity_grid(shape)[0], shape, strict=True))
    smooth = torch.stack([torch.sin(3 * i + j), torch.cos(2 * j - k), torch.sin(i + 2 * k) * 0.5])
    return (torch.tensor([2.0, -1.25, 0.5]).view(3, 1, 1, 1) + smooth)[None]


def blobs(shape=SHAPE) -> torch.Tensor:
    noise = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    return spatial.resize(noise, shape)


@pytest.fixture
def pair():
    """A moving image, the fixed one that the known field makes of it, and the field."""
    moving, field = blobs(), known_field()
    return spatial.warp(moving, field), moving, field


def program(path: Path, body: str) -> Path:
    """An executable Python script."""
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


SYNTHMORPH = """
    import argparse, os
    import nibabel as nib
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("-m", choices=("joint", "deform", "affine", "rigid"), default="joint")
    parser.add_argument("-t")
    parser.add_argument("-e", type=int, choices=(192, 256))
    parser.add_argument("-r", type=float)
    parser.add_argument("-j", type=int)
    parser.add_argument("-g", action="store_true")
    parser.add_argument("moving")
    parser.add_argument("fixed")
    options = parser.parse_args()
    assert options.m == "deform"
    record = os.environ["RECORD"]
    for name in ("moving", "fixed"):
        nib.save(nib.load(getattr(options, name)), os.path.join(record, name + ".nii.gz"))
    with open(os.path.join(record, "options"), "w") as file:
        file.write(repr((options.r, options.j, options.g, options.e, os.getcwd())))
    fixed = nib.load(options.fixed)
    voxels = np.load(os.path.join(record, "field.npy"))  # (3, D, H, W), ours
    places = np.stack(np.meshgrid(*map(np.arange, fixed.shape), indexing="ij"))
    to_world = lambda p: np.einsum("ab,bijk->ijka", fixed.affine[:3, :3], p) + fixed.affine[:3, 3]
    field = to_world(places + voxels) - to_world(places)  # moving minus fixed RAS
    if os.environ.get("LAYOUT") == "vector":
        field = field[:, :, :, None]
    image = nib.Nifti1Image(field.astype(np.float32), fixed.affine)
    image.header.set_intent("displacement vector" if field.ndim == 5 else 0)
    nib.save(image, options.t)
"""


@pytest.fixture
def synthmorph(tmp_path, monkeypatch, pair):
    """A stand-in mri_synthmorph on the PATH; its record folder."""
    record = tmp_path / "record"
    for folder in (record, tmp_path / "bin"):
        folder.mkdir()
    np.save(record / "field.npy", pair[2][0].numpy())
    program(tmp_path / "bin" / "mri_synthmorph", SYNTHMORPH)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("RECORD", str(record))
    return record


@pytest.mark.parametrize(("layout", "orientation", "spacing"), [("frames", "RAS", 1.0), ("vector", "PIL", 2.5)])
def test_synthmorphs_field_in_ras_mm_comes_back_in_voxels(monkeypatch, synthmorph, pair, layout, orientation, spacing):
    fixed, moving, field = pair
    monkeypatch.setenv("LAYOUT", layout)
    method = ReleasedSynthMorph(resolution_mm=spacing, orientation=orientation)
    assert method.available() == ""
    displacement = method(fixed, moving)
    assert displacement.dtype == torch.float32
    assert torch.allclose(displacement, field, atol=1e-4)
    assert torch.allclose(spatial.warp(moving, displacement), fixed, atol=1e-4)
    saved = {name: nib.load(synthmorph / f"{name}.nii.gz") for name in ("fixed", "moving")}
    assert np.array_equal(saved["fixed"].get_fdata(dtype=np.float32), fixed[0, 0].numpy())
    assert np.array_equal(saved["moving"].get_fdata(dtype=np.float32), moving[0, 0].numpy())
    assert nib.aff2axcodes(saved["fixed"].affine) == tuple(orientation)
    assert saved["fixed"].header.get_zooms() == (spacing,) * 3


def test_synthmorph_is_given_only_the_options_asked_for_and_its_folder_goes(synthmorph, pair):
    ReleasedSynthMorph()(*pair[:2])
    *given, folder = eval((synthmorph / "options").read_text())
    assert given == [None, None, False, 256] and not Path(folder).exists()
    ReleasedSynthMorph(regularization=0.75, threads=3, gpu=True, extent=192)(*pair[:2])
    assert eval((synthmorph / "options").read_text())[:4] == (0.75, 3, True, 192)


DEEDS = """
    import os, sys
    import nibabel as nib
    import numpy as np
    from scipy.ndimage import map_coordinates

    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    record = os.environ["RECORD"]
    for name in "FM":
        nib.save(nib.load(options["-" + name]), os.path.join(record, name + ".nii.gz"))
    with open(os.path.join(record, "options"), "w") as file:
        file.write(repr({name: value for name, value in options.items() if name not in ("-F", "-M", "-O")}))
    field = np.load(os.path.join(record, "field.npy"))  # (3, m, n, o), ours
    m, n, o = field.shape[1:]
    g = int(options["-G"].split("x")[-1])
    m1, n1, o1 = m // g, n // g, o // g
    flow = np.zeros(3 * m1 * n1 * o1, np.float32)
    for z in range(o1):
        for x in range(n1):
            for y in range(m1):
                place = [[y * m / m1], [x * n / n1], [z * o / o1]]
                at = y + x * m1 + z * m1 * n1
                for volume, axis in enumerate((1, 0, 2)):
                    flow[at + volume * m1 * n1 * o1] = map_coordinates(field[axis], place, order=1)[0]
    flow.tofile(options["-O"] + "_displacements.dat")
"""


def test_deeds_control_points_come_back_as_a_dense_field_in_our_axes(tmp_path, monkeypatch, pair):
    fixed, moving, field = pair
    np.save(tmp_path / "field.npy", field[0].numpy())
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.setenv("DEEDS_BIN", str(program(tmp_path / "deedsBCV", DEEDS)))
    method = ReleasedDeeds()
    assert method.available() == ""
    displacement = method(fixed, moving)
    assert (displacement - field)[INSIDE].abs().max() < 0.02  # what control points two voxels apart cannot follow
    assert (spatial.warp(moving, displacement) - fixed)[INSIDE].abs().max() < 0.01
    for name, image in (("F", fixed), ("M", moving)):
        assert np.allclose(nib.load(tmp_path / f"{name}.nii.gz").get_fdata(), 255 * image[0, 0].numpy())
    assert eval((tmp_path / "options").read_text()) == {
        "-a": "1.6",
        "-l": "5",
        "-G": "6x5x4x3x2",
        "-L": "6x5x4x3x2",
        "-Q": "5x4x3x2x1",
    }


def test_deeds_field_is_interpolated_as_its_own_program_does():
    shape, spacing = (9, 11, 14), 2
    points = [side // spacing for side in shape]
    values = np.random.default_rng(0).normal(size=3 * np.prod(points)).astype(np.float32)
    along_j, along_i, along_k = values.reshape(3, *points[::-1]).transpose(0, 3, 2, 1)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    places *= np.array([count / side for count, side in zip(points, shape, strict=True)])[:, None, None, None]
    expected = [map_coordinates(part, places, order=1, mode="nearest") for part in (along_i, along_j, along_k)]
    assert np.allclose(deeds_to_voxel(values, shape, spacing)[0].numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"values must be 420 numbers, three for each of \(4, 5, 7\)"):
        deeds_to_voxel(values[:-1], shape, spacing)


PACKAGE = """
    import types
    import itk
    import torch
    from collections import namedtuple

    Loss = namedtuple("Loss", "all_loss other")

    def reader(image: itk.Image):
        raise AssertionError("no file is read here")

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(3))

        def forward(self, image_A, image_B):
            network = self.owner[0]
            network.seen.append((image_A, image_B))
            part = self.shift.view(1, 3, 1, 1, 1)
            return lambda places: network.phi + part + 0 * places

    class Network(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.regis_net, self.seen = Inner(), []
            self.regis_net.owner = [self]
            self.phi = weights["phi"]
            axes = [torch.linspace(0, 1, side) for side in self.phi.shape[2:]]
            self.register_buffer("identity_map", torch.stack(torch.meshgrid(*axes, indexing="ij"))[None])

        def forward(self, image_A, image_B):
            self.regis_net(image_A, image_B)
            return Loss(((self.regis_net.shift - 1) ** 2).sum() + 0 * torch.randn(()), None)

    def get_unigradicon(weights_location=None):
        return Network(torch.load(weights_location, weights_only=True))
"""
NETWORK_GRID = (16, 16, 16)


def icon_map(field: torch.Tensor, grid=NETWORK_GRID) -> torch.Tensor:
    """The map on the network's grid of a field in voxels of another grid, both with aligned outer edges."""
    sides, shape = np.array(grid, dtype=float), np.array(field.shape[2:], dtype=float)
    voxels = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)  # of the network
    places = (voxels + 0.5) * shape / sides - 0.5
    moved = [map_coordinates(part.numpy(), np.moveaxis(places, -1, 0), order=1, mode="nearest") for part in field[0]]
    there = (places + np.stack(moved, -1) + 0.5) * sides / shape - 0.5
    return torch.from_numpy(np.moveaxis(there / (sides - 1), -1, 0)).float()[None]


def reverse_axes(field: torch.Tensor) -> torch.Tensor:
    return field.permute(0, 1, 4, 3, 2).flip(1)


@pytest.fixture
def unigradicon(tmp_path, monkeypatch, pair):
    """A stand-in package and a weights file that holds the map which its network answers with."""
    for name in ("unigradicon", "icon_registration"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(textwrap.dedent(PACKAGE if name[0] == "u" else ""))
    torch.save({"phi": icon_map(reverse_axes(pair[2]))}, tmp_path / "weights.trch")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("UNIGRADICON_WEIGHTS", str(tmp_path / "weights.trch"))
    known = {name: sys.modules.pop(name) for name in ("unigradicon", "icon_registration") if name in sys.modules}
    yield tmp_path / "weights.trch"
    sys.modules.pop("unigradicon", None)
    sys.modules.update(known)


def test_unigradicons_map_comes_back_in_voxels_of_the_images(unigradicon, pair):
    fixed, moving, field = pair
    itk = sys.modules.get("itk")
    assert ReleasedUniGradICON().available() == ""
    displacement = ReleasedUniGradICON()(fixed, moving)
    assert (displacement - field)[INSIDE].abs().max() < 0.02  # the network's grid is coarser
    assert (spatial.warp(moving, displacement) - fixed)[INSIDE].abs().max() < 0.01
    assert sys.modules.get("itk") is itk  # the stand-in for ITK does not stay


def test_unigradicon_in_nibabels_order_keeps_the_axes(unigradicon, pair):
    torch.save({"phi": icon_map(pair[2])}, unigradicon)
    displacement = ReleasedUniGradICON(array_order="ijk")(*pair[:2])
    assert (displacement - pair[2])[INSIDE].abs().max() < 0.02


def test_unigradicons_network_gets_moving_then_fixed_scaled_to_the_unit_range(unigradicon, pair, monkeypatch):
    from lumirlib.methods import released

    kept = []
    load = released.unigradicon_network
    monkeypatch.setattr(released, "unigradicon_network", lambda *a: kept.append(load(*a)) or kept[-1])
    fixed, moving = pair[0] * 0.5 + 0.1, pair[1] * 0.5 + 0.1
    ReleasedUniGradICON(array_order="ijk", upper_quantile=0.75)(fixed, moving)
    for seen, image in zip(kept[0].seen[-1], (moving, fixed), strict=True):
        assert seen.shape == (1, 1, *NETWORK_GRID)
        low, high = image.min(), image.quantile(0.75)
        scaled = (image.clamp(low, high) - low) / (high - low)
        assert torch.allclose(seen, torch.nn.functional.interpolate(scaled, NETWORK_GRID, mode="trilinear"), atol=1e-3)


def test_instance_optimization_moves_the_weights_and_puts_them_back(unigradicon, pair):
    with torch.no_grad():  # as the evaluator calls methods
        before = ReleasedUniGradICON()(*pair[:2])
        state = torch.get_rng_state()
        optimized = ReleasedUniGradICON(io_steps=3, io_learning_rate=0.01)(*pair[:2])
        assert torch.equal(torch.get_rng_state(), state)
        after = ReleasedUniGradICON()(*pair[:2])
    # Adam's first steps have the size of the learning rate: the shift is 0.03 of the network's 15 voxels
    expected = 0.03 * 15 * torch.tensor(SHAPE) / 16
    assert torch.allclose((optimized - before).mean((0, 2, 3, 4)), expected, rtol=0.02)
    assert torch.equal(before, after)


def test_a_changed_weights_file_is_read_again(unigradicon, pair):
    ReleasedUniGradICON()(*pair[:2])
    torch.save({"phi": icon_map(reverse_axes(-pair[2]))}, unigradicon)
    os.utime(unigradicon, ns=(0, 1))
    assert (ReleasedUniGradICON()(*pair[:2]) + pair[2])[INSIDE].abs().max() < 0.02


def test_a_constant_image_is_refused_by_unigradicon(unigradicon, pair):
    with pytest.raises(ValueError, match=r"moving must vary below its quantile 0\.99, got 0 to 0"):
        ReleasedUniGradICON()(pair[0], torch.zeros(1, 1, *SHAPE))


def test_icons_map_scales_with_one_less_than_its_side_and_the_ratio_of_the_sides():
    identity = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 5)] * 3, indexing="ij"))[None]
    phi = identity + torch.tensor([0.25, -0.5, 0.125]).view(1, 3, 1, 1, 1)
    displacement = icon_to_voxel(phi, identity, (10, 15, 20))
    assert displacement.shape == (1, 3, 10, 15, 20)
    assert torch.allclose(displacement[0, :, 4, 7, 3], torch.tensor([2.0, -6.0, 2.0]))


def test_ras_displacement_follows_the_affines_axes():
    affine = grid_affine((5, 6, 7), 2.0, "PIL")  # i to the back, j down, k to the left
    field = np.tile(np.array([2.0, 4.0, 6.0], np.float32), (5, 6, 7, 1))  # right, front, up, mm
    assert ras_to_voxel(field, affine)[0, :, 1, 2, 3].tolist() == [-2.0, -3.0, -1.0]


@pytest.mark.parametrize("orientation", ["RAS", "LIA", "PIL", "SRA"])
def test_the_grids_affine_leads_where_its_letters_say_and_is_centred(orientation):
    affine = grid_affine((5, 6, 7), 1.5, orientation)
    assert nib.aff2axcodes(affine) == tuple(orientation)
    assert np.allclose(affine @ [2, 2.5, 3, 1], [0, 0, 0, 1])
    assert np.allclose(nib.affines.voxel_sizes(affine), 1.5)


FAILING = """
    import sys
    print("reading")
    sys.stderr.write("\\n".join(f"line {n}" for n in range(40)) + "\\nno weights in models\\n")
    sys.exit(3)
"""
QUIET = "print('nothing to do')"
COMPLAINING = "import sys; print('Inconsistent image sizes'); sys.exit(255)"


@pytest.mark.parametrize(
    ("method", "name"), [(ReleasedSynthMorph(), "mri_synthmorph"), (ReleasedDeeds(program="deedsBCV"), "deedsBCV")]
)
def test_a_failing_program_is_reported_with_its_last_lines(tmp_path, monkeypatch, pair, method, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = program(tmp_path / name, FAILING)
    with pytest.raises(RuntimeError, match=rf"{name} failed with exit status 3: line 2\d\n[\s\S]*no weights in mod"):
        method(*pair[:2])
    program(path, COMPLAINING)
    with pytest.raises(RuntimeError, match=f"{name} failed with exit status 255: Inconsistent image sizes"):
        method(*pair[:2])
    program(path, QUIET)
    with pytest.raises(RuntimeError, match=f"{name} wrote no .*: nothing to do"):
        method(*pair[:2])
    path.write_bytes(b"\x00\x01")
    with pytest.raises(RuntimeError, match=f"{name} cannot be started: "):
        method(*pair[:2])


def test_deeds_output_of_another_grid_is_refused(tmp_path, pair):
    path = program(tmp_path / "deeds", "import numpy; numpy.zeros(9, 'f4').tofile('found_displacements.dat')")
    with pytest.raises(ValueError, match=r"values must be 5850 numbers, .* got shape \(9,\)"):
        ReleasedDeeds(program=str(path))(*pair[:2])


def test_an_interrupt_kills_the_program_and_what_it_started(tmp_path):
    body = """
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open("pids.part", "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        os.replace("pids.part", "pids")
        time.sleep(60)
    """
    path = program(tmp_path / "sleeper", body)

    def interrupt():
        while not (tmp_path / "pids").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run_program([str(path)], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process still runs half a second later; a dead one that nobody has waited for does not count."""
    for _ in range(25):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("DEEDS_BIN", "UNIGRADICON_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.mark.parametrize("row", RELEASED)
def test_what_is_not_installed_says_how_to_install_it(nothing_installed, pair, row):
    method = RELEASED[row]()
    assert method.name == row and row.endswith("(released)")
    sentence = method.available()
    assert sentence.startswith("not installed: ") and "\n" not in sentence
    with pytest.raises(MethodUnavailableError) as caught:
        method(*pair[:2])
    assert str(caught.value) == f"{row}: {sentence}"
    for word in {"S": ["mri_synthmorph", "PATH"], "u": ["--no-deps", "UNIGRADICON_WEIGHTS"], "d": ["DEEDS_BIN"]}[
        row[0]
    ]:
        assert word in sentence


def test_a_path_that_leads_nowhere_is_named(unigradicon, monkeypatch, tmp_path):
    assert "there is no weights file elsewhere.trch" in ReleasedUniGradICON(weights="elsewhere.trch").available()
    monkeypatch.delenv("UNIGRADICON_WEIGHTS")
    assert ReleasedUniGradICON().available().startswith("not installed: download Step_2_final.trch")
    (tmp_path / "text").write_text("not executable")
    assert "text is no executable file; set DEEDS_BIN" in ReleasedDeeds(program=str(tmp_path / "text")).available()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReleasedSynthMorph(resolution_mm=0), "resolution_mm must be above 0, got 0"),
        (lambda: ReleasedSynthMorph(orientation="RRS"), "orientation must name one of R/L, A/P and S/I each"),
        (lambda: ReleasedSynthMorph(regularization=1), r"regularization must be in \[0, 1\), got 1"),
        (lambda: ReleasedUniGradICON(io_steps=-1), "io_steps must be 0 or more, got -1"),
        (lambda: ReleasedUniGradICON(upper_quantile=0), r"upper_quantile must be in \(0, 1\], got 0"),
        (lambda: ReleasedUniGradICON(array_order="jik"), "array_order must be one of kji, ijk; got 'jik'"),
        (lambda: ReleasedDeeds(alpha=1, grid_spacing=(4, 2)), "must have five levels each"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("row", RELEASED)
def test_images_that_are_no_pair_are_refused_first(row):
    image = torch.rand(1, 1, 5, 6, 7)
    with pytest.raises(ValueError, match="fixed and moving must share"):
        RELEASED[row]()(image, torch.rand(1, 1, 5, 7, 6))
    with pytest.raises(ValueError, match=r"one pair .* got a batch of 2"):
        RELEASED[row]()(image.repeat(2, 1, 1, 1, 1), image.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="moving must hold finite values"):
        RELEASED[row]()(image, image / 0)
