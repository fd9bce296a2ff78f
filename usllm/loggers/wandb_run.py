"""Weights & Biases: a killed and resumed run is one run of W&B, and one job of a multirun is one run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from usllm.system.code_version import code_version
from usllm.system.errors import RunError, UserError, first_line
from usllm.system.files import write_text
from usllm.system.network import unreachable

if TYPE_CHECKING:
    from wandb import Run

_KEEP_HERE = "keep the run here, to be sent later, with logger.wandb.mode=offline (or WANDB_MODE=offline)"
WANDB_ID_FILE = "wandb_id.txt"
MODES = (None, "online", "offline", "disabled")


class WandbRunLogger(WandbLogger):
    """Lightning's ``WandbLogger`` with the run's id kept in its directory.

    The id is written to ``<save_dir>/wandb_id.txt`` before anything is sent, and read from there by a resumed run, so
    that its steps continue the curve of the run that was killed. Under ``wandb agent`` the agent chooses the id.

    Besides the configuration it stores the version of the code: git commit and whether files differ from it, or the
    version of the package.

    Args:
        save_dir: directory of the run; holds the id and W&B's own files.
        mode: ``online``, ``offline`` (sent later with ``wandb sync``) or ``disabled``; ``None`` leaves it to the
            environment's ``WANDB_MODE``, else online.
        log_model: checkpoints as artifacts: ``False``, ``True`` (those left when training ended) or ``"all"`` (each as
            it is written). Offline, they wait for ``wandb sync``.
        log_export: what is exported from the finished run as an artifact (:mod:`usllm.loggers.artifacts`).
        **arguments: as for ``WandbLogger`` and ``wandb.init``: ``project``, ``name``, ``group``, ``job_type``,
            ``tags``, ``notes``, ``entity``, …

    Raises:
        UserError: an unknown mode, or online without a login.
    """

    def __init__(
        self,
        save_dir: str = ".",
        mode: str | None = None,
        log_model: bool | str = False,
        log_export: bool = False,
        **arguments: Any,
    ) -> None:
        if mode not in MODES:
            raise UserError(f"logger.wandb.mode={mode}: choose online, offline or disabled, or null for WANDB_MODE")
        if log_model not in (False, True, "all"):
            raise UserError(f"logger.wandb.log_model={log_model}: choose false, true or all")
        if log_export not in (False, True):
            raise UserError(f"logger.wandb.log_export={log_export}: choose false or true")
        if (mode or os.environ.get("WANDB_MODE") or "online") == "online":
            refuse_without_login()
            refuse_without_network()
        # Not Lightning's `offline`, which sets WANDB_MODE for all later runs of this process.
        super().__init__(save_dir=save_dir, log_model=log_model, mode=mode, **arguments)  # type: ignore[arg-type]
        self._wandb_init.pop("anonymous", None)  # Lightning passes it even when unset, and W&B warns of it
        self.run_dir, self.stores_code = Path(save_dir), True
        self.disabled = (mode or os.environ.get("WANDB_MODE")) == "disabled"

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """W&B's run, begun or continued at the first use.

        Raises:
            UserError: the directory belongs to another run than the one ``wandb agent`` asks for.
        """
        if self._experiment is None:
            if not self.disabled:
                self._wandb_init["id"] = self._id = kept_id(self.run_dir)
            try:
                run: Any = super().experiment
            except Exception as error:  # a network that went away, a key that is refused
                raise RunError(f"logger=wandb: W&B gave no run ({first_line(error)}); {_KEEP_HERE}") from error
            if self.stores_code:
                run.config.update({"code": code_version()}, allow_val_change=True)
        return cast("Run", self._experiment)

    def mark_preempting(self) -> None:
        """Tell W&B that the run will end early and wants to be started again (a sweep then re-queues the trial)."""
        if self._experiment is not None and not self.disabled:
            with contextlib.suppress(Exception):  # a tracker that cannot be reached must not keep a run from leaving
                self.experiment.mark_preempting()

    def finish(self, exit_code: int = 0) -> None:
        """End the run, so that the next job of this process begins its own."""
        if self._experiment is not None:
            self.experiment.finish(exit_code=exit_code)
            self._experiment = None


def refuse_without_network() -> None:
    """Say at once what W&B would say after minutes.

    Raises:
        RunError: its server cannot be reached.
    """
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if (reason := unreachable(address)) is not None:
        raise RunError(f"logger=wandb: {address} cannot be reached ({reason}); {_KEEP_HERE}")


def refuse_without_login() -> None:
    """Say before any work what W&B would say in the middle of it.

    Raises:
        UserError: this machine has no key for W&B.
    """
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return
    try:
        logged_in = wandb.login(prompt=False)
    except Exception:  # a server that does not answer, or an older release: the run itself will say so
        return
    if not logged_in:
        raise UserError(
            "logger=wandb: this machine is not logged in to W&B; run `wandb login`, or keep the run here with "
            "logger.wandb.mode=offline (or WANDB_MODE=offline)"
        )


def kept_id(run_dir: Path) -> str:
    """The id of the W&B run that belongs to a directory; made, and written there, at the first call.

    Raises:
        UserError: it is another one than ``WANDB_RUN_ID``, which ``wandb agent`` sets.
    """
    path, asked = run_dir / WANDB_ID_FILE, os.environ.get("WANDB_RUN_ID")
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    if known and asked and known != asked:
        raise UserError(
            f"{run_dir} belongs to the W&B run {known}, but WANDB_RUN_ID asks for {asked}: give each trial of a sweep "
            "a directory of its own, with run_dir=runs/sweep/${oc.env:WANDB_RUN_ID} in the sweep's command (see "
            "conf/sweep)"
        )
    if not known:
        from wandb.sdk.lib.runid import generate_id

        known = asked or generate_id()
        write_text(path, f"{known}\n")
    return known
