"""Operators by name. A new one is a file beside these that ends with an object called ``OPERATOR``."""

from usllm.sketch.operators.base import Operator
from usllm.system.discovery import attributes

OPERATORS: dict[str, Operator] = attributes(__name__, __path__, "OPERATOR")

__all__ = ["OPERATORS", "Operator"]
