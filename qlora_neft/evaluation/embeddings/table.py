"""A table of embeddings, equal rows held once, and the nearest other row to a point; in blocks, in bounded memory."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...errors import UserInputError

POINTS_AT_ONCE = 1024  # with the next: 32 MiB of scores
ROWS_AT_ONCE = 8192


class EmbeddingTable:
    """The rows of an embedding, and which token has which.

    Tokens of equal embeddings share a row: noise cannot turn one into the other, for they never differed.

    Args:
        weight: (V, D), any floating-point dtype; kept as it is, computed with in float32.
        device: Where to compute.

    Attributes:
        rows: The distinct embeddings (R, D), R <= V.
        row_of_token: (V,), int64.
        first_token: The smallest token id that has each row (R,), int64, on the CPU.

    Raises:
        UserInputError: If it holds NaN or infinity, or fewer than two distinct rows.
    """

    def __init__(self, weight: Tensor, device: torch.device | str = "cpu") -> None:
        if not all(bool(block.isfinite().all()) for block in weight.split(ROWS_AT_ONCE)):
            raise UserInputError("the embedding holds NaN or infinity. Start from a sound checkpoint.")
        row_of_token, firsts = _distinct(weight)
        if len(firsts) < 2:
            raise UserInputError(f"the embedding must hold two different rows or more, got {len(firsts)}.")
        rows = weight if len(firsts) == len(weight) else weight[torch.tensor(firsts)]
        self.rows, self.row_of_token = rows.to(device), row_of_token.to(device)
        self.first_token = torch.tensor(firsts)
        self._squares = torch.cat([_squares(block.float()) for block in self.rows.split(ROWS_AT_ONCE)])

    @property
    def vocabulary(self) -> int:
        """V, rows of the embedding as it is stored."""
        return len(self.row_of_token)

    @property
    def width(self) -> int:
        """D."""
        return self.rows.shape[1]

    def of_rows(self, rows: Tensor) -> Tensor:
        """Embeddings (N, D) of rows (N,), float32."""
        return self.rows[rows].float()

    def nearest_other(self, points: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The row nearest to each point, by Euclidean distance, its own left out.

        Args:
            points: (N, D), float32.
            own: Rows (N,) that do not count.

        Returns:
            Rows (N,), and squared distances (N,) as float32 products give them: see `rounding`.
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
            # |x - e|^2 - |x|^2 = |e|^2 - 2 x.e
            scores = torch.addmm(self._squares[start : start + len(block)], points, block.T, alpha=-2)
            inside = ((own >= start) & (own < start + len(block))).nonzero().flatten()
            scores[inside, own[inside] - start] = torch.inf
            smallest, where = scores.min(dim=1)
            closer = smallest < best
            best = torch.where(closer, smallest, best)
            nearest = torch.where(closer, where + start, nearest)
        return nearest, (best + _squares(points)).clamp_(min=0)

    def gaps(self, rows: Tensor) -> Tensor:
        """A lower bound (N,) on the distance of each row (N,) to the nearest other one; float32."""
        bounds = []
        for part in rows.split(POINTS_AT_ONCE):
            _, squares = self.nearest_other(self.of_rows(part), part)
            bounds.append((squares - self.rounding(self._squares[part])).clamp_(min=0).sqrt())
        return torch.cat(bounds)

    def rounding(self, squares: Tensor) -> Tensor:
        """How far `nearest_other` may be off for points of these squared norms (N,): products of D terms in float32."""
        return 1e-5 * (squares + self._squares.max())


def _squares(block: Tensor) -> Tensor:
    return block.square().sum(dim=1)


def _distinct(weight: Tensor) -> tuple[Tensor, list[int]]:
    """The distinct row of each token, numbered by first occurrence, and the token each occurred at first."""
    numbers: dict[bytes, int] = {}
    row_of_token, firsts = [], []
    for start in range(0, len(weight), ROWS_AT_ONCE):
        # + 0.0: a negative zero equals zero
        block = (weight[start : start + ROWS_AT_ONCE] + 0.0).contiguous().view(torch.uint8).numpy()
        for offset, row in enumerate(block):
            number = numbers.setdefault(hashlib.blake2b(row, digest_size=16).digest(), len(numbers))
            if number == len(firsts):
                firsts.append(start + offset)
            row_of_token.append(number)
    return torch.tensor(row_of_token), firsts
