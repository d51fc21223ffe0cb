"""Random contrast for acquired images, so that a network learns to register whatever the contrast is.

Random maps of intensities instead of images made from label maps, which :mod:`lumirlib.methods.synthesis` makes: after
the non-linear intensity augmentation of Zhou et al., "Models Genesis", MICCAI 2019, and the idea of Hoffmann et al.
(SynthMorph, IEEE TMI 41(3), 2022) that a network which has seen all contrasts depends on none.
"""

from __future__ import annotations

import torch

from lumirlib._checks import check_image

#: What an intensity map may be, each as likely as the others: a power, the same of the inverted image, a monotone map
#: with random nodes, or one with random nodes that need not be monotone.
KINDS = ("gamma", "inverted", "monotone", "piecewise")
#: Of the logarithm of the exponent.
GAMMA_SIGMA = 0.5
#: Nodes of the piecewise linear maps, between them equal distances.
NODES = 6
#: Lowest value of the brain where its contrast is inverted or free, so that it stays apart from the background.
LOWEST = 0.05


def draw_intensity_map(generator: torch.Generator, size: int = 256) -> torch.Tensor:
    """Values of a random intensity map at `size` equally spaced intensities from 0 to 1.

    Args:
        generator: Generator of random numbers, on the CPU.
        size: Number of values in the table, from 2.

    Returns:
        ``(size,)`` float32 in [0, 1].
    """
    if size < 2:
        raise ValueError(f"size must be 2 or more, got {size}")
    kind = KINDS[int(torch.randint(len(KINDS), (1,), generator=generator))]
    levels = torch.linspace(0, 1, size)
    if kind in ("gamma", "inverted"):
        power = levels ** float(torch.exp(GAMMA_SIGMA * torch.randn(1, generator=generator)))
        return power if kind == "gamma" else 1 - (1 - LOWEST) * power
    nodes = torch.rand(NODES, generator=generator)
    if kind == "monotone":
        nodes = nodes.cumsum(0)
        nodes = (nodes - nodes[0]) / (nodes[-1] - nodes[0])
    else:
        nodes = LOWEST + (1 - LOWEST) * nodes
    return torch.nn.functional.interpolate(nodes[None, None], size, mode="linear", align_corners=True)[0, 0].clamp(0, 1)


def randomize_intensity(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The image with its intensities replaced by those of a random map; the background stays zero.

    One map for each image of the batch, linear between the values of :func:`draw_intensity_map`.

    Args:
        image: Image ``(B, 1, D, H, W)`` in [0, 1], zero outside the brain.
        generator: Generator of random numbers, on the CPU; they are the same whatever the device.

    Returns:
        ``(B, 1, D, H, W)`` in [0, 1], dtype and device of `image`.

    Raises:
        ValueError: another shape, or intensities outside [0, 1].
    """
    check_image(image, "image", channels=1)
    if not (float(image.min()) >= 0 and float(image.max()) <= 1 + 1e-4):  # resampling may round above
        raise ValueError(f"image must be in [0, 1], got {float(image.min()):g} to {float(image.max()):g}")
    changed = []
    for one in image.split(1):
        table = draw_intensity_map(generator).to(one)
        place = one.clamp_max(1) * (len(table) - 1)
        below = place.floor().clamp_max(len(table) - 2)
        low = below.long()
        changed.append(torch.lerp(table[low], table[low + 1], place - below) * (one > 0))
    return torch.cat(changed)
