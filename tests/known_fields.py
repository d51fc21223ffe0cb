"""Velocities that are known, in place of estimated ones."""

import torch
from torch import nn

from lumirlib import spatial


class ConstantVelocity(nn.Module):
    """Stands in for a flow estimator with a velocity that is known."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, fixed, moving):
        return self.field(fixed.shape[2:])


def known_velocity(scale):
    def field(shape):
        grid = spatial.identity_grid(shape)
        centre = (torch.tensor(shape) - 1).view(1, 3, 1, 1, 1) / 2
        bump = torch.exp(-((grid - centre) / torch.tensor(shape).view(1, 3, 1, 1, 1) * 3).square().sum(1, True))
        return scale * bump * torch.tensor([1.0, -0.5, 0.25]).view(1, 3, 1, 1, 1)

    return field
