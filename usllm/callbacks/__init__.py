"""Lightning callbacks of a sketched run."""

from __future__ import annotations

from usllm.calibration.measure import measure_importance
from usllm.callbacks.allocation_picture import AllocationPicture
from usllm.callbacks.importance_calibration import ImportanceCalibration
from usllm.callbacks.layer_table import LayerTable
from usllm.callbacks.learning_rates import LearningRates
from usllm.callbacks.logged_steps import LoggedSteps
from usllm.callbacks.nan_guard import NanGuard
from usllm.callbacks.preemption import Preempted, Preemption
from usllm.callbacks.rng_state import RngState
from usllm.callbacks.sketch_health import SketchHealth
from usllm.callbacks.sketch_histograms import SketchHistograms
from usllm.callbacks.sketch_reprojection import SketchReprojection
from usllm.callbacks.text_samples import TextSamples
from usllm.callbacks.training_progress import TrainingProgress

__all__ = [
    "AllocationPicture",
    "ImportanceCalibration",
    "LayerTable",
    "LearningRates",
    "LoggedSteps",
    "NanGuard",
    "Preempted",
    "Preemption",
    "RngState",
    "SketchHealth",
    "SketchHistograms",
    "SketchReprojection",
    "TextSamples",
    "TrainingProgress",
    "measure_importance",
]
