"""What the JSON entries of compressed layers take is said beside their bits per weight, and is what they take."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_packed import pack, sketched_model

from usllm.compress import compression_report
from usllm.compress.entries import entry_bytes
from usllm.packed.inspection import inspect_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(sketched_model(), tmp_path_factory.mktemp("packed") / "packed")


def header(folder: Path) -> bytes:
    """The JSON before the tensors."""
    content = (folder / "model.safetensors").read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_entry_has_the_bytes_that_the_header_has_for_it(folder: Path) -> None:
    text, inspection = header(folder), inspect_folder(folder)
    parsed = json.loads(text)
    for layer in inspection.layers:
        name = f"{layer.name}.packed"
        entry = json.dumps({name: parsed[name]}, separators=(",", ":"))[1:-1].encode()
        crc = str(json.loads(parsed["__metadata__"]["usllm"])["tensors"][name])
        checksum = f'\\"{name}\\":{crc}'.encode()
        assert entry in text
        assert checksum in text
        begin, end = parsed[name]["data_offsets"]
        digits = sum(len(str(inspection.weight_bytes)) - len(str(place)) for place in (begin, end)) + 10 - len(crc)
        counted = entry_bytes(layer.name, layer.bytes, inspection.weight_bytes)
        assert counted == len(entry) + 1 + len(checksum) + 1 + digits  # with a comma each


def test_both_figures_are_those_of_the_folder_and_differ_by_the_entries(folder: Path) -> None:
    inspection = inspect_folder(folder)
    weights = sum(math.prod(layer.shape) for layer in inspection.layers)
    entries = sum(entry_bytes(layer.name, layer.bytes, inspection.weight_bytes) for layer in inspection.layers)
    with_entries = 8 * (inspection.sketched_bytes + entries) / weights
    assert inspection.bits_per_weight_with_entries == pytest.approx(with_entries, rel=1e-12)
    assert inspection.totals()["bits_per_weight_with_entries"] > inspection.totals()["bits_per_weight"]


def test_a_run_says_before_it_is_packed_what_the_folder_will_say(folder: Path) -> None:
    report, inspection = compression_report(sketched_model()), inspect_folder(folder)
    assert report.bits_per_weight == inspection.bits_per_weight
    # The size of the file, whose digits count, is that of the tensors alone here.
    assert report.bits_per_weight_with_entries == pytest.approx(inspection.bits_per_weight_with_entries, rel=2e-3)
    assert report.to_dict()["bits_per_weight_with_entries"] == report.bits_per_weight_with_entries
