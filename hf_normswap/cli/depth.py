"""Show how gradients at initialisation depend on the depth of a model, for each norm and placement.

With LayerNorm the gradient of the last feed-forward layer does not depend on the depth in the post placement, and
falls as the inverse root of it in the pre placement (Xiong et al., 2020). A minute on a CPU.

Examples:

    normswap depth
    normswap depth --norms layernorm rbn --depths 2 4 8 16 32 --seeds 8 --plot depth.png
"""

import argparse
from dataclasses import asdict

from .data import count
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    norms = ["layernorm", "batchnorm", "rbn", "pnv"]
    parser.add_argument("--norms", nargs="+", default=norms, help="norms to compare (default: %(default)s)")
    parser.add_argument(
        "--placements", nargs="+", default=["post", "pre"], help="placements to compare (default: %(default)s)"
    )
    parser.add_argument(
        "--depths", nargs="+", type=count, default=[2, 4, 8, 16], help="numbers of blocks (default: %(default)s)"
    )
    parser.add_argument("--width", type=count, default=128, help="channels of the model (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=4, help="models for each depth (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw the gradients, as PNG, PDF or SVG")
    parser.add_argument("--json", action="store_true", help="print the study as JSON")


def run(args: argparse.Namespace) -> None:
    """Compute, print, draw."""
    from hf_normswap import study_depth

    study = study_depth(args.norms, placements=args.placements, depths=args.depths, width=args.width, seeds=args.seeds)
    if args.plot:
        from hf_normswap.diagnostics.plots import plot_depth

        plot_depth(study).savefig(args.plot)
    if args.json:
        print_json({"slopes": list(map(asdict, study))})
    else:
        print_table(study.rows())
