"""Parquet files."""

from __future__ import annotations

from pathlib import Path

from usllm.data.sources.boundaries import group_rows
from usllm.data.sources.files import existing
from usllm.data.sources.plain import plain_text
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
    return [row for path in existing(spec.paths) for row in _column(path, spec.text_field)]


def _column(path: Path, text_field: str) -> list[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(f"{path} has no column {text_field!r} but {names}; set text_field")
            rows = file.read(columns=[text_field]).column(text_field).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as parquet ({error})") from error
    if not all(row is None or isinstance(row, str) for row in rows):
        raise UserError(f"{path}: column {text_field!r} does not hold text; set text_field")
    return [plain_text(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1) if row is not None]
