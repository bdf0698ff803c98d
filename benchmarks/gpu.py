"""
Everything that a GPU has to show, in one command.

    python benchmarks/gpu.py --output ./outputs/gpu
    python benchmarks/gpu.py --output ./outputs/gpu --phases train --text ptb.train.txt ptb.valid.txt ptb.test.txt
    python benchmarks/gpu.py --output ./outputs/dry-run --device cpu --quick

Phases run in the order of their worth, each in a process of its own with a budget of seconds, and leave one JSON file
each in the output folder. The file is written anew after each row, so that what was measured survives a kill, and a
command that finds rows there goes on behind them. What the phases do is in `gpu_phases.py`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


BUDGETS = {"facts": 15, "correctness": 75, "norms": 120, "steps": 135, "inference": 65, "launch": 30, "train": 450}
GRACE = 6  # seconds for the row in which a budget ends
STARTS = 3  # of a phase whose process dies, as it does with a broken device


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the JSON files of the phases.")
    parser.add_argument("--phases", nargs="+", choices=BUDGETS, default=[name for name in BUDGETS if name != "train"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes and few rows: a dry run.")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="Text of train: one file, or one per split.")
    args = parser.parse_args(argv)
    if "train" in args.phases and len(args.text) not in (1, 3):
        parser.error("train reads --text: one file of sentences, or three of training, validation and test.")
    args.output.mkdir(parents=True, exist_ok=True)
    for phase in args.phases:
        run_phase(phase, args)
    sys.path.append(str(Path(__file__).parents[1] / "results"))
    import tables_speed  # not earlier: what it needs is needed by no phase

    print(tables_speed.render_folder(args.output))


def run_phase(phase, args):
    """Run a phase until it is done or its budget is used up, again where its process died before."""
    path = args.output / f"{phase}.json"
    options = {"phase": phase, "path": str(path), "device": args.device, "quick": args.quick}
    options["text"] = [str(text) for text in args.text]
    # A dry run is short by its sizes, and may be on a slow machine.
    end = time.monotonic() + BUDGETS[phase] * (5 if args.quick else 1)
    for _ in range(STARTS):
        left = end - time.monotonic()
        if left <= 0:
            break
        reason = run_process(["gpu_phases.py", json.dumps({**options, "seconds": left})], left + GRACE)
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:  # it died on its way
            record = {name: options[name] for name in ("phase", "device", "quick")} | {"rows": [], "seconds": 0}
        if reason is None:
            break
        case = record.pop("running", None)
        if case and "died" in reason:  # without that row it would come to the same end again
            record["rows"].append({**case, "error": reason})
        record["ended"] = reason
        write_json(path, record)
    print(f"{phase}: {record.get('ended')}, {len(record['rows'])} rows", flush=True)


def run_process(command, seconds):
    """`None` when a script of this folder ends well, else what happened; whatever it started ends with it."""
    script = Path(__file__).with_name(command[0])
    path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))  # not installed
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([sys.executable, script, *command[1:]], env=environment, process_group=0)
    try:
        code = process.wait(seconds)
        return f"the process died with exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def write_json(path, content):
    """Write a file whole or not at all: a kill leaves the one from before."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
