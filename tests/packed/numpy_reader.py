"""A second reader of packed models, written from usllm/packed/FORMAT.md with NumPy and the standard library alone."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF


def mix(x: Any) -> Any:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def layer_key(seed: int, name: str) -> int:
    d = 0x811C9DC5
    for byte in name.encode():
        d = (d ^ byte) * 0x01000193 & MASK
    return mix(mix(seed) ^ d)


def read_stream(bits: np.ndarray, count: int, width: int, first: int = 0) -> np.ndarray:
    values = bits[first : first + count * width].reshape(count, width).astype(np.int64)
    return (values << np.arange(width)).sum(1)


def scales(codes: np.ndarray, base: int, m: int) -> np.ndarray:
    return ((codes.astype(np.uint32) + np.uint32(base << m)) << np.uint32(23 - m)).view(np.float32)


def buckets(key: int, row: int, n: int, k: int, kind: str) -> np.ndarray:
    stream = mix(key ^ (row + 1) * 0x9E3779B9 & MASK)
    hashes = np.array([mix(i ^ stream) for i in range(n)])
    if kind == "uniform":
        return (hashes >> 16) * k >> 16
    rank = np.empty(n, np.int64)
    rank[np.argsort(hashes, kind="stable")] = np.arange(n)
    return rank % k


def join(candidates: np.ndarray, operator: str, query: str) -> np.ndarray:
    """[R, n] to [n]."""
    if operator == "mean":
        return candidates.sum(0)
    if operator == "absmaxmin" and query == "signed_max":
        return candidates.max(0)
    if operator == "absmaxmin":
        order = 2 * abs(candidates) + (candidates < 0)  # of equal magnitudes the negative one
        chosen = order.argmax(0)
    else:
        chosen = abs(candidates).argmin(0)  # of equal magnitudes the first row's
    return np.take_along_axis(candidates, chosen[None], 0)[0]


def decode(data: bytes, shape: tuple[int, int], sketch: dict[str, Any], name: str) -> np.ndarray:
    """The weight of a layer, fp32 [out, in]."""
    out, channels = shape
    assert zlib.crc32(data[8:], zlib.crc32(data[:4])) == int.from_bytes(data[4:8], "little")
    raw = np.frombuffer(data, np.uint8)
    count, at = data[0], 8 + 3 * data[0]
    entries = raw[8:at].reshape(count, 3).astype(int)
    classes = [(low & 15, (low >> 4) + 1, k0 + 256 * k1) for low, k0, k1 in entries.tolist()]
    width = (count - 1).bit_length()
    table_bytes = -(-channels * width // 8)
    channel_class = read_stream(np.unpackbits(raw[at : at + table_bytes], bitorder="little"), channels, width)
    at += table_bytes
    holding = [(number, c) for number in range(count) for c in range(channels) if channel_class[c] == number]
    holding = [(number, c) for number, c in holding if classes[number][0]]
    scale = scales(raw[at : at + len(holding)], data[1], 3)
    at += len(holding)
    row_scale = scales(raw[at : at + out], data[2], 5) if sketch["output_scale"] else None
    at += out if sketch["output_scale"] else 0
    states, first = np.unpackbits(raw[at:], bitorder="little"), 0
    groups = -(-out // sketch["group_size"])
    sizes = [out // groups + (g < out % groups) for g in range(groups)]
    key, weight = layer_key(sketch["seed"], name), np.zeros(shape, np.float32)
    spread = {}
    for (number, c), unit in zip(holding, scale, strict=True):
        rows, bits, states_per_group = classes[number]
        unit, start = unit / np.float32(rows) if sketch["operator"] == "mean" else unit, 0
        for g, n in enumerate(sizes):
            k = min(states_per_group, n)
            codes = read_stream(states, rows * k, bits, first).reshape(rows, k)
            codes = 1 - 2 * codes if bits == 1 else codes - ((codes >> (bits - 1)) << bits)
            first += rows * k * bits
            if (number, n) not in spread:
                spread[number, n] = np.array([buckets(key, row, n, k, sketch["hash"]) for row in range(rows)])
            turn = mix(key ^ 0x10000 * 0x9E3779B9 & MASK) % n + (sketch["hash"] != "shared") * (g * channels + c)
            place = spread[number, n][:, (np.arange(n) - turn) % n]
            joined = join(np.take_along_axis(codes, place, 1), sketch["operator"], sketch["query"])
            weight[start : start + n, c] = joined.astype(np.float32) * unit
            start += n
    return weight if row_scale is None else weight * row_scale[:, None]


WITHOUT_EFFECT = {
    *("transformers_version", "_name_or_path", "use_cache", "attn_implementation", "_attn_implementation"),
    *("experts_implementation", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def wrong_checksums(weights: bytes, config: bytes) -> list[str]:
    """Names of tensors and keys whose checksums are not those that the weight file's header gives."""
    length = int.from_bytes(weights[:8], "little")
    header, model = json.loads(weights[8 : 8 + length]), json.loads(config)
    stored = json.loads(header.pop("__metadata__")["usllm"])
    section = model.pop("quantization_config")
    found = {}
    for name, tensor in header.items():
        module, _, kind = name.rpartition(".")
        what: list[Any] = []
        if kind == "packed":
            what = [section["method"], section["format"], module, section["layers"][module][:2]]
        elif module in section["blocks"]:
            rows, columns, bits = section["blocks"][module]
            what = ["blocks", bits, [rows, columns]]
        text = json.dumps([name, tensor["dtype"], tensor["shape"], what], sort_keys=True)
        first, end = (8 + length + offset for offset in tensor["data_offsets"])
        found[name] = zlib.crc32(weights[first:end], zlib.crc32(text.encode()))
    wrong = [name for name in found if found[name] != stored["tensors"].get(name)]
    keys = model | {f"quantization_config.format.{key}": value for key, value in section.pop("format").items()}
    ignored = {"options", "plugin"}
    keys |= {f"quantization_config.{key}": value for key, value in section.items() if key not in ignored}
    sums = {key: zlib.crc32(json.dumps(effective(keys[key]), sort_keys=True).encode()) for key in effective(keys)}
    return wrong + sorted(key for key in {*sums, *stored["keys"]} if sums.get(key) != stored["keys"].get(key))


def effective(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: effective(item) for key, item in value.items() if key not in WITHOUT_EFFECT}
    return value
