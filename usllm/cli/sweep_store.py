"""Lets an Optuna sweep that was interrupted go on where it stopped: Hydra's own sweeper starts from trial 0."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from usllm.system.errors import UserError

_SQLITE = "sqlite:///"


class SweepStore(Callback):
    """Prepares the store of ``hydra/sweeper=bayes`` before the sweep; other sweepers are left alone.

    Trials of an earlier, interrupted call are queued again with the same parameters, which means in the same directory,
    and only what is left of ``n_trials`` is run. One sweep at a time may use a store.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the store's folder and set what is left to do."""
        sweeper = config.hydra.sweeper
        if not sweeper.get("storage") or not sweeper.get("study_name"):
            return
        try:
            with read_write(config), open_dict(sweeper):
                sweeper.n_trials = self._prepare(str(sweeper.storage), str(sweeper.study_name), int(sweeper.n_trials))
        except UserError as error:  # Hydra turns exceptions of callbacks into warnings
            print(f"{config.hydra.job.name}: error: {error}", file=sys.stderr)
            sys.exit(2)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Let others have the store."""
        self._held.close()

    def _prepare(self, storage: str, study_name: str, trials: int) -> int:
        from optuna import load_study
        from optuna.logging import WARNING, set_verbosity

        from usllm.system.lock import sole_user

        set_verbosity(WARNING)
        if storage.startswith(_SQLITE):
            self._held.enter_context(sole_user(Path(storage.removeprefix(_SQLITE)).parent))
        try:
            study = load_study(study_name=study_name, storage=storage)
        except KeyError:
            return trials
        return trials - requeue_interrupted(study)


def requeue_interrupted(study: Any) -> int:
    """Queue the trials again that a killed sweep left running; the number of trials that are complete.

    Args:
        study: an ``optuna.Study``.
    """
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
