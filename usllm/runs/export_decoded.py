"""From a run, a dense model or a packed folder to what other tools read: decoded weights, whose bits are gone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from usllm.config.packed import ExportConfig, refused_beside_packed, size_in_bytes
from usllm.config.validation import user_error
from usllm.models import ModelSpec
from usllm.models.gguf_out import check_gguf_out
from usllm.models.gguf_plan import GgufPlan, plan_gguf
from usllm.models.gguf_writer import write_gguf
from usllm.models.loading import load_config, load_dense, load_generation_config, load_tokenizer, packed_folder
from usllm.packed.card import decoded_card
from usllm.packed.decoded import DecodedModel, decode_folder, decode_source
from usllm.packed.dense import DecodedSize, compressed_bits, export_dense
from usllm.packed.description import ModelFiles
from usllm.packed.sharded_files import empty_model
from usllm.runs.export_card import ExportCard
from usllm.runs.export_origin import Origin, from_dense, from_packed, from_run
from usllm.runs.inputs import program
from usllm.runs.report import print_facts
from usllm.system.errors import PackedFormatError, RunError, UserError
from usllm.system.files import expanded
from usllm.system.version import VERSION

_MEASURED_BEFORE = "Measured before decoding; these weights are the same but for rounding to the type above."


def export_decoded(config: ExportConfig, command: str, given: Sequence[str] = ()) -> DecodedSize:
    """Write the decoded model, and print what that costs.

    Args:
        config: Checked configuration, whose ``form`` is ``dense`` or ``gguf``.
        command: What the user typed, for the card.
        given: Overrides among that.

    Raises:
        UserError: Something in the input does not work; nothing is left under the name of ``out``.
        RunError: ``out`` cannot be written.
    """
    progress, plan = Console(stderr=True), None
    packed = None if config.ckpt is not None else packed_folder(config.model)
    if config.ckpt is not None:
        progress.print("Reading the checkpoint …")
        origin = from_run(config, given, progress)
    elif packed is not None:
        if refused := refused_beside_packed(config, given):  # one of the hub, which is known as packed from here on
            raise user_error(refused)
        progress.print("Reading the packed model …")
        origin = from_packed(config, packed)
    else:
        if config.form == "gguf":  # before the calibration, which takes long
            spec = config.model
            described = ModelFiles(load_config(spec), load_tokenizer(spec), load_generation_config(spec))
            plan = _plan(config, described)
        progress.print("Reading and calibrating the model …")
        origin = from_dense(config)
    card = ExportCard(config, command, origin, _MEASURED_BEFORE)
    if hasattr(card.model_config, "quantization_config"):
        del card.model_config.quantization_config
    files = ModelFiles(card.model_config, card.tokenizer, load_generation_config(origin.spec))
    out = expanded(config.out)
    try:
        with _decoding(origin) as model:
            progress.print(f"Decoding {len(model.layers)} layers …")
            size = (
                _dense(config, out, origin, card, files, model)
                if config.form == "dense"
                else _gguf(config, out, origin, files, model, plan or _plan(config, files))
            )
    except PackedFormatError as error:
        raise UserError(f"model={config.model.name}: {error}") from error
    _print_decoded(config.form, size)
    return size


@contextmanager
def _decoding(origin: Origin) -> Iterator[DecodedModel]:
    if origin.packed is not None:
        with decode_folder(origin.packed) as model:
            yield model
    else:
        assert origin.source is not None
        yield decode_source(origin.source)


def _dense(
    config: ExportConfig, out: Path, origin: Origin, card: ExportCard, files: ModelFiles, model: DecodedModel
) -> DecodedSize:
    def written(folder: Path, size: DecodedSize) -> str:
        return decoded_card(card.facts(folder, _load), origin.compressor.method, size.sentence())

    return export_dense(
        model,
        files,
        out,
        dtype=config.dense.dtype,
        max_shard_size=size_in_bytes(config.max_shard_size),
        overwrite=config.overwrite,
        card=written,
    )


def _load(folder: Path) -> PreTrainedModel:
    return load_dense(ModelSpec(kind="folder", name=str(folder)))


def _plan(config: ExportConfig, files: ModelFiles) -> GgufPlan:
    assert files.tokenizer is not None
    kind, embeddings = config.gguf.type, config.gguf.embeddings
    return plan_gguf(files.config, files.tokenizer, files.generation, kind=kind, embeddings=embeddings)


def _gguf(
    config: ExportConfig, out: Path, origin: Origin, files: ModelFiles, model: DecodedModel, plan: GgufPlan
) -> DecodedSize:
    dense = empty_model(files.config, "float32")
    bits, packed_bytes = compressed_bits(model, dense), model.packed_bytes(dense)
    kinds = ", ".join(f"{kind} ({number} tensors)" for kind, number in plan.by_kind().items())
    size = DecodedSize(out, plan.tensor_bytes, packed_bytes, bits, kinds)
    base = str(origin.spec.file or origin.spec.name)
    told = (
        f"{base}, compressed by the method {origin.compressor.method} and decoded by usllm {VERSION}: {size.sentence()}"
    )
    check_gguf_out(out, config.overwrite)
    try:
        write_gguf(plan.described(out.stem, told), model.read, out)
    except OSError as error:
        raise RunError(f"out={out} cannot be written ({error}): free space, or choose another name") from error
    return size


def _print_decoded(form: str, size: DecodedSize) -> None:
    on_disk = sum(file.stat().st_size for file in size.path.iterdir()) if form == "dense" else size.path.stat().st_size
    console = Console()
    facts = [
        ("dense model" if form == "dense" else "GGUF file", str(size.path)),
        ("on disk", f"{on_disk:,} bytes"),
        ("weights", size.sentence()),
    ]
    print_facts(facts, console)
    console.print("\nNext, try")
    line = shlex.join([program("usllm-eval"), f"model={size.path}", "data=[<file>]"])
    console.print(f"  {line}", style="bold", markup=False, soft_wrap=True, highlight=False)
