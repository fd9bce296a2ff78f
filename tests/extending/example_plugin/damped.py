"""An operator: the mean of a bucket, read at half its size where two rows are joined."""

from usllm.sketch.operators import OPERATORS
from usllm.sketch.operators.mean import Mean


class Damped(Mean):
    """Bucket means whose sum over rows is divided by one more than their number."""

    def divisor(self, rows: int) -> int:
        return rows + 1


OPERATORS["damped"] = Damped()
