"""What vLLM answers, in a process of its own: ``python generating.py request.json answer.json``.

A request holds the arguments of ``LLM``, token ids of the prompts and the arguments of ``SamplingParams``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer a request."""
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(_answer(**request)))


def _answer(engine: dict[str, Any], prompts: list[list[int]], sampling: dict[str, Any]) -> dict[str, Any]:
    """The ``outputs``, and the ``layouts`` that the compressed layers had while they were computed.

    An output is the tokens of a prompt and, where asked for, the likeliest one at each of its places but the first.
    """
    from vllm import LLM, SamplingParams

    model = LLM(**engine)
    given: Any = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = model.generate(given, SamplingParams(temperature=0.0, **sampling))
    found = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "choices": [_likeliest(place) for place in (output.prompt_logprobs or [])[1:]],
        }
        for output in outputs
    ]
    (layouts,) = model.apply_model(_layouts)  # there is one worker
    return {"outputs": found, "layouts": layouts}


def _layouts(model: Any) -> dict[str, str]:
    from usllm.packed.linear import packed_layers

    return {name: layer.layout for name, layer in packed_layers(model).items()}


def _likeliest(place: Any) -> int:
    return int(max(place, key=lambda token: (place[token].logprob, -token)))  # of equal ones the first, as argmax


if __name__ == "__main__":
    main()
