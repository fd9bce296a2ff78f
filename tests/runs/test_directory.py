"""Run directories: names, refusal, and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from usllm.runs.directory import finished_report, noting_failure, refuse_used, run_id
from usllm.system.errors import UserError
from usllm.system.files import read_json, write_json
from usllm.system.run_files import FAILURE_FILE


def test_no_overrides_is_the_default_run() -> None:
    assert run_id("") == "default"


def test_readable_overrides_stay_readable() -> None:
    assert run_id("sketch.rows-2+trainer.max_steps-5") == "sketch.rows-2+trainer.max_steps-5"


@given(st.text(min_size=1, max_size=400))
def test_name_is_short_one_folder_and_a_value_for_the_command_line(overrides: str) -> None:
    name = run_id(overrides)
    assert name == run_id(overrides)
    assert len(name.encode()) <= 255
    assert name not in ("", ".", "..")
    assert "/" not in name
    (override,) = OverridesParser.create().parse_overrides([f"ckpt=runs/demo/{name}"])
    assert override.value() == f"runs/demo/{name}"


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_different_overrides_have_different_names(a: str, b: str) -> None:
    assert (run_id(a) == run_id(b)) == (a == b)


def test_directory_with_a_checkpoint_or_a_report_is_refused(tmp_path: Path) -> None:
    refuse_used(tmp_path / "nowhere")
    refuse_used(tmp_path)
    write_json(tmp_path / "a" / "report.json", {})
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    refuse_used(tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "step=1.ckpt").touch()
    for used in ("a", "b"):
        with pytest.raises(UserError, match="resume=true"):
            refuse_used(tmp_path / used)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"finished": True})
    with pytest.raises(TypeError):
        write_json(path, {"finished": object()})
    assert read_json(path) == {"finished": True}


def test_only_a_finished_report_counts(tmp_path: Path) -> None:
    assert finished_report(tmp_path) is None
    write_json(tmp_path / "report.json", {"finished": False})
    assert finished_report(tmp_path) is None
    write_json(tmp_path / "report.json", {"finished": True})
    assert finished_report(tmp_path) == {"finished": True}


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"finished": tr')
    with pytest.raises(UserError, match=r"report\.json is damaged"):
        finished_report(tmp_path)


def test_a_failure_is_noted_and_forgotten_by_the_next_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), noting_failure(tmp_path):
        raise RuntimeError("out of memory")
    assert read_json(tmp_path / FAILURE_FILE) == {"error": "RuntimeError", "message": "out of memory"}
    with noting_failure(tmp_path):
        assert not (tmp_path / FAILURE_FILE).exists()
    assert not (tmp_path / FAILURE_FILE).exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), noting_failure(tmp_path):
        raise interruption
    assert not (tmp_path / FAILURE_FILE).exists()
