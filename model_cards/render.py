"""
Renders the model cards of this folder, and their list, from results and from nothing else.

    python model_cards/render.py                                 # all cards
    python model_cards/render.py first-run ./first_run/results   # after taking over new results of the first run
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from hf_normswap.reporting.card import render_card
from hf_normswap.reporting.comparison import compare_results
from hf_normswap.reporting.results import load_results


FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "recipes" / "results"
NORMS = {"batchnorm": "BatchNorm", "rbn": "RBN", "powernorm": "PowerNorm"}
SHOWN = ("test_f1", "accuracy", "test_perplexity", "test_bleu")
LEAD = """# Model cards

One for each variant that was trained, rendered by [`render.py`](render.py) from
[the results of its runs](../recipes/results); that of [the first run](first-run.md) stands alone. The weights are not
published: the command in a card trains them again. Mean ± standard deviation over the runs.
"""

_SMALL = "- It is a small model, trained for few steps to compare norms, and not for use.\n"
_ONE_SEED = _SMALL + "- One seed: it tells no difference of a point or two from chance.\n"
_GLUE = _SMALL + (
    "- Its few seeds were scored on a small validation split, on which recipes were compared too: no test split has "
    "been seen.\n"
)
_RTE = _GLUE + "- With LayerNorm, too, this model is at chance on RTE: the card tells nothing of the norm.\n"
_NER = _ONE_SEED + (
    "- LayerNorm is well ahead in so few steps: for a tagger without LayerNorm, fine-tune with it, then convert.\n"
)
_CALIBRATED = (
    "All norms were converted at once, calibrated on {calibrate} texts of the training split, then fine-tuned."
)
_NAIVE = "All norms were swapped at once without calibration, then fine-tuned."
_PROGRESSIVE = "LayerNorm gave way to the norm over the first {progressive:.0%} of the fine-tuning."
_SCRATCH = "Trained from scratch, with a tokenizer of its own."


@dataclass
class Variant:
    """Runs `<runs>-<norm>-<seed><suffix>.json` below the results of the recipes, one card for each norm."""

    runs: str
    head: str
    about: str
    limits: str
    suffix: str = ""
    norms: tuple[str, ...] = tuple(NORMS)
    base_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"
    language: str | list[str] = "en"

    def load(self, norm):
        """The runs with a norm; those with LayerNorm have no suffix."""
        suffix = "" if norm == "layernorm" else self.suffix
        return load_results(sorted(RESULTS.glob(f"{self.runs}-{norm}-[0-9]{suffix}.json")))


_classifier = partial(Variant, head="SequenceClassification")
_only_batchnorm = {"norms": ("batchnorm",)}
VARIANTS = {
    "sst2-calibrated": _classifier("glue-calibrated/sst2", about=_CALIBRATED, limits=_GLUE),
    "mrpc-calibrated": _classifier("glue-calibrated/mrpc", about=_CALIBRATED, limits=_GLUE),
    "rte-calibrated": _classifier("glue-calibrated/rte", about=_CALIBRATED, limits=_RTE),
    "sst2-progressive": _classifier("glue-calibrated/sst2", suffix="-progressive", about=_PROGRESSIVE, limits=_GLUE),
    "mrpc-progressive": _classifier(
        "glue-calibrated/mrpc", suffix="-progressive", about=_PROGRESSIVE, limits=_GLUE, **_only_batchnorm
    ),
    "rte-progressive": _classifier(
        "glue-calibrated/rte", suffix="-progressive", about=_PROGRESSIVE, limits=_RTE, **_only_batchnorm
    ),
    "sst2-naive": _classifier("glue/sst2", about=_NAIVE, limits=_GLUE),
    "mrpc-naive": _classifier("glue-calibrated/mrpc", suffix="-naive", about=_NAIVE, limits=_GLUE, **_only_batchnorm),
    "rte-naive": _classifier("glue-calibrated/rte", suffix="-naive", about=_NAIVE, limits=_RTE, **_only_batchnorm),
    "wnut17": Variant("ner/wnut17", head="TokenClassification", about=_CALIBRATED, limits=_NER),
    "btc": Variant("ner/btc", head="TokenClassification", about=_CALIBRATED, limits=_NER),
    "ptb-gpt2": Variant("lm/ptb-gpt2", head="CausalLM", about=_SCRATCH, limits=_ONE_SEED, base_model=None),
    "ptb-bert": Variant("lm/ptb-bert", head="MaskedLM", about=_SCRATCH, limits=_ONE_SEED, base_model=None),
    "multi30k": Variant(
        "translation/multi30k",
        head="Seq2SeqLM",
        about=_SCRATCH,
        limits=_ONE_SEED,
        base_model=None,
        language=["de", "en"],
    ),
}
# What a single card has to say.
LIMITS = {"wnut17-powernorm": "- Its training diverged: it finds no entity. The card is here for the record.\n"}
FIRST_RUN = {
    "norm": "powernorm",
    "folder": "./first_run/powernorm",
    "title": "The model of the first run",
    "license": "apache-2.0",
    "language": "en",
    "description": (
        "`recipes/first_run.py` trains it from scratch, to tell which topic of the Python language reference a "
        "sentence is from. The saved weights are those of the first seed."
    ),
    "limits": (
        "- It shows that everything works, no more: a model this small, trained on so little text for so short a "
        "time, says nothing on which norm is better elsewhere.\n"
        "- The topics are those of one text. What it answers on any other has no meaning."
    ),
}


def take_over(name, paths):
    results = load_results(paths)
    for result in results:  # of the history, a card shows the discrepancies alone
        result["history"] = [entry for entry in result["history"] if "tid_var_max" in entry]
    lines = ",\n".join(json.dumps(result) for result in results)
    (FOLDER / "results" / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def render_variant(name, variant, norm):
    """A card, and its row of the list."""
    runs, baseline = variant.load(norm), variant.load("layernorm")
    others = chain.from_iterable(variant.load(other) for other in variant.norms if other != norm)
    run = runs[0]
    text = render_card(
        [*baseline, *runs, *others],
        norm=norm,
        folder=run["arguments"]["output_dir"],
        auto_class=f"AutoModelFor{variant.head}",
        title=f"{run['model']} with {NORMS[norm]}, {run['task']}",
        description=variant.about.format(**run["arguments"]),
        limits=(variant.limits + LIMITS.get(f"{name}-{norm}", "")).rstrip(),
        language=variant.language,
        base_model=variant.base_model,
    )
    metric = next(metric for metric in SHOWN if metric in run["metrics"])
    ours, theirs = (compare_results(results, [metric]).rows[0].metrics[metric] for results in (runs, baseline))
    scores = [f"{score.mean:.4g}" + (f" ± {score.std:.2g}" if score.std else "") for score in (ours, theirs)]
    return str(text), (run["task"], NORMS[norm], str(len(runs)), metric, *scores)


def render_all():
    """Every card by the name of its file, and the list of them as `README`."""
    first_run = json.loads((FOLDER / "results" / "first-run.json").read_text(encoding="utf-8"))
    cards = {"first-run": str(render_card(first_run, **FIRST_RUN))}
    rows = [("card", "task", "norm", "runs", "score", "with the norm", "with LayerNorm"), ("---",) * 7]
    for name, variant in VARIANTS.items():
        for norm in variant.norms:
            card = f"{name}-{norm}"
            cards[card], row = render_variant(name, variant, norm)
            rows.append((f"[{card}]({card}.md)", *row))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return cards | {"README": f"{LEAD}\n{table}\n"}


def main():
    if sys.argv[1:]:
        take_over(sys.argv[1], sys.argv[2:])
    for name, text in render_all().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
