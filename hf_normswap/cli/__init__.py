"""Swap the LayerNorms of models of transformers from the command line.

Examples:

    normswap convert textattack/bert-base-uncased-SST-2 ./sst2-bn --texts reviews.txt
    normswap inspect ./sst2-bn --texts reviews.txt
    normswap norms
    normswap fold ./sst2-bn ./sst2-without-norms --onnx
    normswap fold --help

`--debug`, or the environment variable `HF_NORMSWAP_DEBUG=1`, shows the traceback behind an error.
"""

import argparse
import os
import sys
import traceback

from transformers.utils import ENV_VARS_TRUE_VALUES

from hf_normswap import __version__

from . import calibrate, compare, convert, depth, fold, inspect, kernels, norms, push, swap, tid


# A verb is a module of this folder: its docstring is the help, `add_arguments` gives its options, `run` does the work.
# It imports torch and what needs it in `run` alone: help must not wait for them.
VERBS = (inspect, norms, convert, swap, calibrate, tid, depth, fold, compare, push, kernels)

_DEBUG_HELP = "show the traceback behind an error"


def main(argv: list[str] | None = None) -> int:
    """Run the command line `normswap`.

    Args:
        argv (list of `str`, *optional*): the arguments, by default those of the process.

    Returns:
        `int`: 0; 2 after one sentence on stderr about what the user can cure; 130 when interrupted. With `--debug` or
        `HF_NORMSWAP_DEBUG=1` the traceback stands before the sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Looked up before the arguments are parsed, as parsing may be what fails.
    is_debug = "--debug" in argv or os.environ.get("HF_NORMSWAP_DEBUG", "").upper() in ENV_VARS_TRUE_VALUES
    try:
        args = _make_parser().parse_args(argv)
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError) as error:
        if is_debug:
            traceback.print_exception(error)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):  # argparse would print the whole usage first
        raise ValueError(message)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normswap", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hf_normswap {__version__}")
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        summary = (verb.__doc__ or "").partition("\n")[0]
        of_verb = verbs.add_parser(verb.__name__.rpartition(".")[2], help=summary, description=verb.__doc__)
        verb.add_arguments(of_verb)
        of_verb.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
        of_verb.set_defaults(run=verb.run)
    return parser
