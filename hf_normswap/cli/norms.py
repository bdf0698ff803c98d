"""List the norms that `--norm` takes, and what each one is like.

The page "Norms" of the documentation says what they compute.

Examples:

    normswap norms
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s [--option VALUE ...]"
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")


def run(args: argparse.Namespace) -> None:
    """Print a row for each norm."""
    from dataclasses import asdict

    from hf_normswap.core.norm_properties import describe_norms, rows_of_norms

    from .reports import print_json, print_table, to_markdown

    if args.json:
        print_json({norm.name: asdict(norm) for norm in describe_norms()})
    elif args.markdown:
        print(to_markdown(rows_of_norms()))
    else:
        print_table(rows_of_norms())


def add_norm_arguments(
    parser: argparse.ArgumentParser, required: bool, norm: str | None = None, where: str = "blocks"
) -> None:
    """Add the norm, its options and its places; whether a norm is `required`, and what is taken without one."""
    said = "norm to swap in, one of `normswap norms`, for example rbn or batchnorm"
    parser.add_argument("--norm", required=required, default=norm, help=said + (f" (default: {norm})" if norm else ""))
    parser.add_argument(
        "--norm_options",
        type=_json_object,
        metavar="JSON",
        help="options of the norm, for example '{\"momentum\": 0.2}'",
    )
    parser.add_argument("--where", nargs="+", help=f"which norms to swap, one or several names (default: {where})")


def _json_object(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object.") from error
