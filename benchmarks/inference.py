"""One registration: ms per pair and peak memory of the plain path and ours, for widths and schemes.

    python benchmarks/inference.py                     # CPU sizes
    python benchmarks/inference.py --device cuda       # 160x224x192 voxels, N = 16, 32, 64
    python benchmarks/inference.py --sizes 160x224x192:8 --only packaged "COMP, bfloat16" --against 080a01f

The last command measures what `lumirlib register` does with the packaged weights of `ours`, at 1 mm where the images
have such sides, and the cascade alone, against the library before it kept freed memory.

LK has N = 36 at the paper's 32, LC-2 has 64; here every scheme has the N of its size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import plain
import rounds
import torch

from lumirlib.data.embedded import EmbeddedPopulation, make_person
from lumirlib.data.frame import FRAME_SHAPE
from lumirlib.methods.variants import parse_variant
from lumirlib.models.layers import compile_model, place
from lumirlib.training.registrar import choose_registrar
from lumirlib.training.weights import names

SIZES = {
    "cpu": ["80x112x96:16", "80x112x96:32"],
    "cuda": ["160x224x192:16", "160x224x192:32", "160x224x192:64"],
}
NAMES = ("backbone", "COMP", "ours", "LK", "CA", "BF", "LC-2")


def registration(shape: str, channels: int, device: torch.device, name: str, how: str) -> Callable[[], object]:
    """A function that registers a pair by `how`: "plain", "float32", "bfloat16"; "compiled", "contiguous" in that."""
    fixed, moving = rounds.images(shape, device)
    torch.manual_seed(0)
    model = place(
        parse_variant(name, start_channels=channels).build(), device, how not in ("plain", "contiguous")
    ).eval()
    if how == "compiled":
        compile_model(model)

    @torch.inference_mode()
    def register() -> object:
        if how == "plain":
            return plain.fields(model, fixed, moving)[0][0]
        with torch.autocast(device.type, torch.bfloat16, enabled=how != "float32"):
            return model(fixed, moving)

    return register


def packaged(shape: str, channels: int, device: torch.device) -> Callable[[], object]:
    """A function that registers simulated people as `lumirlib register` does, by packaged weights of `ours`, at 1 mm.

    Noise, as others get it, would fold everywhere, and all of it would be smoothed.
    """
    name = next(name for name in names() if name.startswith("ours"))  # an older library has another one
    registrar = choose_registrar(pretrained=name, resolution_mm=1, device=str(device))
    width = registrar.method.estimators[0].conv1.in_channels // 2
    if width != channels:
        raise ValueError(f"{name} has N = {width}")
    if shape != "x".join(map(str, FRAME_SHAPE)):
        raise ValueError(f"ours, packaged, works in the frame of {FRAME_SHAPE} voxels, got {shape}")
    people = (make_person(EmbeddedPopulation(), person, 1)[0] for person in range(2))
    fixed, moving = (torch.from_numpy(image)[None, None].float().to(device) for image in people)
    return lambda: registrar.displacement(fixed, moving, device)


def candidates(kind: str) -> dict[str, Callable]:
    """What is measured on "cpu" or "cuda"."""
    ways = ("plain", "float32", "bfloat16") + (("contiguous", "compiled") if kind == "cuda" else ())
    found = {f"{name}, {how}": partial(registration, name=name, how=how) for name in NAMES for how in ways}
    if kind == "cpu":
        found["ours, packaged"] = packaged
    del found["ours, plain"], found["COMP, plain"]  # benchmarks/plain.py knows the paper's schemes alone
    return found


if __name__ == "__main__":
    rounds.run("inference", candidates, SIZES, __doc__)
