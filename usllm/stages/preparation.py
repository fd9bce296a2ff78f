"""All stages between loading and finetuning, in order, for the module that is about to train the model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from usllm.compress import Statistics, compressed_layers
from usllm.stages.base import Stage, Work
from usllm.system.errors import UserError
from usllm.system.ranks import ranks
from usllm.system.rng import preserved_rng

if TYPE_CHECKING:
    from usllm.training.module import SketchFinetuner

Observer = Callable[[str, nn.Module], None]
"""Called with ``dense`` or ``sketched``, and the model at that point of its way."""


class Preparation:
    """Runs stages on a freshly loaded model; given to :class:`usllm.training.SketchFinetuner`.

    Stages that look at the dense model come first, on all ranks; those that change it run where all of it is. Random
    numbers of the run are left as they were found: a run that is resumed after its stages draws the same.

    Args:
        stages: In their order.
        folder: Where they keep their state; ``None`` keeps none.
        observers: Told when the model is dense, and when it is compressed and stages go on after that.

    Raises:
        UserError: A stage comes before one that must have run.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path | None = None, observers: Sequence[Observer] = ()) -> None:
        refuse_wrong_order(stages)
        self.stages = list(stages)
        self.folder = folder
        self.observers = list(observers)
        self._statistics: dict[str, Statistics] = {}

    def look(self, module: SketchFinetuner, model: nn.Module) -> None:
        """Run what looks at the dense model, which all ranks hold a copy or a shard of."""
        work = self._begin(module, model)
        with preserved_rng():
            for observe in self.observers:
                observe("dense", model)
            for stage in self.stages:
                if stage.on_dense:
                    stage.run(work)
        self._statistics = work.statistics  # and nothing else: the shards of this model are given back

    def change(self, module: SketchFinetuner, model: nn.Module, together: bool = False) -> None:
        """Run what changes the model; it holds all weights, and nothing in it is sharded.

        Args:
            module: That is about to train it.
            model: With its layers swapped.
            together: Whether all ranks do so, each with a copy of the model.
        """
        work = self._begin(module, model, together)
        work.statistics, self._statistics = self._statistics, {}
        with preserved_rng():
            started = False
            for stage in self.stages:
                if stage.on_dense:
                    continue
                if started:  # what follows goes beyond the first projection: show what it began with
                    for observe in self.observers:
                        observe("sketched", model)
                    started = False
                stage.run(work)
                started = stage.name == "start"
        del work
        gc.collect()  # the dense model that blocks learnt from is held in circles until Python comes to it

    def _begin(self, module: SketchFinetuner, model: nn.Module, together: bool = False) -> Work:
        trainer = module.trainer
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit, not declared
        return Work(
            model=model,
            compressor=module.compressor,
            load_dense=module.load_model,
            batches=datamodule.calibration_batches,
            device=next(iter(compressed_layers(model).values())).importance.device,
            context=partial(trainer.precision_plugin.forward_context),
            folder=self.folder,
            text=getattr(datamodule, "identity", {}),
            seed=int(module.run_config.get("seed", 0)),
            shows_progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            writes=ranks().rank == 0,
            together=together,
            needs=frozenset().union(*(stage.needs for stage in self.stages)),
        )


def refuse_wrong_order(stages: Sequence[Stage]) -> None:
    """Refuse stages of which one comes before another that must have run; to be asked before any long work.

    Raises:
        UserError: Names both, and the way out.
    """
    done = [stage.name for stage in stages if stage.on_dense]
    for stage in (stage for stage in stages if not stage.on_dense):
        for missing in (name for name in stage.after if name not in done):
            listed = ", ".join(each.name for each in stages)
            raise UserError(
                f"stages: {stage.name} needs {missing} before it, the list is {listed}; stages run in its order, as in "
                "stages=[default,reconstruct]"
            )
        done.append(stage.name)
