"""A packed folder that vLLM is about to read: refused by the checks of ``usllm.load``, or known well enough."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from usllm.packed.block_layers import BlockEmbedding
from usllm.packed.folder import open_folder
from usllm.packed.loading import check_against_model
from usllm.packed.quantizer import is_finite
from usllm.system.errors import PackedFormatError


@dataclass(frozen=True)
class ServedFolder:
    """What the weights alone do not tell of a model.

    Attributes:
        path: Of the folder.
        embedding: Name of the input embedding where it is stored in blocks: vLLM asks for it without a name.
        head: Name of the head's matrix where it is stored in blocks: the embedding's, if they are tied.
    """

    path: Path
    embedding: str | None
    head: str | None


def checked_folder(path: Path) -> ServedFolder:
    """Check all of a folder but the layers' bytes, which are read and checked when vLLM has loaded them.

    Raises:
        PackedFormatError: A file is missing or damaged; the message begins with the tensor's or file's name.
    """
    folder = open_folder(path)
    skeleton = check_against_model(folder)
    folder.check_tensors()
    with folder.reading() as tensors:
        for name, stored in folder.tensors.items():
            if stored.dtype != "U8" and not is_finite(tensors[name]):
                raise PackedFormatError(f"{name}: holds numbers that are not finite")
    embedding = next((name for name, part in skeleton.named_modules() if isinstance(part, BlockEmbedding)), None)
    head = next((name for name, part in skeleton.named_modules() if part is skeleton.get_output_embeddings()), None)
    if embedding is not None and skeleton.config.get_text_config().tie_word_embeddings:
        head = embedding
    return ServedFolder(path, embedding, head if head in folder.packed.blocks else None)
