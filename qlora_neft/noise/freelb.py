"""FreeLB: noise that climbs the loss, an alternative to noise that is merely drawn.

Zhu et al. 2020 (FreeLB, Algorithm 1, arXiv:1909.11764), which the NEFTune paper compares with (Table 12). A step makes
K forward and backward passes; the mean of their gradients is its gradient. The first pass adds NEFTune's noise. Each
later one adds the noise of the pass before it, moved up the loss by a step of fixed length and projected back into the
ball of radius alpha, sequence by sequence. With K = 1 it is NEFTune.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .neftune import NEFTuneNoise


class Perturbation:
    """The noise of one micro-batch through the passes of a step, as a forward hook on the input embedding.

    Args:
        noise: What the first pass adds; its alpha is the radius of each sequence's ball, in L2 norm at the lookup.
        step_size: Length of one ascent step, in the same unit.
    """

    def __init__(self, noise: NEFTuneNoise, step_size: float) -> None:
        self.noise, self.step_size = noise, step_size
        self.delta: Tensor | None = None  # (B, T, D), float32; zero on padding

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Return ``output`` plus the perturbation, (B, T, D), added in float32 and rounded once."""
        if self.delta is None:
            self.delta = self._drawn(output.detach()).requires_grad_()
        return (output.float() + self.delta).to(output.dtype)

    @torch.no_grad()
    def ascend(self) -> None:
        """Move every sequence's noise along its gradient; one without a finite gradient stays where it is."""
        assert self.delta is not None and self.delta.grad is not None, "a pass forward and backward comes first"
        # Radius and step are meant at the lookup; the hook sees the output, which carries the embedding's `scale`.
        delta, grad, scale = self.delta.detach().clone(), self.delta.grad, self.noise.scale
        for span in self.noise.spans:
            place = span.row, span.tokens
            moved = delta[place] + self.step_size * scale * _direction(grad[place])  # (L, D)
            # Projection: shrink what left the ball (clamp_max), and do not divide by zero (clamp_min).
            delta[place] = moved * (self.noise.alpha * scale / _norm(moved).clamp_min(1e-12)).clamp_max(1.0)
        # A new leaf, so that the next backward pass leaves its gradient here and adds to no old one.
        self.delta = delta.requires_grad_()

    def norms(self) -> list[Tensor]:
        """Return the L2 norm of each sequence's noise at the lookup, as device scalars."""
        assert self.delta is not None, "a forward pass comes first"
        delta = self.delta.detach()
        return [_norm(delta[span.row, span.tokens]) / self.noise.scale for span in self.noise.spans]

    def _drawn(self, output: Tensor) -> Tensor:
        delta = torch.zeros(output.shape, dtype=torch.float32, device=output.device)  # (B, T, D)
        for span, noise in self.noise.drawn(output):
            delta[span.row, span.tokens] = noise
        return delta


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float32)


def _direction(grad: Tensor) -> Tensor:
    """Return the gradient at length 1; zero if it is zero or not finite."""
    norm = _norm(grad)
    usable = torch.isfinite(norm) & (norm > 0)
    # By `where` and not `if`: reading the norm would make the host wait for the device.
    return torch.where(usable, grad / norm, torch.zeros_like(grad))
