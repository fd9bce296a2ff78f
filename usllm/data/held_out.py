"""Documents of the training text that are set aside for validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usllm.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# The split is the same for every seed, so that the validation loss of two seeds is of the same documents.
_SPLIT_SEED = 0


def split_documents(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Training and validation: whole documents, so that no sequence of validation continues one of training.

    Args:
        documents: column ``text``.
        fraction: share of them that is set aside, at least one document.

    Raises:
        UserError: the fraction is not between 0 and 1, or there is one document.
    """
    if not 0 < fraction < 1:
        raise UserError(f"data.validation_fraction={fraction} must lie between 0 and 1 where data.validation is null")
    if len(documents) < 2:
        raise UserError(
            "data.train holds one document, which cannot be split; set data.validation, or a "
            "data.train.separator that occurs in the text"
        )
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    parts = documents.train_test_split(test_size=count, seed=_SPLIT_SEED)
    return parts["train"], parts["test"]
