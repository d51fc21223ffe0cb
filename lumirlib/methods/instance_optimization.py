"""Instance optimization (IO): what a network predicts for a pair is improved on that pair, without any label.

After Balakrishnan et al. (VoxelMorph, IEEE TMI 38(8), 2019), who start a descent on a pair's own field at the network's
prediction, and uniGradICON (Tian et al., MICCAI 2024). Here the velocities of all levels are optimized, with the
objective that the network was trained with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from lumirlib._checks import check_finite, check_image
from lumirlib.models.backbone import Fields, RegistrationNetwork

#: Fields, fixed image and moving image -> scalars, "total" among them.
Objective = Callable[[Fields, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


class InstanceOptimization(nn.Module):
    """A trained network with instance optimization behind it: ``method(fixed, moving) -> displacement``.

    Adam starts at the velocities that the network predicts at every level; all that follows them (integration, cascade,
    bilateral filter) is as in the network. The displacement of the smallest loss met is taken, so it is never worse
    than the network's by the objective. It ends after `steps` steps, or as soon as the smallest loss has fallen by less
    than `tolerance` of itself within `patience` steps. The weights of the network stay as they are.

    Args:
        model: Trained network.
        objective: Function that is minimized.
        steps: Largest number of Adam's steps, from 1.
        learning_rate: Learning rate of Adam, in voxels of each level; shared among the passes of a level, whose fields
            add up.
        tolerance: Smallest relative fall of the loss that counts, from 0.
        patience: Patience in steps, from 1.

    Attributes:
        last_run: Figures of the last call: "optimization_steps", "optimization_seconds" (without those of the network's
            own prediction), and "optimization_loss_before" and "optimization_loss_after".

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        model: RegistrationNetwork,
        objective: Objective,
        steps: int = 50,
        learning_rate: float = 0.03,
        tolerance: float = 1e-3,
        patience: int = 5,
    ) -> None:
        super().__init__()
        check_options(steps, learning_rate, tolerance, patience)
        self.model, self.objective = model, objective
        self.steps, self.learning_rate, self.tolerance, self.patience = steps, learning_rate, tolerance, patience
        self.last_run: dict[str, float] = {}

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Displacement ``(B, 3, D, H, W)`` in voxels that carries `moving` onto `fixed`; takes no gradient.

        Args:
            fixed: Fixed image ``(B, 1, D, H, W)``, intensities in [0, 1].
            moving: Moving image ``(B, 1, D, H, W)``, same shape.

        Raises:
            TypeError, ValueError: as :meth:`RegistrationNetwork.fields`, and for voxels that are not finite.
            FloatingPointError: the objective of the network's own prediction is not finite.
        """
        for image, name in ((fixed, "fixed"), (moving, "moving")):
            check_image(image, name, channels=1)
            check_finite(image, name)
        with torch.no_grad():
            velocities = self.model.fields(fixed, moving).velocities
        if fixed.device.type == "cuda":
            torch.cuda.synchronize(fixed.device)
        started = time.perf_counter()
        # callers register without gradients
        with torch.inference_mode(False), torch.enable_grad():
            fixed, moving = (image.clone() if image.is_inference() else image for image in (fixed, moving))
            velocities = [velocity.detach().clone().requires_grad_() for velocity in velocities]
            displacement, losses = self._descend(velocities, fixed, moving)
        self.last_run = {
            "optimization_steps": len(losses) - 1,
            "optimization_seconds": time.perf_counter() - started,
            "optimization_loss_before": losses[0],
            "optimization_loss_after": min(losses),
        }
        return displacement

    def _descend(
        self, velocities: list[torch.Tensor], fixed: torch.Tensor, moving: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        """The best displacement, and the loss before each step and after the last one."""
        optimizer = torch.optim.Adam(velocities, lr=self.learning_rate / self.model.passes)
        losses: list[float] = []
        kept: list[torch.Tensor] = []
        while True:
            displacements = self.model.displacements(velocities, fixed)
            total = self.objective(Fields(displacements, velocities), fixed, moving)["total"]
            loss = float(total.detach())
            if not math.isfinite(loss):
                if not losses:
                    raise FloatingPointError(f"the objective of the network's prediction must be finite, got {loss}")
                return kept[0], losses
            losses.append(loss)
            if loss == min(losses):
                kept = [displacements[0].detach()]
            if len(losses) > self.steps or self._has_settled(losses):
                return kept[0], losses
            for velocity, gradient in zip(velocities, torch.autograd.grad(total, velocities), strict=True):
                velocity.grad = gradient
            optimizer.step()

    def _has_settled(self, losses: list[float]) -> bool:
        if len(losses) <= self.patience:
            return False
        before = min(losses[: -self.patience])
        return before - min(losses) < self.tolerance * abs(before)


def check_options(steps: int, learning_rate: float, tolerance: float, patience: int) -> None:
    """Raise ValueError unless these can be options of :class:`InstanceOptimization`."""
    for name, value, least in (("instance_steps", steps, 1), ("instance_patience", patience, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"instance_learning_rate must be above 0, got {learning_rate}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"instance_tolerance must be from 0 to below 1, got {tolerance}")
