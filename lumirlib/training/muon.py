"""MUON: an optimizer that orthogonalizes the steps of the convolutions' kernels.

Of "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., kellerjordan.github.io/posts/muon, 2024),
with the step size of "Muon is scalable for LLM training" (Liu et al., arXiv 2502.16982). torch.optim.Muon (torch 2.9
and later) takes matrices alone and computes in bfloat16; tests compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.optim.adam import adam

#: Coefficients of the odd polynomial ax + bx³ + cx⁵ that brings singular values near 1, and how often it is applied.
POLYNOMIAL, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

MOMENTUM = 0.95
#: Root mean square of Adam's usual step at learning rate 1, which the orthogonalized ones get too.
ADAM_STEP = 0.2


BETAS, EPSILON = (0.9, 0.999), 1e-8
#: Outputs of a convolution that predicts velocities. As all last layers with Muon it is left to Adam.
FLOW_CHANNELS = 3
#: What is kept of an orthogonalized parameter.
MUON_STATE = frozenset({"momentum_buffer"})


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors and singular values between about 0.7 and 1.2 (Newton-Schulz iteration).

    Args:
        matrix: Matrix ``(m, n)``; singular values below about a thousandth of its norm come out smaller.

    Returns:
        Likewise; zero where `matrix` is.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide / wide.norm().clamp_min(1e-30)
    first, third, fifth = POLYNOMIAL
    for _ in range(ITERATIONS):
        square = found @ found.T
        found = first * found + (third * square + fifth * square @ square) @ found
    return found if wide is matrix else found.T


class Muon(torch.optim.Optimizer):
    """Muon for the kernels of convolutions and for matrices, Adam for biases, other vectors and flow heads.

    A kernel ``(outputs, inputs, ...)`` counts as a matrix of `outputs` rows. Its step is the Nesterov momentum of the
    gradients, orthogonalized, with a root mean square of about :data:`ADAM_STEP` times the learning rate, so that rates
    for Adam can be kept.

    Args:
        parameters: Parameters of a network.
        lr: Learning rate of both, above 0.
        amsgrad: Whether Adam is run in its AMSGrad form.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, amsgrad: bool = False) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        kernels, others = [], []
        for parameter in parameters:
            is_kernel = parameter.ndim >= 2 and parameter.shape[0] > FLOW_CHANNELS
            (kernels if is_kernel else others).append(parameter)
        groups = [{"params": kernels, "orthogonalized": True}, {"params": others, "orthogonalized": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "amsgrad": amsgrad})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step along the gradients; parameters without one stay. Gives the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["orthogonalized"]:
                for parameter in moving:
                    self._muon(parameter, group["lr"])
            elif moving:
                self._adam(moving, group["lr"], group["amsgrad"])
        return loss

    def _muon(self, parameter: torch.Tensor, rate: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        step = orthogonalize(gradient.lerp(momentum, MOMENTUM).flatten(1))
        size = ADAM_STEP * max(step.shape) ** 0.5  # an orthogonal matrix has a mean square of 1 / its longer side
        parameter.add_(step.reshape(parameter.shape), alpha=-rate * size)

    def _adam(self, parameters: list[torch.Tensor], rate: float, amsgrad: bool) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad):
                    state[name] = torch.zeros_like(parameter)
        kept = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        largest = [state["max_exp_avg_sq"] for state in states if amsgrad]
        adam(
            parameters,
            [parameter.grad for parameter in parameters],
            *kept,
            largest,
            [state["step"] for state in states],
            amsgrad=amsgrad,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
