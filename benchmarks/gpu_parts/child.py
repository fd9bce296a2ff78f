"""A process of one part: ``python -m benchmarks.gpu_parts.child '<description as JSON>'``, started by the runner.

Ends with 0 where everything wanted was measured, :data:`UNMET` where something failed or had no time, and
:data:`AGAIN` where the card was lost and a new process has to go on.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import sys
from pathlib import Path

from benchmarks.gpu_parts.results import Results
from benchmarks.gpu_parts.session import CardLost, Session

UNMET = 4
AGAIN = 5


def main() -> int:
    """Import the part's module and run it; what it raises becomes the part's result."""
    told = json.loads(sys.argv[1])
    faulthandler.enable()  # where it was, when the runner ends it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if told["dry_run"]:  # before a kernel is imported
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    session = Session(
        results=Results(Path(told["results"])),
        part=told["part"],
        call=told["call"],
        end=told["end"],
        dry_run=told["dry_run"],
        worker=told["worker"],
        workers=told["workers"],
        options=told["options"],
        running=Path(told["running"]),
    )
    try:
        importlib.import_module(told["module"]).run(session)
    except CardLost:
        return AGAIN
    except Exception as error:  # its import, or something between two measurements
        try:
            session.fail(f"worker {session.worker}", error)
        except CardLost:
            return UNMET  # not within a measurement: trying again would meet it again
    return UNMET if session.unmet else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # past whatever a lost card would do at the end of the process
