"""Swap the norms of a model, to train it from there.

A pretrained model loses its function by this: `normswap calibrate` swaps and keeps it.

Examples:

    normswap swap ./my-model ./my-model-pn --norm powernorm --norm_options '{"group_scaling": false}'
    normswap swap Helsinki-NLP/opus-mt-en-de ./en-de-rbn --norm rbn --where encoder
    normswap swap ./my-model ./my-model-bn --norm batchnorm --where blocks final --placement pre
"""

import argparse

from hf_normswap.core.files import atomic_directory

from .checkpoints import load_checkpoint, save_checkpoint
from .norms import add_norm_arguments
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s MODEL OUTPUT --norm NORM [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model to start from")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the swapped model in, new or empty")
    add_norm_arguments(parser, required=True)
    parser.add_argument(
        "--placement",
        help="put the norms of the blocks there: post, pre, deep, sub, peri or rskip (default: as they are)",
    )
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> None:
    """Swap, save, and print every norm."""
    from hf_normswap import NormSwapConfig, find_norms, set_norm_placement, swap_norm

    with atomic_directory(args.output) as folder:
        norm = NormSwapConfig(args.norm, **(args.norm_options or {}))
        model, tokenizer = load_checkpoint(args.model)
        if args.placement:
            set_norm_placement(model, args.placement)
        swap_norm(model, norm, where=args.where or "blocks")
        save_checkpoint(model, tokenizer, folder, args.model)
    heading, *rows = find_norms(model).rows()
    if args.json:
        print_json({"output": args.output, "norms": [dict(zip(heading, row)) for row in rows]})
    else:
        print_table([heading, *rows])
        print(f"saved in {args.output}")
