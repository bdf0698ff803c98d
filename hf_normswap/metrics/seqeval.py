"""Entity-level scores for sequence labelling."""

import warnings

import datasets
import evaluate
from seqeval import scheme as schemes
from seqeval.metrics import accuracy_score, classification_report


_SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")


class SeqevalMetric(evaluate.Metric):
    r"""
    Precision, recall and F1 over entities, computed offline by seqeval (https://github.com/chakki-works/seqeval).

    An entity counts as found when its type and both of its boundaries are right. The default is what the CoNLL script
    `conlleval` computes; what is undefined there (the precision of a tagger that finds nothing) is 0.0. All scores are
    fractions (1.0 is perfect).

    Args:
        kwargs (`dict`, *optional*):
            Passed on to [`evaluate.Metric`].

    [`~SeqevalMetric.compute`] and [`~SeqevalMetric.add_batch`] take:
        predictions (`list[list[str]]`, `num_sentences` lists of `num_words` tags):
            Predicted tags, such as `"B-PER"`, without the padded and ignored positions.
        references (`list[list[str]]`, `num_sentences` lists of `num_words` tags):
            True tags.
        mode (`str`, *optional*):
            `"strict"` drops entities that break the tagging scheme; `conlleval` mends them. Only for `compute`.
        scheme (`str`, *optional*):
            Tagging scheme of the strict mode (`"IOB2"`, `"IOBES"`, ...), found from the tags if not given. Only for
            `compute`.

    Returns:
        `dict`: `overall_precision`, `overall_recall`, `overall_f1` (micro averages), `overall_accuracy` (over tags),
        and for each entity type a `dict` of `precision`, `recall`, `f1` and `number`, the count of true entities.

    Example:

    ```python
    >>> from hf_normswap.metrics import SeqevalMetric

    >>> scores = SeqevalMetric().compute(
    ...     predictions=[["B-PER", "I-PER", "O", "B-LOC"]], references=[["B-PER", "I-PER", "O", "B-ORG"]]
    ... )
    >>> scores["overall_f1"], scores["overall_accuracy"]
    (0.5, 0.75)
    >>> scores["PER"]
    {'precision': 1.0, 'recall': 1.0, 'f1': 1.0, 'number': 1}

    ```
    """

    def _info(self):
        tags = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": tags, "references": tags}),
            reference_urls=["https://github.com/chakki-works/seqeval"],
        )

    def _compute(self, predictions, references, mode=None, scheme=None):
        if mode not in (None, "strict"):
            raise ValueError(f"Unknown mode {mode!r}: pass 'strict', or nothing for the scores of conlleval.")
        if scheme is not None and scheme not in _SCHEMES:
            raise ValueError(f"Unknown tagging scheme {scheme!r}: choose one of {', '.join(_SCHEMES)}.")
        if scheme is not None and mode is None:
            raise ValueError(f"Only the strict mode reads the scheme {scheme!r}: pass mode='strict' too.")
        if not references:
            raise ValueError("There is nothing to score: pass one sentence or more.")
        for index, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            if len(predicted) != len(true):
                raise ValueError(
                    f"Sentence {index} has {len(predicted)} predicted and {len(true)} true tags: "
                    "drop the padded positions of both."
                )

        with warnings.catch_warnings():
            # Without any entity the macro averages, which are not reported, divide by zero.
            warnings.simplefilter("ignore", RuntimeWarning)
            report = classification_report(
                references,
                predictions,
                output_dict=True,
                mode=mode,
                scheme=scheme and getattr(schemes, scheme),
                zero_division=0,
            )
        overall = report["micro avg"]
        per_type = {
            name: {
                "precision": float(row["precision"]),
                "recall": float(row["recall"]),
                "f1": float(row["f1-score"]),
                "number": int(row["support"]),
            }
            for name, row in report.items()
            if not name.endswith(" avg")
        }
        return per_type | {
            "overall_precision": float(overall["precision"]),
            "overall_recall": float(overall["recall"]),
            "overall_f1": float(overall["f1-score"]),
            "overall_accuracy": float(accuracy_score(references, predictions)),
        }
