"""One training step (forward, loss, backward, Adam): plain eager float32, our fast ones, and peers from PyPI.

    python benchmarks/train_step.py                    # CPU sizes
    python benchmarks/train_step.py --device cuda      # 160x224x192 voxels, N = 32
    python benchmarks/train_step.py --sizes 80x112x96:8 --only "row ours bfloat16" --against 080a01f

The plain step is benchmarks/plain.py with the same weights; on a GPU its convolutions use TF32, as PyTorch does by
default. "row ours ..." is the row `ours` with its optimizer in place of the backbone. Peers are the networks of the
packages voxelmorph (with neurite's NCC) and MONAI (with its own) at the widths in their names: other networks than
ours, compared by the time of a step on the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import plain
import rounds
import torch
from torch import nn

from lumirlib.losses import multilevel
from lumirlib.methods.base import PAPER
from lumirlib.methods.variants import parse_variant
from lumirlib.models.layers import compile_model, place
from lumirlib.training.trainer import make_optimizer

SIZES = {"cpu": ["40x56x48:8", "64x96x64:32"], "cuda": ["160x224x192:32"]}


def step_of(model: nn.Module, loss: Callable[[], torch.Tensor], optimizer: str = "adam") -> Callable[[], None]:
    """A function that trains a network by one step."""
    optimizer = make_optimizer(model, PAPER, optimizer)

    def step() -> None:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def plain_step(shape: str, channels: int, device: torch.device, tf32: bool = True) -> Callable[[], None]:
    """PyTorch as documented."""
    torch.backends.cudnn.allow_tf32 = tf32
    fixed, moving = rounds.images(shape, device)
    torch.manual_seed(0)
    model = place(parse_variant("backbone", start_channels=channels).build(), device, channels_last=False)
    return step_of(model, lambda: plain.loss(model, fixed, moving, PAPER.smoothness_weight, PAPER.window))


def our_step(
    shape: str,
    channels: int,
    device: torch.device,
    bfloat16: bool = False,
    compiled: bool = False,
    checkpointing: bool = False,
    channels_last: bool = True,
    row: str = "backbone",
    fused_lncc: bool = False,
) -> Callable[[], None]:
    """lumirlib's; with the NCC of the package fused-lncc in place of ours, where that is asked for."""
    if fused_lncc:
        try:
            from fused_lncc import fused_lncc_loss
        except ImportError as error:
            how = "pip install --no-build-isolation fused-lncc==0.1.0, with nvcc"
            raise ImportError(f"not installed: {how} ({error})") from error
        multilevel.ncc_loss = fused_lncc_loss  # in this process, which measures nothing else
    rounds.keep_freed_memory()
    fixed, moving = rounds.images(shape, device)
    variant = parse_variant(row, start_channels=channels)
    torch.manual_seed(0)
    model = place(variant.build(), device, channels_last)
    model.checkpointing = checkpointing
    if compiled:
        compile_model(model)

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return variant.loss_terms(model, fixed, moving, PAPER, torch.Generator())["total"]

    return step_of(model, loss, variant.optimizer)


def _smoothness(field: torch.Tensor) -> torch.Tensor:
    return sum(field.diff(dim=axis).square().mean() for axis in (2, 3, 4)) / 3


def voxelmorph_step(shape: str, channels: int, device: torch.device) -> Callable[[], None]:
    """The package's network at the published widths, neurite's NCC; `channels` is not its."""
    try:
        from neurite.nn.modules import NCC
        from voxelmorph.nn.models import VxmPairwise
    except ImportError as error:
        raise ImportError(f"not installed: pip install voxelmorph==0.3.4 neurite ({error})") from error
    _check_sides(shape)
    fixed, moving = rounds.images(shape, device)
    torch.manual_seed(0)
    model = VxmPairwise(3, 1, 1, nb_features=(16, 32, 32, 32, 32), device=str(device)).to(device)
    similarity = NCC(window_size=9)

    def loss() -> torch.Tensor:
        found = model(moving, fixed, return_warped_source=True)
        warped = next(one for one in found if one.shape[1] == 1)
        field = next(one for one in found if one.shape[1] == 3)
        return similarity(warped, fixed) + _smoothness(field)

    return step_of(model, loss)


def monai_step(shape: str, channels: int, device: torch.device, network: str) -> Callable[[], None]:
    """A network of MONAI with its local correlation, window 9."""
    try:
        from monai.losses import LocalNormalizedCrossCorrelationLoss
        from monai.networks import blocks, nets
    except ImportError as error:
        raise ImportError(f"not installed: pip install monai ({error})") from error
    _check_sides(shape)
    fixed, moving = rounds.images(shape, device)
    torch.manual_seed(0)
    if network == "VoxelMorph":
        model = nets.VoxelMorph().to(device)
    elif network == "LocalNet":
        model = nets.LocalNet(3, 2, channels, extract_levels=(0, 1, 2, 3)).to(device)
    else:
        model = nets.RegUNet(3, 2, channels, depth=4).to(device)
    warp, similarity = blocks.Warp().to(device), LocalNormalizedCrossCorrelationLoss(kernel_size=9)

    def loss() -> torch.Tensor:
        if network == "VoxelMorph":
            warped, field = model(moving, fixed)
        else:
            field = model(torch.cat([moving, fixed], dim=1))
            warped = warp(moving, field)
        return similarity(warped, fixed) + _smoothness(field)

    return step_of(model, loss)


def _check_sides(shape: str) -> None:
    if any(int(side) % 32 for side in shape.split("x")):
        raise ValueError("needs sides divisible by 32")


def candidates(kind: str) -> dict[str, Callable]:
    """What is measured on "cpu" or "cuda"."""
    found = {"plain float32": plain_step}
    if kind == "cuda":
        found["plain float32, no TF32"] = partial(plain_step, tf32=False)
    found["ours float32"] = our_step
    found["ours bfloat16"] = partial(our_step, bfloat16=True)
    found["ours bfloat16, checkpointing"] = partial(our_step, bfloat16=True, checkpointing=True)
    found["ours float32, checkpointing"] = partial(our_step, checkpointing=True)
    if kind == "cuda":
        found["ours float32, contiguous"] = partial(our_step, channels_last=False)
        found["ours bfloat16, contiguous"] = partial(our_step, bfloat16=True, channels_last=False)
        found["ours float32, compiled"] = partial(our_step, compiled=True)
        found["ours bfloat16, compiled"] = partial(our_step, bfloat16=True, compiled=True)
        found["ours bfloat16, compiled, contiguous"] = partial(
            our_step, bfloat16=True, compiled=True, channels_last=False
        )
        found["ours bfloat16, compiled, checkpointing"] = partial(
            our_step, bfloat16=True, compiled=True, checkpointing=True
        )
        found["ours bfloat16, fused-lncc"] = partial(our_step, bfloat16=True, fused_lncc=True)
    for name in [one for one in found if one.startswith("ours")]:
        found[f"row {name}"] = partial(found[name], row="ours")
    found["voxelmorph 16-32-32-32-32, neurite NCC"] = voxelmorph_step
    for network in ("VoxelMorph", "LocalNet", "RegUNet"):
        found[f"MONAI {network}, its NCC"] = partial(monai_step, network=network)
    return found


if __name__ == "__main__":
    rounds.run("train_step", candidates, SIZES, __doc__)
