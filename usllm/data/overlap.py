"""Documents that a test set shares with the text of training and calibration, found by their paragraphs.

A perplexity on text that a model was trained on says little. Copies are seldom exact: they differ in case, white space
or where they were cut; so paragraphs are compared, normalised, by their hashes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from usllm.data.identity import texts
from usllm.system.cache import published
from usllm.system.files import expanded, replacing

if TYPE_CHECKING:
    from datasets import Dataset

WARNING_SHARE = 0.01
"""Share of a test set's documents above which a report warns."""
LEAST_CHARACTERS = 40
"""Shorter paragraphs (headings, list entries) are alike by chance and not compared."""
_FORMAT = 1  # part of the cache's names: raise it when the same text is to give other hashes
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class SharedDocuments:
    """How much of a test set is in the text of training and calibration.

    Attributes:
        test_set: its name.
        documents: documents of the test set.
        shared: those of which at least half of the compared paragraphs are in the other text.
    """

    test_set: str
    documents: int
    shared: int

    @property
    def warning(self) -> str | None:
        """A line for a report, where more than ``WARNING_SHARE`` of the documents are shared."""
        if self.shared <= WARNING_SHARE * self.documents:
            return None
        return (
            f"{self.shared:,} of {self.documents:,} documents ({self.shared / self.documents:.1%}) of test set "
            f"{self.test_set} are in the text of training and calibration: its perplexity is not of unseen text"
        )


def paragraph_hashes(documents: Iterable[str]) -> Iterator[list[int]]:
    """For each document the 64-bit hashes of its paragraphs, which blank lines divide.

    Letter case and white space do not count; paragraphs below ``LEAST_CHARACTERS`` are left out.
    """
    for document in documents:
        paragraphs = (" ".join(part.casefold().split()) for part in _BLANK_LINES.split(document))
        yield [
            int.from_bytes(blake2b(paragraph.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
            for paragraph in paragraphs
            if len(paragraph) >= LEAST_CHARACTERS
        ]


def kept_hashes(documents: Dataset, digest: str, cache_dir: Path) -> NDArray[np.uint64]:
    """All paragraph hashes of a text, sorted ``[n]``, from the cache under ``cache_dir/paragraphs`` if they are in it.

    Args:
        documents: column ``text``.
        digest: of their content, which names the entry.
        cache_dir: folder of the cache.
    """

    def build(folder: Path) -> None:
        hashes = (number for row in paragraph_hashes(texts(documents)) for number in row)
        content = io.BytesIO()  # numpy's own writer of files does not say why it could not
        np.save(content, np.unique(np.fromiter(hashes, dtype=np.uint64)))
        with replacing(folder / "hashes.npy") as file:
            file.write(content.getbuffer())

    folder = published(expanded(cache_dir) / "paragraphs" / f"{_FORMAT}-{digest[:32]}", build)
    return np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)


def count_shared(test_set: str, documents: Iterable[str], seen: NDArray[np.uint64]) -> SharedDocuments:
    """Count the documents of a test set that are in a text.

    Args:
        test_set: its name.
        documents: its documents.
        seen: of :func:`kept_hashes`.
    """
    count = shared = 0
    for hashes in paragraph_hashes(documents):
        count += 1
        if hashes and len(seen):
            wanted = np.array(hashes, dtype=np.uint64)
            places = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
            shared += int(2 * (seen[places] == wanted).sum() >= len(hashes))
    return SharedDocuments(test_set, count, shared)
