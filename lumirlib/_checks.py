"""Argument checks shared by the public functions, one clear sentence per mistake, and numbers of things in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def counted(number: int, thing: str) -> str:
    """A number of things, in words: "1 seed", "3 seeds"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def check_image(image: torch.Tensor, name: str = "image", channels: int | None = None) -> None:
    """Raise unless `image` is a finite-typed tensor of shape (B, C, D, H, W).

    Args:
        image: Tensor to look at.
        name: Name that the caller gives it, for the message.
        channels: Number of channels C that is required, any if None.

    Raises:
        TypeError: not a tensor, or not of a floating-point dtype.
        ValueError: wrong number of dimensions, channels, or a side below 2 voxels.
    """
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(image).__name__}")
    wanted = "C" if channels is None else str(channels)
    if image.ndim != 5 or (channels is not None and image.shape[1] != channels):
        raise ValueError(f"{name} must be (B, {wanted}, D, H, W), got {tuple(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {image.dtype}")
    if min(image.shape[2:]) < 2:
        raise ValueError(f"{name} must have at least 2 voxels along each axis, got {tuple(image.shape[2:])}")


def check_displacement(displacement: torch.Tensor, name: str = "displacement") -> None:
    """Raise unless `displacement` is a floating-point tensor of shape (B, 3, D, H, W)."""
    check_image(displacement, name, channels=3)


def check_labels(labels: torch.Tensor, name: str = "labels") -> None:
    """Raise unless `labels` is an integer tensor of shape (B, 1, D, H, W) without negative numbers."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.ndim != 5 or labels.shape[1] != 1:
        raise ValueError(f"{name} must be (B, 1, D, H, W), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name} must have an integer dtype (uint8 or int8 to int64), got {labels.dtype}")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"{name} must hold label numbers from 0, got {int(labels.min())}")


def check_same_grid(first: torch.Tensor, second: torch.Tensor, first_name: str, second_name: str) -> None:
    """Raise unless both tensors have the same batch size and the same spatial shape."""
    if first.shape[0] != second.shape[0] or first.shape[2:] != second.shape[2:]:
        raise ValueError(
            f"{first_name} and {second_name} must share batch size and spatial shape, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_network_images(fixed: torch.Tensor, moving: torch.Tensor, weights: torch.dtype) -> None:
    """Raise unless both images have one shape (B, 1, D, H, W) and, without autocast, the dtype of a network's weights.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: other shapes, or a side below 2 voxels.
    """
    check_image(fixed, "fixed", channels=1)
    check_image(moving, "moving", channels=1)
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed and moving must have one shape, got {tuple(fixed.shape)} and {tuple(moving.shape)}")
    kind = fixed.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    if not autocast and not fixed.dtype == moving.dtype == weights:
        raise TypeError(f"fixed and moving must have the network's {weights}, got {fixed.dtype} and {moving.dtype}")


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise ValueError if `tensor` holds NaN or infinite values, saying how many; on "meta" it holds none."""
    if tensor.device.type == "meta" or bool(tensor.sum().isfinite()):  # one that is not would show in the sum
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:  # the sum of finite values may overflow
        raise ValueError(f"{name} must hold finite values only, got {bad} NaN or infinite of {tensor.numel()}")


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """Raise ValueError listing `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_option_types(defaults: object, overrides: Mapping[str, object]) -> dict[str, object]:
    """Overrides with whole numbers made floats where the option is one.

    Args:
        defaults: Instance of a dataclass; options that are None take whole numbers or None.
        overrides: Options of it by name.

    Raises:
        ValueError: a value that has not the type of that option's default.
    """
    checked: dict[str, object] = {}
    for name, value in overrides.items():
        default = getattr(defaults, name)
        if isinstance(default, tuple):
            wanted = type(default[0])
            if not isinstance(value, (list, tuple)) or any(type(part) is not wanted for part in value):
                raise ValueError(f"{name} must be a list of {wanted.__name__}, got {value!r}")
            checked[name] = tuple(value)
            continue
        wanted = int if default is None else type(default)
        fits = isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
        if (isinstance(value, bool) and wanted is not bool) or not (fits or (default is None and value is None)):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted]
            raise ValueError(f"{name} must be {kind}, got {value!r}")
        checked[name] = float(value) if wanted is float else value
    return checked
