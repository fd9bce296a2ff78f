"""Every wrong input of the table ends in one line that names it, with its status and without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import tokenizer as with_template
from commands import command
from input_row import ODD_NAME, Row
from wrong_inputs import ROWS

TASK = """\
task: choose_a_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def places(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the names in the table stand for."""
    from usllm.models.random_model import byte_tokenizer, random_model

    root = tmp_path_factory.mktemp("places")
    run = command("train", *_tiny(tiny_text, root), f"run_dir={root}/run", folder=root)
    assert run.status == 0, run.output
    packed = command("export", f"ckpt={root}/run", f"out={root}/packed", folder=root)
    assert packed.status == 0, packed.output
    (root / "lines.jsonl").write_text('{"text": "abc \\ud800 def"}\n')
    documents = tiny_text.read_text().split("\n\n")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (root / "file").write_text("a file\n")
    (root / ODD_NAME).write_text(tiny_text.read_text())
    for name, extra in (("dense", []), ("foreign", ["cat", "dogs", "mat"] + [f"<{n}>" for n in range(20)])):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(list(reversed(extra)))
        random_model("llama").save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    talk = [{"role": "user", "content": "what now"}, {"role": "assistant", "content": "the cat sat"}]
    talks = {"talks": [talk] * 40, "alone": [talk[:1]], "bot": [[talk[0], {**talk[1], "role": "bot"}]]}
    for name, conversations in talks.items():
        rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (root / f"{name}.jsonl").write_text(rows)
    random_model("llama").save_pretrained(root / "talker")
    with_template().save_pretrained(root / "talker")
    tasks = root / "tasks"
    tasks.mkdir()
    questions = [{"question": f"the {a} sat on the", "choices": [" mat", " of"], "answer": 0} for a in "abcde"]
    (tasks / "questions.json").write_text("\n".join(json.dumps(question) for question in questions))
    (tasks / "choose_a_word.yaml").write_text(TASK.format(data=tasks / "questions.json"))
    found = {
        "LINES": "lines.jsonl",
        "ROWS": "rows.jsonl",
        "RUN": "run",
        "PACKED": "packed",
        "DENSE": "dense",
        "FOREIGN": "foreign",
    }
    found |= {"TALKER": "talker", "TALKS": "talks.jsonl", "ALONE": "alone.jsonl", "BOT": "bot.jsonl"}
    found |= {"TASKS": "tasks", "FILE": "file", "ODD": ODD_NAME}
    return {"TEXT": str(tiny_text), **{name: f"{root}/{place}" for name, place in found.items()}}


def _tiny(text: Path | str, here: Path) -> list[str]:
    common = ["experiment=tiny", "model=random", f"data.train.path={text}", f"output_root={here}/runs"]
    return [*common, "trainer.max_steps=2", "~callbacks.progress"]


def _measure(text: str, here: Path) -> list[str]:
    return [
        "model=random",
        f"data=[{text}]",
        "evaluation.windows=[32]",
        "evaluation.max_windows=2",
        f"run_dir={here}/e",
    ]


def _put(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def _typed(row: Row, places: dict[str, str], here: Path) -> list[str]:
    """The whole command line: what a row names again takes the place of what it begins with."""
    given = {"TINY": _tiny(places["TEXT"], here), "MEASURE": _measure(places["TEXT"], here)}
    words = [word for typed in row.typed for word in given.get(typed, [_put(typed, places)])]
    keys = [word.partition("=")[0] for word in words]
    last = [word for at, word in enumerate(words) if keys[at] not in keys[at + 1 :] or word.startswith("-")]
    return last if row.typed[-1:] != ["-m"] else ["-m", *(word for word in last if word != "-m")]


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.command}-{'-'.join(row.typed)[:70]}" for row in ROWS])
def test_wrong_input_is_one_line_with_its_status(row: Row, places: dict[str, str], tmp_path: Path) -> None:
    if "TASKS" in " ".join(row.typed):
        pytest.importorskip("lm_eval")
    here = {**places, "HERE": str(tmp_path)}
    status, output = command(row.command, *_typed(row, here, tmp_path), folder=tmp_path)
    assert status == row.status, output
    assert "Traceback" not in output
    errors = output.count(f"usllm-{row.command}: error:")  # behind a progress bar that was at work, too
    assert errors == (1 if row.status else 0) or "-m" in row.typed, output
    told = output[output.find("error:") :] if errors else output
    for words in row.words:
        assert _put(words, here) in told, output
