"""Perplexity before training is reported of the run's own weights, texts and windows, or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from usllm.callbacks import NanGuard
from usllm.cli import train
from usllm.config import EvaluationConfig
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.runs import measure as measure_module
from usllm.runs.measure import BaselinePerplexity, measure, merge_stages

ROW = {"test_set": "a", "window": 32, "windows": 4, "tokens": 200, "perplexity": 5.0}


def run_here(text: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    """The run's report."""
    few = ["trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2", "~callbacks.progress"]
    argv = ["usllm-train", "experiment=tiny", f"data.train.path={text}", f"run_dir={run_dir}", *few, *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train.main()
    report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
    return report


def interrupted(text: Path, run_dir: Path, step: int, *more: str) -> None:
    """A run that Ctrl-C ended in the optimizer step behind ``step``."""

    def interrupt(self: NanGuard, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanGuard, "on_before_optimizer_step", interrupt)
        with pytest.raises(SystemExit):
            run_here(text, run_dir, *more)


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = report["perplexity"]
    return rows


def test_figures_of_another_run_killed_before_its_first_checkpoint_are_not_taken_over(
    tiny_text: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    interrupted(tiny_text, run_dir, 1, "sketch.bits_per_weight=4")
    left = json.loads((run_dir / "baseline.json").read_text())
    (row,) = figures(run_here(tiny_text, run_dir, "resume=true"))
    (fresh,) = figures(run_here(tiny_text, tmp_path / "fresh"))
    assert row == fresh
    assert row["sketched"] != left["sketched"][0]["perplexity"]


def test_resumed_run_reports_what_it_measured_and_nothing_for_texts_and_windows_it_did_not(
    tiny_text: Path, tmp_path: Path
) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("seven dogs sat on a mat " * 40)
    interrupted(tiny_text, run_dir, 3, "evaluation.windows=[16,32]")
    more = [f"+evaluation.test_sets.other={{kind:text,path:{other}}}", "evaluation.windows=[16,24]", "resume=true"]
    with pytest.warns(UserWarning, match=r"validation/24, other/16, other/24"):
        rows = figures(run_here(tiny_text, run_dir, *more))
    known = {(row["test_set"], row["window"]): row.keys() & {"dense", "sketched", "finetuned"} for row in rows}
    assert known == {
        ("validation", 16): {"dense", "sketched", "finetuned"},
        ("validation", 24): {"finetuned"},
        ("other", 16): {"finetuned"},
        ("other", 24): {"finetuned"},
    }


def test_dense_finetuning_that_is_resumed_without_its_file_does_not_call_the_finetuned_model_dense(
    tiny_text: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    dense = ["stages=none", "~callbacks.sketch_reprojection", "~callbacks.sketch_health"]
    interrupted(tiny_text, run_dir, 3, *dense)
    (run_dir / "baseline.json").unlink()
    (row,) = figures(run_here(tiny_text, run_dir, *dense, "resume=true"))
    assert row.keys() & {"dense", "sketched", "finetuned"} == {"finetuned"}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 1),
        ({"max_windows": 6}, 1),  # the text has no more than 6
        ({"max_windows": 5}, 0),
        ({"precision": "bf16"}, 0),
        ({"windows": [16]}, 0),
        ({"batch_size": 3}, 1),
        ({"window_start": "none"}, 1),  # what versions did that do not say it
        ({"window_start": "each"}, 0),
    ],
)
def test_rows_are_kept_while_their_text_windows_and_precision_stay(
    changes: dict[str, Any], kept: int, tmp_path: Path
) -> None:
    measured_on = baseline(tmp_path)._measured_on()
    del measured_on["a/32"]["window_start"]
    (tmp_path / "baseline.json").write_text(json.dumps({"dense": [ROW], "measured_on": measured_on}))
    if kept:
        assert baseline(tmp_path, resumed=True, **changes).rows == {"dense": [ROW]}
    else:
        with pytest.warns(UserWarning, match="not measured on what evaluation asks for"):
            assert baseline(tmp_path, resumed=True, **changes).rows == {"dense": []}
    assert baseline(tmp_path, **changes).rows == {}


def test_changed_text_and_files_of_older_versions_are_recognised(tmp_path: Path) -> None:
    content = {"dense": [ROW], "measured_on": baseline(tmp_path)._measured_on()}
    (tmp_path / "baseline.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="a/32"):
        assert baseline(tmp_path, stream=torch.arange(1, 201), resumed=True).rows == {"dense": []}
    (tmp_path / "baseline.json").write_text(json.dumps({"dense": [ROW]}))
    with pytest.warns(UserWarning, match="a/32"):
        assert baseline(tmp_path, resumed=True).rows == {"dense": []}


def baseline(
    folder: Path, stream: torch.Tensor | None = None, resumed: bool = False, **changes: Any
) -> BaselinePerplexity:
    stream = torch.arange(200) if stream is None else stream
    config = EvaluationConfig(**{"windows": [32], "precision": "fp32", "window_start": "none", **changes})
    return BaselinePerplexity(folder, byte_tokenizer(), {"a": stream}, config, resumed=resumed)


def test_stages_over_other_windows_or_texts_are_not_put_side_by_side() -> None:
    wider, longer = {**ROW, "windows": 6, "perplexity": 6.0}, {**ROW, "tokens": 300, "perplexity": 7.0}
    first, second, third = merge_stages(dense=[ROW], sketched=[wider], finetuned=[longer])
    assert (first.get("dense"), first.get("sketched"), first.get("finetuned")) == (5.0, None, None)
    assert (second["sketched"], third["finetuned"]) == (6.0, 7.0)
    (row,) = merge_stages(dense=[ROW], finetuned=[{**ROW, "perplexity": 4.0}])
    assert (row["dense"], row["finetuned"]) == (5.0, 4.0)


def test_stages_under_other_window_starts_are_not_put_side_by_side() -> None:
    each = {**ROW, "window_start": "each"}
    assert len(merge_stages(dense=[ROW], finetuned=[each])) == 2
    assert len(merge_stages(dense=[ROW], finetuned=[{**ROW, "window_start": "none"}])) == 1  # an older row says nothing


def test_model_computes_on_the_device_that_is_given_wherever_its_first_parameter_is() -> None:
    # As shards in the memory of the host do (fsdp2_cpu_offload), while layers compute on the GPU.
    model: Any = random_model("llama")
    expected = measured(model, None)
    with_first_parameter_elsewhere(model)
    assert next(model.parameters()).device.type == "meta"
    assert measured(model, torch.device("cpu")) == expected


def test_run_measures_on_the_device_of_its_strategy(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []

    def evaluate(*arguments: Any, device: Any = None, **more: Any) -> Any:
        used.append(device)
        return ordinary(*arguments, device=device, **more)

    ordinary = measure_module.evaluate
    monkeypatch.setattr(measure_module, "evaluate", evaluate)
    run_here(tiny_text, tmp_path / "run", "reuse_statistics=false")
    assert used == [torch.device("cpu")] * 3  # dense, sketched, finetuned


def measured(model: Any, device: torch.device | None) -> float:
    config = EvaluationConfig(windows=[32], precision="fp32")
    (row,) = measure(model, byte_tokenizer(), {"a": torch.arange(200)}, config, "Model", False, device)
    return float(row["perplexity"])


def with_first_parameter_elsewhere(model: nn.Module) -> None:
    model.register_parameter("shard", nn.Parameter(torch.empty(1, device="meta")))
