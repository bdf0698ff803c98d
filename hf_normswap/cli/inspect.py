"""Say which norms a model has, where they stand, and what can be done with them: of any architecture, before a swap.

A model that is not swapped is made from its configuration, without weights: a folder with config.json is enough, and
a model of any size takes seconds. Norms of several layers that are alike share a row; --all prints one for each. Of a
swapped model there are the running statistics, too, and with data its TID.

σ, over channels, is the running standard deviation, ψ of PowerNorm and PN-V; R² is that of the calibration.

Examples:

    normswap inspect google-bert/bert-base-uncased
    normswap inspect openai-community/gpt2 --all
    normswap inspect ./my-model --json
    normswap inspect ./my-model-rbn --texts reviews.txt
"""

import argparse

from .checkpoints import load_checkpoint, load_structure, with_pad_token
from .data import SOURCES, add_data_arguments, read_data
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = f"%(prog)s MODEL [{SOURCES}] [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a model, swapped or not")
    add_data_arguments(parser, required=False)
    parser.add_argument("--all", action="store_true", help="print a row for each norm")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with a row for each norm")


def run(args: argparse.Namespace) -> None:
    """Print the audit."""
    from hf_normswap import inspect_model, measure_tid

    data, tid = read_data(args), None
    if data is None:
        model = load_structure(args.model)
    else:
        model, tokenizer = load_checkpoint(args.model)
        tid = measure_tid(model.eval(), data, tokenizer=with_pad_token(tokenizer), batch_size=args.batch_size)
    report = inspect_model(model, tid=tid)
    if not report.norms and "folded" in (getattr(model.config, "norm_swap", None) or {}):
        raise ValueError(f"{args.model} has no norms, they are folded away: inspect the model from before that.")
    if args.json:
        return print_json({"model": args.model, **report.to_dict()})
    print(report.heading())
    if report.norms:
        print_table(report.rows(every=args.all))
    print("\n".join(report.notes()))
