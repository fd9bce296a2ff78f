"""A misspelt key is answered with the key that was meant, whatever Hydra says before it."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from usllm.cli import train
from usllm.cli.unknown_keys import unknown_keys


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("sketch.bitsperweight=1", "sketch.bits_per_weight"),
        ("allocaton=uniform", "allocation"),
        ("max_steps=3", "trainer.max_steps"),
        ("callbacks.checkpoint.every_n_steps=3", "callbacks.checkpoint.every_n_train_steps"),
        ("sketch.row=1,2", "sketch.rows"),
        ("xyzzy=1", None),
    ],
)
def test_nearest_key_is_found_among_groups_and_values(argument: str, nearest: str | None) -> None:
    others = ["-m", "experiment=demo", "model=random,hub", "sketch.rows=2", "+own.key=3", "~callbacks.progress"]
    assert unknown_keys("train", [*others, argument]) == {argument.partition("=")[0]: nearest}
    assert unknown_keys("train", others) == {}


@pytest.mark.parametrize(
    ("program", "arguments", "lines"),
    [
        ("train", ["sketch.row=1", "optimzer.lr=3"], ["sketch.row: … sketch.rows?", "optimzer.lr: … optimizer.lr?"]),
        (
            "train",
            ["sketch=littlebit", "sketch.rows=3"],
            ["sketch.rows: belongs to method sketch; littlebit has bits_per_weight, paths, slope"],
        ),
        ("eval", ["evaluation.window=[3]"], ["evaluation.window: … evaluation.windows?"]),
        ("export", ["max_shard=3"], ["max_shard: … max_shard_size?"]),
        ("generate", ["max_tokens=3"], ["max_tokens: … max_new_tokens?"]),
        ("inspect", ["jsn=a"], ["jsn: … json?"]),
        ("report", ["run=a"], ["run: … runs?"]),
    ],
)
def test_every_command_names_it_in_place_of_hydras_advice(
    program: str,
    arguments: list[str],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"usllm-{program}", *arguments])
    with pytest.raises(SystemExit, match="2"):
        import_module(f"usllm.cli.{program}").main()
    said = [line.replace("…", "there is no such key; did you mean") for line in lines]
    if len(said) > 1:
        said = ["", *(f"  - {line}" for line in said)]
    assert capsys.readouterr().err == f"usllm-{program}: error: " + "\n".join(said) + "\n"


def test_option_that_does_not_exist_is_no_unknown_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["usllm-train", "experiment=demoo", "sketch.row=1"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "usllm-train: error: experiment=demoo: there is no such option; did you mean experiment=demo?"
    )


def test_key_inside_a_group_that_is_null_says_how_to_set_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["usllm-train", "experiment=tiny", "data.validation.kind=text"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "data.validation is null; pass ++data.validation.kind=…" in capsys.readouterr().err
