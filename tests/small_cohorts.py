"""Small cohorts on disk, for tests that need files but no brains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lumirlib.data.nifti import write_nifti

#: Unequal on purpose: equal sides hide swapped axes.
SMALL_SHAPE = (16, 20, 24)


def smooth_blob(seed: int, shape=SMALL_SHAPE) -> np.ndarray:
    """A smooth uint8 image with zero background, different for each seed."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"))
    centre = generator.uniform(-0.15, 0.15, (3, 1, 1, 1))
    radius = np.sqrt(((grid - centre) ** 2).sum(0))
    value = np.clip(1 - radius, 0, None) * (1 + 0.3 * np.cos(6 * grid[0] + generator.uniform(0, 3)))
    return np.clip(value * 180, 0, 255).astype(np.uint8)


def write_small_cohort(root: Path, training: int = 4, validation: int = 3, **changes) -> Path:
    """A Learn2Reg folder of small blobs with labels 0, 4, 11, 23 and two landmarks; `changes` update the JSON."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])

    def subject(part: str, number: int) -> dict:
        image = smooth_blob(number)
        labels = np.digitize(image, [40, 90, 130]).astype(np.uint8)
        labels = np.array([0, 4, 11, 23], dtype=np.uint8)[labels]
        names = {key: f"{key}{part}/SMALL_{number:04d}_0000" for key in ("images", "labels", "landmarks")}
        write_nifti(root / f"{names['images']}.nii.gz", image, affine)
        write_nifti(root / f"{names['labels']}.nii.gz", labels, affine)
        points = [[7.0, 9.0, 11.0 + 0.5 * (number % 3)], [9.0, 6.0, 8.0]]
        landmarks = root / f"{names['landmarks']}.json"
        landmarks.parent.mkdir(exist_ok=True)
        landmarks.write_text(json.dumps({"names": ["first", "second"], "points": points}))
        return {
            "image": f"./{names['images']}.nii.gz",
            "seg": f"./{names['labels']}.nii.gz",
            "landmarks": f"./{names['landmarks']}.json",
        }

    train = [{"image": subject("Tr", number)["image"]} for number in range(training)]
    people = [subject("Val", 100 + number) for number in range(validation)]
    pairs = [{"fixed": a["image"], "moving": b["image"]} for a in people for b in people if a is not b]
    content = {"name": "Small blobs", "training": train, "validation": pairs, "labelled": people, **changes}
    path = root / "dataset.json"
    path.write_text(json.dumps(content))
    return path
