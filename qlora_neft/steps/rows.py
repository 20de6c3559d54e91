"""Which rows an optimizer step takes, and which of them belong to this rank.

A step's rows follow from seed, epoch and step alone. Ranks share them out; no row is repeated to even out the ranks
(accelerate's ``even_batches`` would), so that any number of ranks learns the same, also after a resume on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from .batch import GHOST

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Order(Protocol):
    """The order of the rows of an epoch. It may have ``set_epoch(epoch)`` as well, as accelerate's samplers do."""

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...


class StepSampler(Sampler[list[int]]):
    """A batch sampler whose batches are one rank's rows of each optimizer step.

    Args:
        order: Row indices of an epoch, the same on every rank.
        rows_per_step: Rows of a step, of all ranks together.
        rank: This rank, from 0.
        num_ranks: Number of ranks.
        drop_last: Whether an incomplete last step is left out.
        epoch_now: Asked for the epoch whenever an iteration begins; None leaves it to `set_epoch`. Upstream passes the
            epoch to samplers, but transformers 5.15 not to one that was wrapped to skip steps on a resume.
    """

    def __init__(
        self,
        order: Order,
        rows_per_step: int,
        rank: int = 0,
        num_ranks: int = 1,
        *,
        drop_last: bool = False,
        epoch_now: Callable[[], int] | None = None,
    ) -> None:
        self.order, self.rows_per_step, self.rank, self.num_ranks = order, rows_per_step, rank, num_ranks
        self.drop_last, self.epoch_now = drop_last, epoch_now

    def __iter__(self) -> Iterator[list[int]]:
        if self.epoch_now:
            # When an iteration begins, not when the loader is made: one loader serves all epochs.
            self.set_epoch(self.epoch_now())
        return (self._part(rows) for rows in self._steps())

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.rows_per_step)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Use the order of that epoch."""
        set_epoch = getattr(self.order, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def rows_of(self, epoch: int, step: int) -> list[int]:
        """Return the row indices of one step of an epoch, of all ranks."""
        self.set_epoch(epoch)
        return next(islice(self._steps(), step, None), [])

    def _steps(self) -> Iterator[list[int]]:
        indices = iter(self.order)
        # Steps are cut from the order as it is, before ranks divide them: their number cannot change a step.
        while rows := list(islice(indices, self.rows_per_step)):
            if len(rows) == self.rows_per_step or not self.drop_last:
                yield rows

    def _part(self, rows: list[int]) -> list[int]:
        # Contiguous shares whose sizes differ by one row at most.
        begin, end = (len(rows) * rank // self.num_ranks for rank in (self.rank, self.rank + 1))
        # Fewer rows than ranks leave some ranks without one: ~i marks row i as a ghost.
        return rows[begin:end] or [~rows[0]]


class StepRows(Dataset[Mapping[str, Any]]):
    """The rows of a dataset; index ~i yields row i as a ghost, which trains nothing.

    Args:
        dataset: Has a length; its rows are mappings.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        # A copy: the dataset may hand out the same row, unmarked, to others.
        return {**self.dataset[~index], GHOST: True} if index < 0 else self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Return several rows at once, which is how `datasets` is fastest."""
        # A negative index would mean a row counted from the end to the dataset itself.
        if not hasattr(self.dataset, "__getitems__") or any(index < 0 for index in indices):
            return [self[index] for index in indices]
        return self.dataset.__getitems__(list(indices))


class StepLoader(DataLoader):
    """A dataloader over `StepSampler` that can be told the epoch, as accelerate's can."""

    def set_epoch(self, epoch: int) -> None:
        """Use the order of that epoch."""
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)


def step_order(sampler: Any, dataset: Any, args: TrainingArguments) -> Order:
    """Replace torch's random order of rows by accelerate's, which follows from seed and epoch alone.

    Args:
        sampler: Upstream's choice; any but a plain random one is kept.
        dataset: The rows it orders.
        args: With ``seed`` and ``data_seed``.
    """
    # Exactly this type: a subclass has an order of its own.
    if type(sampler) is not RandomSampler:
        return sampler
    seed = args.seed if args.data_seed is None else args.data_seed
    return SeedableRandomSampler(dataset, data_seed=seed)


def step_loader(rows: StepRows, steps: StepSampler, collator: Any, args: TrainingArguments) -> StepLoader:
    """Return the dataloader of optimizer steps, with upstream's worker settings.

    It is not prepared by accelerate, which would share the steps out once more; a `StepBatch` goes to the device one
    micro-batch at a time.
    """
    return StepLoader(
        rows,
        batch_sampler=steps,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
