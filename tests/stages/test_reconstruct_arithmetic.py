"""Reconstruction against its recipe written out once more: dense linear layers, autograd and plain AdamW."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from test_reconstruct import OPTIONS, TINY, compressed, stage, tokens
from torch import Tensor, nn
from torch.func import functional_call

from usllm.compress import compressed_layers, method
from usllm.data.batches import in_parts
from usllm.models.loading import load_dense
from usllm.sketch import SketchConfig
from usllm.sketch.state_gradient import state_gradient_
from usllm.stages.blocks import capture, decoder_blocks, output_of, run_block
from usllm.stages.reconstruct import sequence_order

STEPS, BATCH, WARMUP, RAMP = 12, 4, 2, 0.5
LATENT_LR, LR = 0.05, 1e-3


def decoded(plan: object, weight: Tensor) -> Tensor:
    return plan.decode(plan.encode({"weight": weight.detach()}, torch.ones(weight.shape[1])).states)  # type: ignore[attr-defined]


def test_a_block_is_trained_as_the_recipe_says() -> None:
    work = compressed(method("sketch")(SketchConfig(**OPTIONS["sketch"])))
    first = decoder_blocks(work.model)[0]
    plans = {name: layer.plan for name, layer in compressed_layers(first).items()}
    settings = {"latent_lr": LATENT_LR, "lr": LR, "ramp": RAMP, "statistics": "dense", "blocks": 1}
    stage(steps=STEPS, batch_size=BATCH, warmup_steps=WARMUP, **settings).run(work)

    teacher = load_dense(TINY).eval()
    dense, ids = decoder_blocks(teacher)[0], torch.cat([batch["input_ids"] for batch in tokens(16)])
    stream, arguments = capture(teacher, [dense], in_parts({"input_ids": ids}, BATCH), torch.device("cpu"))
    target = run_block(dense, stream, arguments[0], BATCH, nullcontext)
    named = {id(module): name for name, module in teacher.named_modules()}
    layers = {name.removeprefix(f"{named[id(dense)]}."): plan for name, plan in plans.items()}
    values = {name: nn.Parameter(value.detach().clone()) for name, value in dense.named_parameters()}
    latents = {name: values[f"{name}.weight"] for name in layers}
    peaks = {id(v): LATENT_LR * float(v.detach().square().mean().sqrt()) for v in latents.values()}
    groups = [{"params": [v], "lr": 0.0, "peak": peaks.get(id(v), LR)} for v in values.values()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    order = sequence_order(len(stream), STEPS * BATCH, work.seed).view(STEPS, BATCH)
    shell = copy.deepcopy(dense).eval()
    for step in range(STEPS):
        share = (step + 1) / WARMUP
        if step >= WARMUP:
            share = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        progress = min(step / (RAMP * STEPS), 1.0)
        weights: dict[str, Tensor] = dict(values)
        for name, plan in layers.items():
            latent = latents[name]
            shown = latent.detach().lerp(decoded(plan, latent), progress)
            weights[f"{name}.weight"] = latent + (shown - latent).detach()
        found = functional_call(shell, weights, (stream[order[step]],), arguments[0](order[step]))
        found = found[0] if isinstance(found, tuple) else found
        aim = target[order[step]]
        energy = aim.square().sum(-1)
        loss = ((found - aim).square().sum(-1) / energy.clamp_min(0.05 * energy.median())).mean()
        optimizer.zero_grad()
        loss.backward()
        for name, plan in layers.items():
            gradient = latents[name].grad
            assert gradient is not None
            state_gradient_(gradient, plan, plan.encode({"weight": latents[name].detach()}).states)
        nn.utils.clip_grad_norm_(list(values.values()), 1.0)
        optimizer.step()

    trained = dict(first.named_parameters())
    for name, value in values.items():
        moved = float((value.detach() - dict(dense.named_parameters())[name]).abs().max())
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-3 * moved, msg=name)
    assert output_of(first, stream[:1], arguments[0](slice(0, 1))).shape == stream[:1].shape


@pytest.mark.parametrize("recovery", [0.0, 0.25])
def test_what_was_lost_is_won_back_in_part(recovery: float) -> None:
    student, dense, after = (torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    aims, some = stage(recovery=recovery)._aims(student, dense, after), torch.tensor([4, 1])
    lost, added = student - dense, after - dense
    torch.testing.assert_close(aims(some), (student + added - recovery * lost)[some])
    assert torch.equal(stage()._aims(student, dense, after)(some), after[some])
