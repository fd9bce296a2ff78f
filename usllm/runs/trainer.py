"""Lightning's parts from configuration: callbacks and loggers one by one, and the Trainer."""

from __future__ import annotations

from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from usllm.config import TrainConfig
from usllm.config.structure import typed_arguments
from usllm.config.validation import user_error
from usllm.system.errors import UserError
from usllm.system.machine import choose_precision
from usllm.training import build_strategy

_OURS = ("max_steps", "epochs", "tokens", "max_time")
"""The length of the run, which Lightning gets as its number of steps, and the limit, which is a callback's."""
_PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def build_nodes(group: str, nodes: dict[str, Any] | None) -> dict[str, Any]:
    """Instantiate the named nodes of a group; ``null`` nodes are left out.

    Raises:
        UserError: a node's class does not exist or refuses its arguments.
    """
    built = {}
    for name, node in (nodes or {}).items():
        if node is None:
            continue
        try:
            given = {key: value for key, value in node.items() if not str(key).startswith("_")}
            problems: list[str] = []
            typed = typed_arguments(get_object(str(node.get("_target_"))), given, f"{group}.{name}", problems)
            if problems:
                raise user_error(problems)
            built[name] = instantiate({**node, **typed}, _convert_="all")
        except HydraException as error:
            cause = error.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            reason = str(cause or error).strip().splitlines()[0]
            raise UserError(f"{group}.{name} ({node.get('_target_')}) cannot be made: {reason}") from error
        except (ImportError, AttributeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{group}.{name}._target_={node.get('_target_')}: cannot be found ({reason})") from error
    return built


def devices_in(trainer: dict[str, Any]) -> int:
    """Number of processes that share a step, as far as the configuration says."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        import torch

        devices = max(1, torch.cuda.device_count())
    return devices * int(nodes)


def steps_of(config: TrainConfig) -> int | None:
    """Optimizer steps of the run, of a budget of tokens rounded up; ``None`` where only the text tells (``epochs``)."""
    trainer, data = config.trainer, config.data
    if (tokens := trainer.get("tokens")) is None:
        steps: int | None = trainer.get("max_steps")
        return steps
    sequences = data.batch_size * int(trainer.get("accumulate_grad_batches", 1)) * devices_in(trainer)
    return -(-int(tokens) // (sequences * data.context_length))


def refuse_by_lightning(config: TrainConfig) -> None:
    """Let Lightning look at the group ``trainer`` before any text is read: it knows the devices of this machine.

    Raises:
        UserError: Lightning refuses an argument.
    """
    build_trainer(config, 1, [], [])


def build_trainer(config: TrainConfig, max_steps: int, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """The Trainer of a run.

    Args:
        max_steps: optimizer steps of the run.
        callbacks: in the order of their hooks; Lightning itself puts those that save checkpoints last.
        loggers: none is allowed.

    Raises:
        UserError: Lightning refuses an argument.
    """
    arguments = {key: value for key, value in config.trainer.items() if key not in _OURS}
    accelerator = str(arguments.get("accelerator", "auto"))
    arguments["precision"] = choose_precision(str(arguments.get("precision", "auto")), accelerator)
    # The sampler unrolls all passes into one Lightning epoch (resume is exact only away from an epoch's end), and it
    # shares the sequences out among ranks itself.
    arguments |= {"max_steps": max_steps, "max_epochs": 1, "use_distributed_sampler": False}
    # Lightning would put one of its own in the place of a callback that was removed.
    arguments.setdefault("enable_checkpointing", any(isinstance(callback, Checkpoint) for callback in callbacks))
    arguments.setdefault("enable_progress_bar", any(isinstance(callback, ProgressBar) for callback in callbacks))
    if (profiler := arguments.get("profiler")) is not None:
        # Lightning's own would hand their result to a logger that is silent; these write files.
        arguments["profiler"] = _PROFILERS[profiler](dirpath=config.run_dir, filename="profile")
    arguments["strategy"] = build_strategy(arguments.get("strategy", "auto"))
    try:
        return Trainer(**arguments, callbacks=callbacks, logger=loggers or False, default_root_dir=config.run_dir)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        way_out = "; trainer=cpu runs on any machine" if "backend found" in str(error) else ""
        raise UserError(f"trainer: {error}{way_out}") from error
