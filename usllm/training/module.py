"""The LightningModule: a causal language model trained through its weight sketch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from usllm.compress import (
    DEFAULT_PATTERNS,
    as_compressor,
    compressed_layers,
    load_plans_,
    save_plans,
    swap_linears_,
    to_section,
)
from usllm.compress.gradients import spread_gradients_
from usllm.data.batches import NO_TARGET, model_inputs
from usllm.system.errors import UserError
from usllm.system.ranks import alone, failing_together, ranks, shared_from_rank_zero
from usllm.training.checkpoint_section import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_KEY,
    checked_section,
    recount_micro_batches_,
)
from usllm.training.checkpoints import load_checkpoint
from usllm.training.differences import compression_differences, run_differences
from usllm.training.objectives import Batch, Objective, next_token_loss
from usllm.training.optimization import OptimizerConfig, build_optimizer, build_schedule
from usllm.training.preparing import Preparing
from usllm.training.sharding import load_on_rank_zero, shard_
from usllm.training.step_loss import StepLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16}


class SketchFinetuner(LightningModule):
    """Finetunes a dense model through the sketch of its linear layers.

    Before ``ImportanceCalibration`` (or a checkpoint) has set the layers' plans, the model is exactly the dense one.

    Args:
        load_model: returns the dense model, fp32 (the latents of a straight-through estimator lose small updates in
            bf16). Called once, in ``configure_model``.
        sketch: a compressor, or the options of a method, such as ``SketchConfig``; a checkpoint made under another
            configuration is refused.
        objective: what is minimised. Validation is cross-entropy whatever the objective.
        optimizer: AdamW and its schedule over ``trainer.max_steps``.
        patterns: names of the linear layers to sketch.
        config: the run's resolved configuration as plain Python, stored in checkpoints.
        gradient_checkpointing: recompute activations in the backward pass.
        preparation: what happens to the freshly loaded model before it is trained (:mod:`usllm.stages`);
            ``ImportanceCalibration`` brings one where there is none. A run that continues does without.
    """

    model: nn.Module | None

    def __init__(
        self,
        load_model: Callable[[], PreTrainedModel],
        sketch: Any,
        objective: Objective,
        optimizer: OptimizerConfig,
        patterns: Sequence[str] = DEFAULT_PATTERNS,
        config: Mapping[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        preparation: Preparing | None = None,
    ) -> None:
        super().__init__()
        self.load_model = load_model
        self.compressor = as_compressor(sketch)
        self.objective = objective
        self.optimizer_config = optimizer
        self.patterns = tuple(patterns)
        self.run_config = dict(config or {})
        self.gradient_checkpointing = gradient_checkpointing
        self.preparation = preparation
        self.model = None
        self.validation_loss = MeanMetric()
        self.step_loss = StepLoss()

    def configure_model(self) -> None:
        """Load the dense model, give the objective its teacher, swap the linear layers, and prepare or restore them.

        Safe to call again. Latents exist afterwards, whatever the method: sharding and the optimizer find them there.
        ``trainer.ckpt_path``, set before ``fit``, names the checkpoint of a run that continues; where it is given to
        ``fit`` instead, the preparation is made and then replaced by what the checkpoint holds.
        """
        if self.model is not None:
            return
        with torch.device("cpu"):  # not the card, on which Lightning has new tensors made here: stages name devices
            mesh, saved = self._data_parallel_mesh(), self._saved_section()
            preparation = self.preparation if saved is None else None
            if preparation is not None and mesh is not None:  # the dense model is looked at in shards, and loaded again
                dense = load_on_rank_zero(self.load_model)
                swap_linears_(dense, self.patterns)
                shard_(dense, mesh, self._cpu_offload())
                preparation.look(self, dense)
                del dense
            if mesh is None:
                with failing_together():
                    loaded = self.load_model()
            else:
                loaded = load_on_rank_zero(self.load_model)
            self.objective.attach(loaded)
            swap_linears_(loaded, self.patterns)
            model: nn.Module = loaded
            if saved is not None:
                load_plans_(model, saved["plans"], self.compressor)
            elif preparation is not None:
                self._prepare(model, preparation, mesh)
            if self.gradient_checkpointing:
                # transformers 5.23 renamed it, and warns about the old name
                old_name = loaded.gradient_checkpointing_enable
                getattr(loaded, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
            if mesh is not None:
                self._shard_(model, mesh)
            self.model = model.train()  # transformers hands models out in evaluation mode, and Lightning keeps it

    def _prepare(self, model: nn.Module, preparation: Preparing, mesh: DeviceMesh | None) -> None:
        if mesh is None:
            model.to(self.trainer.strategy.root_device)
            preparation.look(self, model)
            preparation.change(self, model, together=ranks().world_size > 1)
            return
        with failing_together():
            if ranks().rank == 0:
                with alone():
                    preparation.change(self, model)
        plans = shared_from_rank_zero(save_plans(model))
        if ranks().rank != 0:
            load_plans_(model, plans, self.compressor)
            for layer in compressed_layers(model).values():
                layer.states_arrived()  # with the other tensors, when the model is sharded

    def _saved_section(self) -> dict[str, Any] | None:
        """What usllm has written into the checkpoint that training will continue from, as far as that is known yet."""
        path = None if self._trainer is None else self.trainer.ckpt_path
        if path is None or not Path(path).is_file():
            return None
        return checked_section(load_checkpoint(path), to_continue=self.trainer.training)

    def _cpu_offload(self) -> bool:
        return bool(getattr(self.trainer.strategy, "cpu_offload", False))

    def _data_parallel_mesh(self) -> DeviceMesh | None:
        """The devices to shard the model over; ``None`` where each holds a whole one, or there is only one."""
        return None if self._device_mesh is None else self._device_mesh["data_parallel"]

    def _shard_(self, model: nn.Module, mesh: DeviceMesh) -> None:
        cpu_offload = self._cpu_offload()
        for teacher in self.objective.networks():
            shard_(teacher.to(dtype=self._compute_dtype()), mesh, cpu_offload)
        shard_(model, mesh, cpu_offload)

    def _compute_dtype(self) -> torch.dtype:
        return _COMPUTE_DTYPES.get(str(self.trainer.precision).split("-")[0], torch.float32)

    @property
    def network(self) -> nn.Module:
        """The language model with its sketched layers.

        Raises:
            RuntimeError: ``configure_model`` has not been called.
        """
        if self.model is None:
            raise RuntimeError("SketchFinetuner.configure_model has not been called: there is no model")
        return self.model

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and the schedule, advanced once per optimizer step."""
        optimizer = build_optimizer(self.network, self.optimizer_config, fused=self._compute_dtype() != torch.float16)
        # It could unscale fp16 gradients itself, and Lightning refuses to clip those, in whatever precision it trains.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        # trainer.estimated_stepping_batches would build the training loader before a checkpoint has restored its state
        schedule = build_schedule(optimizer, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def on_fit_start(self) -> None:
        """Move the teacher, if there is one, to the device and the precision of the run."""
        if self._device_mesh is None:  # else it was sharded together with the model
            self.objective.place(self.device, self._compute_dtype())

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits ``[sequences, context, vocabulary]`` of ``input_ids`` ``[sequences, context]``."""
        places = {} if position_ids is None else {"position_ids": position_ids}
        return self.network(input_ids=input_ids, use_cache=False, **places).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro batch, over all its places."""
        loss, parts = self.objective.loss(self.network, batch)
        self.step_loss.add(batch, loss, parts)
        return loss

    def on_train_start(self) -> None:
        """Begin with the first micro batch of an optimizer step."""
        self.step_loss.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let methods that train their states gather the gradients of these; Lightning clips afterwards.

        Logs the step's loss: in ``on_train_batch_end`` it would come after the checkpoint of the step.
        """
        spread_gradients_(self.network)
        means = self.step_loss.finish_(optimizer, lambda share: self.trainer.strategy.reduce(share, reduce_op="mean"))
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the cross-entropy of one validation batch."""
        input_ids = batch["input_ids"]
        labels = batch.get("labels", input_ids)
        places = input_ids.numel() - len(input_ids)
        targets = int((labels[:, 1:] != NO_TARGET).sum())
        loss = next_token_loss(self(**model_inputs(batch)), labels) * (places / max(targets, 1))
        self.validation_loss.update(loss, weight=targets)

    def on_validation_epoch_end(self) -> None:
        """Log cross-entropy and perplexity over all predicted tokens of the validation split."""
        loss = self.validation_loss.compute()
        self.validation_loss.reset()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/ppl", loss.exp(), prog_bar=True)

    def _restore_plans(self, plans: Mapping[str, Any]) -> None:
        """Rebuild the plans, unless configure_model has done so, whose latents may be sharded by now."""
        layers = compressed_layers(self.network)
        known = save_plans(self.network)
        same = known.keys() == plans.keys() and all(
            torch.equal(known[name][key], value) for name in plans for key, value in plans[name].items()
        )
        if same and layers:
            return
        load_plans_(self.network, plans, self.compressor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plans, sketch configuration and run configuration: tensors and plain Python only."""
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "plans": save_plans(self.network),
            "shapes": {name: list(layer.shape) for name, layer in compressed_layers(self.network).items()},
            "compressor": to_section(self.compressor),
            "patterns": list(self.patterns),
            "config": self.run_config,
            "ranks": None if self._trainer is None else self.trainer.world_size,
            "accumulate_grad_batches": None if self._trainer is None else self.trainer.accumulate_grad_batches,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the plans, so that the state buffers have their shapes before Lightning fills them.

        Raises:
            UserError: not a usllm checkpoint, one of another format, or one made under another configuration.
        """
        fitting = self._trainer is not None and self.trainer.training  # one that is only looked at may be older
        saved = checked_section(checkpoint, to_continue=fitting)
        differences = compression_differences(saved, self.compressor, self.patterns)
        ranks = None if self._trainer is None else self.trainer.world_size
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        by_content = type(datamodule).__qualname__ in checkpoint  # the data module compares its texts itself
        differences += run_differences(saved["config"], self.run_config, saved.get("ranks"), ranks, by_content)
        if differences:
            raise UserError(
                "the checkpoint was made under another configuration: "
                + "; ".join(differences)
                + ". Restore these values, or start a new run under another name="
            )
        self._restore_plans(saved["plans"])
        before = saved.get("accumulate_grad_batches")
        if before is not None and self._trainer is not None:
            recount_micro_batches_(checkpoint, before, self.trainer.accumulate_grad_batches)


def sketch_finetuner(module: LightningModule) -> SketchFinetuner:
    """The module as what it is, for callbacks, whose hooks are typed for any ``LightningModule``.

    Raises:
        TypeError: it is another one.
    """
    if not isinstance(module, SketchFinetuner):
        raise TypeError(f"the callbacks of usllm work on a SketchFinetuner, not on a {type(module).__name__}")
    return module
