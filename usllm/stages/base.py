"""What a stage of a run is, and what it works on.

The order of a run is load, calibrate, allocate, start, reconstruct, finetune, measure (docs/architecture.md). Stages
between loading and finetuning are objects of this kind, in a list that a run's configuration gives. They run inside
:meth:`usllm.training.SketchFinetuner.configure_model`: it is the first place where all ranks of a run exist, and the
last one before latents must be there for sharding and for the optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from usllm.compress import Compressor, LayerPlan, Statistics
from usllm.stages.store import Store, store_of
from usllm.system.files import write_json
from usllm.system.ranks import Ranks, failing_together, ranks
from usllm.system.run_files import found_file

if TYPE_CHECKING:
    from usllm.stages.block_source import BlockSource

Batch = Mapping[str, Tensor]


@dataclass
class Work:
    """A model on its way from dense to ready for finetuning, with what stages have found out about it.

    Attributes:
        model: The model with its compressed layers; dense until ``start``.
        compressor: Method and configuration.
        load_dense: Gives the dense model once more.
        batches: Gives the first n sequences of the training text, one by one, ``input_ids`` [1, context].
        device: Where the model computes.
        context: Makes the context of forward passes, such as autocast.
        folder: Where :meth:`store` puts what stages keep, so that a killed run continues; ``None`` keeps nothing.
        seed: Of the run.
        shows_progress: Whether to draw progress bars.
        writes: Whether this process writes to ``folder``: one of several ranks does.
        text: What the training text is by content, plain Python, as far as the data module says it.
        together: Whether all ranks run the stages that change the model, each on a copy of it, so that they can share
            sequences out; where one rank holds all of it for the others, it works alone.
        needs: Statistics that stages read, besides those of the method.
        statistics: By layer name, from ``calibrate``.
        bits: Ceiling of each layer, by name, from ``allocate``.
        plans: By layer name, from ``allocate``.
        found: What stages report, by their names.
        blocks: Gives blocks one by one where the model holds no weights: it is names and shapes alone, and stages that
            work block by block take them from here.
        weights: Fingerprint of the dense weights; ``None``: those of the model are read.
    """

    model: nn.Module
    compressor: Compressor
    load_dense: Callable[[], nn.Module]
    batches: Callable[[int], Iterable[Batch]]
    device: torch.device
    context: Callable[[], AbstractContextManager[Any]]
    folder: Path | None = None
    seed: int = 0
    shows_progress: bool = False
    writes: bool = True
    text: Mapping[str, Any] = field(default_factory=dict)
    together: bool = False
    needs: frozenset[str] = frozenset()
    statistics: dict[str, Statistics] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    blocks: BlockSource | None = None
    weights: str | None = None

    def part_of(self, count: int) -> slice:
        """Which of ``count`` things are this rank's; all of them where it works alone."""
        rank, world_size = ranks() if self.together else Ranks()
        return slice(count * rank // world_size, count * (rank + 1) // world_size)

    def writing(self) -> AbstractContextManager[None]:
        """For what one rank writes and others read: they wait for it, and fail together."""
        return failing_together() if self.together else nullcontext()

    def tell(self, stage: Stage, row: dict[str, Any]) -> None:
        """Add a row to what a stage has found; where there is a folder, its :func:`found_file` is written anew.

        Args:
            stage: Whose it is.
            row: Plain Python, with the keys of the rows before.
        """
        rows = self.found.setdefault(stage.name, [])
        rows.append(row)
        if self.folder is not None and self.writes:
            write_json(found_file(self.folder, stage.name), {"rows": rows})

    def store(self, stage: Stage, **more: Any) -> Store:
        """Files of a stage, for the model as it is now: ask before anything is changed.

        They are found again by a run in the same folder in which everything that the stage can read is as it was:
        the attributes of the stage, the method and its options, the model, statistics, plans, text, seed, precision.

        Args:
            stage: Whose they are.
            more: What else decides their content, plain Python and tensors.
        """
        return store_of(self, stage, more)


class Stage(ABC):
    """One step of the way. What it needs to continue after a kill it keeps in ``work.store(self)``.

    Attributes:
        name: In messages, and of its folder. One that stands in for another stage has that one's name.
        on_dense: Whether it only looks at the dense model; such stages run first, on all ranks, sharded or not. The
            others change the model; where it is to be sharded they run on the one rank that holds all of it.
        needs: Statistics that it reads, besides those that the method needs for planning.
        after: Names of the stages that must have run; not asked of stages that only look, which are the first.
        later_options: Options that came after runs were begun without them, with the value that leaves all as it was:
            at that value a run goes on with what it has kept.
    """

    name: ClassVar[str]
    on_dense: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[tuple[str, ...]] = ("start",)
    later_options: ClassVar[Mapping[str, Any]] = {}

    def refuse_devices(self, devices: int) -> None:  # noqa: B027 - most share nothing out
        """Refuse a number of devices that share its work; asked before anything is read, and where there is work.

        Raises:
            UserError: There are too many.
        """

    @abstractmethod
    def run(self, work: Work) -> None:
        """Do the work, or what a killed run has left of it; the result depends on ``work`` alone.

        Raises:
            UserError: Something in the input does not work.
        """
