"""Statistics of a dense model's activations, and the passes that measure them. This file needs torch alone."""

from usllm.calibration.second_moments import SecondMoments

__all__ = ["SecondMoments"]
