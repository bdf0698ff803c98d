"""Swap the norms of a pretrained model, fitted to its LayerNorms on data without labels.

The data is texts, images or recordings, as the model reads them. R² and error say how well each norm returns what its
LayerNorm returned, on these very examples: with few of them, better than on others. The model keeps the head that its
checkpoint names. One that is swapped already, and neither calibrated nor trained since, needs no --norm.

Examples:

    normswap calibrate textattack/bert-base-uncased-SST-2 ./sst2-rbn --norm rbn --texts reviews.txt
    zcat reviews.gz | normswap calibrate ./my-model ./my-model-pn --norm powernorm --where all --texts - --json
    normswap calibrate google/vit-base-patch16-224 ./vit-bn --norm batchnorm --where all --images ./photos
    normswap calibrate ./my-swapped-model ./my-calibrated-model --dataset_name stanfordnlp/imdb --columns text
    normswap calibrate Helsinki-NLP/opus-mt-en-de ./en-de-rbn --norm rbn --dataset_name wmt/wmt14 \\
        --dataset_config_name de-en --split validation --columns en de
"""

import argparse
import copy
from dataclasses import asdict

from hf_normswap.core.files import atomic_directory

from .checkpoints import load_to_convert, save_checkpoint, with_pad_token
from .data import SOURCES, add_data_arguments, count, read_data
from .norms import add_norm_arguments
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    # Positionals first: behind an option of several values they would be further ones.
    parser.usage = f"%(prog)s MODEL OUTPUT [--norm NORM] ({SOURCES}) [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model to start from")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the calibrated model in, new or empty")
    add_conversion_arguments(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_conversion_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what [`convert`] takes; whether data is `required`."""
    add_norm_arguments(parser, required=False)
    add_fitting_arguments(parser, required)
    parser.add_argument(
        "--distillation_steps",
        type=count,
        default=0,
        metavar="STEPS",
        help="steps of training against the original afterwards, on the same data (default: none)",
    )


def add_fitting_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what norms are fitted to; whether data is `required`."""
    add_data_arguments(parser, required)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the model, in which it is saved too (default: that of the checkpoint)",
    )
    parser.add_argument(
        "--memory_budget",
        type=count,
        default=2**30,
        metavar="BYTES",
        help="activations to keep in memory, more are memory-mapped (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate, save, and print the report."""
    with atomic_directory(args.output) as folder:
        model, tokenizer, report = convert(args, read_data(args))
        save_checkpoint(model, tokenizer, folder, args.model)
    if args.json:
        print_json({"output": args.output, "fits": list(map(asdict, report))})
    else:
        print_table(report.rows())
        print(f"saved in {args.output}")


def convert(args: argparse.Namespace, data) -> tuple:
    """Model, processor and report of the calibration on this data."""
    from hf_normswap import Norm, NormSwapConfig, calibrate, distill, find_norms, restore_norm
    from hf_normswap.swap import swap_to_fit

    if args.norm:
        norm = NormSwapConfig(args.norm, **(args.norm_options or {}))
    model, tokenizer = load_to_convert(args)
    kinds = {site.kind for site in find_norms(model) if isinstance(site.module, Norm)}
    if kinds == {"layernorm"}:  # the baseline of the recipes
        restore_norm(model)
        kinds = set()
    if not kinds and not args.norm:
        raise ValueError(f"{args.model} has LayerNorms: say what they become, for example with --norm rbn.")
    if kinds and args.distillation_steps:
        raise ValueError(f"{args.model} is swapped already, and there is no original to distill: leave that out.")
    if not kinds:
        original = copy.deepcopy(model) if args.distillation_steps else None
        swap_to_fit(model, norm, args.where or "blocks")
    elif args.norm or args.norm_options or args.where:
        norms = " and ".join(sorted(kinds))
        raise ValueError(f"{args.model} is swapped already, to {norms}: leave out norm, norm_options and where.")
    options = {"tokenizer": with_pad_token(tokenizer), "batch_size": args.batch_size}
    report = calibrate(model, data, memory_budget=args.memory_budget, **options)
    if args.distillation_steps:
        distill(model, original, data, steps=args.distillation_steps, **options)
    return model, tokenizer, report
