"""Part (e): a real model finetuned through its sketch for the rest of the time, and packed at the end.

The library's own pieces in a plain loop: no Hydra, no Lightning. Water-filling, an output scale and distillation, the
method of least error that we know; AdamW with a cosine that follows the clock instead of a number of steps. Perplexity
is that of the end of the text, which is not trained on, at four points: dense, sketched, halfway, trained; and once
more of the packed folder, loaded again.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_parts.models import peak_gib, prepare, release, settle
from benchmarks.gpu_parts.pieces import MB, cut_all, joined_file, joined_folder
from benchmarks.gpu_parts.results import OK, Refused
from benchmarks.gpu_parts.session import Session
from usllm.calibration import SecondMoments
from usllm.compress import allocate_, compressed_layers, reproject_, swap_linears_
from usllm.eval.perplexity import perplexity
from usllm.sketch import SketchConfig
from usllm.training.objectives import Distill

SHARD = 16 * MB
LAST = "packed model"
_BLOCK_BITS = {16: 16.0, 8: 8.5, 4: 4.5}  # a weight's, with the scale of its block of 32


@dataclass(frozen=True)
class Recipe:
    """Sizes of a run.

    Attributes:
        context: Tokens of a sequence, in training and of a window of perplexity.
        batch: Sequences of a step.
        calibration: Batches that importance is measured on.
        windows: Of a perplexity.
        peak: Learning rate at its highest.
        for_the_end: Seconds kept for packing and reading back.
    """

    context: int = 512
    batch: int = 16
    calibration: int = 8
    windows: int = 64
    peak: float = 1e-4
    for_the_end: float = 20.0


MADE_UP_BITS = 24.0  # the tables of layers so small take most of them
DRY_RUN = Recipe(context=32, batch=2, calibration=2, windows=2, for_the_end=1.0)


def run(session: Session) -> None:
    """Finetune and pack, unless that went well before; it cannot be continued in the middle."""
    device = prepare(session)
    if session.dry_run:  # the part of training steps has run the kernels in the interpreter
        os.environ["USLLM_KERNELS"] = "auto"
    recipe = DRY_RUN if session.dry_run else Recipe()
    with tempfile.TemporaryDirectory() as scratch:
        session.measure(
            LAST, lambda: _finetune(session, recipe, device, Path(scratch)), least=2 if session.dry_run else 60
        )


def _finetune(session: Session, recipe: Recipe, device: torch.device, scratch: Path) -> dict[str, Any]:
    from usllm.models import ModelSpec
    from usllm.models.loading import load_dense

    folder, ids = _inputs(session, scratch)
    training, held_out = _split(ids, recipe)
    spec = ModelSpec(kind="folder", name=str(folder))
    release()
    model: Any = load_dense(spec)
    model = model.to(device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    began = time.monotonic()

    def measured(point: str, of: Any) -> None:
        found = perplexity(of, held_out, recipe.context, recipe.windows, 1 if session.dry_run else 8, autocast=autocast)
        session.write(
            f"perplexity {point}", OK, perplexity=found.perplexity, window=found.window, windows=found.windows
        )

    measured("dense", model)
    one = time.monotonic() - began
    objective = Distill(kl_weight=1.0, hidden_weight=1.0)
    objective.attach(model)
    objective.place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sketch = SketchConfig(
        bits_per_weight=float(session.options["bits"]) if "model" in session.options else MADE_UP_BITS,
        rows=1,
        allocation="waterfill",
        output_scale=True,
        rounding="nearest",
    )
    swap_linears_(model)
    batches = _batches(training, recipe, device)
    with SecondMoments(compressed_layers(model)) as moments, torch.no_grad(), _autocast(device):
        for _ in range(recipe.calibration):
            model(input_ids=next(batches), use_cache=False)
    allocate_(model, sketch, moments.mean())
    measured("sketched", model)
    # Two more perplexities, the last one of a model that computes from bytes, and what packing takes.
    end = session.end - recipe.for_the_end - 4 * one
    if session.dry_run:
        end = min(end, time.monotonic() + 2)
    trained = _train(session, model, objective, batches, recipe, end, lambda: measured("halfway", model))
    session.write("training", OK, **trained, bits_per_weight=sketch.bits_per_weight, peak_gib=peak_gib(device))
    measured("trained", model)
    del objective
    return _pack(session, model, spec, Path(session.options["out"]) / "packed", measured, device)


def _train(
    session: Session,
    model: Any,
    objective: Distill,
    batches: Iterator[Tensor],
    recipe: Recipe,
    end: float,
    halfway: Any,
) -> dict[str, Any]:
    """Train until ``end``, at least one step."""
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak, betas=(0.9, 0.95), weight_decay=0.0)
    started, steps, losses, passed_half = time.monotonic(), 0, [], False
    while steps == 0 or time.monotonic() < end:
        done = min((time.monotonic() - started) / max(end - started, 1e-3), 1.0)
        if done >= 0.5 and not passed_half:
            passed_half = True
            halfway()
            model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak * min(20 * done + 0.01, 0.5 * (1 + math.cos(math.pi * done)))
        with _autocast(device):
            loss, _ = objective.loss(model, {"input_ids": next(batches)})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reproject_(model)
        steps += 1
        if steps & (steps - 1) == 0 or steps % 50 == 0:
            losses.append([steps, round(float(loss.detach()), 4)])
            if not math.isfinite(losses[-1][1]):
                raise RuntimeError(f"the loss is {losses[-1][1]} after {steps} steps")
    if not passed_half:
        halfway()
    settle(device)
    seconds = time.monotonic() - started
    tokens = steps * recipe.batch * recipe.context
    return {"steps": steps, "tokens": tokens, "tokens_per_second": tokens / seconds, "loss": losses}


def _pack(session: Session, model: Any, spec: Any, out: Path, measured: Any, device: torch.device) -> dict[str, Any]:
    """Write the packed folder, read it back, and cut what is larger than a shard."""
    import usllm
    from usllm.models.loading import load_config, load_generation_config
    from usllm.packed.description import ModelFiles
    from usllm.packed.export import export
    from usllm.packed.source import from_model

    # The tokenizer lies beside the dense model already; the fewer files, the easier they are brought home.
    files = ModelFiles(load_config(spec), None, load_generation_config(spec))
    inspection = export(from_model(model.cpu()), files, out, rest=_rest(model), max_shard_size=SHARD, overwrite=True)
    del model
    release()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measured("packed", usllm.load(out, dtype=dtype).to(device))
    cut = cut_all(out, SHARD)
    return {
        "folder": str(out),
        "files": sorted(path.name for path in cut),
        "bytes": sum(path.stat().st_size for path in cut),
        "bits_per_weight": inspection.totals()["bits_per_weight"],
        "bits_per_parameter": inspection.totals()["model_bits_per_weight"],
    }


def _rest(model: Any) -> Any:
    """How the embeddings are stored: as wide as a shard has room for; what is narrower still is cut afterwards."""
    from usllm.packed.export import RestStorage

    weights = model.get_input_embeddings().weight.numel()
    bits = next((bits for bits, each in _BLOCK_BITS.items() if weights * each / 8 <= SHARD), 4)
    return RestStorage(embeddings=bits, linears=max(bits, 8))


def _inputs(session: Session, scratch: Path) -> tuple[Path, Tensor]:
    """Folder of the dense model, and its token ids, int64 [n]; in a dry run both are made up, cut and joined."""
    if session.dry_run and "model" not in session.options:
        return _made_up(scratch)
    folder = joined_folder(Path(session.options["model"]), scratch)
    array = np.load(joined_file(Path(session.options["tokens"]), scratch), allow_pickle=False)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise Refused(
            f"--tokens={session.options['tokens']} holds {array.dtype} {array.shape}: one row of ids is wanted"
        )
    return folder, torch.from_numpy(array.astype(np.int64))


def _made_up(scratch: Path) -> tuple[Path, Tensor]:
    from benchmarks.gpu_parts.models import SMALL, dense_model

    folder = scratch / "made up"
    dense_model(SMALL["small"], torch.device("cpu")).save_pretrained(folder)
    cut_all(folder, 20_000)
    (scratch / "joined").mkdir()
    ids = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.uint16)
    np.save(scratch / "tokens.npy", ids)
    cut_all(scratch, 5_000)
    array = np.load(joined_file(scratch / "tokens.npy", scratch / "joined"), allow_pickle=False)
    return joined_folder(folder, scratch / "joined"), torch.from_numpy(array.astype(np.int64))


def _split(ids: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The text to train on, and the end of it to measure on."""
    held = recipe.windows * recipe.context
    least = held + recipe.batch * recipe.context
    if len(ids) < least:
        raise Refused(f"--tokens holds {len(ids)} ids, {least} are the least: make it of more text")
    return ids[:-held], ids[-held:]


def _batches(ids: Tensor, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """Sequences in a random order that is always the same, again and again: int64 [batch, context]."""
    generator = torch.Generator().manual_seed(0)
    sequences = ids[: len(ids) // recipe.context * recipe.context].view(-1, recipe.context)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for rows in order.split(recipe.batch):
            if len(rows) == recipe.batch:
                yield sequences[rows].to(device)


def _autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
