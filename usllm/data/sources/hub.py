"""Data sets from the Hugging Face hub, from its local cache where there is no network."""

from __future__ import annotations

from usllm.data.sources.boundaries import group_rows
from usllm.data.sources.column import document, read, refuse_missing
from usllm.data.sources.spec import SourceSpec
from usllm.system.network import leave_unreachable_hub, network_or_user_error


def documents(spec: SourceSpec) -> list[str]:
    """The text column of the split; rows are joined into documents where ``spec.document_start`` says so."""
    rows = _rows(spec)
    return rows if spec.document_start is None else group_rows(rows, spec.document_start)


def whole_text(spec: SourceSpec) -> str:
    """All rows, joined by ``spec.separator``: with a blank line, the text of published WikiText perplexities."""
    return spec.separator.join(_rows(spec))


def _rows(spec: SourceSpec) -> list[str]:
    from datasets import load_dataset

    what = f"{spec.name}{f' ({spec.config})' if spec.config else ''}, split {spec.split!r}"
    leave_unreachable_hub()
    try:
        data = load_dataset(str(spec.name), spec.config, split=spec.split)
    except Exception as error:  # hub, HTTP and builder errors have no common base class
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise network_or_user_error(
            f"the data set {what} cannot be loaded from the Hugging Face hub ({type(error).__name__}: {reason}). "
            "Without a network, use data=pydoc (Python's own documentation), data=text data.train.path=<file>, or the "
            "jsonl or parquet kinds",
            error,
        ) from error
    refuse_missing(data.column_names, spec, what)
    # Empty rows stay: the published WikiText figures are measured with them.
    rows = enumerate(data[spec.field], start=1)
    return [document(row, spec, f"{what}, row {number}") for number, row in rows if read(row, spec)]
