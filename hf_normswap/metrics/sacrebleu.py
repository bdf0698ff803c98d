"""Corpus BLEU with its signature."""

from itertools import zip_longest

import datasets
import evaluate
from sacrebleu.metrics import BLEU


class SacrebleuMetric(evaluate.Metric):
    r"""
    Corpus BLEU (Post, 2018, https://aclanthology.org/W18-6319), computed offline by sacrebleu.

    Args:
        kwargs (`dict`, *optional*):
            Passed on to [`evaluate.Metric`].

    [`~SacrebleuMetric.compute`] and [`~SacrebleuMetric.add_batch`] take:
        predictions (`list[str]` of length `num_sentences`):
            Detokenised translations.
        references (`list[str]` or `list[list[str]]` of length `num_sentences`):
            Detokenised references: one for each sentence, or a list of them for each sentence.
        tokenize (`str`, *optional*, defaults to `"13a"`):
            The tokeniser of sacrebleu: `"13a"`, `"intl"`, `"zh"`, `"char"`, `"none"`, ... Only for `compute`.
        lowercase (`bool`, *optional*, defaults to `False`):
            Whether to ignore case. Only for `compute`.

    Returns:
        `dict`: `score` (BLEU, from 0 to 100), `precisions` (of 1- to 4-grams, from 0 to 100), `bp` (brevity penalty),
        `sys_len` and `ref_len` (in tokens), and the `signature` to quote beside the score.

    Example:

    ```python
    >>> from hf_normswap.metrics import SacrebleuMetric

    >>> bleu = SacrebleuMetric().compute(
    ...     predictions=["the cat sat on the mat today"], references=["the cat sat on the mat"]
    ... )
    >>> round(bleu["score"], 2), bleu["bp"], bleu["sys_len"], bleu["ref_len"]
    (80.91, 1.0, 7, 6)
    >>> bleu["signature"].split("|version")[0]
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp'

    ```
    """

    def _info(self):
        sentence = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="",
            features=[
                datasets.Features({"predictions": sentence, "references": datasets.List(sentence)}),
                datasets.Features({"predictions": sentence, "references": sentence}),
            ],
            reference_urls=["https://github.com/mjpost/sacrebleu"],
        )

    def _compute(self, predictions, references, tokenize="13a", lowercase=False):
        references = [[reference] if isinstance(reference, str) else reference for reference in references]
        if not all(references):
            raise ValueError(f"Sentence {references.index([])} has no reference: pass one reference or more for each.")
        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(f"Unknown tokeniser {tokenize!r}: choose one of {', '.join(BLEU.TOKENIZERS)}.")

        bleu = BLEU(tokenize=tokenize, lowercase=lowercase)
        result = bleu.corpus_score(predictions, list(zip_longest(*references)))
        return {
            "score": result.score,
            "precisions": result.precisions,
            "bp": result.bp,
            "sys_len": result.sys_len,
            "ref_len": result.ref_len,
            "signature": str(bleu.get_signature()),
        }
