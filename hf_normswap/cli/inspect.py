"""List every norm of a checkpoint: its place, its kind, its running statistics; with data, its TID too.

σ, over channels, is the running standard deviation, ψ of PowerNorm and PN-V; R² is that of the calibration.

Examples:

    normswap inspect ./my-model
    normswap inspect google-bert/bert-base-uncased --json
    normswap inspect ./my-model-rbn --texts reviews.txt
"""

import argparse

from .checkpoints import load_checkpoint, with_pad_token
from .data import SOURCES, add_data_arguments, read_data
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = f"%(prog)s MODEL [{SOURCES}] [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a model, swapped or not")
    add_data_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Print a row for each norm."""
    from hf_normswap import find_norms, measure_tid

    data = read_data(args)
    model, tokenizer = load_checkpoint(args.model)
    tids = {}
    if data is not None:
        report = measure_tid(model.eval(), data, tokenizer=with_pad_token(tokenizer), batch_size=args.batch_size)
        tids = {tid.name: tid for tid in report}
    norms = [_describe(model, site, tids.get(site.name)) for site in find_norms(model)]
    if not norms:
        raise ValueError(f"{args.model} has no norms, they are folded away: inspect the model from before that.")
    if args.json:
        print_json({"model": args.model, "class": type(model).__name__, "norms": norms})
        return
    heading = [name for name in norms[0] if any(norm[name] is not None for norm in norms)]
    print_table([tuple(heading), *(tuple(_cell(norm[name]) for name in heading) for norm in norms)])


def _describe(model, site, tid) -> dict:
    """What is known of a norm."""
    norm = site.module
    fit = ((getattr(model.config, "norm_swap", None) or {}).get("calibration") or {}).get(site.path)
    batches = getattr(norm, "num_batches_tracked", None)
    squared = getattr(norm, "running_var", getattr(norm, "running_power", None))
    scales = None if squared is None else squared.sqrt()
    return {
        "norm": site.kind,
        "stack": site.stack,
        "sublayer": site.sublayer,
        "layer": site.layer,
        "placement": site.placement,
        "batches": None if batches is None else int(batches),
        "sigma_min": None if scales is None else scales.min().item(),
        "sigma_median": None if scales is None else scales.median().item(),
        "sigma_max": None if scales is None else scales.max().item(),
        "r2": fit,
        "tid_mean": tid and tid.mean,
        "tid_variance": tid and tid.variance,
        "name": site.name,
    }


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else value
