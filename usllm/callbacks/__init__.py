"""Lightning callbacks of a sketched run."""

from __future__ import annotations

from usllm.callbacks.importance_calibration import ImportanceCalibration, measure_importance
from usllm.callbacks.nan_guard import NanGuard
from usllm.callbacks.preemption import Preempted, Preemption
from usllm.callbacks.rng_state import RngState
from usllm.callbacks.sketch_health import SketchHealth
from usllm.callbacks.sketch_reprojection import SketchReprojection

__all__ = [
    "ImportanceCalibration",
    "NanGuard",
    "Preempted",
    "Preemption",
    "RngState",
    "SketchHealth",
    "SketchReprojection",
    "measure_importance",
]
