"""Odd configurations of every command: keys of the composed configurations, each with values that nobody should type.

The keys are those of the configuration itself, so that a new one is tried without a word here. No value names a place
outside the test's own folder that could be written to.
"""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from usllm.runs.directory import register_resolvers

COMMANDS = ("train", "train", "train", "train", "eval", "export", "generate", "inspect", "report")
"""Most keys are the training's."""
NUMBERS = (
    *("-1", "0", "1", "2", "3", "0.5", "1.5", "-0.5", "1e-320", "1e-8", "1e6", "1e38", "-1e38", "1e308", "1e400"),
    *("inf", "-inf", "nan", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 30),
)
TEXTS = (
    *(
        "",
        "null",
        "true",
        "abc",
        "a b",
        " ",
        "it's",
        '"',
        "[a]",
        "[",
        "[]",
        "{a:1}",
        "{",
        "a,b",
        "a=b",
        "${x}",
        "${",
        "é",
    ),
    *(
        "\\",
        "a\\",
        "~x",
        "%s",
        "0x10",
        "a" * 300,
        "a/b",
        "no/such/place",
        "FILE",
        "FILE/x",
        "/proc/x",
        "TEXT",
        "\t",
        "…",
    ),
)
LEFT_OUT = frozenset({"trainer.devices", "trainer.num_nodes", "plugins"})
"""They start processes, or import modules, which is their work."""
BYTES, SECONDS = 3 << 30, 12
"""Memory and processor time that a command may take beyond what its parent has."""
STOPPED = -signal.SIGXCPU
"""Status of a command that had been accepted and was at work until its time was up."""


class Odd(NamedTuple):
    """A command and what is typed behind the settings that make it small."""

    command: str
    typed: list[str]


def odd_configurations(first: int, count: int) -> Iterator[Odd]:
    """Configurations by number; each is always the same."""
    values = {command: _values(command) for command in dict.fromkeys(COMMANDS)}
    for number in range(first, first + count):
        draw = random.Random(number)
        command = draw.choice(COMMANDS)
        keys = list(values[command])
        chosen = draw.sample(keys, min(len(keys), draw.choice((1, 1, 1, 2, 3))))
        yield Odd(command, [f"++{key}={draw.choice(_odd(values[command][key], draw))}" for key in chosen])


def _odd(value: Any, draw: random.Random) -> tuple[str, ...]:
    """Values that are odd for a key; most often of the kind that it has, so that they are not refused by their type."""
    if value is None or isinstance(value, list | dict) or draw.random() < 0.15:
        return NUMBERS + TEXTS
    return NUMBERS if isinstance(value, int | float) else TEXTS


def _values(command: str) -> dict[str, Any]:
    """Dotted keys of a command's configuration, with their values."""
    register_resolvers()
    given = ["experiment=tiny", "model=random"] if command == "train" else []
    with initialize_config_module(config_module="usllm.conf", version_base="1.3"):
        plain = OmegaConf.to_container(compose(command, given))
    return {key: value for key, value in _leaves(plain) if key not in LEFT_OUT and "_target_" not in key}


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Bounded:
    """Bounds the memory and the time of the child that is to run a command; compiled kernels are kept for the next.

    Args:
        cache: Folder of the cache.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self) -> None:
        """Called in the child."""
        os.environ["USLLM_CACHE"] = str(self.cache)
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, taken + BYTES))
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
