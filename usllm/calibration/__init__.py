"""Statistics of a dense model's activations. Needs torch alone."""

from usllm.calibration.second_moments import SecondMoments

__all__ = ["SecondMoments"]
