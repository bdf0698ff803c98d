"""Measure how far batch statistics are from the running ones, norm by norm.

The training-inference discrepancy (TID) is what batch normalisation loses from training to inference. Examples are put
into batches of --batch_size: take that of the training. With --plot, the TID over the training is drawn, from the
tid.json that the trainers of this package leave in their output folder.

Examples:

    normswap tid ./my-model-rbn --texts reviews.txt
    normswap tid ./my-model-bn --dataset_name stanfordnlp/imdb --columns text --batch_size 16 --json
    normswap tid ./outputs/sst2-rbn --plot tid.png
"""

import argparse
from dataclasses import asdict

from .checkpoints import load_checkpoint, with_pad_token
from .data import SOURCES, add_data_arguments, read_data
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = f"%(prog)s MODEL [{SOURCES}] [--plot FILE] [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a swapped model")
    add_data_arguments(parser, required=False)
    parser.add_argument("--plot", metavar="FILE", help="draw the TID over the training, as PNG, PDF or SVG")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Measure, print, draw."""
    from hf_normswap import TidHistory, measure_tid

    data = read_data(args)
    if data is None and not args.plot:
        raise ValueError(
            "There is nothing to measure or to draw: give --texts, --images, --audio, --dataset_name or --plot."
        )
    if args.plot:
        from hf_normswap.diagnostics.plots import plot_tid

        plot_tid(TidHistory.read(args.model)).savefig(args.plot)
    if data is not None:
        model, tokenizer = load_checkpoint(args.model)
        reader = with_pad_token(tokenizer)
        report = measure_tid(model.eval(), data, tokenizer=reader, batch_size=args.batch_size)
        if args.json:
            print_json({"model": args.model, "batch_size": args.batch_size, "norms": list(map(asdict, report))})
        else:
            print_table(report.rows())
    elif args.json:
        history = TidHistory.read(args.model)
        print_json(vars(history))
    else:
        print_table(_last(TidHistory.read(args.model)))


def _last(history) -> list[tuple]:
    """The last entry of a history as rows."""
    columns = zip(history.mean[-1], history.variance[-1], history.layers, strict=True)
    cells = [(*(None if value is None else f"{value:.4f}" for value in row[:2]), row[2]) for row in columns]
    return [(f"TID of mean, step {history.steps[-1]}", "TID of variance", "name"), *cells]
