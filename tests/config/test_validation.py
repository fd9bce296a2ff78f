"""Every configuration in the package passes; every bad value is named, all of them in one message."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import usllm.conf
from composing import composed

from usllm.config import check_eval, check_train, sketch_config
from usllm.system.errors import UserError

CONF = Path(usllm.conf.__path__[0])
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def tiny(text: Path, *overrides: str) -> list[str]:
    return ["experiment=tiny", f"data.train.path={text}", *overrides]


@pytest.fixture
def data_folder(tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of the names that configurations of local data expect."""
    for name in ("imdb.train.txt.xz", "imdb.valid.txt.xz", "wikitext2.valid.txt", "wikitext2.test.raw.txt"):
        content = tiny_text.read_bytes()
        (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    monkeypatch.setenv("USLLM_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_is_valid(name: str, tiny_text: Path, data_folder: Path) -> None:
    overrides = [f"data.train.path={tiny_text}"] if name == "tiny" else []
    config = check_train(composed(f"experiment={name}", *overrides))
    assert config.name == name  # the run's folder is named after it


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={option}"
        for group in ("sketch", "allocation", "objective", "optimizer", "callbacks", "logger", "trainer")
        for option in options(group)
        if option != "none" or group != "allocation"  # chosen by the methods that share nothing out over channels
    ],
)
def test_option_composes_and_is_valid(choice: str, tiny_text: Path) -> None:
    one_row = ["sketch.rows=1"] if choice in ("allocation=trained", "allocation=recipe") else []
    check_train(composed(*tiny(tiny_text, choice), *one_row))


def test_evaluation_composes_and_is_valid(tiny_text: Path) -> None:
    config = check_eval(
        composed("model=random", "evaluation=files", f"evaluation.test_sets.text.path={tiny_text}", command="eval")
    )
    assert list(config.evaluation.test_sets) == ["text"]


def test_sketch_and_allocation_make_one_sketch_config(tiny_text: Path) -> None:
    config = check_train(
        composed(*tiny(tiny_text, "sketch.rows=1", "allocation=waterfill", "allocation.layer_budget=importance"))
    )
    sketch = sketch_config(config)
    assert (sketch.rows, sketch.allocation, sketch.layer_budget) == (1, "waterfill", "importance")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sketch.bits_per_weight=0", "sketch.bits_per_weight=0"),
        ("sketch.bits_per_weight=-1", "sketch.bits_per_weight=-1"),
        ("sketch.rows=0", "sketch.rows=0"),
        ("sketch.operator=minhash", "sketch.operator='minhash'"),
        ("allocation.name=random", "allocation.name='random'"),
        ("allocation.layer_budget=more", "allocation.layer_budget='more'"),
        ("+sketch.row=3", "did you mean sketch.rows?"),
        ("objective.name=hope", "objective.name='hope'"),
        ("+objective.temperature=2", "objective"),
        ("optimizer.lr=0", "optimizer.lr=0"),
        ("optimizer.lr=fast", "optimizer.lr=fast"),
        ("optimizer.schedule=step", "optimizer.schedule='step'"),
        ("optimizer.warmup_steps=9", "optimizer.warmup_steps=9"),
        ("model.kind=rumour", "model.kind='rumour'"),
        ("model.patterns=[]", "model.patterns"),
        ("data.train.path=/no/such/file", "data.train.path=/no/such/file"),
        ("data.train.kind=csv", "data.train.kind='csv'"),
        ("data.context_length=1", "data.context_length=1"),
        ("data.batch_size=0", "data.batch_size=0"),
        ("data.validation_fraction=1.5", "data.validation_fraction=1.5"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1"),
        ("trainer.max_steps=null", "trainer.epochs=None"),
        ("trainer.epochs=1", "set exactly one"),
        ("trainer.tokens=1000", "set exactly one"),
        ("trainer.tokens=0", "trainer.tokens=0: must be a whole number of at least 1"),
        ("trainer.tokens=1.5", "trainer.tokens=1.5: must be a whole number"),
        ("trainer.tokens=true", "trainer.tokens=True: must be a whole number"),
        ("trainer.precision=16", "trainer.precision=16"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("+trainer.gpus=2", "trainer.gpus=2"),
        ("+trainer.max_epochs=2", "trainer.max_epochs"),
        ("evaluation.windows=[]", "evaluation.windows"),
        ("evaluation.windows=[1]", "evaluation.windows=1"),
        ("evaluation.validation_split=false", "nothing is measured"),
        ("+callbacks.mine.x=1", "callbacks.mine"),
        ("name=a/b", "name=a/b"),
        ("seed=-1", "seed=-1"),
    ],
)
def test_bad_value_is_named(override: str, named: str, tiny_text: Path) -> None:
    with pytest.raises(UserError) as raised:
        check_train(composed(*tiny(tiny_text, override)))
    assert named in str(raised.value)


def test_all_problems_come_in_one_message(tiny_text: Path) -> None:
    bad = ["sketch.rows=0", "optimizer.lr=0", "data.context_length=0", "trainer.precision=8", "model.kind=x"]
    with pytest.raises(UserError) as raised:
        check_train(composed(*tiny(tiny_text, *bad)))
    message = str(raised.value)
    assert "5 problems" in message
    for key in ("sketch.rows", "optimizer.lr", "data.context_length", "trainer.precision", "model.kind"):
        assert key in message


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["data=text"], "data.train.path: needs a value; pass data.train.path=…"),
        (["data=hub"], "data.train.name: needs a value; pass data.train.name=…"),
        (["model=folder"], "model.name: needs a value; pass model.name=…"),
        (["model=gguf"], "model.kind=gguf needs model.file=/path/to/model.gguf"),
    ],
)
def test_missing_value_is_asked_for_once_and_its_stand_in_is_not_judged(overrides: list[str], asked: str) -> None:
    with pytest.raises(UserError) as raised:
        check_train(composed(*overrides))
    assert str(raised.value) == asked


def test_missing_text_is_asked_for() -> None:
    with pytest.raises(UserError) as raised:
        check_train(composed("data=base"))
    assert str(raised.value).startswith("data.train: needs a value; choose another option of data, or pass")


def test_missing_value_hides_no_other_problem(tiny_text: Path) -> None:
    with pytest.raises(UserError) as raised:
        check_train(composed(*tiny(tiny_text, "model=folder", "model.patterns=[]", "name=a/b", "data.train=???")))
    message = str(raised.value)
    assert "4 problems" in message
    for line in ("model.name: needs", "model.patterns is empty", "name=a/b: must be", "data.train: needs"):
        assert line in message


def test_callback_is_added_as_the_default_configuration_says(tiny_text: Path) -> None:
    plain = check_train(composed(*tiny(tiny_text))).callbacks
    added = check_train(composed(*tiny(tiny_text, "callbacks=[default,early_stopping]"))).callbacks
    assert plain is not None and added is not None
    assert added.keys() - plain.keys() == {"early_stopping"}


def test_missing_gguf_file_is_named(tiny_text: Path) -> None:
    with pytest.raises(UserError, match=r"model\.file=/no/such\.gguf"):
        check_train(composed(*tiny(tiny_text, "model=gguf", "model.file=/no/such.gguf")))


def test_dense_evaluation_without_test_sets_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.test_sets"):
        check_eval(composed("model=random", command="eval"))


def test_texts_of_a_configuration_are_looked_for_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("USLLM_DATA", raising=False)
    with pytest.raises(
        UserError, match=r"no such file \(the folder of this configuration's texts is \$USLLM_DATA, which"
    ):
        check_train(composed("data=reviews_and_wikitext"))
    monkeypatch.setenv("USLLM_DATA", "/nowhere")
    with pytest.raises(UserError, match=r"/nowhere/imdb\.train\.txt\.xz: no such file \(relative paths start at"):
        check_train(composed("data=reviews_and_wikitext"))
