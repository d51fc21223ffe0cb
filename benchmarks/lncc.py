"""Local normalized cross-correlation with its gradient, seconds and peak memory, beside other implementations.

    python benchmarks/lncc.py
    python benchmarks/lncc.py --device cuda

Every implementation is measured in a process of its own, all of them in turn, several rounds over; one that takes
longer than 20 s only in the first. A process calls it on a small image first, where its loss and gradient are compared
with eq. 2 in float64, every window cut out. The second call counts for seconds, the first for memory: resident above
the start on the CPU, allocated on a GPU. Images are simulated heads with zeros around them.

The peers are no dependencies: `pip install --no-deps monai neurite`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib import metadata

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from lumirlib import losses, provenance
from lumirlib.files import write_json
from lumirlib.study.costs import MEBIBYTE, PeakMemory, in_own_process, seconds
from lumirlib.training.engine import pick_device

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SMALL_SHAPE = (40, 56, 48)
#: Calls that take longer are timed in one round alone.
PATIENCE_SECONDS = 20


def ours(window: int) -> Loss:
    return lambda warped, fixed: losses.ncc_loss(warped, fixed, window)


def from_sums(warped: torch.Tensor, fixed: torch.Tensor, window: int, window_sum: Loss) -> torch.Tensor:
    """Eq. 2 from window sums, in the images' precision, with autograd's gradient."""
    moments = warped, fixed, warped * warped, fixed * fixed, warped * fixed
    w, f, ww, ff, wf = (window_sum(moment) for moment in moments)
    count = window**3
    covariance, variance_w, variance_f = wf - w * f / count, ww - w * w / count, ff - f * f / count
    return 1 - (covariance * covariance / (variance_w * variance_f + 1e-5)).mean()


def five_convolutions(window: int) -> Loss:
    def loss(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        ones = warped.new_ones(1, 1, window, window, window)
        return from_sums(warped, fixed, window, lambda moment: F.conv3d(moment, ones, padding=window // 2))

    return loss


def separable_pooling(window: int) -> Loss:
    def window_sum(moment: torch.Tensor) -> torch.Tensor:
        moment = F.pad(moment, [window // 2] * 6)
        for kernel in ((window, 1, 1), (1, window, 1), (1, 1, window)):
            moment = F.avg_pool3d(moment, kernel, stride=1, divisor_override=1)
        return moment

    return lambda warped, fixed: from_sums(warped, fixed, window, window_sum)


def monai(window: int) -> Loss:
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    loss = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=window)
    return lambda warped, fixed: 1 + loss(warped, fixed)


def voxelmorph(window: int) -> Loss:
    from neurite.nn.modules import NCC  # where voxelmorph 0.3 has its own

    score = NCC(window_size=window)
    return lambda warped, fixed: 1 - score(warped, fixed).mean()


CANDIDATES = {
    "lumirlib": ours,
    "five conv3d": five_convolutions,
    "VoxelMorph (neurite)": voxelmorph,
    "MONAI": monai,
    "separable avg_pool3d": separable_pooling,
}
PACKAGES = {"VoxelMorph (neurite)": "neurite", "MONAI": "monai"}


def head(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A simulated head, (1, 1, D, H, W) in [0, 1]: smooth tissue in an ellipsoid, zeros around it."""
    generator = torch.Generator().manual_seed(seed)
    noise = losses.gaussian_smooth(torch.rand(1, 1, *shape, generator=generator), 1.5, 7)
    axes = torch.meshgrid(*(torch.linspace(-1.2, 1.2, side) for side in shape), indexing="ij")
    inside = sum(axis.square() for axis in axes) < 1
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return noise * inside


def loss_and_gradient(loss: Loss, warped: torch.Tensor, fixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    warped = warped.detach().requires_grad_()
    value = loss(warped, fixed)
    value.backward()
    return value.detach(), warped.grad


def direct(warped: torch.Tensor, fixed: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2 and its gradient in float64: the windows of one plane after another cut out, their means subtracted."""
    warped = warped.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for plane in range(warped.shape[2]):
        cut = []
        for image in (warped, fixed.double()):
            near = F.pad(image, [window // 2] * 6).narrow(2, plane, window)
            windows = near.unfold(3, window, 1).unfold(4, window, 1).movedim(2, -1).flatten(4)
            cut.append(windows - windows.mean(-1, keepdim=True))
        a, b = cut
        squared = (a * b).sum(-1) ** 2 / ((a * a).sum(-1) * (b * b).sum(-1) + 1e-5)
        part = squared.sum() / warped.numel()
        (-part).backward()
        total += part.detach()
    return 1 - total, warped.grad


def measure(
    name: str,
    shape: tuple[int, ...],
    window: int,
    device: torch.device,
    threads: int,
    expected: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, object]:
    """One implementation, in this process: seconds, peak memory and errors; or what is "missing"."""
    torch.set_num_threads(threads)
    try:
        loss = CANDIDATES[name](window)
    except ImportError as error:
        return {"missing": f"not installed: pip install --no-deps {PACKAGES[name]} ({error})"}
    small = (head(SMALL_SHAPE, seed).to(device) for seed in (0, 1))
    value, gradient = (tensor.double().cpu() for tensor in loss_and_gradient(loss, *small))
    warped, fixed = (head(shape, seed).to(device) for seed in (0, 1))

    def work() -> None:
        loss_and_gradient(loss, warped, fixed)

    with PeakMemory(device) as memory:
        taken = seconds(work, device)
    if taken < PATIENCE_SECONDS:
        taken = seconds(work, device)
    return {
        "seconds": taken,
        "peak_mib": memory.peak / MEBIBYTE,
        "loss_error": abs(float(value - expected[0])),
        "gradient_error": float((gradient - expected[1]).norm() / expected[1].norm()),
    }


def table(found: dict[str, list[dict[str, float]]]) -> pd.DataFrame:
    """One row per implementation: medians over rounds, and how many times ours they are."""
    columns = ("seconds", "peak_mib", "loss_error", "gradient_error")
    rows = {
        name: {column: statistics.median(one[column] for one in measured) for column in columns}
        for name, measured in found.items()
    }
    made = pd.DataFrame(rows).T
    made.insert(1, "seconds_ratio", made["seconds"] / made["seconds"]["lumirlib"])
    made.insert(3, "peak_ratio", made["peak_mib"] / made["peak_mib"]["lumirlib"])
    return made


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--shape", type=int, nargs=3, default=[160, 224, 192], help="sides of the images in voxels")
    options.add_argument("--window", type=int, default=9, help="side of the window in voxels")
    options.add_argument("--device", default="cpu", help="cpu, cuda ...")
    options.add_argument("--repeats", type=int, default=3, help="rounds")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    options.add_argument("--out", default="", help="results folder")
    given = options.parse_args()
    if given.repeats < 1 or given.threads < 1:
        options.error("--repeats and --threads must be 1 or more")
    try:
        device = pick_device(given.device)
    except ValueError as error:
        options.error(str(error))
    torch.set_num_threads(given.threads)
    expected = direct(*(head(SMALL_SHAPE, seed) for seed in (0, 1)), given.window)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
    missing: dict[str, str] = {}
    with tqdm(total=given.repeats * len(CANDIDATES), desc="lncc", unit="measurement") as bar:
        for _ in range(given.repeats):
            for name, measured in found.items():
                slow = max((one["seconds"] for one in measured), default=0) > PATIENCE_SECONDS
                if name not in missing and not slow:
                    arguments = name, tuple(given.shape), given.window, device, given.threads, expected
                    one = in_own_process(name, measure, *arguments)
                    if "missing" in one:
                        missing[name] = one["missing"]
                    else:
                        measured.append(one)
                bar.update()
    peers = {PACKAGES[name]: metadata.version(PACKAGES[name]) for name in PACKAGES if name not in missing}
    summary = table({name: measured for name, measured in found.items() if measured})
    print(summary.to_string(float_format=lambda number: f"{number:.3g}"))
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    sides = " ".join(map(str, given.shape))
    about = {
        "command": f"python benchmarks/lncc.py --shape {sides} --window {given.window} --device {given.device} "
        f"--repeats {given.repeats} --threads {given.threads}",
        "commit": provenance.commit(),
        "device": provenance.describe_device(device),
        "written": provenance.now(),
        "versions": {**provenance.versions(), **peers},
        "images": "simulated heads",
        "shape": given.shape,
        "window": given.window,
        "missing": missing,
        "medians": summary.to_dict("index"),
        "rounds": found,
    }
    folder = provenance.results_folder(given.out) / "benchmarks"
    print(write_json(folder / f"lncc_{device.type}.json", about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
