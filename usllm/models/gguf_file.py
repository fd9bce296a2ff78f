"""GGUF files: read, checked, and decoded once into a folder that transformers loads at once.

Decoding goes through transformers in fp32, which keeps every value exactly (Q4_1 is ``d·q + m`` with fp16 ``d`` and
``m``, which bf16 could not hold), and every value is compared with what the ``gguf`` package reads. It takes about 45 s
for 135 million weights, mostly for the tokenizer's lists, so the result is cached under the file's content hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

import torch
from transformers import GenerationConfig

from usllm.models.gguf_contents import read_contents
from usllm.models.gguf_families import configuration_of
from usllm.models.gguf_rope import check_rope
from usllm.models.gguf_tensors import check_tensors, check_values
from usllm.models.gguf_tokenizer import check_tokenizer, end_tokens, tokenizer_of
from usllm.system.cache import cache_root, published
from usllm.system.errors import UserError, first_line

_READING = 2
"""Counts the changes of what a decoded folder holds, so that older ones in the cache are not used."""


def decoded_folder(path: Path) -> Path:
    """Folder with the fp32 weights, configuration and tokenizer of a GGUF file, made at the first call.

    Whatever the file says about the model is in that folder. It is read twice, by the ``gguf`` package and by
    transformers, and the two are compared.

    Raises:
        UserError: the file is missing or damaged, is not a whole model, or says what is not understood.
    """
    if not path.is_file():
        raise UserError(f"model.file={path}: there is no such file")
    stat = path.stat()
    digest = _content_hash(path, stat.st_size, stat.st_mtime_ns)
    return published(cache_root() / "gguf" / digest, lambda folder: _decode(path, folder))


def _decode(path: Path, folder: Path) -> None:
    contents = read_contents(path)
    config = configuration_of(contents)
    check_tokenizer(contents)
    check_tensors(contents, config)
    from transformers import AutoModelForCausalLM

    where, name = str(path.parent), path.name
    try:
        tokenizer = tokenizer_of(contents)  # before the weights, which take longer
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, config=config, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # conversions fail with whatever the odd entry caused; the file is the cause
        raise UserError(f"model.file={path} cannot be decoded by transformers: {first_line(error)}") from error
    check_values(contents, model)
    check_rope(contents, model)
    # The weights are plain fp32 now; transformers refuses to save what it still believes to be quantised.
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end_tokens(contents) or None, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@functools.lru_cache(maxsize=16)
def _content_hash(path: Path, size: int, modified_ns: int) -> str:
    """SHA-256 of the content and of what decodes it; size and time are cache keys within this process only."""
    del size, modified_ns
    import transformers

    digest = hashlib.sha256(f"transformers {transformers.__version__}, fp32, reading {_READING}".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]
