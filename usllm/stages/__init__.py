"""The stages of a run between loading and finetuning, one file each; a run's configuration lists them."""

from usllm.stages.allocate import Allocate
from usllm.stages.base import Stage, Work
from usllm.stages.calibrate import Calibrate
from usllm.stages.preparation import Preparation, refuse_wrong_order
from usllm.stages.reconstruct import Reconstruct
from usllm.stages.start import Start
from usllm.stages.store import Store

__all__ = [
    "Allocate",
    "Calibrate",
    "Preparation",
    "Reconstruct",
    "Stage",
    "Start",
    "Store",
    "Work",
    "refuse_wrong_order",
]
