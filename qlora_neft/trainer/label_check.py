"""A look at the labels of the first step, whoever made them: is anything learned, and is the end learned?"""

from __future__ import annotations

from typing import Any

from ..errors import UserInputError
from ..steps.batch import IGNORE_INDEX, StepBatch


def check_labels(step: StepBatch, tokenizer: Any) -> None:
    """See that a step trains something, and that its end tokens are not masked as padding.

    A collator that masks every pad token (transformers' ``DataCollatorForLanguageModeling``) masks the end token as
    well where the two are one; a model so trained never stops.

    Args:
        step: The first step, collated.
        tokenizer: With ``pad_token_id`` and ``eos_token_id``.

    Raises:
        UserInputError: If there is no label at all, or pad is the end token and no end token has a label.
    """
    if step.num_trained_tokens() == 0:
        raise UserInputError(
            "train_dataset: the first optimizer step has no label, so nothing would be learned. Look at the labels: "
            "all are -100, or every response lies behind max_length."
        )
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or getattr(tokenizer, "pad_token_id", None) != end:
        return
    if any(_ends(micro.inputs, end) for micro in step) and not any(_trained_ends(m.inputs, end) for m in step):
        raise UserInputError(
            "data_collator: pad token and end token are one, and the collator masks both: the model would never learn "
            "to stop. Give the tokenizer another pad token, or leave data_collator to the trainer."
        )


def _ends(inputs: dict[str, Any], end: int) -> int:
    """End tokens that are no padding, the first token of a row left aside: it may be a begin token as well."""
    found = inputs["input_ids"].eq(end)
    if inputs.get("attention_mask") is not None and inputs["attention_mask"].shape == found.shape:
        found = found & inputs["attention_mask"].bool()
    return int(found[..., 1:].sum())


def _trained_ends(inputs: dict[str, Any], end: int) -> int:
    labels = inputs["labels"]
    return int((labels.eq(end) & labels.ne(IGNORE_INDEX))[..., 1:].sum())
