"""Single tokens in narrow types are attended to in float32 on the CPU; all else is transformers' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_packed import logits, pack, sketched_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import usllm
from usllm.packed.attention import NAME, attention


def rows(queries: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries of six heads, keys and values of two."""
    draw = torch.Generator().manual_seed(0)
    sizes = (6, queries), (2, keys), (2, keys)
    query, key, value = (torch.randn(3, heads, n, 16, generator=draw).to(dtype) for heads, n in sizes)
    return query, key, value


def mask_of(kind: str | None, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The second of three sequences looks back on its last half only."""
    seen = torch.ones(3, 1, 1, keys, dtype=torch.bool)
    seen[1, ..., : keys // 2] = False
    if kind is None:
        return None
    return seen if kind == "bool" else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


LAYER: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
@pytest.mark.parametrize("keys", [1, 7, 130])
def test_a_single_query_is_computed_in_float32_and_rounded_once(
    keys: int, mask: str | None, dtype: torch.dtype
) -> None:
    given, seen = rows(1, keys, dtype), mask_of(mask, keys, dtype)
    found, weights = attention(LAYER, *given, seen, scaling=0.3)
    exact = sdpa_attention_forward(
        LAYER, *(each.double() for each in given), None if seen is None else mask_of("bool", keys, dtype), scaling=0.3
    )[0]
    assert weights is None and found.dtype == dtype and found.shape == (3, 1, 6, 16)
    step = torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= 0.51 * step * exact.abs() + 1e-5).all()


@pytest.mark.parametrize(("queries", "dtype"), [(5, torch.bfloat16), (1, torch.float32), (5, torch.float32)])
def test_all_else_is_that_of_transformers(queries: int, dtype: torch.dtype) -> None:
    given = rows(queries, 5, dtype)
    assert torch.equal(attention(LAYER, *given, None)[0], sdpa_attention_forward(LAYER, *given, None)[0])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tokens_one_by_one_have_the_logits_of_a_prompt(architecture: str, tmp_path: Path) -> None:
    model = usllm.load(pack(sketched_model(architecture), tmp_path / "packed"), dtype=torch.bfloat16, layout="decoded")
    assert model.config._attn_implementation == NAME
    ids = torch.arange(40).view(2, 20)
    padding = torch.ones_like(ids)
    padding[1, :6] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=padding, use_cache=False).logits
        cache, found = None, []
        for place in range(ids.shape[1]):
            seen = {"attention_mask": padding[:, : place + 1], "past_key_values": cache, "use_cache": True}
            positions = (padding[:, : place + 1].cumsum(-1) - 1).clamp(min=0)[:, -1:]
            output = model(ids[:, place : place + 1], position_ids=positions, **seen)
            cache = output.past_key_values
            found.append(output.logits)
        exact = usllm.load(tmp_path / "packed", dtype=torch.float32, layout="decoded")
        right = exact(ids, attention_mask=padding, use_cache=False).logits
    one_by_one = torch.cat(found, 1).float()
    kept = padding.bool()
    # Rounded in other places, and no further from float32 than the prompt is.
    assert (one_by_one - right)[kept].abs().mean() <= 1.2 * (whole.float() - right)[kept].abs().mean()


def test_static_cache_gives_the_tokens_of_one_that_grows(tmp_path: Path) -> None:
    model: Any = usllm.load(pack(sketched_model(), tmp_path / "packed"), dtype=torch.bfloat16)
    ids = torch.arange(12).view(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    grown = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **options), grown)


def test_an_attention_that_the_caller_names_is_taken(tmp_path: Path) -> None:
    folder = pack(sketched_model(), tmp_path / "packed")
    for name in ("sdpa", "eager"):
        assert usllm.load(folder, attn_implementation=name).config._attn_implementation == name
    wanted = logits(usllm.load(folder, dtype=torch.bfloat16, attn_implementation="sdpa"))
    assert torch.equal(logits(usllm.load(folder, dtype=torch.bfloat16)), wanted)


def test_a_pickled_model_attends_in_a_process_that_has_loaded_nothing(tmp_path: Path) -> None:
    model: Any = usllm.load(pack(sketched_model(), tmp_path / "packed"), dtype=torch.bfloat16)
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model.generate(torch.arange(6)[None], do_sample=False, max_new_tokens=6)[0].tolist())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == str(
        model.generate(torch.arange(6)[None], do_sample=False, max_new_tokens=6)[0].tolist()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_keep_the_name_that_transformers_knows(dtype: torch.dtype, tmp_path: Path) -> None:
    assert usllm.load(pack(sketched_model(), tmp_path / "packed"), dtype=dtype).config._attn_implementation == "sdpa"


def test_it_is_not_saved(tmp_path: Path) -> None:
    usllm.load(pack(sketched_model(), tmp_path / "packed")).save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()
