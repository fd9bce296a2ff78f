"""What a misspelt key was meant to be.

Hydra refuses a key that does not exist and advises to add it, which is right for keys of one's own and misleading for a
slip of the finger. It has no hook for its messages, so the line with the nearest key follows them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

_REFUSED = re.compile(r"Could not override '(.+?)'")


@contextlib.contextmanager
def nearest_keys_named(program: str) -> Iterator[None]:
    """Where the block, one of Hydra's mains, ends with an error: name the keys nearest to those that do not exist.

    Args:
        program: the name of the command, which is that of its configuration with ``usllm-`` before it.
    """
    try:
        yield
    except SystemExit as leaving:
        if leaving.code == 1:
            with contextlib.suppress(Exception):  # Hydra has said what is wrong
                for line in about_unknown_keys(program.removeprefix("usllm-"), sys.argv[1:]):
                    print(f"{program}: error: {line}", file=sys.stderr)
        raise


def about_unknown_keys(config_name: str, arguments: Sequence[str]) -> list[str]:
    """A line for each override whose key does not exist; as for :func:`unknown_keys`."""
    from usllm.config.compression import DEFAULT_METHOD, of_another_method

    unknown, cfg = _composed_without_unknown(config_name, arguments)
    known = list(_keys(OmegaConf.to_container(cfg)))
    lines = []
    for key in unknown:
        group, _, option = key.partition(".")
        method = OmegaConf.select(cfg, "sketch.method", default=DEFAULT_METHOD)
        foreign = of_another_method(option, method) if group == "sketch" else None
        nearest = _nearest(key, known)
        hint = "" if nearest is None else f"; did you mean {nearest}?"
        lines.append(f"{key}: {foreign or f'there is no such key{hint}'}")
    return lines


def unknown_keys(config_name: str, arguments: Sequence[str]) -> dict[str, str | None]:
    """The overrides among ``arguments`` whose keys do not exist, and the nearest key, if one is near.

    Args:
        config_name: in ``usllm.conf``.
        arguments: of the command line; of a sweep's values the first one is looked at.
    """
    unknown, cfg = _composed_without_unknown(config_name, arguments)
    known = list(_keys(OmegaConf.to_container(cfg)))
    return {key: _nearest(key, known) for key in unknown}


def _composed_without_unknown(config_name: str, arguments: Sequence[str]) -> tuple[list[str], DictConfig]:
    """Keys that do not exist, and the configuration without them."""
    parsed = OverridesParser.create().parse_overrides([word for word in arguments if not word.startswith("-")])
    overrides = {
        override.get_key_element(): (
            f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else str(override.input_line)
        )
        for override in parsed
    }
    unknown: list[str] = []
    with initialize_config_module(config_module="usllm.conf", version_base="1.3"):
        while True:
            try:
                cfg = compose(config_name, list(overrides.values()))
            except ConfigCompositionException as error:
                refused = _REFUSED.search(str(error))
                if refused is None or overrides.pop(refused[1], None) is None:
                    raise
                unknown.append(refused[1])
            else:
                return unknown, cfg


def _nearest(key: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of groups and values."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")
