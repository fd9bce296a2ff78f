"""Perplexity of a checkpoint, or of a dense model, on named test sets, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from usllm.compress import compressed_layers, compression_report
from usllm.config import DataConfig, EvalConfig, evaluation_of_run, section_of
from usllm.data.windows import resolved_rule
from usllm.eval.harness import find_tasks, harness_tables, run_harness
from usllm.eval.perplexity import bos_rule, tokenizer_name
from usllm.models import ModelSpec
from usllm.models.loading import check_context_length, load_config, load_dense, load_packed, load_tokenizer
from usllm.packed.inspection import inspect_folder
from usllm.runs.inputs import build_data, shared_documents, sharing, token_streams
from usllm.runs.measure import measure
from usllm.runs.report import perplexity_table, print_facts, print_warnings
from usllm.runs.saved_run import find_checkpoint, load_sketched_, stored_config
from usllm.system.errors import UserError
from usllm.system.files import expanded, write_json
from usllm.system.finite import refuse_nonfinite
from usllm.system.machine import choose_autocast, machine, machine_line
from usllm.training import load_checkpoint

RESULT_FILE = "evaluation.json"


def evaluate(config: EvalConfig, command: str, given: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, print a table and write ``evaluation.json``.

    Args:
        config: checked configuration.
        command: what the user typed, for the result.
        given: overrides that the user typed: a checkpoint is measured as its run was, but for what they name.

    Returns:
        The content of ``evaluation.json``.

    Raises:
        UserError: something in the input does not work.
        RunError: the model is not finite; names where first.
    """
    tasks = config.harness
    manager = find_tasks(tasks.tasks, tasks.include_path) if tasks.tasks else None
    checkpoint = None if config.ckpt is None else find_checkpoint(config.ckpt)
    saved = None if checkpoint is None else load_checkpoint(checkpoint)
    if saved is None:
        spec, evaluation, run = config.model, config.evaluation, None
    else:
        assert checkpoint is not None
        run = stored_config(saved, checkpoint)
        spec = section_of(ModelSpec, run["model"], "model")
        evaluation = evaluation_of_run(run, config.evaluation, given)
    model_config = load_config(spec)
    for window in evaluation.windows:
        check_context_length(model_config, window, "evaluation.windows")
    tokenizer = load_tokenizer(spec)
    rule = resolved_rule(evaluation.window_start, model_config.model_type, tokenizer, "evaluation.window_start")
    data = None
    if run is not None and evaluation.validation_split:
        data = build_data(section_of(DataConfig, run["data"], "data"), tokenizer, run["seed"], model_config)
    streams = token_streams(evaluation, tokenizer, data)
    shared = [] if data is None else shared_documents(evaluation, data)

    packed = load_packed(spec) if saved is None else None
    model = packed or load_dense(spec)
    if saved is not None:
        load_sketched_(model, saved)
        refuse_nonfinite(model, f"ckpt={checkpoint}")
    cast(nn.Module, model).to(choose_device(config.device))  # transformers' own `to` is typed for keywords only
    rows = measure(model, tokenizer, streams, evaluation, "Model")
    harness = None
    if manager is not None:
        harness = run_harness(
            model,
            tokenizer,
            tasks.tasks,
            include_path=tasks.include_path,
            limit=tasks.limit,
            batch_size=tasks.batch_size,
            num_fewshot=tasks.num_fewshot,
            seed=config.seed,
            add_bos_token=tasks.add_bos_token,
            autocast=choose_autocast(evaluation.precision, model.device),
            manager=manager,
        )
    # A checkpoint of a run that finetuned the dense model has layers, but no plans.
    planned = any(layer.plan is not None for layer in compressed_layers(model).values())
    compression = compression_report(model).to_dict() if planned else None
    if packed is not None:
        compression = inspect_folder(expanded(str(spec.name))).totals()
    result = {
        "command": command,
        "model": str(checkpoint or spec.file or spec.name),
        "perplexity": rows,
        **sharing(shared),
        "harness": harness,
        "tokenizer": {"name": tokenizer_name(tokenizer), "bos": bos_rule(tokenizer, rule)},
        "compression": compression,
        "machine": machine(),
    }
    path = Path(config.run_dir) / RESULT_FILE
    write_json(path, result)
    print_result(result, path)
    return result


def print_result(result: dict[str, Any], path: Path) -> None:
    """Print the table of an evaluation."""
    console = Console()
    console.print()
    if result["perplexity"]:
        console.print(perplexity_table(result["perplexity"], title="Perplexity"))
    for table in harness_tables(result["harness"]):
        console.print(table, markup=False, highlight=False, soft_wrap=True)
    facts = [
        ("model", result["model"]),
        ("tokenizer", f"{result['tokenizer']['name']}, beginning-of-text token: {result['tokenizer']['bos']}"),
        ("machine", machine_line(result["machine"])),
        ("result", str(path)),
    ]
    if (compression := result["compression"]) is not None:
        bits = (
            f"{compression['bits_per_weight']:.4f} ({compression['bits_per_weight_with_entries']:.4f} with the JSON "
            f"entries of tensors), over the whole model {compression['model_bits_per_weight']:.4f}"
        )
        facts.insert(1, ("bits per weight", bits))
    print_facts(facts, console)
    notes = (result["harness"] or {}).get("notes", [])
    print_warnings([*result["warnings"], *notes], console)


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for.

    Raises:
        UserError: There is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has no usable GPU; use device=cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
