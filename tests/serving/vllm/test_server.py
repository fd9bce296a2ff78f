"""``vllm serve packed`` on the loopback, asked by the OpenAI client."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS, SMALL, WRITES, environment, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(1800)]

STARTED = "Application startup complete"


@pytest.fixture(scope="module")
def client(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server that has started."""
    from openai import OpenAI

    root = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    program = Path(__file__).with_name("vllm_command.py")
    command = [sys.executable, str(program), "serve", str(folder_of(WRITES)), "--enforce-eager", *small]
    command += ["--served-model-name", "packed", "--host", "127.0.0.1", "--port", str(port)]
    log = root / "log"
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root
    )
    assert process.stdout is not None
    with log.open("w") as output, ThreadPoolExecutor(1) as reader:
        try:
            for line in process.stdout:
                output.write(line)
                if STARTED in line:
                    break
            else:
                output.flush()
                raise AssertionError(log.read_text()[-8000:])
            reader.submit(output.writelines, process.stdout)  # a full pipe would stop the server
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=1200, max_retries=0)
        finally:
            process.terminate()
            process.wait(120)


def test_sixteen_requests_at_once_are_all_answered(client: Any) -> None:
    def ask(prompt: str) -> Any:
        whole = {"ignore_eos": True}
        return client.completions.create(model="packed", prompt=prompt, max_tokens=16, temperature=0, extra_body=whole)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, PROMPTS * 2))
    assert [answer.usage.completion_tokens for answer in answers] == [16] * 16
    assert all(answer.choices[0].text.strip() for answer in answers)


def test_the_chat_route_answers(client: Any) -> None:
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model="packed", messages=turn, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content.strip()
