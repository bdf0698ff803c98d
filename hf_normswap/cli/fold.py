"""Fold the norms of a model away, after converting its LayerNorms if need be.

A model that is swapped and calibrated, or trained, is folded as it is. One with LayerNorms becomes one without norms
in a single command: with --norm and data it is swapped and calibrated first. With --gains a model keeps its own
norms, without gains and shifts.

Examples:

    normswap fold ./my-calibrated-model ./my-folded-model
    normswap fold ./my-gpt2-pn ./my-folded-gpt2 --untie --onnx
    normswap fold ./my-llama ./my-llama-without-gains --gains
    normswap fold textattack/bert-base-uncased-SST-2 ./sst2-without-norms --norm batchnorm --where all \\
        --texts reviews.txt --distillation_steps 400 --onnx
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from hf_normswap.core.files import atomic_directory

from .calibrate import add_conversion_arguments, convert
from .checkpoints import load_to_convert, save_checkpoint, with_pad_token
from .data import SOURCES, count, has_data, read_data
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = f"%(prog)s MODEL OUTPUT [--norm NORM ({SOURCES})] [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model to start from")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the folded model in, new or empty")
    parser.add_argument(
        "--gains",
        action="store_true",
        help="fold the gains and shifts of a model that has its own norms, and keep the norms: see fold_gains",
    )
    add_export_arguments(parser)
    add_conversion_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a folded model is written with."""
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give a head that shares its weights with the embeddings its own, to fold the norm in front of it too",
    )
    parser.add_argument("--onnx", action="store_true", help="write an ONNX graph too, into OUTPUT/onnx")
    parser.add_argument(
        "--int8",
        nargs="?",
        const="dynamic",
        choices=["dynamic", "static"],
        help="with 8 bits in the graph; static takes the ranges of activations from the data (default: dynamic)",
    )
    parser.add_argument(
        "--keep_float", nargs="+", metavar="MODULE", help="modules whose layers stay in float32 in a graph in 8 bits"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="ERROR",
        help="largest error of the graph (default: 1e-4, in 8 bits 0.1)",
    )
    parser.add_argument(
        "--affine_every",
        type=count,
        metavar="N",
        help="in a post-norm model, fold all norms but one in N: 4 is good for 8 bits (default: fold all)",
    )


def check_export(args: argparse.Namespace) -> None:
    """Raises `ValueError` where the arguments contradict each other."""
    for name in ("int8", "keep_float", "tolerance"):
        if getattr(args, name) is not None and not args.onnx:
            raise ValueError(f"{name} is for the ONNX graph: pass --onnx too.")
    if args.int8 == "static" and not has_data(args):
        raise ValueError("int8 static needs data for the ranges of activations: pass --texts or other data.")


def save(args: argparse.Namespace, model, tokenizer, folder: Path, data=None):
    """Write model, processor and graph into `folder`; returns the report of the graph, if there is one.

    The `data` is for a graph in 8 bits.
    """
    from hf_normswap import export_onnx

    save_checkpoint(model, tokenizer, folder, args.model)
    if not args.onnx:
        return None
    of_int8 = {"data": data, "tokenizer": with_pad_token(tokenizer)} if args.int8 and data is not None else {}
    options = {"int8": args.int8 or False, "keep_float": args.keep_float or (), "tolerance": args.tolerance}
    return export_onnx(model, folder / "onnx", **options, **of_int8)


def content_of_onnx(args: argparse.Namespace, onnx) -> dict:
    """What a report in JSON says of the graph."""
    return {"onnx": {**asdict(onnx), "path": str(Path(args.output, "onnx", "model.onnx"))}} if onnx else {}


def print_onnx(onnx) -> None:
    """Say what the graph is like, if there is one."""
    if onnx:
        print(f"ONNX (opset {onnx.opset}): {onnx.norm_nodes} nodes of norms, relative error {onnx.error:.1e}")


_OF_A_CONVERSION = (
    "norm",
    "norm_options",
    "where",
    "dataset_config_name",
    "split",
    "columns",
    "distillation_steps",
)


def run(args: argparse.Namespace) -> None:
    """Convert if asked to, fold, save, and print the report."""
    given = [name for name in _OF_A_CONVERSION if getattr(args, name)]
    if args.gains and (has_data(args) or given):
        raise ValueError("gains are those of a model with its own norms: leave the options of a conversion out.")
    if args.gains and args.affine_every:
        raise ValueError("affine_every is for norms that are folded whole: leave it out with --gains.")
    if given and not has_data(args):
        raise ValueError(
            f"{given[0]} is for a conversion, which needs data: pass --texts, --images, --audio or --dataset_name too."
        )
    check_export(args)
    from hf_normswap import fold_gains, fold_norms

    with atomic_directory(args.output) as folder:
        data = read_data(args)
        model, tokenizer = convert(args, data)[:2] if data is not None else load_to_convert(args)
        if not args.gains and getattr(model.config, "norm_swap", None) is None:
            raise ValueError(
                f"{args.model} has LayerNorms: pass --norm and data, such as --texts, to convert them first."
            )
        options = {} if args.gains else {"affine_every": args.affine_every}
        report = (fold_gains if args.gains else fold_norms)(model.eval(), untie=args.untie, **options)
        onnx = save(args, model, tokenizer, folder, data)
    if args.json:
        print_json({"output": args.output, **asdict(report), **content_of_onnx(args, onnx)})
        return
    print_table(report.rows())
    print(f"relative error of the outputs: {report.error:.1e}")
    print(f"saved in {args.output}")
    print_onnx(onnx)
