"""Write a compressed model's decoded weights as an ordinary folder of transformers, which any tool reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from usllm.packed.decoded import DecodedModel
from usllm.packed.description import ModelFiles, write_description
from usllm.packed.meaning import first_difference, meaning_of
from usllm.packed.new_folder import DECODED_MARK, DENSE_FOLDER, new_folder
from usllm.packed.sharded_files import DTYPES, empty_model, rounded, stored_tensors, write_shards
from usllm.system.errors import RunError, UserError, no_space
from usllm.system.files import write_text


@dataclass(frozen=True)
class DecodedSize:
    """What decoding costs.

    Attributes:
        path: The folder or file.
        weight_bytes: Bytes of the weights as they were written.
        packed_bytes: Bytes of the same weights in packed form.
        compressed_bits: Bits per compressed weight of the packed form.
        stored_as: Type of the weights.
    """

    path: Path
    weight_bytes: int
    packed_bytes: int
    compressed_bits: float
    stored_as: str

    def sentence(self) -> str:
        """Both sizes, and that the bits are gone."""
        ratio = self.weight_bytes / self.packed_bytes
        return (
            f"the {self.compressed_bits:.4g} bits per weight are gone: the weights take {self.weight_bytes:,} bytes as "
            f"{self.stored_as}, {ratio:.2f} times the {self.packed_bytes:,} of the packed form"
        )


def compressed_bits(model: DecodedModel, skeleton: PreTrainedModel) -> float:
    """Bits per weight of the compressed layers.

    Raises:
        UserError: A compressed layer is not in the model.
    """
    weights = dict(skeleton.named_parameters())
    try:
        numbers = sum(weights[f"{name}.weight"].numel() for name in model.layers)
    except KeyError as error:
        raise UserError(f"the checkpoint does not fit the model that it names: it has no {error}") from error
    return 8 * sum(model.layers.values()) / numbers


def export_dense(
    model: DecodedModel,
    files: ModelFiles,
    out: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int = 4_000_000_000,
    overwrite: bool = False,
    card: Callable[[Path, DecodedSize], str] | None = None,
) -> DecodedSize:
    """Write the folder. The tensors of one weight file and one layer's states are in memory at a time.

    Args:
        model: What is decoded.
        files: Configuration, tokenizer and generation settings.
        out: Folder to make.
        dtype: Of all tensors, rounded once from fp32 where they are decoded: a key of ``sharded_files.DTYPES``.
        max_shard_size: Ceiling for one weight file, in bytes.
        overwrite: Replace ``out``, if it is such a folder.
        card: Makes the model card (``README.md``) from the folder under construction and its size.

    Raises:
        UserError: ``out`` exists, the model does not fit its configuration, or a number is not finite in ``dtype``.
        PackedFormatError: The packed folder that is read is damaged.
        RunError: ``out`` cannot be written.
    """
    skeleton = empty_model(files.config, dtype)
    bits = compressed_bits(model, skeleton)
    with new_folder(out, overwrite, DENSE_FOLDER) as folder:
        try:
            write_description(files, type(skeleton).__name__, None, DTYPES[dtype], folder)
            again = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype)
            if what := first_difference(meaning_of(skeleton), again):
                raise UserError(f"form=dense: this version of transformers does not write {what}; leave it packed")
            write_shards(
                folder,
                stored_tensors(skeleton),
                lambda name: rounded(model.read(name), dtype, name, "dense.dtype"),
                lambda tensors: DECODED_MARK,
                max_shard_size,
            )
            written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            size = DecodedSize(out, written, model.packed_bytes(skeleton), bits, dtype)
            if card is not None:
                write_text(folder / "README.md", card(folder, size))
        except Exception as error:  # tokenizers and safetensors have errors of their own for a full disk
            if isinstance(error, OSError) or no_space(error):
                raise RunError(
                    f"out={out} cannot be written ({error}): free space, or choose another folder"
                ) from error
            raise
    return size
