"""Conversations, before and after: SmolLM2-135M-Instruct tuned on questions about Python's standard library.

python benchmarks/chat.py [--folder RUNS] [--keep]

Makes a file of conversations on the spot: what a function is for, by its name, and the first paragraph of its
docstring. Tunes the dense model on it, and one at 1 bit per weight through its sketch (experiment=demo), with the loss
on the answers alone. Prints what the answers that were set aside cost each of them, and what they say; --keep writes it
to benchmarks/results/chat.json and into docs/data.md, --table only the latter, from the file.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, it finds only its own folder there

from benchmarks.page_sections import between_markers
from usllm.data import SourceSpec
from usllm.data.batches import NO_TARGET, model_inputs
from usllm.data.datamodule import TextDataModule
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer
from usllm.system.code_version import code_version
from usllm.system.files import write_json
from usllm.system.machine import machine
from usllm.training.objectives import next_token_loss

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "results" / "chat.json", ROOT / "docs" / "data.md"
BEGIN, END = "<!-- chat: benchmarks/chat.py --keep -->", "<!-- end of chat -->"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
ASKED = ["What does zipfile.ZipFile.extractall do?", "What does json.encoder.JSONEncoder.encode do?"]
CONTEXT = 256
COMMON = ["experiment=demo", "data=chat", "data.validation_fraction=0.05", "trainer.limit_val_batches=1.0"]
RUNS = {
    "dense, tuned": ["stages=none", "objective=cross_entropy", "~objective.kl_weight", "~objective.hidden_weight"],
    "1 bit, tuned": ["objective.cross_entropy_weight=1.0"],
}
RUNS["dense, tuned"] += ["optimizer.lr=2e-5", "trainer.max_steps=120"]


def conversations(library: Path) -> Iterator[dict[str, Any]]:
    """A question and its answer for each documented function of a folder of modules, by name."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).with_suffix("").parts
        if SKIPPED.intersection(place):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the sources of others
            tree = ast.parse(path.read_bytes())  # never imported: importing this or antigravity does things
        for name, text in _documented(tree, [part for part in place if part != "__init__"]):
            answer = " ".join(text.split("\n\n")[0].split())
            if 20 <= len(answer) <= 400:
                asked = {"role": "user", "content": f"What does {name} do?"}
                yield {"messages": [asked, {"role": "assistant", "content": answer}]}


def _documented(node: ast.AST, names: list[str]) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef) and (text := ast.get_docstring(child)):
                yield ".".join([*names, child.name]), text
            yield from _documented(child, [*names, child.name])


@torch.no_grad()
def dense_perplexity(path: Path) -> float:
    """Of the answers that are set aside, of the dense model."""
    spec = SourceSpec(kind="jsonl", path=str(path), messages_field="messages")
    options: dict[str, Any] = {"context_length": CONTEXT, "batch_size": 2, "validation_fraction": 0.05}
    data = TextDataModule(load_tokenizer(ModelSpec()), spec, **options)
    model = load_dense(ModelSpec()).eval()
    total, count = 0.0, 0
    for batch in data.val_dataloader():
        logits, labels = model(**model_inputs(batch), use_cache=False).logits, batch["labels"]
        total += float(next_token_loss(logits, labels)) * (labels.numel() - len(labels))
        count += int((labels[:, 1:] != NO_TARGET).sum())
    return math.exp(total / count)


def tuned(name: str, path: Path, folder: Path) -> dict[str, Any]:
    """A run: perplexity of the answers that are set aside, as training validates it, and answers to new questions."""
    run = folder / name.replace(", ", "_").replace(" ", "_")
    typed = [*COMMON, *RUNS[name], f"data.train.path={path}", f"data.context_length={CONTEXT}"]
    typed += [f"run_dir={run}", f"name={run.name}", "logger=csv", "evaluation.max_windows=8", "resume=true"]
    subprocess.run([sys.executable, "-m", "usllm.cli.train", *typed], check=True)
    (log,) = (run / "csv").rglob("metrics.csv")
    with log.open() as file:
        perplexities = [row["val/ppl"] for row in csv.DictReader(file) if row["val/ppl"]]
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    shown = [word for word in typed if not word.startswith(("run_dir=", "data.train.path="))]
    kept = {key: report[key] for key in ("tokens", "bits_per_weight", "seconds")}
    return {"perplexity": float(perplexities[-1]), "overrides": shown, "answers": answers(run), **kept}


def answers(run: Path) -> list[str]:
    """What a run's model says when it is asked."""
    found = []
    for question in ASKED:
        typed = [f"ckpt={run}", f"prompt={question}", "chat=true", "max_new_tokens=32"]
        line = [sys.executable, "-m", "usllm.cli.generate", *typed]
        found.append(subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip())
    return found


def table(facts: dict[str, Any]) -> str:
    """The section of docs/data.md.

    Args:
        facts: of benchmarks/results/chat.json.
    """
    rows = facts["rows"]
    lines = [
        f"**Before and after.** {facts['conversations']:,} questions and answers that `benchmarks/chat.py` makes of",
        f"Python's docstrings, a twentieth of them set aside; SmolLM2-135M-Instruct, {facts['machine']['cpu']}:",
        "",
        "| model | perplexity of the answers set aside | tokens | bits per weight |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        bits = (row.get("bits_per_weight") or {}).get("achieved")
        rate = "-" if bits is None else f"{bits:.3f}"
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row.get('tokens', 0):,} | {rate} |")
    tuned = {name: row["answers"] for name, row in rows.items() if "answers" in row}
    lines += ["", f"| asked | {' | '.join(tuned)} |", "| --- |" + " --- |" * len(tuned)]
    for question, *said in zip(ASKED, *tuned.values(), strict=True):
        lines.append(f"| {question} | {' | '.join(' '.join(answer.split()) for answer in said)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/chat"), help="of the conversations and the runs")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/chat.json")
    parser.add_argument("--table", action="store_true", help="write docs/data.md from benchmarks/results/chat.json")
    given = parser.parse_args()
    if given.table:
        _write(json.loads(KEPT.read_text(encoding="utf-8")))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder.resolve() / "conversations.jsonl"
    rows = [json.dumps(row) for row in conversations(Path(sysconfig.get_path("stdlib")))]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    found: dict[str, Any] = {"dense": {"perplexity": dense_perplexity(path)}}
    found |= {name: tuned(name, path, given.folder.resolve()) for name in RUNS}
    for name, row in found.items():
        print(f"{name:14} {row['perplexity']:8.2f}")
        for question, answer in zip(ASKED, row.get("answers", []), strict=False):
            print(f"  {question}\n    {answer}")
    if given.keep:
        facts = {"conversations": len(rows), "rows": found, "machine": machine(), "code": code_version()}
        write_json(KEPT, facts)
        _write(facts)


def _write(facts: dict[str, Any]) -> None:
    page = between_markers(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(facts))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
