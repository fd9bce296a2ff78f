"""Everything that a CUDA card has to show, by one command within a given time: right results, and how fast.

    python benchmarks/gpu.py --out DIR [--minutes 9] [--model FOLDER --tokens FILE] [--dry-run]

In this order, each with its share of the time: (a) correctness: the tests marked ``cuda``; (b) kernels: their times,
and launch parameters for this card; (c) training: a step, sketched over dense; (d) generation from packed layers;
(e) finetuning, with --model and --tokens only. Every result is a line of DIR/results.jsonl as soon as it is there; what
fails leaves its traceback there and the next goes on; called again with the same DIR, what is missing is run.

Needs torch, triton, transformers, safetensors, tokenizers, numpy, pytest and hypothesis; nothing has to be installed of
this repository. ``python benchmarks/gpu_table.py`` makes the tables of docs/results.md from kept results.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

STARTED = time.monotonic()

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this file holds modules of other packages' names
    from benchmarks.gpu_parts.runner import main

    sys.exit(main(started=STARTED))
