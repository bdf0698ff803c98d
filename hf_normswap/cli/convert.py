"""Replace the norms of a trained model in one call, and measure on held-out data what it keeps.

Fits the new norms to a part of the data, without labels, and compares the model with the original one on the rest.
With --budget it converts as many norms as the budget allows: a mean Kullback-Leibler divergence of the predictions, or
a relative error of the embeddings. With --fold the norms become part of the linear layers.

Examples:

    normswap convert ./my-classifier ./my-classifier-bn --texts texts.txt
    normswap convert ./my-classifier ./my-classifier-bn --texts texts.txt --budget 0.003 --json
    normswap convert ./my-classifier ./without-norms --texts texts.txt --distill 200 --fold --onnx
    normswap convert ./my-classifier ./my-classifier-bn --dataset_name nyu-mll/glue --dataset_config_name sst2 \\
        --columns sentence --score accuracy
    normswap convert google/vit-base-patch16-224 ./vit-bn --images ./photos
"""

import argparse
from dataclasses import asdict

from hf_normswap.core.files import atomic_directory

from .calibrate import add_fitting_arguments
from .checkpoints import load_to_convert, with_pad_token
from .data import SOURCES, count, read_data
from .fold import add_export_arguments, check_export, content_of_onnx, print_onnx, save
from .norms import add_norm_arguments
from .reports import print_json, print_table
from .scores import add_score_arguments, make_score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = f"%(prog)s MODEL OUTPUT ({SOURCES}) [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model to start from")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the converted model in, new or empty")
    add_norm_arguments(parser, required=False, norm="batchnorm", where="all")
    add_fitting_arguments(parser, required=True)
    parser.add_argument(
        "--distill",
        type=count,
        default=0,
        metavar="STEPS",
        help="steps of training against the original, undone where they do not help (default: none)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="DISTANCE",
        help="largest distance from the original, for example 0.003: leaves norms as they are where need be",
    )
    parser.add_argument(
        "--holdout", type=float, default=0.2, metavar="SHARE", help="share of held-out examples (default: %(default)s)"
    )
    parser.add_argument("--fold", action="store_true", help="fold the new norms into the linear layers")
    add_export_arguments(parser)
    add_score_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    """Convert, fold if asked to, save, and print the report."""
    check_export(args)
    for name in ("untie", "affine_every"):
        if getattr(args, name) and not args.fold:
            raise ValueError(f"{name} is for folding: pass --fold too.")
    from hf_normswap import NormSwapConfig, convert_norms, fold_norms

    with atomic_directory(args.output) as folder:
        norm = NormSwapConfig(args.norm, **(args.norm_options or {}))
        data = read_data(args)
        model, tokenizer = load_to_convert(args)
        reader = with_pad_token(tokenizer)
        report = convert_norms(
            model,
            data,
            norm,
            where=args.where or "all",
            tokenizer=reader,
            score=make_score(args, reader),
            distill_steps=args.distill,
            budget=args.budget,
            holdout=args.holdout,
            batch_size=args.batch_size,
            memory_budget=args.memory_budget,
        )
        folded = fold_norms(model, untie=args.untie, affine_every=args.affine_every) if args.fold else None
        onnx = save(args, model, tokenizer, folder, data)
    if args.json:
        of_fold = {"fold": asdict(folded)} if folded else {}
        print_json({"output": args.output, **asdict(report), **of_fold, **content_of_onnx(args, onnx)})
        return
    print_table(report.rows())
    print(*report.lines(), sep="\n")
    if folded:
        print_table(folded.rows())
        print(f"relative error of the outputs by folding: {folded.error:.1e}")
    print(f"saved in {args.output}")
    print_onnx(onnx)
