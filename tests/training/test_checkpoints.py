from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Settings

from usllm.system.errors import UserError
from usllm.training import AtomicCheckpointIO, StepCheckpoint, latest_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 5 steps with a checkpoint every 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_run.run(folder, Settings(steps=5, accumulate=1, validate_every=5))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint(step: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.randn(50, 50)}, "global_step": step}


def fill(folder: Path, *steps: int) -> list[Path]:
    paths = [folder / f"step={step:08d}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        torch.save(checkpoint(step), path)
    return paths


def test_newest_two_checkpoints_and_the_end_of_training_are_kept(trained: Path) -> None:
    assert names(trained / "checkpoints") == ["step=00000004.ckpt", "step=00000005.ckpt"]


def test_checkpoint_holds_only_what_loads_without_pickled_code(trained: Path) -> None:
    loaded = torch.load(trained / "checkpoints" / "step=00000005.ckpt", weights_only=True)
    assert loaded["global_step"] == 5
    machine = {"ranks", "accumulate_grad_batches"}
    assert {"plans", "shapes", "compressor", "patterns", "config", "format", *machine} == set(loaded["usllm"])


def test_latents_are_stored_in_fp32_and_states_beside_them(trained: Path) -> None:
    state = torch.load(trained / "checkpoints" / "step=00000005.ckpt", weights_only=True)["state_dict"]
    layer = "model.model.layers.0.self_attn.q_proj"
    assert state[f"{layer}.weight"].dtype == torch.float32
    assert f"{layer}.state_codes" in state
    assert not any("teacher" in name for name in state)


def test_resuming_often_leaves_no_more_files_than_running_through(trained: Path, tmp_path: Path) -> None:
    settings = Settings(steps=8, accumulate=1, checkpoint_every=1, kill_at=("on_train_batch_end", 3))
    for kill in range(3):
        with pytest.raises(tiny_run.Killed):
            tiny_run.run(tmp_path / "run", settings)
        assert len(names(tmp_path / "run" / "checkpoints")) == 2, f"after kill {kill}"


def test_newest_step_is_found_by_number_not_by_name_or_age(tmp_path: Path) -> None:
    torch.save(checkpoint(12), tmp_path / "step=12.ckpt")
    torch.save(checkpoint(9), tmp_path / "step=9.ckpt")
    assert latest_checkpoint(tmp_path) == tmp_path / "step=12.ckpt"


def test_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    (tmp_path / "step=00000003.ckpt.part").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_checkpoint_is_named_and_the_one_before_it_is_used(share: float, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder)
    newest = folder / "step=00000005.ckpt"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * share)])
    with pytest.warns(UserWarning, match=r"step=00000005\.ckpt cannot be read .* the checkpoint before it is used"):
        assert latest_checkpoint(folder) == folder / "step=00000004.ckpt"


def test_run_continues_from_the_checkpoint_before_a_cut_one_and_ends_equal(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = run / "checkpoints" / "step=00000005.ckpt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        tiny_run.run(run, Settings(steps=5, accumulate=1, validate_every=5))
    assert not tiny_run.differences(tiny_run.final_checkpoint(trained), tiny_run.final_checkpoint(run))


def test_whole_checkpoints_cause_no_warning(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latest_checkpoint(tmp_path)


def test_folder_of_cut_checkpoints_only_is_refused_naming_them(tmp_path: Path) -> None:
    for path in fill(tmp_path, 1, 2):
        path.write_bytes(path.read_bytes()[:100])
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(UserError, match=r"step=00000002\.ckpt, step=00000001\.ckpt"),
    ):
        latest_checkpoint(tmp_path)


def test_file_of_other_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt cannot be read \(it is not a training checkpoint\)"):
        load_checkpoint(tmp_path / "other.ckpt")


def test_writing_that_breaks_off_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step=00000001.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(1), path)
    before = path.read_bytes()

    def full_disk(value: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        writer.save_checkpoint(checkpoint(2), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


def test_kill_before_the_rename_leaves_the_old_file_and_a_part_that_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step=00000001.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(1), path)
    before = path.read_bytes()

    def killed(*_: Any) -> None:
        raise tiny_run.Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(tiny_run.Killed):
            writer.save_checkpoint(checkpoint(2), path)
    assert path.read_bytes() == before
    assert latest_checkpoint(tmp_path) == path
    writer.save_checkpoint(checkpoint(3), path)
    assert names(tmp_path) == [path.name]
    assert load_checkpoint(path)["global_step"] == 3


def test_writer_never_leaves_the_target_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", None)
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "deep" / "step=00000001.ckpt")
    assert names(tmp_path / "deep") == ["step=00000001.ckpt"]


@pytest.mark.parametrize(
    ("arguments", "key"), [({"every_n_train_steps": 0}, "every_n_train_steps=0"), ({"keep": 1}, "keep=1")]
)
def test_settings_that_could_lose_a_run_are_refused(arguments: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=f"callbacks.checkpoint.{key}"):
        StepCheckpoint(**arguments)
