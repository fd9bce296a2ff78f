"""Parquet files."""

from __future__ import annotations

from pathlib import Path

from usllm.data.sources.boundaries import group_rows
from usllm.data.sources.column import document, read, refuse_missing
from usllm.data.sources.files import existing
from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import UserError


def documents(spec: SourceSpec) -> list[str]:
    """The text column of all files in the order given; joined where ``spec.document_start`` says so."""
    rows = _rows(spec)
    return rows if spec.document_start is None else group_rows(rows, spec.document_start)


def whole_text(spec: SourceSpec) -> str:
    """All rows, joined by ``spec.separator``."""
    return spec.separator.join(_rows(spec))


def _rows(spec: SourceSpec) -> list[str]:
    return [row for path in existing(spec.paths) for row in _column(path, spec)]


def _column(path: Path, spec: SourceSpec) -> list[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            refuse_missing(file.schema_arrow.names, spec, str(path))
            rows = file.read(columns=[spec.field]).column(spec.field).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as parquet ({error})") from error
    numbered = enumerate(rows, start=1)
    return [document(row, spec, f"{path}, row {number}") for number, row in numbered if read(row, spec)]
