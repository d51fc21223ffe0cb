"""The embedded cohort: simulated people made from a real template and atlas, no download needed.

Each person is the template of the package `deepmriprep` (a sharp skull-stripped average T1 at 0.5 mm) and its
Neuromorphometrics atlas, seen through a random diffeomorphism and with random tissue contrast, bias field and noise.
Because the diffeomorphisms are known, so are the true displacement between any two people and the places of the
landmarks. The cohort is written once, in the LUMIR frame and as a Learn2Reg JSON folder, into the user's cache
folder, and read from there like any other.

Every figure computed on it is a figure on simulated data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import platformdirs
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lumirlib import spatial
from lumirlib.data.frame import (
    FRAME_ORIGIN_MM,
    FRAME_SHAPE,
    RESOLUTIONS_MM,
    frame_affine,
    sample_in_frame,
    template_1mm,
    template_folder,
    template_image,
)
from lumirlib.data.nifti import read_nifti, write_nifti
from lumirlib.files import read_json, write_json
from lumirlib.metrics.labels import LUMIR_LABELS

#: Points, or displacements of a grid's, to where they are moved.
Motion = Callable[[torch.Tensor], torch.Tensor]

CONTROL_SPACING_MM = 8

FIELD_SPACING_MM = 2

#: Landmarks are the centroids of these atlas labels in template space: deep grey matter, ventricles, cerebellum,
#: and poles and gyri of the cortex on both sides.
LANDMARK_LABELS = (
    4,
    11,
    23,
    30,
    31,
    32,
    35,
    36,
    37,
    47,
    48,
    55,
    56,
    59,
    60,
    71,
    72,
    73,
    120,
    121,
    160,
    161,
    202,
    203,
)


@dataclass(frozen=True)
class EmbeddedPopulation:
    """How the simulated people differ; one value of this names one cohort.

    Attributes:
        seed: Random seed of everything; person n uses the seed (seed, n).
        training: Number of training people.
        validation: Number of validation people; every ordered pair of them is a validation pair.
        grid_mm: Spacings of the grids of Gaussian noise that are summed into the velocity field.
        sigma_mm: Standard deviation of the noise on each of these grids, in mm per unit time.
        strength_sigma: Spread of the logarithm of a factor on each person's whole velocity.
        tissue_sigma: Spread of the intensity of each tissue class between people, as a share of the white.
        label_sigma: Spread of the intensity of each atlas region around its tissue.
        gamma_sigma: Spread of the logarithm of the gamma exponent.
        bias_sigma: Strength of the multiplicative bias field (standard deviation of its logarithm).
        noise_sigma: Additive noise, as a share of the white.
    """

    seed: int = 2024
    training: int = 24
    validation: int = 6
    grid_mm: tuple[int, ...] = (32, 16, 8)
    sigma_mm: tuple[float, ...] = (2.0, 1.3, 0.57)
    strength_sigma: float = 0.12
    tissue_sigma: float = 0.04
    label_sigma: float = 0.015
    gamma_sigma: float = 0.10
    bias_sigma: float = 0.06
    noise_sigma: float = 0.02

    def name(self) -> str:
        """A short name that changes when anything of the recipe changes."""
        recipe = json.dumps([GENERATOR_VERSION, asdict(self)], sort_keys=True)
        return f"embedded-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"


#: Raised whenever the code below would make other people from the same population.
GENERATOR_VERSION = 1


@lru_cache(maxsize=1)
def _atlas() -> tuple[torch.Tensor, np.ndarray]:
    array, affine = read_nifti(template_folder() / "neuromorphometrics.nii.gz")
    array = np.where(np.isin(array, LUMIR_LABELS), array, 0).astype(np.int16)
    return torch.from_numpy(array)[None, None], affine


@lru_cache(maxsize=1)
def landmark_points() -> dict[int, tuple[float, float, float]]:
    """Landmarks of the template: atlas label -> place in 1 mm voxels of the LUMIR frame."""
    atlas, affine = _atlas()
    to_frame = np.linalg.inv(frame_affine(1)) @ affine
    points = {}
    for label in LANDMARK_LABELS:
        voxels = torch.nonzero(atlas[0, 0] == label).double().mean(0).numpy()
        points[label] = tuple(float(x) for x in (to_frame @ np.append(voxels, 1.0))[:3])
    return points


def _spline_matrix(nodes: int, points: np.ndarray, spacing: float) -> torch.Tensor:
    """Matrix that turns values on `nodes` knots at 0, spacing, 2 spacing ... into cubic spline values at `points`."""
    from scipy.interpolate import CubicSpline  # imported where people are made: it takes half a second

    spline = CubicSpline(np.arange(nodes) * spacing, np.eye(nodes), axis=0)
    return torch.from_numpy(spline(points).astype(np.float32))


def _upsample_spline(values: torch.Tensor, points: list[np.ndarray], spacing: float) -> torch.Tensor:
    matrices = [_spline_matrix(side, at, spacing) for side, at in zip(values.shape[1:], points, strict=True)]
    return torch.einsum("cxyz,ix,jy,kz->cijk", values, *matrices)


def _nodes(spacing: int) -> list[int]:
    return [side // spacing + 1 for side in FRAME_SHAPE]


def control_velocity(population: EmbeddedPopulation, person: int) -> torch.Tensor:
    """Velocity of one person on the 8 mm control grid: ``(3, 21, 29, 25)``, mm per unit time."""
    generator = np.random.default_rng([population.seed, person, 0])
    total = torch.zeros(3, *_nodes(CONTROL_SPACING_MM))
    for spacing, sigma in zip(population.grid_mm, population.sigma_mm, strict=True):
        noise = torch.from_numpy(generator.standard_normal((3, *_nodes(spacing))).astype(np.float32)) * sigma
        control = [np.arange(nodes) * float(CONTROL_SPACING_MM) for nodes in _nodes(CONTROL_SPACING_MM)]
        total += noise if spacing == CONTROL_SPACING_MM else _upsample_spline(noise, control, spacing)
    return total * float(np.exp(generator.normal(0, population.strength_sigma)))


def person_transform(velocity: torch.Tensor) -> torch.Tensor:
    """Displacement from a person's image to the template.

    Args:
        velocity: Velocity on the control grid, as :func:`control_velocity` gives it. Its negative gives the inverse.

    Returns:
        ``(1, 3, 80, 112, 96)`` on the 2 mm grid of the frame, in voxels of that grid:
        ``person(p) = template(p + u(p))``.
    """
    points = [np.arange(side // FIELD_SPACING_MM) * FIELD_SPACING_MM + 0.5 for side in FRAME_SHAPE]
    dense = _upsample_spline(velocity, points, CONTROL_SPACING_MM) / FIELD_SPACING_MM
    return spatial.integrate(dense[None], steps=6)


def person_transforms(velocity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Displacements from a person's image to the template and from the template to the person's image.

    Args:
        velocity: Velocity as for :func:`person_transform`.

    Returns:
        Two fields ``(1, 3, 80, 112, 96)`` in voxels of 2 mm. The second inverts the first at its own grid points
        within 0.01 mm; between them its interpolation is off by a few hundredths of a mm on average.
    """
    to_template = person_transform(velocity)
    return to_template, spatial.invert(to_template, initial=person_transform(-velocity), iterations=5)


def _to_spacing(field: torch.Tensor, spacing_mm: int) -> torch.Tensor:
    """A 2 mm field on the frame's grid of another spacing, block-aligned, in voxels of that grid."""
    if spacing_mm > FIELD_SPACING_MM:
        factor = spacing_mm // FIELD_SPACING_MM
        return F.avg_pool3d(field, factor) / factor
    return spatial.to_finer_grid(field, FIELD_SPACING_MM // spacing_mm)


def true_displacement(
    fixed_to_template: torch.Tensor,
    moving_to_template: torch.Tensor,
    moving_from_template: torch.Tensor,
    resolution_mm: int,
) -> torch.Tensor:
    """The displacement u that carries a moving person onto a fixed one: ``T_moving(p + u(p)) = T_fixed(p)``.

    Args:
        fixed_to_template: T_fixed as a displacement, the first of :func:`person_transforms`.
        moving_to_template: T_moving as a displacement, the first of :func:`person_transforms`.
        moving_from_template: Inverse of T_moving, the second of :func:`person_transforms`.
        resolution_mm: Voxel size of the result, 1, 2 or 4.

    Returns:
        ``(1, 3, D, H, W)`` in voxels of that resolution. Solved on the 2 mm grid, there within 0.05 mm.
    """
    forward, backward = partial(spatial.compose, moving_to_template), partial(spatial.compose, moving_from_template)
    return _to_spacing(_solve(forward, backward, fixed_to_template, iterations=2), resolution_mm)


def _solve(forward: Motion, backward: Motion, target: torch.Tensor, iterations: int) -> torch.Tensor:
    """What `forward` moves to a target, points or displacements of a grid, by an approximate inverse of it.

    As one after the other is nearly the identity, correcting the argument of the inverse by what is left contracts,
    where plain fixed-point iteration on the result need not.
    """
    start = target
    found = backward(start)
    for _ in range(iterations):
        start = start - (forward(found) - target)
        found = backward(start)
    return found


def _appearance(
    template_values: torch.Tensor, labels: torch.Tensor, population: EmbeddedPopulation, person: int
) -> torch.Tensor:
    """Give the sampled template this person's contrast, bias field and regional differences. ``(1, 1, D, H, W)``."""
    generator = np.random.default_rng([population.seed, person, 1])
    # tissue contrast: a monotone map of the template's typical CSF, grey and white intensities to those of one
    # scan, which is sharper than the average that the template is
    knots = np.array([0.0, 0.35, 0.72, 0.95, 1.05])
    typical = np.array([0.0, 0.18, 0.56, 0.95, 1.05])
    values = typical + np.append(0.0, generator.normal(0, population.tissue_sigma, 4))
    values = np.maximum.accumulate(np.clip(values, 0.0, None))
    source = template_values.numpy().ravel()
    image = np.interp(source, knots, values).astype(np.float32)
    image = np.clip(image, 0, None) ** np.float32(np.exp(generator.normal(0, population.gamma_sigma)))
    regional = np.exp(generator.normal(0, population.label_sigma, 256)).astype(np.float32)
    image *= regional[np.clip(labels.numpy().ravel(), 0, 255)]
    control = torch.from_numpy(generator.standard_normal((1, 4, 5, 4)).astype(np.float32)) * population.bias_sigma
    shape = template_values.shape[2:]
    points = [np.linspace(0, nodes - 1, side) for nodes, side in zip(control.shape[1:], shape, strict=True)]
    bias = _upsample_spline(control, points, 1.0).exp()
    image = torch.from_numpy(image).reshape(1, 1, *shape) * bias[None]
    return torch.where(template_values > 0.02, image, image.new_zeros(()))  # outside the brain stays exactly zero


def make_person(
    population: EmbeddedPopulation, person: int, resolution_mm: int
) -> tuple[np.ndarray, np.ndarray, dict[int, list[float]], torch.Tensor]:
    """Image, labels, landmarks and control velocity of one simulated person.

    Args:
        population: Recipe of the population.
        person: Number of the person: 0, 1, 2 ...; training people come first.
        resolution_mm: Voxel size in mm: 1, 2 or 4.

    Returns:
        uint8 image with the 99.9th percentile of the brain at 255; uint8 labels (LUMIR's 133 numbers); landmark
        label -> voxel coordinates at this resolution; the velocity ``(3, 21, 29, 25)`` in mm.
    """
    if resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(f"resolution_mm must be one of {RESOLUTIONS_MM} for the embedded cohort, got {resolution_mm}")
    velocity = control_velocity(population, person)
    transform = person_transform(velocity)
    sampling_mm = max(1, resolution_mm // 2)
    factor = resolution_mm // sampling_mm
    field = _to_spacing(transform, sampling_mm)
    template, template_affine = template_image() if sampling_mm == 1 else template_1mm()
    atlas, atlas_affine = _atlas()
    values = sample_in_frame(template, template_affine, field, sampling_mm, "bilinear")
    labels = sample_in_frame(atlas, atlas_affine, field, sampling_mm, "nearest")
    image = _appearance(values, labels, population, person)
    image = F.avg_pool3d(image, factor) if factor > 1 else image
    labels = spatial.majority_label(labels, factor)[0, 0].numpy().astype(np.uint8)
    brain = image[0, 0].numpy()
    noise = np.random.default_rng([population.seed, person, 2]).normal(0, population.noise_sigma, brain.shape)
    white = np.percentile(brain[brain > 0], 99.9)
    noisy = np.where(brain > 0, np.clip(brain / white + noise, 1 / 255, 1), 0)
    landmarks = _person_landmarks(velocity, transform, resolution_mm)
    return np.rint(noisy * 255).astype(np.uint8), labels, landmarks, velocity


def person_image(dataset: Path, file: str, resolution_mm: int) -> torch.Tensor:
    """Image of a person of a simulated cohort on voxels of any size, made anew; nothing is written.

    Args:
        dataset: Path of the cohort's JSON, which holds the recipe of its population.
        file: Name of the person's image file.
        resolution_mm: Voxel size in mm: 1, 2 or 4.

    Returns:
        ``(1, 1, D, H, W)`` float32 in [0, 1].

    Raises:
        ValueError: people of another release of the generator, whom this one cannot make.
    """
    content = read_json(dataset)
    if content["release"] != str(GENERATOR_VERSION):
        raise ValueError(f"{dataset}: expected people of release {GENERATOR_VERSION}, got {content['release']}")
    recipe = {name: tuple(one) if isinstance(one, list) else one for name, one in content["population"].items()}
    (person,) = (
        one["person"] for one in (*content["training"], *content["labelled"]) if Path(one["image"]).name == file
    )
    image, *_ = make_person(EmbeddedPopulation(**recipe), person, resolution_mm)
    return torch.from_numpy(image)[None, None] / 255


def _person_landmarks(velocity: torch.Tensor, transform: torch.Tensor, resolution_mm: int) -> dict[int, list[float]]:
    """Where each template landmark lies in the person: the p with ``p + u(p) = x``."""
    template_points = landmark_points()
    target = torch.tensor(list(template_points.values()), dtype=torch.float64).T.reshape(1, 3, -1, 1, 1)
    target = (target - 0.5) / FIELD_SPACING_MM  # 1 mm voxels -> voxels of the 2 mm grid

    def by(field: torch.Tensor) -> Motion:
        field = field.double()
        return lambda points: points + spatial.sample(field, points)

    forward = by(transform)
    points = _solve(forward, by(person_transform(-velocity)), target, iterations=30)
    residual = (forward(points) - target).norm(dim=1).max() * FIELD_SPACING_MM
    if residual > 0.05:
        raise RuntimeError(f"a landmark could not be placed: residual {residual:.3f} mm, expected at most 0.05 mm")
    in_frame = points * FIELD_SPACING_MM + 0.5
    in_grid = (in_frame - (resolution_mm - 1) / 2) / resolution_mm
    places = in_grid.reshape(3, -1).T.tolist()
    return {label: [round(x, 4) for x in place] for label, place in zip(template_points, places, strict=True)}


def cache_folder() -> Path:
    """Where generated cohorts are kept: the user's cache folder, or `LUMIRLIB_CACHE` if that is set."""
    chosen = os.environ.get("LUMIRLIB_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("lumirlib"))


def embedded_json(
    resolution_mm: int = 4,
    population: EmbeddedPopulation | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Path of the embedded cohort's dataset JSON; the cohort is made first where it is missing.

    Making it takes about half a minute at 4 mm and a minute or two at 1 mm, once. Each file is written atomically
    and the JSON last, so an interrupted call goes on where it stopped and two at once do no harm.

    Args:
        resolution_mm: Voxel size in mm: 1, 2 or 4.
        population: Recipe of the population; None takes the project's own.
        folder: Folder where cohorts are kept; None takes :func:`cache_folder`.
        progress: Whether to show a progress bar while making.

    Returns:
        Path of `dataset.json`, beside imagesTr, imagesVal, labelsVal, landmarksVal and velocitiesVal.
    """
    if resolution_mm not in RESOLUTIONS_MM:
        raise ValueError(f"resolution_mm must be one of {RESOLUTIONS_MM} for the embedded cohort, got {resolution_mm}")
    population = population or EmbeddedPopulation()
    root = Path(folder or cache_folder()) / population.name() / f"{resolution_mm}mm"
    dataset = root / "dataset.json"
    if dataset.is_file():
        return dataset
    people = population.training + population.validation
    missing = [person for person in range(people) if not _person_files(root, population, person)["done"].is_file()]
    with (
        ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool,
        tqdm(
            total=people,
            initial=people - len(missing),
            desc=f"embedded cohort, {resolution_mm} mm",
            unit="person",
            disable=not progress,
        ) as bar,
    ):
        for _ in pool.map(lambda person: _write_person(root, population, person, resolution_mm), missing):
            bar.update()
    write_json(dataset, _dataset(population, resolution_mm))
    return dataset


def _person_files(root: Path, population: EmbeddedPopulation, person: int) -> dict[str, Path]:
    part = "Tr" if person < population.training else "Val"
    name = f"SIM_{person:04d}_0000"
    files = {
        "image": root / f"images{part}" / f"{name}.nii.gz",
        "seg": root / f"labels{part}" / f"{name}.nii.gz",
        "landmarks": root / f"landmarks{part}" / f"{name}.json",
        "velocity": root / f"velocities{part}" / f"{name}.nii.gz",
    }
    files["done"] = files["velocity"]  # written last
    return files


def _write_person(root: Path, population: EmbeddedPopulation, person: int, resolution_mm: int) -> None:
    image, labels, landmarks, velocity = make_person(population, person, resolution_mm)
    files = _person_files(root, population, person)
    affine = frame_affine(resolution_mm)
    write_nifti(files["image"], image, affine)
    write_nifti(files["seg"], labels, affine)
    write_json(
        files["landmarks"],
        {
            "space": "voxel index i,j,k of the image",
            "names": [f"centroid of label {label}" for label in landmarks],
            "points": list(landmarks.values()),
        },
    )
    control_affine = np.diag([CONTROL_SPACING_MM] * 3 + [1]).astype(np.float64)
    control_affine[:3, 3] = FRAME_ORIGIN_MM
    write_nifti(files["velocity"], velocity.movedim(0, -1).numpy(), control_affine)


def _dataset(population: EmbeddedPopulation, resolution_mm: int) -> dict:
    def entry(person: int) -> dict[str, object]:
        root = Path(".")
        files = _person_files(root, population, person)
        keys = ("image", "seg", "landmarks", "velocity")
        return {**{key: f"./{files[key].as_posix()}" for key in keys}, "person": person}

    training = [entry(person) for person in range(population.training)]
    labelled = [entry(person) for person in range(population.training, population.training + population.validation)]
    pairs = [(fixed, moving) for fixed in labelled for moving in labelled if fixed is not moving]
    return {
        "name": "Embedded cohort (simulated)",
        "release": str(GENERATOR_VERSION),
        "description": f"simulated people at {resolution_mm} mm: warped template and atlas of deepmriprep 0.3",
        "licence": "template and atlas as distributed with deepmriprep (MIT)",
        "simulated": True,
        "population": asdict(population),
        "pairing": "unpaired",
        "modality": {"0": "MR"},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": [side // resolution_mm for side in FRAME_SHAPE]},
        "numTraining": len(training),
        "training": training,
        "numValidation": len(pairs),
        "validation": [{"fixed": fixed["image"], "moving": moving["image"]} for fixed, moving in pairs],
        "labelled": labelled,
    }
