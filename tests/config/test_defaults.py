"""A default that stands in YAML and in Python is one value; the dataclass or signature is its source.

Where the two differ on purpose, :data:`DIFFERENT` says why; a row that is no longer needed fails too.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from omegaconf import OmegaConf

from usllm.callbacks import ImportanceCalibration, SketchReprojection
from usllm.compress.registry import method
from usllm.config import AllocationConfig, DataConfig, EvalConfig, HarnessConfig, TrainConfig
from usllm.config.packed import ExportConfig, GenerateConfig, InspectConfig, RestConfig
from usllm.data.datamodule import TextDataModule
from usllm.data.packing import pack
from usllm.eval.harness import run_harness
from usllm.packed.export import RestStorage
from usllm.packed.loading import load
from usllm.reports.settings import ReportSettings
from usllm.sketch import SketchConfig
from usllm.stages import Calibrate
from usllm.training.objectives import OBJECTIVES

CONF = Path(__file__).parents[2] / "conf"
COMMANDS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "report": ReportSettings,
}
SECTIONS = ("model", "data", "sketch", "allocation", "objective", "optimizer", "evaluation")
"""Groups whose options are sections of the schema."""
OBJECTS = ("stages", "callbacks", "logger")
"""Groups whose options name the classes that they are made into."""
# Two places in Python, and the keys whose names differ there.
TWINS: list[tuple[Any, Any, dict[str, str]]] = [
    (DataConfig, TextDataModule, {}),
    (DataConfig, pack, {}),
    (AllocationConfig, SketchConfig, {"name": "allocation"}),
    (RestConfig, RestStorage, {}),
    (HarnessConfig, run_harness, {}),
    (Calibrate, ImportanceCalibration, {}),
    (Calibrate, SketchReprojection, {"sequences": "calibration_sequences"}),
    (Calibrate, ExportConfig, {"sequences": "calibration_sequences"}),
    (GenerateConfig, load, {}),
]

_EXPERIMENT = "what the experiment is there for"
DIFFERENT = {
    "stages/calibrate: calibrate.reuse": "runs of the commands share it; plain Lightning keeps nothing unasked",
    "callbacks/importance_calibration: importance_calibration.reuse": "the same",
    "callbacks/checkpoint: checkpoint.dirpath": "a run of the commands has a folder; else Lightning chooses",
    "logger/csv: csv.save_dir": "the same",
    "logger/wandb: wandb.save_dir": "the same",
    "DataConfig and TextDataModule: window_start": "auto needs the model's family, which only a configuration knows",
    "DataConfig and pack: window_start": "the same",
    "DataConfig and TextDataModule: mixture": "none; an argument's default is never a dictionary",
    "experiment=layer_error: shown": _EXPERIMENT,
    "experiment=smollm2_quality: variants": _EXPERIMENT,
    "experiment=ste_convergence: variants": _EXPERIMENT,
}
"""``<place>: <key>`` -> why the two differ."""

Pair = tuple[str, Any, Any]


def python_defaults(source: Any) -> dict[str, Any]:
    """Defaults of a dataclass, a class or a function by name; what has none is left out."""
    if dataclasses.is_dataclass(source):
        fields = dataclasses.fields(source)
        made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
        return made | {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    parameters = inspect.signature(source).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def plain(value: Any) -> Any:
    """Lists for tuples, strings for paths, and of a variable or of another key what holds without it."""
    if isinstance(value, str) and (unset := re.fullmatch(r"\$\{oc\.(?:env|select):[\w.]+,'?(.*?)'?\}", value)):
        return unset[1]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def section_in(hint: Any) -> Any:
    """The dataclass in ``Section`` or ``Section | None``, else None."""
    parts = () if typing.get_origin(hint) is dict else (hint, *typing.get_args(hint))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def source_of(group: str, node: Mapping[str, Any]) -> Any:
    """What a group is made into that the schema leaves to others; None where they are objects named by the YAML."""
    if group == "sketch":
        return method(node.get("method", "sketch")).Options
    return OBJECTIVES[node["name"]] if group == "objective" else None


def pairs_in(source: Any, node: Mapping[str, Any], path: str = "") -> Iterator[Pair]:
    """Pairs of a section, with those of the sections in it."""
    defaults = python_defaults(source)
    hints = typing.get_type_hints(source) if dataclasses.is_dataclass(source) else {}
    for key, value in node.items():
        inner = section_in(hints.get(key)) or (source_of(key, value) if isinstance(value, dict) else None)
        if inner is not None and isinstance(value, dict):
            yield from pairs_in(inner, value, f"{path}{key}.")
        elif key in defaults and key not in OBJECTS:
            yield f"{path}{key}", value, defaults[key]


def of_command(command: str) -> list[Pair]:
    """Pairs of a command's configuration with nothing chosen."""
    return list(pairs_in(COMMANDS[command], OmegaConf.to_container(composed(command=command))))  # type: ignore[arg-type]


def of_option(group: str, option: str) -> list[Pair]:
    """Pairs of an option of a group; where it stands on another option, without the keys that it is there for."""
    node = OmegaConf.to_container(composed(f"{group}={option}")[group])
    assert isinstance(node, dict)
    source = source_of(group, node) or section_in(typing.get_type_hints(TrainConfig)[group])
    chosen = {"name"} | there_for(group, option)
    return [pair for pair in pairs_in(source, node) if pair[0].partition(".")[0] not in chosen]


def there_for(group: str, option: str) -> set[str]:
    """Keys by which an option differs from the one that it stands on, and that one from the next."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert isinstance(node, dict)
    below = [base for base in node.get("defaults", []) if isinstance(base, str) and base != "_self_"]
    return set(node).union(*(there_for(group, base) for base in below)) if below else set()


def of_objects(file: str) -> list[Pair]:
    """Pairs of a file whose nodes become objects of usllm; objects of Lightning have their defaults there."""
    found: list[Pair] = []
    for name, node in OmegaConf.to_container(OmegaConf.load(CONF / f"{file}.yaml")).items():  # type: ignore[union-attr]
        target = node.get("_target_", "") if isinstance(node, dict) else ""
        if target.startswith("usllm."):
            module, _, attribute = target.rpartition(".")
            found += pairs_in(getattr(importlib.import_module(module), attribute), node, f"{name}.")
    return found


def of_study(experiment: str) -> list[Pair]:
    """Pairs of an experiment's study, without the settings that the experiment is there for."""
    study = OmegaConf.to_container(composed(f"experiment={experiment}"))["study"]  # type: ignore[index,call-overload]
    if study is None:
        return []
    module = importlib.import_module(f"usllm.experiments.{study['name']}")
    settings = next(
        value
        for value in vars(module).values()
        if getattr(value, "__module__", "") == module.__name__ and dataclasses.is_dataclass(value)
    )
    return list(pairs_in(settings, study))


def of_twins(source: Any, twin: Any, names: Mapping[str, str]) -> list[Pair]:
    """Pairs of two places in Python."""
    first, second = python_defaults(source), python_defaults(twin)
    named = {key: names.get(key, key) for key in first}
    return [(key, first[key], second[other]) for key, other in named.items() if other in second]


def options(*groups: str) -> list[tuple[str, str]]:
    """Options of groups, as (group, name)."""
    return [(group, path.stem) for group in groups for path in sorted((CONF / group).glob("*.yaml"))]


PLACES: dict[str, Callable[[], list[Pair]]] = (
    {f"usllm-{name}": partial(of_command, name) for name in COMMANDS}
    | {f"{group}={name}": partial(of_option, group, name) for group, name in options(*SECTIONS) if name != "base"}
    | {f"{group}/{name}": partial(of_objects, f"{group}/{name}") for group, name in options(*OBJECTS)}
    | {f"experiment={name}": partial(of_study, name) for _, name in options("experiment")}
    | {f"{a.__name__} and {b.__name__}": partial(of_twins, a, b, names) for a, b, names in TWINS}
)


@cache
def differing(place: str) -> tuple[dict[str, str], int]:
    """The pairs of a place that are not equal, and the number of all."""
    pairs = [(key, plain(a), plain(b)) for key, a, b in PLACES[place]()]
    found = {f"{place}: {key}": f"{a!r} and {b!r}" for key, a, b in pairs if a != b}
    return found, len(pairs)


@pytest.mark.parametrize("place", PLACES)
def test_defaults_agree(place: str) -> None:
    assert {key: values for key, values in differing(place)[0].items() if key not in DIFFERENT} == {}


def test_all_places_are_looked_at() -> None:
    """Every group of conf has a source in Python, or one that is not ours; and the pairs are found."""
    elsewhere = {"experiment", "trainer", "hydra", "sweep", "local"}  # of Lightning, of Hydra, of W&B, of a machine
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert groups - elsewhere == set(SECTIONS) | set(OBJECTS)
    assert sum(differing(place)[1] for place in PLACES) > 300


def test_every_setting_stands_in_yaml() -> None:
    """A field that no file shows could be set by nobody who has not read the source."""
    for command, cls in COMMANDS.items():
        assert {field.name for field in dataclasses.fields(cls)} - set(composed(command=command)) == set(), command
    for group in set(SECTIONS) - {"sketch", "objective"}:
        section = section_in(typing.get_type_hints(TrainConfig)[group])
        shown = {key for _, name in options(group) if name != "base" for key in composed(f"{group}={name}")[group]}
        assert {field.name for field in dataclasses.fields(section)} - shown == set(), group
    in_allocation = {field.name for field in dataclasses.fields(AllocationConfig)} | {"allocation"}
    for _, name in options("sketch"):
        node = composed(f"sketch={name}").sketch
        fields = {field.name for field in dataclasses.fields(source_of("sketch", node))}
        assert fields - in_allocation - set(node) == set(), f"sketch={name}"
    for _, name in options("objective"):
        node = composed(f"objective={name}").objective
        assert python_defaults(source_of("objective", node)).keys() - set(node) == set(), f"objective={name}"


def test_differences_on_purpose_are_still_there() -> None:
    assert DIFFERENT.keys() - {key for place in PLACES for key in differing(place)[0]} == set()
