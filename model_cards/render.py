"""
Renders the model cards of this folder, and their list, from results and from nothing else.

    python model_cards/render.py                       # all cards
    python model_cards/render.py ./first_run/results   # after taking over new results of the first run
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from hf_normswap.reporting.card import render_card
from hf_normswap.reporting.comparison import compare_results
from hf_normswap.reporting.results import load_results, write_result


FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results"
NORMS = {"batchnorm": "BatchNorm", "rbn": "RBN", "powernorm": "PowerNorm"}
SHOWN = ("test_f1", "accuracy", "test_perplexity", "test_bleu")
LEAD = """# Model cards

[`render.py`](render.py) renders a card from [records of runs](../results/README.md), and a push writes the same card
beside the weights. Here are cards of some variants, a bad one among them, and of [the first run](first-run.md). The
index of the records has all other variants. The weights are not published: the command in a card trains them again.
Where it names a local folder, put the id of the model or of the data set. Scores are mean ± standard deviation over
the runs.

`python model_cards/render.py` writes the cards and this list. To add a card, add its runs to `VARIANTS` there.
"""

_SMALL = "- It is a small model, trained for few steps to compare norms, and not for use.\n"
_ONE_SEED = _SMALL + "- One seed: it tells no difference of a point or two from chance.\n"
_GLUE = _SMALL + (
    "- Its few seeds were scored on a small validation split, on which recipes were compared too: no test split has "
    "been seen.\n"
)
_NER = _ONE_SEED + (
    "- LayerNorm is well ahead in so few steps: for a tagger without LayerNorm, fine-tune with it, then convert.\n"
)
_CALIBRATED = (
    "All norms were converted at once, calibrated on {calibrate} texts of the training split, then fine-tuned."
)
_SCRATCH = "Trained from scratch, with a tokenizer of its own."


@dataclass
class Variant:
    """Runs `<runs>-<norm>-<placement>-<seed><suffix>.json` below the results, one card for each norm of `norms`."""

    runs: str
    head: str
    about: str
    limits: str
    norms: tuple[str, ...]
    placement: str = "post"
    suffix: str = ""
    base_model: str | None = "sentence-transformers/all-MiniLM-L6-v2"
    language: str | list[str] = "en"

    def load(self, norm):
        """The runs with a norm; those with LayerNorm have no suffix."""
        suffix = "" if norm == "layernorm" else self.suffix
        return load_results(sorted(RESULTS.glob(f"{self.runs}-{norm}-{self.placement}-[0-9]{suffix}.json")))


_scratch = partial(Variant, about=_SCRATCH, limits=_ONE_SEED, norms=("powernorm",), base_model=None)
VARIANTS = {
    "sst2-calibrated": Variant(
        "glue/sst2",
        head="SequenceClassification",
        about=_CALIBRATED,
        limits=_GLUE,
        norms=tuple(NORMS),
        suffix="-calibrated",
    ),
    "wnut17": Variant("ner/wnut17", head="TokenClassification", about=_CALIBRATED, limits=_NER, norms=("rbn",)),
    "ptb-gpt2": _scratch("lm/ptb-gpt2", head="CausalLM", placement="pre"),
    "ptb-bert": _scratch("lm/ptb-bert", head="MaskedLM"),
    "multi30k": _scratch("translation/multi30k", head="Seq2SeqLM", language=["de", "en"]),
}
FIRST_RUN = {
    "norm": "powernorm",
    "folder": "./first_run/powernorm",
    "title": "The model of the first run",
    "license": "apache-2.0",
    "language": "en",
    "description": (
        "`python -m recipes.first_run` trains it from scratch, to tell which topic of the Python language reference a "
        "sentence is from. The saved weights are those of the first seed."
    ),
    "limits": (
        "- It shows that everything works, no more: a model this small, trained on so little text for so short a "
        "time, says nothing on which norm is better elsewhere.\n"
        "- The topics are those of one text. What it answers on any other has no meaning."
    ),
}


def take_over(paths):
    """Replaces the records of the first run. Of their history the card shows the discrepancies only."""
    for result in load_results(paths):
        result["history"] = [entry for entry in result["history"] if "tid_var_max" in entry]
        write_result(result, RESULTS / "first-run" / f"python-topics-{result['norm']}-post-{result['seed']}.json")


def render_variant(variant, norm):
    """A card, and its row of the list."""
    runs, baseline = variant.load(norm), variant.load("layernorm")
    others = chain.from_iterable(variant.load(other) for other in NORMS if other != norm)
    run = runs[0]
    text = render_card(
        [*baseline, *runs, *others],
        norm=norm,
        folder=run["arguments"]["output_dir"],
        auto_class=f"AutoModelFor{variant.head}",
        title=f"{run['model']} with {NORMS[norm]}, {run['task']}",
        description=variant.about.format(**run["arguments"]),
        limits=variant.limits.rstrip(),
        language=variant.language,
        base_model=variant.base_model,
    )
    metric = next(metric for metric in SHOWN if metric in run["metrics"])
    ours, theirs = (compare_results(results, [metric]).rows[0].metrics[metric] for results in (runs, baseline))
    scores = [f"{score.mean:.4g}" + (f" ± {score.std:.2g}" if score.std else "") for score in (ours, theirs)]
    return str(text), (run["task"], NORMS[norm], str(len(runs)), metric, *scores)


def render_all():
    """Every card by the name of its file, and the list of them as `README`."""
    cards = {"first-run": str(render_card(load_results([RESULTS / "first-run"]), **FIRST_RUN))}
    rows = [("card", "task", "norm", "runs", "score", "with the norm", "with LayerNorm"), ("---",) * 7]
    for name, variant in VARIANTS.items():
        for norm in variant.norms:
            card = f"{name}-{norm}"
            cards[card], row = render_variant(variant, norm)
            rows.append((f"[{card}]({card}.md)", *row))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return cards | {"README": f"{LEAD}\n{table}\n"}


def main():
    if sys.argv[1:]:
        take_over(sys.argv[1:])
    for name, text in render_all().items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
