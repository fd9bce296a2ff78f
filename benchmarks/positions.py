"""Loss by position in long windows of WikiText-2's test text: a checkpoint of usllm-train beside its dense model.

python benchmarks/positions.py CHECKPOINT [--window 2048] [--windows 16] [--every 6] [--json FILE]

CHECKPOINT is a file or the directory of a run; the text is that in $USLLM_DATA.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from usllm.config.validation import section_of
from usllm.eval.windows import measured_windows
from usllm.models import ModelSpec
from usllm.models.loading import load_dense, load_tokenizer
from usllm.runs.saved_run import find_checkpoint, load_sketched_, stored_config
from usllm.system.files import write_json
from usllm.system.machine import choose_autocast, machine
from usllm.training import load_checkpoint

EDGES = (0, 16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Positions at which the means are cut."""


def losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Cross-entropy of each token behind the first: fp32 [windows, window - 1], nats.

    Args:
        model: A causal model on the CPU.
        windows: Token ids, int64 [windows, window].
    """
    dtype, found = choose_autocast("auto", torch.device("cpu")), []
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            found.append(functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.stack(found)


def by_position(values: Tensor) -> dict[str, float]:
    """Means between two edges, by the positions that are predicted.

    Args:
        values: [windows, window - 1]; the first column is position 1.
    """
    cuts = itertools.pairwise(edge for edge in EDGES if edge <= values.shape[1] + 1)
    return {f"{max(low, 1)} to {high - 1}": float(values[:, max(low - 1, 0) : high - 1].mean()) for low, high in cuts}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--every", type=int, default=6, help="every so many windows of the text one is taken")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    checkpoint = find_checkpoint(given.checkpoint)
    saved = load_checkpoint(checkpoint)
    spec = section_of(ModelSpec, stored_config(saved, checkpoint)["model"], "model")
    model, tokenizer = load_dense(spec).eval(), load_tokenizer(spec)
    text = (Path(os.environ["USLLM_DATA"]) / "wikitext2.test.raw.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = measured_windows(ids, given.window, given.windows * given.every, name="wikitext2")[:: given.every]
    dense = by_position(losses(model, windows))
    load_sketched_(model, saved)
    compressed = by_position(losses(model.eval(), windows))
    print(f"{len(windows)} windows of {given.window} tokens, one of every {given.every}; nats a token")
    for place, value in dense.items():
        print(
            f"{place:>14}  dense {value:.3f}  compressed {compressed[place]:.3f}  apart {compressed[place] - value:.3f}"
        )
    if given.json is not None:
        what = {"window": given.window, "windows": len(windows), "every": given.every, "machine": machine()}
        write_json(given.json, {**what, "dense": dense, "compressed": compressed})


if __name__ == "__main__":
    main()
