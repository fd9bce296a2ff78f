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

{{ figures_and_origin }}
"""

_FIGURES_AND_ORIGIN = """## Perplexity

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
_DECODED = """---
{{ card_data }}
---

# {{ title }}

{{ base }}, compressed by the method {{ method }} and decoded to ordinary weights by usllm {{ versions.usllm }}: it
computes what the compressed model does, and any tool that reads transformers' folders reads it.

**The bits are gone.** {{ size }}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ title }}")
tokenizer = AutoTokenizer.from_pretrained("{{ title }}")
```

What was decoded was stored as: `{{ sketch }}`.

{{ figures_and_origin }}
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
    tags = ["usllm", "ultrasketch", *(["sub-1-bit"] if inspection.bits_per_weight < 1 else [])]
    return _rendered(_TEMPLATE, facts, tags, totals=inspection.totals(), rest=_by_storage(inspection))


def decoded_card(facts: CardFacts, method: str, sentence: str) -> str:
    """The card of a folder of decoded weights.

    Args:
        facts: About it.
        method: That its layers were compressed by.
        sentence: What was lost: both sizes, without a full stop.
    """
    size = sentence[:1].upper() + sentence[1:]
    return _rendered(_DECODED, facts, ["usllm"], method=method, size=size)


def _rendered(template: str, facts: CardFacts, tags: list[str], **values: Any) -> str:
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    stages = [stage for stage in _STAGES if any(stage in row for row in facts.rows)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=facts.base if facts.base.count("/") == 1 and not facts.base.startswith(("/", ".")) else None,
    )
    # Markdown: nothing is escaped. A tag alone on its line leaves no line behind.
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["measured"] = _measured_tokens
    values |= {name: getattr(facts, name) for name in facts.__dataclass_fields__}
    values |= {"card_data": data.to_yaml(), "stages": stages, "names": _STAGES}
    end = environment.from_string(_FIGURES_AND_ORIGIN).render(**values)
    return environment.from_string(template).render(**values, figures_and_origin=end)


def _measured_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of the text in a row's windows, of which one may be a beginning-of-text token."""
    return int(row["windows"] * (row["window"] - (row.get("window_start") == "each")))


def _by_storage(inspection: Inspection) -> dict[str, int]:
    """Bytes of the unsketched tensors by how they are stored: what was written, which is not always what was asked."""
    sizes: dict[str, int] = {}
    for tensor in inspection.rest:
        sizes[tensor.stored_as] = sizes.get(tensor.stored_as, 0) + tensor.bytes
    return sizes
