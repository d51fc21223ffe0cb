"""Where and how a run is computed: device, precision, number of processes. Nothing here names a run.

Lightning Fabric does the work: it is PyTorch with the differences between one process and many taken out, and unlike
Accelerate it neither asks for a configuration file nor owns the loop. Processes are started by `torchrun`, on one
machine or several:

    torchrun --nproc-per-node 4 -m lumirlib run LC-2 --preset paper --set batch_size=4 ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lumirlib._checks import check_choice
from lumirlib.models.layers import compile_model
from lumirlib.provenance import describe_device

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = ("auto", "32-true", "bf16-mixed")

CACHES = ("auto", "on", "off")


Item = TypeVar("Item")


def launched() -> bool:
    """Whether `torchrun` started this process."""
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def pick_device(device: str = "auto") -> torch.device:
    """The device of a name; "auto" is the GPU where there is one, under `torchrun` each process's own.

    Raises:
        ValueError: one that cannot be had.
    """
    if device in ("auto", "cuda") and torch.cuda.is_available():
        index = int(os.environ["LOCAL_RANK"]) if launched() else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device must be cpu, or the number of processes at most that of the GPUs: process {index} of "
                f"{os.environ.get('LOCAL_WORLD_SIZE', 1)} on this machine has none of its {torch.cuda.device_count()}"
            )
        return torch.device("cuda", index)
    if device == "auto":
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that it lacks
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {device!r}: {error}") from error
    return chosen


def as_arguments(parameters: Mapping[str, object]) -> list[str]:
    """Arguments of :class:`Engine` as those of a command line."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in parameters.items()]


@dataclass(frozen=True)
class Engine:
    """How a run is computed. The same run on another engine has the same name, and goes on from its checkpoints.

    Attributes:
        device: Device's name: "auto", "cpu", "cuda", "cuda:1" ...
        precision: Name of the precision: "32-true", float32 throughout; "bf16-mixed", convolutions in bfloat16 while
            weights, integration, warping and losses stay float32; "auto", the latter on GPUs that have bfloat16, else
            the former.
        processes: Number of processes that share each batch; more than one are started by torchrun, see
            :meth:`lumirlib.study.run.Run.train`.
        compile: Whether the network is compiled with ``torch.compile``.
        checkpointing: Whether activations are recomputed in the backward pass instead of kept.
        cache: Use of a cache of the volumes on disk (:mod:`lumirlib.data.cache`), made first: "on", "off", or "auto",
            where a cohort's scans exceed the memory that it may take.
        readers: Number of threads that read ahead.
        deterministic: Whether algorithms are avoided whose result depends on the order in which threads come: see
            :meth:`reproducibly`.
    """

    device: str = "auto"
    precision: str = "auto"
    processes: int = 1
    compile: bool = False
    checkpointing: bool = False
    cache: str = "auto"
    readers: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_choice(self.precision, PRECISIONS, "precision")
        check_choice(self.cache, CACHES, "cache")
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic must be true or false, got {self.deterministic!r}")
        for name in ("processes", "readers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if launched() and self.processes != 1:
            raise ValueError(f"processes must be left out under torchrun, which gives it, got {self.processes}")
        if not launched() and int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
            raise ValueError(
                f"{os.environ['SLURM_NTASKS']} tasks of Slurm would each train the same run: start one task per node, "
                "and in it torchrun"
            )
        self.target  # noqa: B018 (a device that cannot be had is said now)

    @cached_property
    def target(self) -> torch.device:
        """The device of this process."""
        return pick_device(self.device)

    @cached_property
    def chosen_precision(self) -> str:
        """The precision that "auto" stands for."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self.target.type == "cuda" and torch.cuda.is_bf16_supported(False) else "32-true"

    @property
    def rank(self) -> int:
        """Number of this process among all, from 0."""
        return int(os.environ["RANK"]) if launched() else 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def world_size(self) -> int:
        """Processes that train together with this one."""
        return int(os.environ["WORLD_SIZE"]) if launched() else 1

    @cached_property
    def fabric(self) -> Fabric:
        """Fabric for this process; the first use joins it to the others."""
        # imports torch._dynamo, which takes as long as a fifth of all other imports: only training waits for it
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

        target = self.target
        local = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
        fabric = Fabric(
            accelerator=target.type,
            devices=[target.index] if target.type == "cuda" and not launched() else local,
            num_nodes=self.world_size // local,
            strategy="ddp" if launched() else "auto",
            precision=self.chosen_precision,
            # Fabric would take a Slurm allocation for a request to start processes
            plugins=TorchElasticEnvironment() if launched() else LightningEnvironment(),
        )
        if launched():
            fabric.launch()
        return fabric

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Network and optimizer as they are to be called in training; the given ones keep the weights and the state.

        Args:
            model: Network on this engine's device.
            optimizer: Optimizer of the network's parameters.

        Raises:
            ValueError: a network that cannot recompute its activations, where that is wanted.
        """
        if self.checkpointing:
            if not hasattr(model, "checkpointing"):
                raise ValueError(f"checkpointing must be off: {type(model).__name__} cannot recompute its activations")
            model.checkpointing = True
        if self.compile:
            compile_model(model)
        model, optimizer = self.fabric.setup(model, optimizer, move_to_device=False)
        if hasattr(model.module, "fields"):
            model.mark_forward_method("fields")
        return model, optimizer

    def gather(self, own: list[Item]) -> list[Item]:
        """Items of all processes, where each has every n-th of them, beginning with its rank, in their order."""
        if self.world_size == 1:
            return own
        parts: list[list[Item]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(parts, own)
        return [
            parts[position % len(parts)][position // len(parts)] for position in range(sum(len(part) for part in parts))
        ]

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.world_size == 1:
            return numbers
        return self.fabric.all_reduce(
            torch.tensor(numbers, dtype=torch.float64, device=self.target), reduce_op="sum"
        ).tolist()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """What is inside is done by the first process while the others wait, and then by them."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    @contextmanager
    def reproducibly(self) -> Iterator[None]:
        """What is inside gives the same bits again, as far as the device can, where the engine is `deterministic`.

        On CPUs that is wholly so on one machine, with the same versions and number of threads (`OMP_NUM_THREADS`):
        PyTorch raises for what it cannot promise. On GPUs the gradients of sampling and of trilinear resizing are sums
        by atomic additions, in no fixed order: PyTorch warns of each, and results differ in their last digits.
        """
        if not self.deterministic:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True, warn_only=self.target.type != "cpu")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn

    def as_parameters(self) -> dict[str, object]:
        """What differs from the defaults, as parameters of a notebook."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    def as_arguments(self) -> list[str]:
        """What differs from the defaults, but for the processes, as arguments of `lumirlib run`."""
        return as_arguments({name: value for name, value in self.as_parameters().items() if name != "processes"})

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.world_size > 1:
            self.fabric.barrier()

    def describe(self) -> str:
        """Device, precision and processes in words, for provenance."""
        words = [describe_device(self.target)]
        if self.world_size > 1:
            words[0] = f"{self.world_size} processes, each {words[0]}"
        words += [self.chosen_precision] if self.chosen_precision != "32-true" else []
        words += ["compiled"] if self.compile else []
        words += ["deterministic"] if self.deterministic else []
        return ", ".join(words)
