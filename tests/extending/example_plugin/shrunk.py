"""An initialisation from E[a aᵀ]: weights shrunk in the directions in which a layer's inputs carry little energy."""

import torch

from usllm.compress import compressed_layers
from usllm.stages import Start, Work


class ShrunkStart(Start):
    """Starts from ``W Σ (Σ + λ m I)⁻¹``, Σ = E[a aᵀ] of the layer's input and m the mean of its diagonal.

    Args:
        ridge: λ.
    """

    needs = frozenset({"covariance"})

    def __init__(self, ridge: float = 0.01) -> None:
        self.ridge = ridge

    def run(self, work: Work) -> None:
        for name, layer in compressed_layers(work.model).items():
            covariance = work.statistics[name].covariance
            assert covariance is not None
            damped = covariance + self.ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
            weight = layer.get_parameter("weight").data
            weight.copy_(torch.linalg.solve(damped, covariance @ weight.T).T)
        super().run(work)
