"""Lightning strategies for many devices, by the names that ``trainer.strategy`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from usllm.system.ranks import failing_together
from usllm.training.checkpoints import load_checkpoint


class _SavesTogether(Strategy):
    """A checkpoint that rank 0 cannot write ends all ranks, which would wait for it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        with failing_together():
            super().save_checkpoint(checkpoint, filepath, storage_options)


class DdpStrategy(_SavesTogether, DDPStrategy):
    """Every device has the whole model.

    Lightning's ``DDPStrategy`` without the broadcast of buffers at every forward pass: the states are the same on all
    ranks.
    """

    def __init__(self) -> None:
        super().__init__(broadcast_buffers=False, gradient_as_bucket_view=True)


class Fsdp2Strategy(_SavesTogether, ModelParallelStrategy):
    """FSDP2 over all devices: latents, gradients and optimizer state are sharded by output rows.

    Lightning's ``ModelParallelStrategy`` with three differences:

    - One dimension: all devices share the data, none of them a layer.
    - A checkpoint is one file, the same that one device writes, gathered on rank 0: any number of ranks under any
      strategy continues it, and ``usllm-eval`` and ``usllm-export`` read it.
    - It is restored before the optimizer exists, as under all other strategies. Lightning would fill the model before
      ``on_load_checkpoint`` has made room for the states, and calibrate a model that is about to be restored.

    Args:
        cpu_offload: keep latents, gradients and optimizer state in the memory of the host, where the step is computed;
            a layer's latents are copied to the device when it is their turn.
    """

    def __init__(self, cpu_offload: bool = False) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            # gradient norms of offloaded shards are summed on the CPU
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload and torch.cuda.is_available() else None,
        )
        self.cpu_offload = cpu_offload

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        """Start the process group and lay the devices out in one dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move what is not sharded; sharding has put the rest where it belongs."""
        assert self.lightning_module is not None
        for part in self.lightning_module.children():
            if not isinstance(part, FSDPModule):
                part.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole model in the memory of rank 0, tensor by tensor; empty on other ranks, which all must call it."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state in the memory of rank 0; empty on other ranks, which all must call it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return self._gathered(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file's content; its tensors stay on disk until each rank takes its shards."""
        return load_checkpoint(self.broadcast(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill this rank's shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Fill this rank's shards."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _sharded_like(parameters[number], value) for name, value in values.items()}
                for number, values in whole["state"].items()
            }
            optimizer.load_state_dict({**whole, "state": state})

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        def whole(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()  # all ranks take part, and all but rank 0 let go of it at once
            return value.cpu() if isinstance(value, Tensor) and self.is_global_zero else None

        def anything(value: Any) -> Any:
            return whole(value) if isinstance(value, Tensor) else value

        with torch.no_grad():
            gathered: dict[str, Any] = tree_map(anything, dict(state))
        return gathered if self.is_global_zero else {}


def _sharded_like(parameter: Tensor, value: Any) -> Any:
    """An entry of the optimizer's state, cut as its parameter is where it has the parameter's shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    here = value.to(parameter.device)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def build_strategy(strategy: Any) -> Any:
    """What ``trainer.strategy`` stands for: an object for the names below, anything else as it is, for Lightning.

    - ``ddp``: :class:`DdpStrategy`.
    - ``fsdp2``, ``fsdp2_cpu_offload``: :class:`Fsdp2Strategy`.
    """
    made: dict[str, Strategy] = {}
    if strategy == "ddp":
        made["ddp"] = DdpStrategy()
    elif strategy in ("fsdp2", "fsdp2_cpu_offload"):
        made[strategy] = Fsdp2Strategy(cpu_offload=strategy != "fsdp2")
    return made.get(strategy, strategy) if isinstance(strategy, str) else strategy
