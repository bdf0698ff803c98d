"""The scores of the nine GLUE tasks."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _matthews(predictions, references):
    return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


def _accuracy(predictions, references):
    return {"accuracy": float(accuracy_score(references, predictions))}


def _accuracy_and_f1(predictions, references):
    return _accuracy(predictions, references) | {"f1": float(f1_score(references, predictions, zero_division=0.0))}


def _correlations(predictions, references):
    # A NaN score would freeze `load_best_model_at_end` on the first, untrained checkpoint.
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {
        "pearson": float(pearsonr(predictions, references).statistic),
        "spearmanr": float(spearmanr(predictions, references).statistic),
    }


_SCORES = {
    "cola": _matthews,
    "sst2": _accuracy,
    "mrpc": _accuracy_and_f1,
    "qqp": _accuracy_and_f1,
    "stsb": _correlations,
    "mnli": _accuracy,
    "qnli": _accuracy,
    "rte": _accuracy,
    "wnli": _accuracy,
}
_ALIASES = {"mnli_matched": "mnli", "mnli_mismatched": "mnli"}


class GlueMetric(evaluate.Metric):
    r"""
    The official scores of one GLUE task (Wang et al., 2019, https://arxiv.org/abs/1804.07461), computed offline.

    | task | scores |
    |---|---|
    | `cola` | `matthews_correlation` |
    | `sst2`, `mnli`, `qnli`, `rte`, `wnli` | `accuracy` |
    | `mrpc`, `qqp` | `accuracy`, `f1` of class 1 |
    | `stsb` | `pearson`, `spearmanr` |

    Scores are fractions (1.0 is perfect), not percentages. A correlation does not exist when every prediction, or
    every reference, is the same: the score is then 0.0, as scikit-learn has it for the Matthews correlation. A NaN
    among the `stsb` predictions gives NaN, so that a diverged run is not mistaken for a weak one.

    Args:
        config_name (`str`):
            The task. `"mnli_matched"` and `"mnli_mismatched"` are accepted for `"mnli"`.
        kwargs (`dict`, *optional*):
            Passed on to [`evaluate.Metric`].

    [`~GlueMetric.compute`] and [`~GlueMetric.add_batch`] take:
        predictions (sequence of `int` or, for `stsb`, `float`, of length `num_examples`):
            Predicted class ids, or similarities.
        references (sequence of `int` or, for `stsb`, `float`, of length `num_examples`):
            True class ids, or similarities from 0 to 5.

    Example:

    ```python
    >>> from hf_normswap.metrics import GlueMetric

    >>> GlueMetric("mrpc").compute(predictions=[0, 1, 1, 1], references=[0, 1, 1, 0])
    {'accuracy': 0.75, 'f1': 0.8}

    >>> metric = GlueMetric("stsb")
    >>> for predictions, references in [([1.0, 2.0], [0.5, 1.5]), ([4.0], [3.5])]:
    ...     metric.add_batch(predictions=predictions, references=references)
    >>> {name: round(score, 6) for name, score in metric.compute().items()}
    {'pearson': 1.0, 'spearmanr': 1.0}

    ```
    """

    @property
    def name(self):
        # The prefix of clashing scores in `evaluate.combine`: `glue_rte_accuracy`, not `glue_metric_0_accuracy`.
        return f"glue_{self.config_name}"

    @property
    def _score(self):
        return _SCORES.get(_ALIASES.get(self.config_name, self.config_name))

    def _info(self):
        if self._score is None:
            raise ValueError(f"Unknown GLUE task {self.config_name!r}: choose one of {', '.join(_SCORES)}.")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            # Class ids are read as floats too: an integer column would silently round probabilities down to class 0.
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        if len(predictions) < 2 and self._score is _correlations:
            raise ValueError(f"{self.config_name!r} is scored by a correlation: pass two examples or more.")
        if len(predictions) == 0:
            raise ValueError(f"There is nothing to score for {self.config_name!r}: pass one example or more.")
        if np.any(references < 0):
            raise ValueError(
                f"The references of {self.config_name!r} hold negative labels, which mark an unlabelled split: "
                "score the validation split instead."
            )
        if self._score is not _correlations:
            if np.any(predictions % 1 != 0) or np.any(references % 1 != 0):
                raise ValueError(f"{self.config_name!r} is scored on class ids: take the argmax of the logits first.")
            predictions, references = predictions.astype(int), references.astype(int)
        return self._score(predictions, references)
