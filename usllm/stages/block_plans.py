"""Plans of a block's layers from the stream that really reaches it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from usllm.calibration import SecondMoments
from usllm.compress import compressed_layers
from usllm.compress.surgery import plan_layer
from usllm.stages.base import Work
from usllm.stages.block_arguments import Arguments
from usllm.stages.blocks import outputs


@torch.no_grad()
def plan_for_stream_(
    work: Work,
    block: nn.Module,
    dense_block: nn.Module,
    prefix: str,
    stream: Tensor,
    arguments: Arguments,
    batch_size: int,
) -> None:
    """Share out each layer's bits anew, by the energy of its input on a stream; the bits stay, latents start again.

    Activations are those of the dense block on the compressed stream: the block's own are not known before it is
    trained. Methods that plan without statistics keep their plans.

    Args:
        work: With the bits of each layer, and what was measured on the dense model.
        block: A compressed block, started but not trained.
        dense_block: The same block, dense.
        prefix: Name of the block in the model.
        stream: That enters it, [sequences, context, hidden].
        arguments: What the block is called with besides.
        batch_size: Sequences of a forward pass.

    Raises:
        UserError: The bits leave no room.
    """
    needs = work.compressor.needs
    if not needs & {"energy", "covariance"}:
        return
    layers = compressed_layers(block)
    dense_layers = {name: dense_block.get_submodule(name.removeprefix(f"{prefix}.")) for name in layers}
    with SecondMoments(dense_layers, full="covariance" in needs) as moments:
        for _ in outputs(dense_block, stream, arguments, batch_size, work.context):
            pass
    energies = moments.mean()
    for name, layer in layers.items():
        weight = dense_layers[name].weight
        assert isinstance(weight, Tensor)
        known = replace(work.statistics[name], energy=energies[name], weight_energy=weight.float().square().mean(0))
        if "covariance" in needs:
            known = replace(known, covariance=moments.full_mean()[name])
        plan = plan_layer(layer, work.compressor, known, work.bits[name])
        layer.set_plan(plan, energies[name], plan.start(weight.float(), known))
        layer.reproject()
