"""The table of a paper, and the columns of the page."""

from __future__ import annotations

import re
from dataclasses import replace

from synthetic import NASTY

from usllm.reports.figures import Reference
from usllm.reports.labels import labels, text_names, texts_of
from usllm.reports.runs import Run
from usllm.reports.table import columns, markdown


def rows(table: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]


def test_table_has_a_row_for_the_dense_model_the_reference_and_each_finished_run(runs: list[Run]) -> None:
    text = texts_of(runs)[0]
    table = markdown(runs, {"SmolLM2-135M": Reference("Q4_1", {text: 33.0}, 98_000_000)})
    found = [[cell.strip() for cell in row] for row in rows(table)]
    assert found[0][:4] == ["variant", "bpw", "model bpw", "size"]
    assert found[0][4:] == ["wikitext2 sketched", "wikitext2 finetuned", "imdb sketched", "imdb finetuned"]
    assert found[2] == ["dense model", "-", "16", "269.0 MB", "-", "30.20", "-", "42.80"]
    assert found[3] == ["Q4\\_1", "-", "-", "98.0 MB", "-", "33.00", "-", "-"]
    assert [row[0] for row in found[4:]] == [
        "dense, finetuned",
        "0.5 bpw, 1 row, proportional",
        "0.5 bpw, 3 rows, proportional",
        "0.5 bpw, 1 row, waterfill",
        "0.5 bpw, 3 rows, waterfill",
        "1 bpw, 1 row, proportional",
        "1 bpw, 1 row, waterfill",
    ]
    assert "2 of 9 runs have not finished" in table


def test_perplexity_after_the_blocks_has_a_column_where_a_run_has_it(runs: list[Run]) -> None:
    text, rebuilt = texts_of(runs)[0], next(run for run in runs if run.status == "finished" and not run.dense)
    measured = {**rebuilt.perplexity, text: replace(rebuilt.perplexity[text], reconstructed=77.0)}
    found = rows(markdown([run if run is not rebuilt else replace(run, perplexity=measured) for run in runs]))
    heads = [cell.strip() for cell in found[0]]
    column = heads.index("wikitext2 reconstructed")
    assert heads[column - 1 : column + 2] == ["wikitext2 sketched", "wikitext2 reconstructed", "wikitext2 finetuned"]
    cells = [row[column].strip() for row in found[2:]]
    assert cells.count("77.00") == 1 and set(cells) == {"77.00", "-"}


def test_all_rows_have_the_same_cells_whatever_names_are(runs: list[Run]) -> None:
    table = markdown([replace(run, model=NASTY, allocation=f"a|b {NASTY}") for run in runs])
    assert len({len(row) for row in rows(table)}) == 1
    assert "<script" not in table.replace("\\<", "")


def test_mixed_models_have_a_table_each(runs: list[Run]) -> None:
    table = markdown([*runs, *(replace(run, model="Llama") for run in runs)])
    assert table.count("| variant |") == 2


def test_a_dash_stands_for_what_is_missing(runs: list[Run]) -> None:
    texts = text_names(texts_of(runs), short=True)
    shown = {column.title: column for column in columns(labels(runs), texts)}
    interrupted = next(run for run in runs if run.status == "interrupted")
    assert shown["wikitext2 finetuned"].shown(interrupted) == "-"
    assert shown["bpw asked"].shown(interrupted) == "1"
    assert shown["time"].shown(interrupted) == "-"
