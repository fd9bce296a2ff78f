"""Plug-ins on the command line: where their configuration joins, and what is said of those that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from usllm.system.errors import UserError
from usllm.system.plugins import import_plugins, with_search_path

PATH = "hydra.searchpath=[pkg://{}.conf]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def plug_in(place: Path, name: str, code: str = "", *options: str) -> str:
    """The name of a new plug-in with files of options."""
    for folder in (place / name, place / name / "conf"):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (place / name / "__init__.py").write_text(code)
    for option in options:
        path = place / name / "conf" / option
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return name


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve"]], ids=" ".join)
def test_configuration_joins_before_a_flag_and_behind_one(flags: list[str], place: Path) -> None:
    name = plug_in(place, "placed")
    plugins, path = f"plugins=[{name}]", PATH.format(name)
    assert with_search_path(["seed=1", plugins, "name=x", *flags]) == ["seed=1", plugins, path, "name=x", *flags]
    assert with_search_path([*flags, plugins]) == [*flags, plugins, path]


@pytest.mark.parametrize("option", ["sketch/mean.yaml", "train.yaml"])
def test_option_with_the_name_of_a_built_in_one_is_refused(option: str, place: Path) -> None:
    name = plug_in(place, "hidden", "", option)
    with pytest.raises(UserError, match=rf"{option} of {name}\.conf would not be read, usllm\.conf has .*rename it"):
        with_search_path([f"plugins=[{name}]"])


def test_options_of_one_name_in_two_plug_ins_are_refused(place: Path) -> None:
    names = [plug_in(place, name, "", "sketch/my_sketch.yaml") for name in ("first", "second")]
    with pytest.raises(UserError, match=r"my_sketch\.yaml of second\.conf would not be read, first\.conf has"):
        with_search_path([f"plugins=[{','.join(names)}]"])


def test_plug_in_that_fails_is_told_its_own_error_and_nothing_about_paths(place: Path) -> None:
    code = "import usllm_kernels\nusllm_kernels.register('row_norm', 'triton', None)\n"
    with pytest.raises(UserError, match=r"plugins=failing: fails while it is imported: ValueError: register") as error:
        import_plugins([plug_in(place, "failing", code)])
    assert "PYTHONPATH" not in str(error.value)
    with pytest.raises(UserError, match=r"plugins=lacking: fails .* No module named 'no_such_library'") as error:
        import_plugins([plug_in(place, "lacking", "import no_such_library\n")])
    assert "PYTHONPATH" not in str(error.value)


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such_package.plugin", "present.no_such_module"])
def test_plug_in_that_is_not_there_is_told_where_to_lie(name: str, place: Path) -> None:
    plug_in(place, "present")
    with pytest.raises(UserError, match=rf"plugins={name}: cannot be imported .*PYTHONPATH"):
        import_plugins([name])
