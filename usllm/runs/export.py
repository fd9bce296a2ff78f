"""From a run, or a dense model, to a packed folder with its card; :mod:`usllm.runs.export_decoded` has other forms."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from usllm.compress.ceilings import shortfall
from usllm.compress.coverage import coverage
from usllm.config.packed import ExportConfig, size_in_bytes
from usllm.loggers import log_export
from usllm.models.loading import load_generation_config
from usllm.models.skeleton import skeleton
from usllm.packed.card import model_card
from usllm.packed.dense import DecodedSize
from usllm.packed.export import ModelFiles, RestStorage, export, left_whole
from usllm.packed.inspection import Inspection
from usllm.packed.loading import load
from usllm.packed.source import PackingSource
from usllm.runs.export_card import ExportCard
from usllm.runs.export_decoded import export_decoded
from usllm.runs.export_origin import from_dense, from_run
from usllm.runs.inputs import program
from usllm.runs.report import human_bytes, print_coverage, print_facts, print_warnings

_MEASURED_BEFORE = (
    "Measured before packing: the sketched layers are the same bit for bit, what is not sketched was rounded to "
    "the types above."
)


def export_model(config: ExportConfig, command: str, given: Sequence[str] = ()) -> Inspection | DecodedSize:
    """Write a model in the form that is asked for, read it back, and print what it takes.

    Args:
        config: Checked configuration.
        command: What the user typed, for the card.
        given: Overrides among that: a run is measured as it was, but for what they name.

    Raises:
        UserError: Something in the input does not work; nothing is left under the name of ``out``.
    """
    if config.form != "packed":
        return export_decoded(config, command, given)
    progress = Console(stderr=True)
    progress.print("Reading the checkpoint …" if config.ckpt is not None else "Reading and calibrating the model …")
    origin = from_run(config, given, progress) if config.ckpt is not None else from_dense(config)
    source = origin.source
    assert source is not None
    progress.print(f"Packing {len(source.plans)} layers …")
    card = ExportCard(config, command, origin, _MEASURED_BEFORE)
    print_coverage(coverage(skeleton(card.model_config), origin.spec.patterns, source.plans.keys()), progress)
    files = ModelFiles(card.model_config, card.tokenizer, load_generation_config(origin.spec))

    def written(folder: Path, inspection: Inspection) -> str:
        return model_card(card.facts(folder, lambda path: load(path, dtype=torch.float32)), inspection)

    rest = RestStorage(config.rest.dtype, config.rest.embeddings, config.rest.linears)
    print_warnings(left_whole(source, files.config, rest), Console(stderr=True))
    inspection = export(
        source,
        files,
        config.out,
        rest=rest,
        max_shard_size=size_in_bytes(config.max_shard_size),
        overwrite=config.overwrite,
        card=written,
    )
    tracker = origin.tracker
    artifact = log_export(tracker, inspection.path, inspection.totals()) if tracker else None
    _print_export(inspection, artifact, source)
    return inspection


def _print_export(inspection: Inspection, artifact: str | None, source: PackingSource) -> None:
    totals, rate = inspection.totals(), source.compressor.options.bits_per_weight
    got = f"{totals['bits_per_weight']:.4f} bits per weight" + (f" of {rate:g} asked" if rate is not None else "")
    reason = shortfall(source.plans, source.compressor)
    console = Console()
    facts = [
        ("packed model", str(inspection.path)),
        ("sketched", f"{human_bytes(totals['sketched_bytes'])}, {got}"),
        *([("", f"less than asked: {reason}")] if reason else []),
        ("", f"{totals['bits_per_weight_with_entries']:.4f} with the JSON entries of tensors, which are not in it"),
        ("everything else", human_bytes(totals["rest_bytes"])),
        ("weight files", f"{totals['weight_bytes']:,} bytes, {totals['model_bits_per_weight']:.4f} bits per parameter"),
        ("folder", f"{totals['disk_bytes']:,} bytes"),
        *([("W&B artifact", artifact)] if artifact is not None else []),
    ]
    print_facts(facts, console)
    console.print("\nNext, try")
    for line in (
        shlex.join([program("usllm-inspect"), f"model={inspection.path}"]),
        shlex.join([program("usllm-generate"), f"model={inspection.path}"]) + ' prompt="…"',
    ):
        console.print(f"  {line}", style="bold", markup=False, soft_wrap=True, highlight=False)
