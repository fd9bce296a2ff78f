import subprocess
import sys

import pytest
import torch

from usllm.sketch import SketchConfig, build_plan
from usllm.sketch.classes import ChannelClass
from usllm.sketch.hash import HASHES, first_rotation, layer_key, mix32
from usllm.sketch.plan import Plan
from usllm.sketch.rotation import rotate


def one_class_plan(
    n: int, channels: int, states: int, rows: int = 1, name: str = "layer", hash: str = "balanced"
) -> Plan:
    config = SketchConfig(rows=rows, hash=hash, group_size=n)
    channel_class = torch.zeros(channels, dtype=torch.uint8)
    return Plan(name, (n, channels), config, (ChannelClass(rows, states, 4),), channel_class)


def buckets_of(plan: Plan) -> torch.Tensor:
    """Bucket of every weight, [rows, out, in], by the formula in the module's documentation, one weight at a time."""
    n, channels = plan.shape
    choice = plan.classes[0]
    table = plan.placement(choice, n).buckets.long()
    turn = first_rotation(plan.key, n)
    found = torch.empty(choice.rows, n, channels, dtype=torch.int64)
    for channel in range(channels):
        for i in range(n):
            found[:, i, channel] = table[:, (i - turn - plan.rotation_step * channel) % n]
    return found


def test_mix32_is_a_bijection_of_murmur3() -> None:
    # 0 is a fixed point of the finaliser; 1 gives 0x514e28b7 (the published MurmurHash3 fmix32 of 1).
    assert mix32(0) == 0
    assert mix32(1) == 0x514E28B7
    assert len({mix32(value) for value in range(5000)}) == 5000


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "from usllm.sketch.hash import *; k = layer_key(7, 'model.layers.3.mlp.up_proj');"
        "print(k, first_rotation(k, 300), *HASHES['balanced'].table(k, 2, 9).tolist())"
    )
    key = layer_key(7, "model.layers.3.mlp.up_proj")
    expected = [key, first_rotation(key, 300), *HASHES["balanced"].table(key, 2, 9).tolist()]
    for hash_seed in ("0", "123"):
        printed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert [int(value) for value in printed.stdout.split()] == expected


@pytest.mark.parametrize(("n", "states"), [(1, 1), (7, 3), (288, 36), (288, 288), (512, 64), (511, 100)])
def test_balanced_loads_differ_by_at_most_one_and_no_state_is_empty(n: int, states: int) -> None:
    plan = one_class_plan(n, 3, states, rows=3)
    loads = plan.placement(plan.classes[0], n).load
    assert int(loads.max()) - int(loads.min()) <= 1
    assert int(loads.min()) >= 1
    assert bool((loads.sum(1) == n).all())


@pytest.mark.parametrize("hash", ["balanced", "uniform", "shared"])
def test_rotation_by_copies_equals_the_formula(hash: str) -> None:
    plan = one_class_plan(23, 61, 5, rows=2, hash=hash)
    address = torch.arange(23 * 61, dtype=torch.float32).view(23, 61)
    rotated = rotate(address, plan.spans[0], plan.rotation(plan.spans[0]), plan.rotation_step)  # [in, n]
    table = plan.placement(plan.classes[0], 23).buckets.long()
    found = torch.empty(2, 23 * 61, dtype=torch.int64)
    found[:, rotated.long().flatten()] = table.repeat(1, 61)
    assert torch.equal(found.view(2, 23, 61), buckets_of(plan))


def test_rows_are_pairwise_independent() -> None:
    """Weights that collide in row 0 collide in row 1 no more often than 1/K, within four standard deviations."""
    n, states, pairs, both = 256, 32, 0, 0
    for number in range(20):
        first, second = buckets_of(one_class_plan(n, 1, states, rows=2, name=f"layer.{number}"))[:, :, 0]
        together = torch.triu(first[:, None] == first, 1)
        pairs += int(together.sum())
        both += int((together & (second[:, None] == second)).sum())
    expected = pairs / states
    assert both <= expected + 4 * expected**0.5
    assert both >= expected * (states / n) * 0.5  # and they do collide: the rows are not built to avoid each other


def test_channels_are_decorrelated() -> None:
    """Weights that collide in one channel collide in another about as often as by chance, for near and far channels."""
    n, states, channels = 256, 32, 256
    buckets = buckets_of(one_class_plan(n, channels, states))[0]
    chance = (n / states - 1) / (n - 1)
    together = torch.triu(buckets[:, None, 0] == buckets[None, :, 0], 1)
    rates = []
    for channel in range(1, channels):
        again = buckets[:, None, channel] == buckets[None, :, channel]
        rates.append(float((together & again).sum() / together.sum()))
    mean = sum(rates) / len(rates)
    assert chance * 0.8 < mean < chance * 1.2
    assert max(rates) < 6 * chance


def test_no_two_channels_share_a_hash_until_all_rotations_were_used() -> None:
    n = 64
    buckets = buckets_of(one_class_plan(n, n, 16))[0]
    assert len({tuple(buckets[:, channel].tolist()) for channel in range(n)}) == n


def test_layers_and_seeds_have_hashes_of_their_own() -> None:
    tables = {
        tuple(HASHES["balanced"].table(layer_key(seed, name), 0, 64).tolist())
        for seed in range(3)
        for name in ("a", "b", "model.layers.0.q", "model.layers.1.q")
    }
    assert len(tables) == 12


def test_uniform_hash_leaves_states_empty_and_balanced_does_not() -> None:
    importance = torch.ones(64)
    for name, occupied in (("balanced", 1.0), ("uniform", 0.99)):
        config = SketchConfig(bits_per_weight=2.0, rows=1, hash=name, allocation="uniform")
        occupancy = build_plan((512, 64), importance, config, "layer").occupancy()
        assert occupancy == 1.0 if name == "balanced" else occupancy < occupied
