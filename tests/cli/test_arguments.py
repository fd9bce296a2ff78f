"""What is typed reaches the program: places instead of options for ``model=``, and text whatever signs it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from usllm.cli.arguments import expand_model, expand_test_sets, folder_of_model, quote_values, readable
from usllm.cli.start import check_options
from usllm.system.errors import UserError


def test_model_places_become_options(tmp_path: Path) -> None:
    assert expand_model(["model=random", "seed=1"]) == ["model=random", "seed=1"]
    assert expand_model(["model=a/b.gguf"]) == ["model=gguf", "model.file='a/b.gguf'"]
    assert expand_model(["model=meta-llama/Llama-3.2-1B"]) == ["model=hub", "model.name='meta-llama/Llama-3.2-1B'"]
    assert expand_model([f"model={tmp_path}"]) == ["model=folder", f"model.name='{tmp_path}'"]
    assert expand_model(["model=./nowhere"]) == ["model=folder", "model.name='./nowhere'"]


def test_model_sweep_and_other_keys_are_left_to_hydra() -> None:
    argv = ["-m", "model=random,smollm2_135m", "model.name=a/b", "data.train.path=x.gguf"]
    assert expand_model(argv) == argv


def test_places_of_one_kind_are_swept_and_a_mixture_is_refused() -> None:
    assert expand_model(["-m", "model=./a,./b"]) == ["-m", "model=folder", "model.name='./a','./b'"]
    assert expand_model(["-m", "model=a.gguf,b.gguf"]) == ["-m", "model=gguf", "model.file='a.gguf','b.gguf'"]
    with pytest.raises(UserError, match="each for itself"):
        expand_model(["-m", "model=./a,random"])


def test_name_on_the_hub_has_one_slash_and_no_folder_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert expand_model(["model=owner/name"])[0] == "model=hub"
    for place in ("runs/packed", "a/b/c", "a/"):
        assert expand_model([f"model={place}"]) == ["model=folder", f"model.name='{place}'"]


def read(argument: str) -> object:
    """What Hydra makes of the value of an argument."""
    (readable_argument,) = readable([argument])
    (override,) = OverridesParser.create().parse_overrides([readable_argument])
    value = override.value()
    return OmegaConf.create({"value": value}).value if isinstance(value, str) else value


@pytest.mark.parametrize(
    "text", ["~/a", "a=b", "it's", "[a", "{a:", "é ü", "a:b=c", "foo(1)", "${", "'", "\\'", "a\\ ="]
)
def test_value_that_hydra_cannot_read_is_text(text: str) -> None:
    assert read(f"data.train.path={text}") == text


def test_what_hydra_can_read_is_left_alone() -> None:
    argv = ["a=1,2", "a=[1,2]", "a={b:1}", "a='x y'", "a=", "~a", "+a=null", "a=${b}", "-m", "a=interval(1,2)", "word"]
    assert readable(argv) == argv


@pytest.mark.parametrize("name", ["a,b.txt", "[a].txt", "${x}.txt", "it's, [a] ti=ny ${x} é.txt", "'a'.txt"])
def test_file_that_is_there_is_that_file_whatever_signs_its_name_holds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert read(f"data.train.path={name}") == name
    assert read(f"data.train.path={tmp_path}/{name}") == f"{tmp_path}/{name}"
    path = expand_test_sets([f"data=[{name},other.txt]"])[1]
    assert read(path) == name
    assert readable([f"sketch.rows={name}"])[0] == f"sketch.rows={name}" or read(f"sketch.rows={name}") == name


def test_test_sets_have_names_that_hydra_can_read() -> None:
    names = [word.split(".")[2] for word in expand_test_sets(["data=[é.txt,2024.txt,a b.jsonl.gz,a-b.txt]"])[::2]]
    assert names == ["_", "text_2024", "a_b", "a_b_2"]
    for nothing in ("data=", "data=[]", "data=null"):
        with pytest.raises(UserError, match="names no file"):
            expand_test_sets([nothing])


def test_folder_of_a_packed_model_has_two_names_and_is_given_once() -> None:
    assert folder_of_model(["model=a", "x=1"]) == folder_of_model(["++model=a", "x=1"]) == ["folder=a", "x=1"]
    with pytest.raises(UserError, match="one thing"):
        folder_of_model(["model=a", "folder=a"])


def test_options_of_hydra_are_known_in_full_only() -> None:
    check_options(["-m", "a=1", "--cfg=job"])
    check_options(["a=1", "--multirun"])
    with pytest.raises(UserError, match="--multi: there is no such option"):
        check_options(["--multi", "a=1"])


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30))
@example("it's \\alpha\\'")
@example("a\\")
@example("${oc.env:HOME}")
@example("\\${x}")
@example("null")
def test_prompt_reaches_the_program_as_it_was_typed(prompt: str) -> None:
    (argument,) = quote_values([f"prompt={prompt}"], ("prompt",))
    (override,) = OverridesParser.create().parse_overrides([argument])
    assert OmegaConf.create({"prompt": override.value()}).prompt == prompt
