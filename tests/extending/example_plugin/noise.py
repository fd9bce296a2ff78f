"""A stage: noise on the latents before training begins."""

import torch
from torch import Tensor

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
        latents = {
            f"{name}.{key}": latent
            for name, layer in compressed_layers(work.model).items()
            for key, latent in layer.latents.items()
        }
        noise = work.store(self).kept("noise", lambda: self.noise(latents, work.seed))
        for name, latent in latents.items():
            latent.data.add_(noise[name].to(latent))
        reproject_(work.model)

    def noise(self, latents: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The work itself: done once, and read from the store after a kill."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {name: latent.detach().square().mean().sqrt().cpu() * self.size for name, latent in latents.items()}
        return {name: torch.randn(latents[name].shape, generator=generator) * sizes[name] for name in latents}
