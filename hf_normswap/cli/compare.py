"""Compare the norms of a folder of results: mean and sample standard deviation over the seeds.

Results are what the recipes leave in result.json, one for each run.

Examples:

    normswap compare outputs/
    normswap compare outputs/sst2-*/result.json --metrics accuracy --markdown
    normswap compare outputs/ --against layernorm
"""

import argparse

from .reports import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("results", metavar="RESULT", nargs="+", help="files of results, or folders of them")
    parser.add_argument("--metrics", nargs="+", help="the metrics to show (default: all)")
    parser.add_argument(
        "--against",
        metavar="NORM",
        help="show the differences to this norm, seed by seed, with 95 %% intervals of a paired t-test",
    )
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    style.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> None:
    """Print a row for each norm of a task, model and placement."""
    from hf_normswap.reporting.results import compare_results, load_results

    table = compare_results(load_results(args.results), args.metrics, args.against)
    if args.json:
        print_json(table.to_dict())
    elif args.markdown:
        print(table.to_markdown())
    else:
        table.show()
