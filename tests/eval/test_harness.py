"""Tasks of lm-evaluation-harness: a local task with local data on tiny models, in this process and by the command."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny_packed import pack, sketched_model
from tokenizers import processors

from usllm.cli import eval as evaluation
from usllm.cli import train
from usllm.eval import harness
from usllm.eval.harness import find_tasks, harness_tables, run_harness
from usllm.models.random_model import byte_tokenizer, random_model
from usllm.packed.export import RestStorage
from usllm.system.errors import UserError

QUESTIONS = [
    {"question": f"the {animal} sat on the", "choices": [" mat", " river", " of"], "answer": index % 3}
    for index, animal in enumerate(("cat", "dog", "hen", "fox", "owl"))
]
TASK = """\
task: choose_a_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{data}"
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
READING = """\
task: read_the_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{data}"
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A folder with the tasks ``choose_a_word`` and ``read_the_text``, both on five questions."""
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (folder / "choose_a_word.yaml").write_text(TASK.format(data=data))
    (folder / "read_the_text.yaml").write_text(READING.format(data=data))
    return folder


def most_likely_choices() -> list[int]:
    """The choice that the tiny Llama finds likeliest, by its logits alone."""
    model, tokenizer = random_model("llama").eval(), byte_tokenizer()
    chosen = []
    for question in QUESTIONS:
        prompt = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            answer = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            log_likelihood = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            scores.append(float(log_likelihood.sum()))
        chosen.append(scores.index(max(scores)))
    return chosen


def test_accuracy_is_that_of_the_logits(task_folder: Path) -> None:
    right = [guess == question["answer"] for guess, question in zip(most_likely_choices(), QUESTIONS, strict=True)]
    result = run_harness(random_model("llama"), byte_tokenizer(), ["choose_a_word"], include_path=task_folder)
    share = sum(right) / len(right)
    found = result["results"]["choose_a_word"]
    assert found["acc,none"] == pytest.approx(share)
    assert found["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert result["n-samples"]["choose_a_word"] == {"original": 5, "effective": 5}


def test_result_is_json_with_version_and_seeds_and_prints_as_a_table(task_folder: Path) -> None:
    result = run_harness(
        random_model("llama"),
        byte_tokenizer(),
        ["choose_a_word"],
        include_path=task_folder,
        limit=2,
        batch_size=2,
        seed=7,
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["seeds"].values()) == {7}
    assert result["lm_eval_version"]
    assert result["n-samples"]["choose_a_word"]["effective"] == 2
    assert result["settings"]["limit"] == 2
    (table,) = harness_tables(result)
    assert "choose_a_word" in table and "acc" in table


def test_number_of_shots_reaches_the_task(task_folder: Path) -> None:
    result = run_harness(random_model("llama"), byte_tokenizer(), ["choose_a_word"], include_path=task_folder, limit=1)
    more = run_harness(
        random_model("llama"), byte_tokenizer(), ["choose_a_word"], include_path=task_folder, limit=1, num_fewshot=2
    )
    assert (result["n-shot"]["choose_a_word"], more["n-shot"]["choose_a_word"]) == (0, 2)


def test_model_tokenizer_and_random_numbers_are_left_alone(task_folder: Path) -> None:
    model, tokenizer = random_model("llama").train(), byte_tokenizer()
    model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), torch.rand(1).item())
    random.seed(5)
    torch.manual_seed(5)
    run_harness(model, tokenizer, ["choose_a_word"], include_path=task_folder, limit=1)
    assert (random.random(), torch.rand(1).item()) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(("add_bos_token", "first", "noted"), [(None, 2, True), (False, 1, False), (True, 2, True)])
def test_second_beginning_of_text_token_is_said_and_can_be_left_out(
    task_folder: Path, add_bos_token: bool | None, first: int, noted: bool
) -> None:
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    model, seen = random_model("llama"), []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0, :3]))
    options = {"include_path": task_folder, "limit": 1, "add_bos_token": add_bos_token}
    result = run_harness(model, tokenizer, ["read_the_text"], **options)  # type: ignore[arg-type]
    assert int((seen[-1] == bos).sum()) == first
    assert result["settings"]["add_bos_token"] is add_bos_token
    assert ["harness.add_bos_token=false leaves one" in note for note in result["notes"]] == [True] * noted


def test_one_beginning_of_text_token_is_nothing_to_note(task_folder: Path) -> None:
    for task in ("read_the_text", "choose_a_word"):
        assert run_harness(random_model("llama"), byte_tokenizer(), [task], include_path=task_folder)["notes"] == []


def test_autocast_reaches_the_model(task_folder: Path) -> None:
    model, seen = random_model("llama"), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    run_harness(model, byte_tokenizer(), ["choose_a_word"], include_path=task_folder, limit=1, autocast=torch.bfloat16)
    assert seen == {torch.bfloat16}


def test_figures_that_are_not_finite_become_null() -> None:
    pytest.importorskip("lm_eval")
    assert harness._plain({"a": math.nan, "b": [math.inf, 1.5]}) == {"a": None, "b": [None, 1.5]}


def test_wildcard_takes_tasks_and_not_the_groups_that_hold_them(task_folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    (task_folder / "group.yaml").write_text("group: choose_all\ntask: [choose_a_word]\n")
    index = TaskManager(include_path=str(task_folder), include_defaults=False)
    assert harness._matches("choose_*", index) == ["choose_a_word"]
    assert harness._matches("choose_all", index) == ["choose_all"]


@pytest.mark.slow
def test_unknown_task_names_the_nearest(task_folder: Path) -> None:
    with pytest.raises(UserError, match=r"harness\.tasks=choose_a_wrod: .*did you mean choose_a_word"):
        find_tasks(["choose_a_wrod"], task_folder)


def test_missing_data_is_one_clear_message(task_folder: Path) -> None:
    (task_folder / "questions.json").unlink()
    with pytest.raises(UserError, match=r"harness\.tasks=\['choose_a_word'\]: cannot be run here \(.*questions\.json"):
        run_harness(random_model("llama"), byte_tokenizer(), ["choose_a_word"], include_path=task_folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match=r"harness\.include_path=.*nowhere: no such folder"):
        find_tasks(["any"], tmp_path / "nowhere")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'usllm\[eval\]'"):
        find_tasks(["any"])


def test_command_runs_tasks_on_a_sketched_checkpoint(
    task_folder: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["experiment=tiny", f"data.train.path={tiny_text}", "trainer.max_steps=2", f"run_dir={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["usllm-train", *argv, "~callbacks.progress"])
    train.main()
    folder = tmp_path / "result"
    argv = [f"ckpt={tmp_path}/run", f"run_dir={folder}", "seed=3"]
    argv += ["harness.tasks=[choose_a_word]", f"harness.include_path={task_folder}", "harness.limit=4"]
    monkeypatch.setattr(sys, "argv", ["usllm-eval", *argv])
    evaluation.main()
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["perplexity"][0]["perplexity"] > 1
    assert 0 <= result["harness"]["results"]["choose_a_word"]["acc,none"] <= 1
    assert result["harness"]["n-samples"]["choose_a_word"]["effective"] == 4
    assert set(result["harness"]["seeds"].values()) == {3}
    assert "choose_a_word" in capsys.readouterr().out


def test_command_finds_a_packed_folder_as_good_as_the_sketched_model(
    task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = sketched_model(), ["choose_a_word", "read_the_text"]
    expected = run_harness(model, byte_tokenizer(), tasks, include_path=task_folder)
    folder = pack(model, tmp_path / "packed", RestStorage("float32"))
    argv = [f"model={folder}", f"run_dir={tmp_path}/result", "evaluation.precision=fp32"]
    argv += [f"harness.tasks=[{','.join(tasks)}]", f"harness.include_path={task_folder}"]
    monkeypatch.setattr(sys, "argv", ["usllm-eval", *argv])
    evaluation.main()
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert result["harness"]["results"] == expected["results"]
    assert result["harness"]["results"]["read_the_text"]["byte_perplexity,none"] > 1


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("harness.include_path=/no/such/folder", "harness.include_path=/no/such/folder"),
        ("harness.limit=0", "harness.limit=0"),
        ("harness.limit=2.5", "harness.limit=2.5"),
        ("harness.batch_size=0", "harness.batch_size=0"),
        ("harness.num_fewshot=-1", "harness.num_fewshot=-1"),
    ],
)
def test_bad_settings_are_named_by_the_command(
    argument: str,
    named: str,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["model=random", f"run_dir={tmp_path}/run", "harness.tasks=[choose_a_word]", argument]
    monkeypatch.setattr(sys, "argv", ["usllm-eval", *argv])
    with pytest.raises(SystemExit) as ended:
        evaluation.main()
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
