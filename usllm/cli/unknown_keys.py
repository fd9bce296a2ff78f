"""What a misspelt key was meant to be.

Hydra refuses a key that does not exist and advises to add it, which is right for keys of one's own and misleading for a
slip of the finger. These lines take the place of that advice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from usllm.system.renamed_keys import GONE

_OPEN = ("callbacks.", "logger.", "trainer.", "stages.", "evaluation.test_sets.", "hydra.")
"""Groups that take keys of one's own; all others refuse what is added to them."""
_REFUSED = re.compile(r"Could not override '(.+?)'")


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
        said = GONE.get(key) or foreign or _inside_null(key, cfg)
        lines.append(f"{key}: {said or f'there is no such key{_hint(key, known)}'}")
    return lines


def _inside_null(key: str, cfg: DictConfig) -> str | None:
    """What to say about a key of a group that is null now; ``None`` where it is no such key."""
    parents = [key.rsplit(".", count)[0] for count in range(1, key.count(".") + 1)]
    for parent in parents:
        if OmegaConf.select(cfg, parent, default=False) is None:
            return f"{parent} is null; pass ++{key}=… to set it, and its other keys likewise"
    return None


def _hint(key: str, known: Sequence[str]) -> str:
    nearest = _nearest(key, known)
    if nearest is not None:
        return f"; did you mean {nearest}?"
    return f"; +{key}=… adds one" if key.startswith(_OPEN) else "; --help shows those that there are"


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
