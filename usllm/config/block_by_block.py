"""What a run that never holds its model can do, and what it refuses with the way out."""

from __future__ import annotations

from typing import Any

from usllm.compress.budgets import budget_needs
from usllm.config.rules import Problems
from usllm.config.schema import TrainConfig

_STAGES = {f"usllm.stages.{name}" for name in ("Calibrate", "Allocate", "Start", "Reconstruct")}
_ALONE = {"devices": (1, [0], "1"), "num_nodes": (1,), "strategy": ("auto",)}
_ACCELERATORS = ("cpu", "gpu", "cuda", "auto")


def check_block_by_block(config: TrainConfig, problems: Problems) -> None:
    """The rules of ``block_by_block=true``; none without it."""
    if not config.block_by_block:
        return
    why = "block_by_block=true holds one block of the model"

    def refuse(key: str, value: Any, way_out: str) -> None:
        problems.append(f"{key}={value}: {why}; {way_out}")

    trainer = config.trainer
    if trainer.get("max_steps") != 0:
        key = next((key for key in ("max_steps", "tokens", "epochs") if trainer.get(key) is not None), "max_steps")
        way_out = "end to end needs all of them: pass trainer.max_steps=0, trainer.epochs=null and trainer.tokens=null"
        refuse(f"trainer.{key}", trainer.get(key), way_out)
    for key, allowed in _ALONE.items():
        value = trainer.get(key, allowed[0])
        if value not in allowed:
            refuse(f"trainer.{key}", value, "it runs on one device: pass trainer=cpu or trainer=gpu")
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in _ACCELERATORS:
        refuse("trainer.accelerator", accelerator, f"choose one of {', '.join(_ACCELERATORS)}")
    if config.model is not None and config.model.kind == "random":
        refuse("model.kind", "random", "that model lies in no file: give a folder, a GGUF file or a name on the hub")
    rule = config.allocation.layer_budget
    if "gradient" in budget_needs(rule):
        way_out = "gradients go through all of them: pass allocation.layer_budget=equal or importance"
        refuse("allocation.layer_budget", rule, way_out)
    _check_stages(config.stages or {}, refuse, problems)
    samples = (config.callbacks or {}).get("text_samples")
    if isinstance(samples, dict) and samples.get("side_by_side"):
        way_out = "usllm-generate model=<run>/packed writes with the result: leave it out"
        refuse("callbacks.text_samples.side_by_side", "true", way_out)
    if config.study is not None:
        refuse("study", config.study.get("name"), "a study loads whole models: leave it out")


def _check_stages(stages: dict[str, Any], refuse: Any, problems: Problems) -> None:
    targets = {name: node.get("_target_") for name, node in stages.items() if isinstance(node, dict)}
    for name, target in targets.items():
        if target not in _STAGES:
            refuse("stages", name, "this stage may read all of it: leave it out")
    found = {target.rpartition(".")[2]: stages[name] for name, target in targets.items() if target in _STAGES}
    if "Reconstruct" not in found or "Calibrate" not in found:
        problems.append("stages: block_by_block=true trains blocks; pass stages=[default,reconstruct]")
    elif (blocks := found["Reconstruct"].get("blocks")) is not None:
        refuse("stages.reconstruct.blocks", blocks, "all of them are written at the end: pass null")
