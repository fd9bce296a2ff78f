"""Operators by name. A new one is a file beside these and a line in this table."""

from usllm.sketch.operators.absmaxmin import AbsMaxMin
from usllm.sketch.operators.base import Operator
from usllm.sketch.operators.countmin import CountMin
from usllm.sketch.operators.mean import Mean

OPERATORS: dict[str, Operator] = {"absmaxmin": AbsMaxMin(), "countmin": CountMin(), "mean": Mean()}

__all__ = ["OPERATORS", "Operator"]
