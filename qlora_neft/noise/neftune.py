"""NEFTune as published: each sequence's embeddings get noise scaled by alpha / sqrt(L * d).

    X'_j = emb(x_j) + alpha / sqrt(L_j * d) * eps_j,   eps_j ~ Uniform(-1, 1)^(L_j x d)

L_j is the sequence's own number of real tokens and d the embedding width (Jain et al. 2023, NEFTune,
Algorithm 1 and its footnote on batches of unequal lengths, arXiv:2310.05914). Padding receives nothing.
eps_j is a function of (seed, optimizer step, ordinal), so that no batch-mate, split, rank, device or restart can change
it. Needs only torch: no transformers, no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..steps.sequences import SequenceSpan
from .streams import normal_draws, uniform_draws

DISTRIBUTIONS = ("uniform", "gaussian", "bernoulli")
SCHEDULES = ("constant", "linear", "cosine")
# Standard deviation of one component of eps: Uniform(-1, 1) has variance 1/3.
UNIT_RMS = {"uniform": 1 / math.sqrt(3), "gaussian": 1.0, "bernoulli": 1.0}


def noise_scale(alpha: float, length: int, width: int) -> float:
    """Return the factor on eps for one sequence: ``alpha / sqrt(length * width)``, length in real tokens."""
    return alpha / math.sqrt(length * width)


def expected_norm(alpha: float, distribution: str) -> float:
    """Return the expected L2 norm of a sequence's noise: alpha / sqrt(3) if uniform, alpha if not."""
    return alpha * UNIT_RMS[distribution]


def alpha_at(step: int, num_steps: int, alpha: float, final_alpha: float | None, schedule: str) -> float:
    """Return the noise strength at optimizer step ``step`` (0-based) of ``num_steps``.

    ``linear`` and ``cosine`` go from ``alpha`` at the first step to ``final_alpha`` at the last. They are ours: the
    paper keeps alpha constant.
    """
    if schedule == "constant" or final_alpha is None:
        return alpha
    # The last step, num_steps - 1, has progress 1; a run of a single step stays at alpha.
    progress = min(step / max(num_steps - 1, 1), 1.0)
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return alpha + (final_alpha - alpha) * progress


def lookup_scale(embedding: nn.Module) -> float:
    """Return the factor that the embedding multiplies its lookup by, 1.0 for most models.

    The Gemma family scales by sqrt(d) inside its embedding module. Noise belongs at the lookup, before that, so
    that alpha means the same for every model; noise on the output must therefore carry the factor.
    """
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, Tensor):  # transformers rounds it to the weight's dtype in its forward
        assert isinstance(embedding.weight, Tensor)
        scale = scale.to(embedding.weight.dtype)
    return float(scale)


@dataclass
class NoiseStatistics:
    """Noise and embedding norms of the sequences measured so far, as device scalars (no synchronization)."""

    noise_norms: list[Tensor] = field(default_factory=list)
    embedding_norms: list[Tensor] = field(default_factory=list)

    def add(self, noise: Tensor, embeds: Tensor, scale: float = 1.0) -> None:
        """Record one sequence: its noise and its clean embeddings, both (L, D), at the lookup (``scale`` undone)."""
        self.noise_norms.append(torch.linalg.vector_norm(noise, dtype=torch.float32) / scale)
        self.embedding_norms.append(torch.linalg.vector_norm(embeds, dtype=torch.float32) / scale)

    def means(self) -> tuple[float, float] | None:
        """Return the mean noise norm and the mean ratio of noise to embedding norm; None if nothing was measured."""
        if not self.noise_norms:
            return None
        noise, embeds = torch.stack(self.noise_norms), torch.stack(self.embedding_norms)
        # The only wait for the device, once per log.
        return noise.mean().item(), (noise / embeds).mean().item()


@dataclass
class NEFTuneNoise:
    """The noise of one micro-batch, as a forward hook on the input embedding.

    Attributes:
        spans: The sequences of the micro-batch; their ordinals count through the whole optimizer step.
        alpha: Noise strength at this step, dimensionless, >= 0.
        seed: Seed of the run.
        step: Optimizer step, 0-based.
        distribution: ``"uniform"`` (the paper), ``"gaussian"`` (its ablation, eps ~ N(0, 1)) or ``"bernoulli"``
            (SymNoise's: -1 or 1 with equal chance).
        sign: 1, or -1 for the same noise mirrored, as SymNoise's second pass adds it.
        scale: See `lookup_scale`.
        statistics: Where to record norms, or None to skip the measurement.
    """

    spans: Sequence[SequenceSpan]
    alpha: float
    seed: int
    step: int
    distribution: str = "uniform"
    sign: float = 1.0
    scale: float = 1.0
    statistics: NoiseStatistics | None = None

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Return ``output`` plus noise, (B, T, D), in its dtype; ``output`` itself is left alone.

        Out of place because under activation checkpointing the embedding's output is a leaf that requires grad.
        Noise is drawn, scaled and added in float32 and rounded once. Calling twice gives the same noise.
        """
        noisy = output.clone()
        for span, noise in self.drawn(output):
            # In place where a view can be had: an index tensor gives a copy. Other dtypes are summed in float32.
            if noisy.dtype == torch.float32 and isinstance(span.tokens, slice):
                noisy[span.row, span.tokens].add_(noise)
            else:
                clean = output[span.row, span.tokens]
                noisy[span.row, span.tokens] = (clean.float() + noise).to(noisy.dtype)
        return noisy

    def drawn(self, output: Tensor) -> Iterator[tuple[SequenceSpan, Tensor]]:
        """Yield each sequence of (B, T, D) embeddings and its noise, (L, D) in float32, valid until the next one."""
        width = output.shape[-1]
        for span, eps in zip(self.spans, self._draws(width, output.device), strict=True):
            # The paper's factor holds at the lookup; the output carries the embedding's own factor as well.
            bound = noise_scale(self.alpha, span.length, width) * self.scale * self.sign
            noise = self._scaled(eps, bound).view(-1, width)
            if self.statistics is not None:
                self.statistics.add(noise, output[span.row, span.tokens].detach(), self.scale)
            yield span, noise

    def _draws(self, width: int, device: torch.device) -> Iterator[Tensor]:
        draws = normal_draws if self.distribution == "gaussian" else uniform_draws
        # 128 bits of key: the seed, then step and ordinal in 32 bits each. No hash, so no two draws collide.
        keys = [(self.seed, (self.step << 32) | span.ordinal) for span in self.spans]
        return draws([span.length * width for span in self.spans], keys, device)

    def _scaled(self, eps: Tensor, bound: float) -> Tensor:
        """Map Uniform[0, 1) to Uniform[-bound, bound) or to -bound and bound, or N(0, 1) to N(0, bound^2), in place."""
        if self.distribution == "gaussian":
            return eps.mul_(bound)
        if self.distribution == "bernoulli":
            eps.ge_(0.5)  # 0 or 1, each for half of the draws
        return eps.mul_(2 * bound).sub_(bound)


@contextmanager
def noisy_embeddings(embedding: nn.Module, noise: Callable[..., Tensor] | None) -> Generator[None, None, None]:
    """Add noise to the output of ``embedding`` inside the block and never outside it, whatever ends the block.

    Args:
        embedding: The model's input embedding, (B, T) ids to (B, T, D).
        noise: A forward hook that adds it, such as `NEFTuneNoise`; None adds nothing and registers nothing.
    """
    if noise is None:
        yield
        return
    # First in line, so that every later hook (input gradients for checkpointing, a user's probe) sees the noise.
    handle = embedding.register_forward_hook(noise, prepend=True)
    try:
        yield
    finally:
        handle.remove()
