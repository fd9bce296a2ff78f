"""Tokenizers with chat templates of the kinds that models have, and conversations to write with them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from usllm.models.random_model import byte_tokenizer

END = "<|endoftext|>"
TURNS = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '<|endoftext|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As ChatML: every turn begins with its role and ends with a mark and a line end."""
STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] + '<|endoftext|>' }}{% endfor %}"
)
"""As Llama 2: refuses what it does not know."""
DEAF = (
    "{% for message in messages %}{% if message['role'] in ['user', 'assistant'] %}"
    "{{ '[' + message['role'] + ']' + message['content'] + '<|endoftext|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As Phi's: leaves out roles that it does not know."""
FORGETFUL = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and not loop.last %}{{ '[short]' }}"
    "{% else %}{{ '[' + message['role'] + ']' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As of models that think: an answer is written otherwise once the conversation goes on."""


def tokenizer(template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a template."""
    found = byte_tokenizer()
    found.chat_template = template
    return found


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
