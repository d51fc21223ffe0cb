"""How far apart affines to the template come out for one brain in several poses: SimpleITK's (ours) and torchreg's.

    python benchmarks/affine.py                                # simulated people
    python benchmarks/affine.py --cohort brains --scans 4      # real ones

Each brain is turned by up to 20 degrees about each axis, shifted by up to 25 mm and scaled by up to 10 % along each
axis, in its header alone. The affine of a pose, with the pose taken out, should be that of the upright brain.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torchreg import AffineRegistration
from tqdm.auto import tqdm

from lumirlib import load_cohort, provenance
from lumirlib.data.frame import FRAME_SHAPE, frame_affine, template_in_frame
from lumirlib.files import write_json
from lumirlib.scans.prepare import affine_to_frame
from lumirlib.scans.scan import correlation, sample_world, transform, world_slabs
from lumirlib.study.results import data_title


def on_frame(image: torch.Tensor, affine: np.ndarray, to_scan: np.ndarray, resolution_mm: int) -> torch.Tensor:
    """A scan on the frame's grid."""
    shape = tuple(side // resolution_mm for side in FRAME_SHAPE)
    seen = torch.empty(1, 1, *shape)
    for planes, points in world_slabs(shape, frame_affine(resolution_mm)):
        seen[:, :, planes] = sample_world(image, affine, transform(to_scan, points))
    return seen


def by_torchreg(image: torch.Tensor, mask: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    """As :func:`lumirlib.scans.prepare.affine_to_frame`, by torchreg on 4 mm voxels, from the same start."""

    def loss(moved: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        moved, static = moved - moved.mean(), static - static.mean()
        return 1 - (moved * static).sum() / (moved.norm() * static.norm())

    template, target = template_in_frame(4), frame_affine(4)
    places = [
        transform(grid, torch.nonzero(where[0, 0]).T.reshape(1, 3, -1, 1, 1)).mean((0, 2, 3, 4)).numpy()
        for grid, where in ((affine, mask), (target, template > 0.02))
    ]
    volume = float(mask.sum()) * abs(np.linalg.det(affine[:3, :3])) / (float((template > 0.02).sum()) * 64)
    start = np.diag([*[volume ** (1 / 3)] * 3, 1.0])
    start[:3, 3] = places[0] - start[:3, :3] @ places[1]
    coarse = F.avg_pool3d(on_frame(image / image.max(), affine, start, 2), 2)
    search = AffineRegistration(
        (2, 1),
        (300, 100),
        learning_rate=1e-2,
        with_shear=True,
        verbose=False,
        dissimilarity_function=loss,
        padding_mode="zeros",
    )
    search(coarse, template, return_moved=False)
    normalized = np.vstack(
        [search.get_affine()[0].double().numpy(), [0, 0, 0, 1]]
    )  # of coordinates k, j, i in -1 ... 1
    to_normalized = np.zeros((4, 4))
    to_normalized[3, 3] = 1
    for axis, side in enumerate(template.shape[2:]):
        to_normalized[2 - axis, [axis, 3]] = 2 / (side - 1), -1
    voxels = np.linalg.inv(to_normalized) @ normalized @ to_normalized
    return start @ target @ voxels @ np.linalg.inv(target)


def pose(generator: np.random.Generator) -> np.ndarray:
    """A random one, 4 x 4."""
    turn = Rotation.from_euler("xyz", generator.uniform(-20, 20, 3), degrees=True).as_matrix()
    found = np.eye(4)
    found[:3, :3] = turn @ np.diag(generator.uniform(0.9, 1.1, 3))
    found[:3, 3] = generator.uniform(-25, 25, 3)
    return found


def main() -> None:
    """Measure, print the means, and write ``<results>/benchmarks/affine_<cohort>.json``."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cohort", default="embedded", help="embedded, brains, or a dataset JSON, at 1 mm or 2 mm")
    options.add_argument("--resolution", type=int, default=2, help="voxels of the scans in mm")
    options.add_argument("--scans", type=int, default=3, help="spread over the training people")
    options.add_argument("--poses", type=int, default=2, help="of each scan, besides the upright one")
    options.add_argument("--out", default="", help="results folder")
    given = options.parse_args()
    cohort = load_cohort(given.cohort, given.resolution)
    chosen = [cohort.train[round(at)] for at in np.linspace(0, len(cohort.train) - 1, given.scans)]
    ways = {"SimpleITK": affine_to_frame, "torchreg": by_torchreg}
    template = template_in_frame(2)
    brain = transform(frame_affine(2), torch.nonzero(template[0, 0] > 0.02)[::20].T.reshape(1, 3, -1, 1, 1))
    path = provenance.results_folder(given.out) / "benchmarks" / f"affine_{cohort.short_name}.json"
    rows, upright = [], {}
    with tqdm(total=given.scans * (given.poses + 1) * len(ways), unit="affine") as bar:
        for number, subject in enumerate(chosen):
            image, generator = cohort.image(subject), np.random.default_rng(number)
            for turn in range(given.poses + 1):
                turned = pose(generator) if turn else np.eye(4)
                for name, way in ways.items():
                    started = time.perf_counter()
                    found = np.linalg.inv(turned) @ way(image, image > 0, turned @ cohort.affine)
                    seconds = time.perf_counter() - started
                    upright[name] = upright[name] if turn else found
                    apart = (transform(found, brain) - transform(upright[name], brain)).norm(dim=1)
                    seen = on_frame(image, cohort.affine, found, 2)
                    rows.append(
                        {
                            "scan": subject.name,
                            "pose": turn,
                            "by": name,
                            "seconds": seconds,
                            "apart_mm": float(apart.square().mean().sqrt()) if turn else None,
                            "template_correlation": correlation(seen, template, template > 0.02),
                        }
                    )
                    bar.update()
    about = {
        "command": f"python benchmarks/affine.py {' '.join(sys.argv[1:])}".strip(),
        "commit": provenance.commit(),
        "made": provenance.now(),
        "device": provenance.describe_device(torch.device("cpu")),
        "data": data_title(cohort.short_name, cohort.name, cohort.simulated, cohort.resolution_mm),
        "versions": provenance.versions(),
    }
    write_json(path, {"provenance": about, "rows": rows})
    table = pd.DataFrame(rows).groupby("by")
    print(table[["apart_mm", "template_correlation", "seconds"]].agg(["mean", "max"]).to_string(float_format="%.3f"))
    print(path)


if __name__ == "__main__":
    main()
