"""Continue a text, token by token on the screen."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from usllm.config import section_of
from usllm.config.packed import GenerateConfig, size_in_bytes
from usllm.models import ModelSpec
from usllm.models.loading import check_vocabulary, load_dense, load_tokenizer
from usllm.packed.loading import load
from usllm.runs.evaluate import choose_device
from usllm.runs.saved_run import find_checkpoint, load_sketched_
from usllm.system.errors import PackedFormatError, RunError, UserError, first_line
from usllm.system.files import expanded
from usllm.system.finite import refuse_nonfinite
from usllm.system.frames import with_room
from usllm.training import load_checkpoint
from usllm.training.checkpoint_section import CHECKPOINT_KEY


def generate(config: GenerateConfig) -> str:
    """Print the continuation while it is made.

    Returns:
        The continuation, without the prompt.

    Raises:
        UserError: The model cannot be loaded, or the prompt is empty or longer than its context.
        RunError: The model is not finite; names where first.
    """
    text = sys.stdin.read() if config.prompt == "-" else config.prompt
    if not text:
        raise UserError("prompt: is empty; give a text to go on from")
    device = choose_device(config.device)
    model, tokenizer = _packed(config, device) if config.folder is not None else _checkpoint(config, device)
    refuse_nonfinite(model, f"ckpt={config.ckpt}" if config.folder is None else f"model={config.folder}")
    ids = _tokenised(text, tokenizer, config.chat).to(device)
    check_vocabulary(model.config, int(ids.max()), "prompt")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + config.max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens={config.max_new_tokens}: with {ids.shape[1]} tokens of prompt that is more than the "
            f"model's {limit} positions; shorten one of them"
        )
    set_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = with_room(model.generate)(  # type: ignore[arg-type]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.max_new_tokens,
        streamer=streamer,
        logits_processor=LogitsProcessorList([_FiniteLogits()]),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


class _FiniteLogits(LogitsProcessor):
    """Stops where the model's numbers are lost: the most likely token of NaN is the first of the vocabulary."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores ``[batch, vocabulary]`` as they are.

        Raises:
            RunError: one of them is NaN.
        """
        if torch.isnan(scores).any():
            raise RunError(
                f"the scores of token {input_ids.shape[1] + 1} are NaN: a number on the way was too large; use "
                "dtype=float32"
            )
        return scores


def _tokenised(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> torch.Tensor:
    """Token ids [1, n]."""
    if not chat:
        return torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.long)
    if not tokenizer.chat_template:
        raise UserError("chat=true: this model's tokenizer has no chat template; leave chat=false")
    turn = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], dtype=torch.long)


def _packed(config: GenerateConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = str(config.folder)
    try:
        model = load(
            place,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            device_map=None if device.type == "cpu" else {"": str(device)},
            layout=config.layout,
            layout_memory=None if config.layout_memory is None else size_in_bytes(config.layout_memory),
        )
    except PackedFormatError as error:
        raise UserError(f"model={place}: {error}") from error
    source = expanded(place) if expanded(place).is_dir() else place
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a folder without a tokenizer fails in many ways
        raise UserError(f"model={place}: has no tokenizer that can be read ({first_line(error)})") from error
    return model, tokenizer


def _checkpoint(config: GenerateConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = find_checkpoint(str(config.ckpt))
    saved = load_checkpoint(path)
    if CHECKPOINT_KEY not in saved:
        raise UserError(f"ckpt={path}: was not written by usllm-train")
    spec = section_of(ModelSpec, saved[CHECKPOINT_KEY]["config"]["model"], "model")
    model = load_dense(spec)
    load_sketched_(model, saved)
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    cast(nn.Module, model).to(device=device, dtype=dtype)
    return model.eval(), load_tokenizer(spec)
