"""The account of a packed folder, printed: per layer, in total, and against the bytes on disk."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from usllm.config.packed import InspectConfig
from usllm.packed.folder import open_folder
from usllm.packed.inspection import Inspection, inspect_folder
from usllm.packed.loading import check_against_model
from usllm.runs.report import print_facts
from usllm.system.errors import PackedFormatError, UserError
from usllm.system.files import expanded, write_json

TABLE_WIDTH = 180
"""Columns that the widest table takes."""


def inspect_model(config: InspectConfig) -> Inspection:
    """Check the folder and print its account.

    Raises:
        UserError: It is no packed folder, or is damaged; the tensor or file is named.
    """
    path = expanded(config.folder)
    if not path.is_dir():
        raise UserError(f"model={config.folder}: no such folder; give one written by usllm-export")
    try:
        inspection = inspect_folder(path)
        check_against_model(open_folder(path))
    except PackedFormatError as error:
        raise UserError(f"model={config.folder}: {error}") from error
    print_inspection(inspection)
    if config.json is not None:
        write_json(expanded(config.json), account(inspection))
    if inspection.accounted_bytes != inspection.disk_bytes:
        raise UserError(
            f"model={config.folder}: the parts add up to {inspection.accounted_bytes} bytes, the folder has "
            f"{inspection.disk_bytes}; a weight file holds something that is not a tensor"
        )
    return inspection


def print_inspection(inspection: Inspection, console: Console | None = None) -> None:
    """Tables of layers, of everything else, and the sums."""
    console = console or _wide_console()
    console.print(_layer_table(inspection))
    rest = Table(title="Everything else", title_justify="left", title_style="bold")
    for heading in ("tensor", "shape", "stored as", "bytes"):
        rest.add_column(heading, justify="right" if heading == "bytes" else "left", no_wrap=True)
    for tensor in inspection.rest:
        rest.add_row(tensor.name, "x".join(map(str, tensor.shape)), tensor.stored_as, f"{tensor.bytes:,}")
    console.print(rest)
    totals = inspection.totals()
    parts = [
        ("sketched layers", totals["sketched_bytes"]),
        ("other tensors", totals["rest_bytes"]),
        ("headers of the weight files", totals["header_bytes"]),
        *inspection.other_files.items(),
    ]
    facts = [(name, f"{size:>15,} bytes") for name, size in parts]
    facts += [
        ("sum", f"{inspection.accounted_bytes:>15,} bytes"),
        ("on disk", f"{inspection.disk_bytes:>15,} bytes"),
        ("bits per sketched weight", f"{inspection.bits_per_weight:>15.4f}   (without the JSON entries of tensors)"),
        ("with these entries", f"{inspection.bits_per_weight_with_entries:>15.4f}"),
        ("bits per parameter", f"{inspection.model_bits_per_weight:>15.4f}   (weight files over all parameters)"),
    ]
    print_facts(facts, console)


def _wide_console() -> Console:
    """Wide enough for every figure, also where the output is a file or a narrow window, which then wraps lines."""
    console = Console()
    return console if console.width >= TABLE_WIDTH else Console(width=TABLE_WIDTH)


def account(inspection: Inspection) -> dict[str, Any]:
    """The whole account as plain Python."""
    return {
        "model": str(inspection.path),
        "method": inspection.method,
        "format": inspection.format,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "facts": {name: fact._asdict() for name, fact in layer.facts.items()},
                "sections": layer.sections,
                "bytes": layer.bytes,
                "bits_per_weight": layer.bits_per_weight,
            }
            for layer in inspection.layers
        ],
        "rest": [
            {"name": t.name, "shape": list(t.shape), "as": t.stored_as, "bytes": t.bytes} for t in inspection.rest
        ],
        "other_files": inspection.other_files,
        "accounted_bytes": inspection.accounted_bytes,
        **inspection.totals(),
    }


def _layer_table(inspection: Inspection) -> Table:
    constants = ", ".join(f"{key}={value}" for key, value in inspection.format.items())
    title = f"Compressed layers, {inspection.method}" + (f" ({constants})" if constants else "")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", no_wrap=True)
    facts = [(name, fact) for layer in inspection.layers for name, fact in layer.facts.items()]
    names = list(dict.fromkeys(name for name, fact in facts if not isinstance(fact.value, str)))
    for heading in ("shape", *(name.replace("_", " ") for name in names), "bpw", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in inspection.layers:
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        figures = [_shown(layer.facts[name].value) if name in layer.facts else "-" for name in names]
        table.add_row(layer.name, shape, *figures, f"{layer.bits_per_weight:.4f}", f"{layer.bytes:,}")
    return table


def _shown(value: float | int | str) -> str:
    """A fact's value: whole numbers with commas, others with three digits."""
    return f"{value:,}" if isinstance(value, int) else value if isinstance(value, str) else f"{value:.3g}"
