"""Files with one JSON object per line."""

from __future__ import annotations

import json

from usllm.data.sources.boundaries import group_rows
from usllm.data.sources.column import document
from usllm.data.sources.files import existing, opened
from usllm.data.sources.spec import SourceSpec
from usllm.system.errors import UserError


def documents(spec: SourceSpec) -> list[str]:
    """The text field of every object, in the order of the files; joined where ``spec.document_start`` says so."""
    rows = _rows(spec)
    return rows if spec.document_start is None else group_rows(rows, spec.document_start)


def whole_text(spec: SourceSpec) -> str:
    """All rows, joined by ``spec.separator``."""
    return spec.separator.join(_rows(spec))


def _rows(spec: SourceSpec) -> list[str]:
    rows = []
    for path in existing(spec.paths):
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}, line {number} is not JSON ({error}); mend it") from error
                value = record.get(spec.field) if isinstance(record, dict) else None
                rows.append(document(value, spec, f"{path}, line {number}"))
    return rows
