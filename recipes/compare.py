"""
Compares the norms of a folder of results, mean ± sample standard deviation over the seeds.

    python recipes/compare.py results/ --metrics accuracy f1
"""

import argparse
import json

from hf_normswap.results import compare_results, load_results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="result files, or folders of them")
    parser.add_argument("--metrics", nargs="+", help="the metrics to show, all of them if not given")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--markdown", action="store_true", help="print a Markdown table")
    style.add_argument("--json", action="store_true", help="print the table as JSON")
    args = parser.parse_args()
    try:
        table = compare_results(load_results(args.paths), args.metrics)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.markdown:
        print(table.to_markdown())
    elif args.json:
        print(json.dumps(table.to_dict(), indent=2))
    else:
        table.show()


if __name__ == "__main__":
    main()
