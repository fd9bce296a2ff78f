"""The model card of a packed folder: what it is, how to load it, what it measures, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from usllm.packed.inspection import Inspection

_STAGES = {
    "dense": "dense model",
    "sketched": "sketched, not trained",
    "reconstructed": "sketched, after stages that train it before finetuning",
    "finetuned": "sketched, finetuned",
    "packed": "this folder",
}
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ base }} with {{ totals.sketched_weights|thousands }} of its {{ totals.parameters|thousands }} weights in a packed
data sketch (UltraSketchLLM, arXiv 2506.17255), written by usllm {{ versions.usllm }}.

## Load it

```python
import usllm  # makes transformers read packed models: without this line it returns random layers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ title }}")
tokenizer = AutoTokenizer.from_pretrained("{{ title }}")
```

`usllm.load("{{ title }}")` does the same and checks more: it refuses a folder in which a tensor or a setting is not
the one that was written. Checksums find accidents and mix-ups, not a forger who makes them right too. From the command
line: `usllm-generate model={{ title }} prompt="…"`, `usllm-inspect model={{ title }}`.

## Size

| | |
|---|---|
| bits per sketched weight: all that its tensors hold | {{ "%.4f"|format(totals.bits_per_weight) }} |
| the same with the JSON entries of these tensors | {{ "%.4f"|format(totals.bits_per_weight_with_entries) }} |
| bits per parameter of the whole model | {{ "%.4f"|format(totals.model_bits_per_weight) }} |
| bytes of the sketched layers | {{ totals.sketched_bytes|thousands }} |
{% for kind, size in rest.items() %}
| bytes of everything else stored as {{ kind }} | {{ size|thousands }} |
{% endfor %}
| bytes of the weight files | {{ totals.weight_bytes|thousands }} |

Sketch: `{{ sketch }}`.

## Perplexity

{% if rows %}
{{ measured_as }}

| test set | window | window start | tokens |{% for stage in stages %} {{ names[stage] }} |{% endfor +%}
|---|---|---|---|{% for stage in stages %}---|{% endfor +%}
{% for row in rows %}
| {{ row.test_set }} | {{ row.window }} | {{ row.window_start|default("none") }} | {{ row|measured|thousands }} |
{%- for stage in stages %} {{ "%.2f"|format(row[stage]) if row[stage] is defined else "not measured" }} |{% endfor +%}
{% endfor %}
{% else %}
Not measured. `usllm-eval model={{ title }}` measures it.
{% endif %}

## How it was made

```bash
{% for command in commands %}
{{ command }}
{% endfor %}```

{{ machine }}. Versions:{% for name, number in versions.items() %} {{ name }} {{ number }}{{ "," if not loop.last }}
{%- endfor %}.
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what is in the folder.

    Attributes:
        title: Name of the model: that of its folder.
        base: The dense model.
        commands: What made it, first to last.
        machine: One line about the machine.
        versions: Library versions by name.
        sketch: The sketch configuration, in words.
        rows: Perplexities, one row per test set and window (``usllm.runs.measure.merge_stages``).
        measured_as: Window, precision and tokenizer rule of the figures, in one sentence.
    """

    title: str
    base: str
    commands: Sequence[str]
    machine: str
    versions: Mapping[str, str]
    sketch: str
    rows: Sequence[Mapping[str, Any]] = field(default_factory=list)
    measured_as: str = ""


def model_card(facts: CardFacts, inspection: Inspection) -> str:
    """The card, Markdown with the hub's metadata block."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    stages = [stage for stage in _STAGES if any(stage in row for row in facts.rows)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["usllm", "ultrasketch", *(["sub-1-bit"] if inspection.bits_per_weight < 1 else [])],
        base_model=facts.base if facts.base.count("/") == 1 and not facts.base.startswith(("/", ".")) else None,
    )
    # Markdown: nothing is escaped. A tag alone on its line leaves no line behind.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["measured"] = _measured_tokens
    return environment.from_string(_TEMPLATE).render(
        card_data=data.to_yaml(),
        totals=inspection.totals(),
        rest=_by_storage(inspection),
        stages=stages,
        names=_STAGES,
        **{name: getattr(facts, name) for name in facts.__dataclass_fields__},
    )


def _measured_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of the text in a row's windows, of which one may be a beginning-of-text token."""
    return int(row["windows"] * (row["window"] - (row.get("window_start") == "each")))


def _by_storage(inspection: Inspection) -> dict[str, int]:
    """Bytes of the unsketched tensors by how they are stored: what was written, which is not always what was asked."""
    sizes: dict[str, int] = {}
    for tensor in inspection.rest:
        sizes[tensor.stored_as] = sizes.get(tensor.stored_as, 0) + tensor.bytes
    return sizes
