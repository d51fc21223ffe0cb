"""Digest of a method, so that its partial results are never taken for those of another."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lumirlib import provenance
from lumirlib.evaluation import Method

#: Attributes that a method changes while it works.
DIARY = ("last_run", "training")
#: Those of every module: its tensors and modules, which are taken in their own way, and hooks.
INNER = frozenset(vars(nn.Module()))

PLAIN = (bool, int, float, complex, str, bytes, Enum, Path, np.generic, torch.dtype, type(None))


def method_digest(method: Method) -> str:
    """16 hexadecimal digits of a method's kind, options and weights, and of this package's code.

    Another digest means another method. The same digest means the same method, but for what a function has in lists and
    dictionaries of the scope around it, which it may fill while it works.

    Args:
        method: Function ``method(fixed, moving) -> displacement``: a network, a row, a function, or any object that is
            called.
    """
    content = hashlib.sha256(provenance.source_digest().encode())
    for part in _parts(method, {}):
        content.update(len(part).to_bytes(8, "little") + part)
    return content.hexdigest()[:16]


def _parts(value: object, seen: dict[int, object]) -> Iterator[bytes]:
    """What tells a value from others, depth first."""
    if isinstance(value, PLAIN):
        yield f"{type(value).__qualname__} {value!r}".encode()
        return
    if isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that no other takes its number
    yield from _parts(type(value), seen)
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _parts(key, seen)
            yield from _parts(one, seen)
    elif isinstance(value, (set, frozenset)):
        yield from _parts(sorted(map(repr, value)), seen)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _parts(one, seen)
    elif isinstance(value, functools.partial):
        yield from _parts([value.func, value.args, value.keywords], seen)
    elif isinstance(value, types.MethodType):
        yield from _parts([value.__func__, value.__self__], seen)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        yield from _parts([value.__code__, value.__defaults__, value.__kwdefaults__], seen)
        for cell in value.__closure__ or ():
            if not isinstance(cell.cell_contents, (list, dict, set)):
                yield from _parts(cell.cell_contents, seen)
    elif isinstance(value, types.CodeType):
        yield value.co_code
        yield from _parts([value.co_names, value.co_consts], seen)
    elif isinstance(value, nn.Module):
        yield from _parts(dict(value.state_dict()), seen)
        for name, module in value.named_modules():
            options = {key: one for key, one in vars(module).items() if key not in INNER and key not in DIARY}
            yield from _parts([name, type(module), options], seen)
    else:
        yield from _parts({key: one for key, one in getattr(value, "__dict__", {}).items() if key not in DIARY}, seen)
