"""Metrics that need no download: drop-in [`evaluate.Metric`] subclasses over scikit-learn, seqeval and sacrebleu.

```python
>>> import evaluate
>>> from hf_normswap.metrics import GlueMetric

>>> metric = evaluate.combine([GlueMetric("mrpc"), GlueMetric("cola")])
>>> metric.compute(predictions=[0, 1, 1, 1], references=[0, 1, 1, 0])
{'accuracy': 0.75, 'f1': 0.8, 'matthews_correlation': 0.5773502691896258}

```
"""

from importlib import import_module


__all__ = ["GlueMetric", "SacrebleuMetric", "SeqevalMetric"]

_HOMES = {"GlueMetric": "glue", "SacrebleuMetric": "sacrebleu", "SeqevalMetric": "seqeval"}


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name} needs the package {error.name!r}: install it with `pip install 'hf_normswap[recipes]'`."
        ) from error
