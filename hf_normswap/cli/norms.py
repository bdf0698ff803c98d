"""The norm that a verb swaps in."""

import argparse
import json


def add_norm_arguments(
    parser: argparse.ArgumentParser, required: bool, norm: str | None = None, where: str = "blocks"
) -> None:
    """Add the norm, its options and its places; whether a norm is `required`, and what is taken without one."""
    said = "norm to swap in, for example rbn, batchnorm or powernorm" + (f" (default: {norm})" if norm else "")
    parser.add_argument("--norm", required=required, default=norm, help=said)
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
