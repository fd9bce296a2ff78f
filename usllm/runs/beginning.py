"""What a run finds out before it computes: its model's description, its text as tokens, whether they go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from usllm.compress import Compressor, swap_linears_
from usllm.compress.ceilings import refuse_unreachable
from usllm.compress.coverage import Coverage, coverage
from usllm.config import TrainConfig, compressor_of
from usllm.data.datamodule import TextDataModule
from usllm.data.overlap import SharedDocuments
from usllm.models.loading import check_context_length, load_config, load_tokenizer
from usllm.models.skeleton import skeleton
from usllm.runs.inputs import (
    build_data,
    refuse_batch_beyond_text,
    shared_documents,
    token_streams,
    with_window_starts,
)
from usllm.runs.report import print_coverage
from usllm.runs.trainer import build_nodes, devices_in
from usllm.stages import Allocate, Stage, refuse_wrong_order


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        config, plain: Its configuration, typed and plain, with the rules of its model's family resolved.
        model_config: Of the dense model.
        tokenizer: Of the model.
        compressor: Method and configuration.
        stages: Between loading and finetuning.
        covered: Which of the model's weights are compressed.
        data: The training text.
        streams: Token ids [n] by test set.
        shared: Documents of test sets that are in the training text.
    """

    config: TrainConfig
    plain: dict[str, Any]
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    compressor: Compressor
    stages: list[Stage]
    covered: Coverage
    data: TextDataModule
    streams: dict[str, Tensor]
    shared: list[SharedDocuments]


def begin(config: TrainConfig, plain: Mapping[str, Any], console: Console) -> Beginning:
    """Read descriptions and text, and refuse what cannot work before any long work.

    Raises:
        UserError: Something in the input does not work.
    """
    model_config = load_config(config.model)
    check_context_length(model_config, config.data.context_length)
    for window in config.evaluation.windows:
        check_context_length(model_config, window, "evaluation.windows")
    tokenizer = load_tokenizer(config.model)
    compressor = compressor_of(config.sketch, config.allocation)
    stages = list(build_nodes("stages", config.stages).values())
    refuse_wrong_order(stages)
    if not str(config.trainer.get("strategy")).startswith("fsdp2"):  # there one rank runs them for the others
        for stage in stages:
            stage.refuse_devices(devices_in(config.trainer))
    described = skeleton(model_config)
    covered = coverage(described, config.model.patterns)
    if any(isinstance(stage, Allocate) for stage in stages):
        refuse_unreachable(swap_linears_(described, config.model.patterns), compressor)
    config, plain = with_window_starts(config, plain, tokenizer, model_config)
    steps, tokens = config.trainer.get("max_steps"), config.trainer.get("tokens")
    length = f"{config.trainer.get('epochs')} epochs" if steps is None else f"{steps} steps"
    length = length if tokens is None else f"{tokens:,} tokens"
    length = "block by block" if config.block_by_block else length
    console.print(f"Run {config.name}: {length}, in {config.run_dir}", markup=False, soft_wrap=True)
    if stages:
        print_coverage(covered, console)
    else:
        console.print("Compressing nothing: there are no stages (stages=none), the dense model is finetuned")
    console.print("Reading and tokenising text …")
    data = build_data(config.data, tokenizer, config.seed, model_config)
    if steps != 0 and not config.resume:  # stages have batches of their own, and what was begun goes on
        refuse_batch_beyond_text(config.data, data)
    return Beginning(
        config=config,
        plain=dict(plain),
        model_config=model_config,
        tokenizer=tokenizer,
        compressor=compressor,
        stages=stages,
        covered=covered,
        data=data,
        streams=token_streams(config.evaluation, tokenizer, data),
        shared=shared_documents(config.evaluation, data),
    )
