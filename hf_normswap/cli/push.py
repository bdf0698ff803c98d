"""Push a swapped model to the Hub: weights, code, tokenizer and model card in one commit, or nothing.

With --results the card has a table of the runs, as the recipes leave them in result.json.

Examples:

    normswap push ./my-model-rbn "<your-namespace>/bert-base-rbn"
    normswap push ./outputs/sst2-rbn-0 "<your-namespace>/sst2-rbn" --results outputs/sst2-*/result.json \\
        --license apache-2.0 --private
"""

import argparse

from .checkpoints import load_checkpoint
from .reports import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("model", metavar="MODEL", help="folder of a swapped model")
    parser.add_argument("repo_id", metavar="REPO", help="id on the Hub, as in <your-namespace>/bert-base-rbn")
    parser.add_argument("--results", nargs="+", metavar="FILE", default=[], help="results of runs, for the card")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="whether a new repo is private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--license", help="license of the weights, for the card")
    parser.add_argument("--description", help="what the model is, for the card")
    parser.add_argument("--limits", help="what it must not be used for, for the card")
    parser.add_argument("--json", action="store_true", help="print the commit as JSON")


def run(args: argparse.Namespace) -> None:
    """Push, and print where."""
    from hf_normswap import push_model
    from hf_normswap.reporting.results import load_results

    results = load_results(args.results) if args.results else []
    model, tokenizer = load_checkpoint(args.model)
    commit = push_model(
        model,
        args.repo_id,
        tokenizer=tokenizer,
        results=results,
        private=args.private,
        revision=args.revision,
        license=args.license,
        description=args.description,
        limits=args.limits,
    )
    if args.json:
        print_json({"repo_id": args.repo_id, "url": str(commit.repo_url), "commit": commit.oid})
    else:
        print(commit.repo_url)
