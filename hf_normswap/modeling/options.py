"""What options of norms may be, given by a user or by a configuration."""

import math
import numbers


def check_number(name: str, value, high: float = math.inf) -> None:
    """Raises `ValueError` unless the option `name` is a finite number of at least 0 and at most `high`."""
    if not isinstance(value, numbers.Real) or not 0 <= value <= high or math.isinf(value):
        bound = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} is a number of at least 0{bound}, and cannot be {value!r}.")
