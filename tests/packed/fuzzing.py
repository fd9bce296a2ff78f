"""Reads damaged folders: what is damaged is refused, or computes exactly what the healthy folder does.

Run as a program it reads thousands of them in a process whose memory is bounded (:func:`main`).
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folder_files import Files, tensor_places
from mutations import DAMAGE, damaged_blob, mutated

SLACK_BYTES = 64 << 20  # over twice the folder's size: interpreter, allocator and library overhead


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a refusal hides that an allocation failed."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "MemoryError" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Cases:
    """Reads damaged folders; whatever is neither the healthy folder's logits nor :class:`PackedFormatError` is raised.

    Of forgeries any logits are taken. Of format version 1, whose folders have no checksums but the layers' own, any
    model is: transformers 4 takes settings of any type and fails with them only when it computes.

    Args:
        source: A valid packed folder.
        scratch: Folder to write damaged ones to.
    """

    def __init__(self, source: Path, scratch: Path) -> None:
        from usllm.packed.config import PackedConfig

        self.files, self.scratch = Files.read(source), scratch
        packed = PackedConfig.from_dict(json.loads(self.files.config)["quantization_config"])
        self.sketch, self.has_checksums = packed.compressor.options, packed.format_version > 1
        self.logits = self._logits(source)
        places = tensor_places(self.files.weights)
        self.layers = {
            name: (entry.shape, self.files.weights[slice(*places[f"{name}.packed"])])
            for name, entry in packed.layers.items()
        }

    def layer(self, number: int) -> str:
        """Read and decode a damaged layer."""
        import torch

        from usllm.sketch import query
        from usllm.sketch.layer_bytes import read_plan, read_states

        draw = random.Random(number)
        name = draw.choice(sorted(self.layers))
        shape, blob = self.layers[name]
        packed = torch.frombuffer(bytearray(damaged_blob(blob, draw)) or bytearray(1), dtype=torch.uint8)

        def attempt() -> None:
            plan = read_plan(packed, shape, self.sketch, name)
            decoded = query(read_states(packed, plan), plan)
            assert decoded.shape == shape and bool(decoded.isfinite().all()), "decoded weights are not finite"

        return self._outcome("layer alone", attempt)

    def inspect(self, number: int) -> str:
        """Inspect a damaged folder as usllm-inspect does."""
        from usllm.packed.folder import open_folder
        from usllm.packed.inspection import inspect_folder
        from usllm.packed.loading import check_against_model

        kind, files = mutated(self.files, number)
        folder = files.write(self.scratch)

        def attempt() -> None:
            inspect_folder(folder)
            check_against_model(open_folder(folder))
            if kind in DAMAGE and self.has_checksums:
                self._compare(folder)

        return self._outcome(f"{kind}, inspected", attempt)

    def load(self, number: int) -> str:
        """Load a damaged folder and compute with it."""
        import usllm

        kind, files = mutated(self.files, number)
        folder = files.write(self.scratch)
        attempt: Callable[[Path], Any] = self._compare if kind in DAMAGE else self._logits
        if not self.has_checksums:
            attempt = usllm.load
        return self._outcome(f"{kind}, loaded", lambda: attempt(folder))

    def _logits(self, folder: Path) -> Any:
        import torch

        import usllm

        with torch.no_grad():
            return usllm.load(folder)(torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits

    def _compare(self, folder: Path) -> None:
        import torch

        assert torch.equal(self._logits(folder), self.logits), "other numbers than the healthy folder's, without a word"

    def _outcome(self, kind: str, attempt: Callable[[], Any]) -> str:
        from usllm.system.errors import PackedFormatError

        try:
            attempt()
        except PackedFormatError as error:
            if ran_out_of_memory(error):
                raise AssertionError("more memory was asked for than the file is worth") from error
            return f"{kind}: refused"
        return f"{kind}: accepted"


def main(source: str, scratch: str, layers: int, folders: int, loads: int, start: int) -> None:
    """Read damaged layers and folders in this process; print what became of them as JSON.

    Memory is bounded to what a healthy folder needed, twice the folder and a fixed slack; a case that takes over two
    minutes ends the process with a traceback. Damage that is handled wrongly is printed with its number.
    """
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    import usllm
    from usllm.packed.inspection import inspect_folder

    cases = Cases(Path(source), Path(scratch))
    inspect_folder(source)
    import torch

    usllm.load(source)(torch.tensor([[1, 2, 3, 4]]), use_cache=False)
    compile_loops()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * cases.files.size + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: Counter[str] = Counter()
    failures = []
    for kind, count in (("layer", layers), ("inspect", folders), ("load", loads)):
        for number in range(start, start + count):
            faulthandler.dump_traceback_later(120, exit=True)
            try:
                outcomes[getattr(cases, kind)(number)] += 1
            except Exception as error:  # the case is told, and the others go on
                failures.append([kind, number, f"{type(error).__name__}: {error}"[:300]])
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"outcomes": dict(sorted(outcomes.items())), "failures": failures}))


def compile_loops() -> None:
    """Have the compiled loops made for narrow and wide states: where nothing is cached yet, that takes memory."""
    from usllm.sketch import SketchConfig, build_plan
    from usllm_kernels import query

    for bits in (4, 16):
        plan = build_plan((64, 64), None, SketchConfig(bits_per_weight=8.0, state_bits=bits, rows=1), "layer")
        query(plan.state_tensors(), plan)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))  # type: ignore[arg-type]
