"""Calibrate: the statistics of the dense model's activations that the method, and later stages, need."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch

from usllm.calibration.measure import measure_statistics
from usllm.calibration.stored import stored_statistics
from usllm.compress import Statistics, compressed_layers
from usllm.compress.budgets import budget_needs
from usllm.stages.base import Stage, Work
from usllm.system.errors import UserError
from usllm.system.ranks import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Calibrate(Stage):
    """Streams the first sequences of the training text through the dense model, in the run's precision.

    Args:
        sequences: Number of sequences, 1 or more.
        reuse: Share the measurement with all runs of the same weights, text and arithmetic; not among the ranks of a
            distributed run, which measure a part each.
    """

    name: ClassVar[str] = "calibrate"
    on_dense: ClassVar[bool] = True

    def __init__(self, sequences: int = 32, reuse: bool = False) -> None:
        if sequences < 1:
            raise UserError(f"stages.calibrate.sequences={sequences}: must be 1 or more")
        self.sequences = sequences
        self.reuse = reuse

    def run(self, work: Work) -> None:
        """Fill ``work.statistics``; measured once a run, or once for all runs where they are shared.

        Raises:
            UserError: There was no sequence, or a layer's input is not finite.
        """
        needs = statistics_needed(work)
        layers = compressed_layers(work.model)
        if not needs:
            work.statistics = {name: Statistics(energy=None) for name in layers}
            return

        def fresh() -> dict[str, Statistics]:
            return measure_statistics(
                work.model,
                work.batches(self.sequences),
                self.sequences,
                needs,
                device=work.device,
                context=work.context,
                progress=work.shows_progress,
            )

        alone = ranks().world_size == 1
        if not alone or not (self.reuse or work.folder):
            work.statistics = fresh()
            return
        folder = None if self.reuse or work.folder is None else work.folder / self.name
        with work.context():
            autocast = (
                torch.get_autocast_dtype(work.device.type) if torch.is_autocast_enabled(work.device.type) else None
            )
        work.statistics = stored_statistics(
            cast("PreTrainedModel", work.model),
            work.batches(self.sequences),
            needs,
            work.device,
            autocast,
            fresh,
            folder,
        )


def statistics_needed(work: Work) -> frozenset[str]:
    """What planning by the method and its rule over layers reads; ``energy``, ``covariance``, ``gradient``."""
    by_rule = budget_needs(work.compressor.options.layer_budget)
    return work.compressor.needs | by_rule | work.needs
