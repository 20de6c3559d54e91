"""A table of embeddings that holds equal rows once and finds the row nearest to a point, in bounded memory."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...errors import UserInputError

POINTS_AT_ONCE, ROWS_AT_ONCE = 1024, 8192  # their scores take 32 MiB


class EmbeddingTable:
    """The rows of an embedding, and which token has which.

    Tokens with equal embeddings share a row: noise cannot turn one into the other, since they never differed.

    Args:
        weight: (V, D), any floating-point dtype; stored as it is, computed with in float32.
        device: Where to compute.

    Attributes:
        rows: The distinct embeddings (R, D), R <= V.
        row_of_token: (V,), int64.
        first_token: The smallest token id that has each row (R,), int64, on the CPU.

    Raises:
        UserInputError: If it holds NaN or infinity, or fewer than two distinct rows.
    """

    def __init__(self, weight: Tensor, device: torch.device | str = "cpu") -> None:
        # By blocks throughout: a float32 copy of the whole embedding may not fit beside it.
        if not all(bool(block.isfinite().all()) for block in weight.split(ROWS_AT_ONCE)):
            raise UserInputError("the embedding holds NaN or infinity. Use an undamaged checkpoint.")
        row_of_token, firsts = _distinct(weight)
        if len(firsts) < 2:
            raise UserInputError(f"the embedding must have at least two different rows, got {len(firsts)}.")
        # (R, D); without repeats no copy is made.
        rows = weight if len(firsts) == len(weight) else weight[torch.tensor(firsts)]
        self.rows, self.row_of_token = rows.to(device), row_of_token.to(device)
        self.first_token = torch.tensor(firsts)
        # (R,), squared norms: every search needs them.
        self._squares = torch.cat([_squares(block.float()) for block in self.rows.split(ROWS_AT_ONCE)])

    @property
    def vocabulary(self) -> int:
        """V, the rows of the embedding as stored."""
        return len(self.row_of_token)

    @property
    def width(self) -> int:
        """D, the size of an embedding."""
        return self.rows.shape[1]

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the embeddings (N, D) of rows (N,), float32."""
        return self.rows[rows].float()

    def nearest_other(self, points: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Find the row nearest to each point by Euclidean distance, its own row excluded.

        Args:
            points: (N, D), float32.
            own: Each point's own row, (N,).

        Returns:
            Rows (N,), and squared distances (N,), rounded as `rounding` says.
        """
        found = [
            self._nearest(*pair) for pair in zip(points.split(POINTS_AT_ONCE), own.split(POINTS_AT_ONCE), strict=True)
        ]
        return torch.cat([rows for rows, _ in found]), torch.cat([squares for _, squares in found])

    def _nearest(self, points: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.full((len(points),), torch.inf, device=points.device)
        nearest = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            block = self.rows[start : start + ROWS_AT_ONCE].float()
            # |x - e|^2 - |x|^2 = |e|^2 - 2 x.e, (N, R_block): one matrix product; |x|^2 moves no minimum
            scores = torch.addmm(self._squares[start : start + len(block)], points, block.T, alpha=-2)
            # A point's own row is usually the nearest: take it out of the race.
            inside = ((own >= start) & (own < start + len(block))).nonzero().flatten()
            scores[inside, own[inside] - start] = torch.inf
            smallest, where = scores.min(dim=1)
            closer = smallest < best
            best = torch.where(closer, smallest, best)
            nearest = torch.where(closer, where + start, nearest)
        return nearest, (best + _squares(points)).clamp_(min=0)  # rounding can make it negative

    def gaps(self, rows: Tensor) -> Tensor:
        """Return a lower bound (N,) on the distance of each row (N,) to the nearest other row, float32."""
        bounds = []
        for part in rows.split(POINTS_AT_ONCE):
            _, squares = self.nearest_other(self.of_rows(part), part)
            bounds.append((squares - self.rounding(self._squares[part])).clamp_(min=0).sqrt())
        return torch.cat(bounds)

    def rounding(self, squares: Tensor) -> Tensor:
        """Return how far `nearest_other` may be off for points of these squared norms (N,).

        It sums products of D terms in float32.
        """
        # 1e-5 is 84 times float32's epsilon; rounding in a sum of D terms grows like sqrt(D).
        return 1e-5 * (squares + self._squares.max())


def _squares(block: Tensor) -> Tensor:
    return block.square().sum(dim=1)


def _distinct(weight: Tensor) -> tuple[Tensor, list[int]]:
    """Return the distinct row of each token, numbered by first occurrence, and the first token of each row."""
    numbers: dict[bytes, int] = {}
    row_of_token, firsts = [], []
    for start in range(0, len(weight), ROWS_AT_ONCE):
        # + 0.0 turns a negative zero into zero, which has other bytes but the same value
        block = (weight[start : start + ROWS_AT_ONCE] + 0.0).contiguous().view(torch.uint8).numpy()
        for offset, row in enumerate(block):
            # 16 bytes of hash instead of D numbers as a key: a vocabulary of 256,000 would fill the memory twice.
            number = numbers.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(numbers))
            if number == len(firsts):
                firsts.append(start + offset)
            row_of_token.append(number)
    return torch.tensor(row_of_token), firsts
