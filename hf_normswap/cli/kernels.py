"""Compile the native backends of the norms now, and say which of them work here.

Without it the first forward of a norm on a CPU compiles for a few seconds. Run it once per machine, before a job on
many nodes that share a cache.

Examples:

    normswap kernels
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.usage = "%(prog)s [--help]"


def run(args: argparse.Namespace) -> None:
    """Print a row for each kind of device."""
    from hf_normswap.kernels import CHOICES, load_backend

    from .reports import print_table

    rows = [("device", "runs as", "when", "state")]
    for device in CHOICES["all"]:
        used = "by default" if device in CHOICES["auto"] else "HF_NORMSWAP_KERNELS=all"
        try:
            rows.append((device, load_backend(device).__name__, used, "works"))
        except (ImportError, OSError) as error:
            rows.append((device, "PyTorch", used, f"does not work here: {str(error).splitlines()[0]}"))
    print_table(rows)
