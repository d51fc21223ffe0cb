"""A CUDA device without a GPU: fake tensors, which have shapes, dtypes and a device, but no values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Elements of a tensor that may lie on the CPU where all work should be on the GPU: settings, small kernels.
SMALL = 4096


class Watch(TorchDispatchMode):
    """Sees every operation; answers what only values could tell; keeps count of what a GPU would be waited for.

    Attributes:
        waits: Operations that bring a value from the GPU to the processor, or whose shape depends on values.
        left: Operations that made large tensors on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.left: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name, named = function.name(), named or {}
        if name in ("aten::_local_scalar_dense", "aten::_unique2", "aten::bincount", "aten::nonzero"):
            tensor = arguments[0]
            if tensor.device.type == "cuda":
                self.waits.append(name)
            if name == "aten::_local_scalar_dense":  # true, one, a half: finite, present, within bounds
                return 0.5 if tensor.is_floating_point() else tensor.dtype == torch.bool or 1
            if name == "aten::bincount":
                return tensor.new_zeros(named.get("minlength") or arguments[2])
            if name == "aten::_unique2":
                return tensor.new_zeros(4), tensor.new_zeros(tensor.shape), tensor.new_zeros(4)
        if name == "aten::index.Tensor":
            arguments = (arguments[0], self._without_masks(arguments[1]))
        result = function(*arguments, **named)
        for made in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(made, torch.Tensor) and made.device.type == "cpu" and made.numel() > SMALL:
                self.left.append(f"{name} {tuple(made.shape)}")
        return result

    def _without_masks(self, indices):
        """Indices of eight voxels in place of those that a mask would choose."""
        found = []
        for one in indices:
            if one is None or one.dtype != torch.bool:
                found.append(one)
                continue
            if one.device.type == "cuda":
                self.waits.append("aten::nonzero")
            found += [one.new_zeros(8, dtype=torch.int64)] * one.ndim
        return found


def _clear_caches() -> None:
    """Forget grids and kernels that functions of the package keep: fake ones must not meet real tensors."""
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "lumirlib"]:
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Within it, tensors are fake and may be on the device "cuda"."""
    _clear_caches()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
            yield watch
    finally:
        _clear_caches()


def bfloat16() -> torch.autocast:
    """Autocast as on a GPU that has bfloat16."""
    return _autocast("cuda", torch.bfloat16)


def _autocast(*given: object, **named: object) -> torch.autocast:
    """PyTorch's, which would be off where no GPU is."""
    with mock.patch.multiple("torch.cuda", is_available=lambda: True, is_bf16_supported=lambda: True):
        return torch.autocast(*given, **named)


def on_cuda(model: nn.Module, layout: torch.memory_format = torch.preserve_format) -> nn.Module:
    """A network whose parameters and buffers are fake ones on the GPU; what is neither stays where it is."""
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is None:
                    continue
                moved = torch.empty_like(value, device="cuda")
                moved = moved.to(memory_format=layout) if value.ndim == 5 else moved
                kept[name] = nn.Parameter(moved, value.requires_grad) if kept is module._parameters else moved
    return model


def gradients(total: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """What ``torch.autograd.grad`` would give, None for what the total does not depend on.

    PyTorch's engine has a thread for each GPU, and none here. The nodes of the graph, those with a hand-written
    backward pass among them, are called in this thread.
    """
    waiting: dict[object, list[torch.Tensor | None]] = {total.grad_fn: [torch.ones_like(total)]}
    found: dict[int, torch.Tensor] = {}
    of_checkpoints = mock.patch("torch.amp.autocast", _autocast)  # when they are computed again
    with torch.no_grad(), of_checkpoints, mock.patch("torch._C._current_graph_task_id", return_value=0):
        for node in _from_the_end(total.grad_fn):
            given = waiting.pop(node, None)
            if given is None:
                continue
            if hasattr(node, "variable"):
                found[id(node.variable)] = given[0]
                continue
            if hasattr(node, "_forward_cls"):  # written in Python: no gradient is a zero one
                facts = node._input_metadata
                given = [
                    torch.zeros(one.shape, dtype=one.dtype, device=one.device) if gradient is None else gradient
                    for gradient, one in zip(given, facts, strict=True)
                ]
                results = node.apply(*given)
            else:
                results = node(*given)
            results, edges = results if isinstance(results, tuple) else (results,), node.next_functions
            assert not any(isinstance(one, torch.Tensor) for one in results[len(edges) :])  # of arguments, no tensors
            for gradient, (following, position) in zip(results, edges, strict=False):
                if following is None or gradient is None:
                    continue
                facts = following._input_metadata
                gradient = gradient.sum_to_size(facts[position].shape).to(facts[position].dtype)  # as the engine does
                sums = waiting.setdefault(following, [None] * len(facts))
                sums[position] = gradient if sums[position] is None else sums[position] + gradient
    return [found.get(id(one)) for one in wanted]


def _from_the_end(root: object) -> list[object]:
    """All nodes of a graph, each before those that it hands gradients to."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]
