"""Real commands in forked children of one parent that has imported everything, and ways to kill them.

The parent is a process of its own that only imports (``preloaded.py`` says what), so that no thread of a test's
computations is lost in a fork. What a command is spared is Hydra's first composition of everything, half of what most
do in tests: Hydra looks for ``hydra.mode`` in it, which no configuration here sets (``test_command.py``), and where an
argument could set it, nothing is spared.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_context = multiprocessing.get_context("forkserver")


class Outcome(NamedTuple):
    """Exit status (negative: the signal that ended it), and what was printed to both streams."""

    status: int
    output: str


def told(outcomes: Sequence[Outcome]) -> str:
    """All that commands printed, uncut, for the message of a test that fails."""
    return "".join(f"\n--- ended with {status}:\n{output}" for status, output in outcomes)


def command(name: str, *arguments: str, folder: Path, before: Callable[[], None] | None = None) -> Outcome:
    """Run ``usllm-<name>`` with ``arguments`` in ``folder``.

    Args:
        before: Called in the child before the command, such as one of the killers below; a function of a module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f".{name}.log"
    process = _context.Process(target=_child, args=(name, arguments, folder, log, before))
    process.start()
    process.join(280)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"usllm-{name} did not end: {log.read_text()}")
    assert process.exitcode is not None
    return Outcome(process.exitcode, log.read_text(encoding="utf-8", errors="replace"))


def command_on_ranks(
    name: str, *arguments: str, folder: Path, before: Callable[[], None] | None = None, ranks: int = 2
) -> list[Outcome]:
    """Run ``usllm-<name>`` on ranks that talk through gloo, started as torchrun starts them; what became of each.

    When one has failed, those that wait for it are killed, as torchrun does, if they have not noticed by themselves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs, processes = [folder / f".{name}.{rank}.log" for rank in range(ranks)], []
    for rank, log in enumerate(logs):
        launched = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
        processes.append(_context.Process(target=_child, args=(name, arguments, folder, log, before, launched)))
    for process in processes:
        process.start()
    waiting = {process.sentinel: process for process in processes}
    failed = False
    while waiting:
        ended = multiprocessing.connection.wait(list(waiting), 60 if failed else 400)
        for sentinel in ended:
            process = waiting.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            failed = failed or process.exitcode != 0
        if not ended:
            for process in waiting.values():
                process.kill()
            if not failed:
                raise AssertionError(f"usllm-{name} did not end: {[log.read_text() for log in logs]}")
    return [
        Outcome(process.exitcode or 0, log.read_text(encoding="utf-8", errors="replace"))
        for process, log in zip(processes, logs, strict=True)
    ]


def _child(
    name: str,
    arguments: tuple[str, ...],
    folder: Path,
    log: Path,
    before: Callable[[], None] | None,
    environment: Mapping[str, object] | None = None,
) -> None:
    import importlib

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(output)  # what crashes says where
    os.chdir(folder)
    os.environ["USLLM_CACHE"] = str(folder / "cache")
    if environment is not None:
        from lightning.pytorch.utilities import rank_zero_only

        os.environ |= {key: str(value) for key, value in environment.items()}
        rank_zero_only.rank = environment["RANK"]  # Lightning reads it when it is imported: in the server, long ago
    sys.argv[:] = [f"usllm-{name}", *arguments]
    status = 1
    try:
        if before is not None:
            before()
        if not any("hydra" in argument or argument.startswith("-") for argument in arguments):
            from hydra._internal.hydra import Hydra

            Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
        importlib.import_module(f"usllm.cli.{name}").main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(status)


def killed_after(module: str, name: str, calls: int = 1, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Has the process killed when a function has returned for the ``calls``-th time.

    Args:
        module: That the function is called through.
        name: Its name there; ``Class.method`` for a method.
        number: The signal that is sent; SIGINT is Ctrl-C.
    """
    return _Killer(module, name, calls, number)


class _Killer:
    def __init__(self, module: str, name: str, calls: int, number: signal.Signals) -> None:
        self.module, self.name, self.calls, self.number = module, name, calls, number

    def __call__(self) -> None:
        import importlib

        if self.number == signal.SIGINT:  # the parent, a server of forks, ignores it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        owner: Any = importlib.import_module(self.module)
        *classes, last = self.name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        ordinary, made = getattr(owner, last), []

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = ordinary(*arguments, **options)
            made.append(None)
            if len(made) == self.calls:
                os.kill(os.getpid(), self.number)
            return result

        setattr(owner, last, wrapped)
