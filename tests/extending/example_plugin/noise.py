"""A stage: noise on the latents before training begins."""

import torch

from usllm.compress import compressed_layers, reproject_
from usllm.stages import Stage, Work


class Noise(Stage):
    """Adds normal noise to every latent, relative to its root mean square.

    Args:
        size: Of the noise.
    """

    name = "noise"

    def __init__(self, size: float = 0.01) -> None:
        self.size = size

    def run(self, work: Work) -> None:
        generator = torch.Generator().manual_seed(work.seed)
        for layer in compressed_layers(work.model).values():
            for latent in layer.latents.values():
                noise = torch.randn(latent.shape, generator=generator).to(latent)
                latent.data.add_(noise * latent.detach().square().mean().sqrt() * self.size)
        reproject_(work.model)
