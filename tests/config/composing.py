"""Composing configurations in tests, as the commands do."""

from __future__ import annotations

import copy
from functools import lru_cache

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from usllm.runs.directory import register_resolvers


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...], command: str) -> DictConfig:
    register_resolvers()
    with initialize_config_module(config_module="usllm.conf", version_base="1.3"):
        return compose(config_name=command, overrides=list(overrides), return_hydra_config=True)


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """The configuration of a command, with Hydra's own part known to interpolations; the caller's own copy."""
    register_resolvers()
    cfg = copy.deepcopy(_composed(overrides, command))  # half a second, and many tests ask for the same
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
