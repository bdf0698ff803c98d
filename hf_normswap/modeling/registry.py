"""Norms by name."""

import difflib
import math
import numbers
import re


_NORMS: dict[str, type] = {}
_ALIASES: dict[str, str] = {}


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]", "", name).lower()


def register_norm(name: str, *aliases: str):
    """Class decorator that makes a norm known under `name`, its class name and `aliases`.

    The class derives from [`Norm`] (or [`BatchStatisticNorm`]); its options are the keyword arguments of its
    `__init__`.

    Raises:
        ValueError: when another class already has the name.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap import Norm, get_norm, register_norm
    >>> @register_norm("tanh")
    ... class DynamicTanh(Norm):
    ...     def normalize(self, x, mask):
    ...         return torch.tanh(0.5 * x)
    >>> get_norm("Dynamic-Tanh") is DynamicTanh
    True

    ```
    """

    def register(cls):
        spellings = {_plain(spelling) for spelling in (name, cls.__name__, *aliases)}
        for spelling in spellings:
            taken = _NORMS.get(_ALIASES.get(spelling, ""))
            # The same class again is a module that was reloaded.
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"The norm name {spelling!r} belongs to {taken.__qualname__}: choose another name.")
        cls.norm_name = name
        _NORMS[name] = cls
        _ALIASES.update(dict.fromkeys(spellings, name))
        return cls

    return register


def get_norm(name: str) -> type:
    """The class registered under `name`; case, spaces, hyphens and underscores do not matter.

    Raises:
        ValueError: when there is none, with the closest names.

    Example:

    ```python
    >>> from hf_normswap import get_norm
    >>> get_norm("power-norm").__name__, get_norm("PN").__name__
    ('PowerNorm', 'PowerNorm')

    ```
    """
    spelling = _plain(str(name))
    if spelling not in _ALIASES:
        close = dict.fromkeys(_ALIASES[match] for match in difflib.get_close_matches(spelling, _ALIASES, cutoff=0.5))
        hint = f"did you mean {' or '.join(map(repr, close))}" if close else f"choose among {available_norms()}"
        raise ValueError(f"There is no norm {name!r}: {hint}, or register one of your own with @register_norm first.")
    return _NORMS[_ALIASES[spelling]]


def available_norms() -> list[str]:
    """Registered names, sorted."""
    return sorted(_NORMS)


def check_number(name: str, value, high: float = math.inf) -> None:
    """Raises `ValueError` unless the option `name` is a finite number of at least 0 and at most `high`."""
    if not isinstance(value, numbers.Real) or not 0 <= value <= high or math.isinf(value):
        bound = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} is a number of at least 0{bound}, and cannot be {value!r}.")
