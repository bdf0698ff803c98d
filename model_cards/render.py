"""
Renders the model cards of this folder from the results beside them.

    python model_cards/render.py                               # all cards, from results/<card>.json
    python model_cards/render.py first-run first_run/results   # one card, after taking over new results
"""

import json
import sys
from pathlib import Path

from hf_normswap.card import render_card
from hf_normswap.results import load_results


FOLDER = Path(__file__).parent
CARDS = {
    "first-run": {
        "norm": "powernorm",
        "model_id": "first_run/powernorm",
        "title": "The model of the first run",
        "license": "apache-2.0",
        "description": (
            "`recipes/first_run.py` trains it from scratch, to tell which topic of the Python language reference a "
            "sentence is from. The saved weights are those of the first seed."
        ),
        "limits": (
            "- It shows that everything works, no more: a model this small, trained on so little text for so short a "
            "time, says nothing on which norm is better elsewhere.\n"
            "- The topics are those of one text. What it answers on any other has no meaning."
        ),
    },
}


def take_over(name, paths):
    results = load_results(paths)
    for result in results:  # of the history, a card shows the last discrepancies alone
        result["history"] = [entry for entry in result["history"] if "loss" in entry][-1:]
    lines = ",\n".join(json.dumps(result) for result in results)
    (FOLDER / "results" / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def render(name):
    results = json.loads((FOLDER / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return str(render_card(results, **CARDS[name]))


def main():
    name, *paths = sys.argv[1:] or [None]
    if paths:
        take_over(name, paths)
    for card in [name] if name else CARDS:
        (FOLDER / f"{card}.md").write_text(render(card), encoding="utf-8")


if __name__ == "__main__":
    main()
