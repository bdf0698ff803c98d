"""
What can be done with the norms of each architecture of transformers, step by step, on tiny models.

    PYTHONPATH=. python benchmarks/architectures.py --output results/architectures.json
    PYTHONPATH=. python benchmarks/architectures.py --only vit t5 --steps find swap fold
    PYTHONPATH=. python benchmarks/architectures.py --render results/architectures.json > docs/architectures.md

Each step starts from the stock model. A step either succeeds, or it is refused in one sentence, or it fails.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

from hf_normswap import (
    calibrate,
    distill,
    export_onnx,
    find_norms,
    fold_norms,
    gradient_norms,
    measure_tid,
    norm_penalty,
    probe_activations,
    swap_norm,
)
from hf_normswap.core.residual_stream import is_result
from hf_normswap.modeling.base import BatchStatisticNorm
from tests.helpers.architectures import Architecture, architectures, norm_modules


NORMS = ("batchnorm", "rbn", "powernorm", "rmsnorm")


@dataclass
class Arguments:
    only: list[str] | None = field(default=None, metadata={"help": "Architectures; all if not given."})
    steps: list[str] | None = field(default=None, metadata={"help": "Steps; all if not given."})
    output: str | None = field(default=None, metadata={"help": "Result file; what it has of other steps stays."})
    render: str | None = field(default=None, metadata={"help": "Print the page of a result file, and run nothing."})
    debug: bool = field(default=False, metadata={"help": "Show the traceback of what fails."})


def outputs_of(model, inputs: dict) -> list[torch.Tensor]:
    """The tensors that a model is for, without its loss."""
    inputs = {name: value.to(model.dtype) if is_float(value) else value for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**inputs, return_dict=True)
    return [value for name, value in output.items() if is_float(value) and is_result(name) and name != "loss"]


def find(architecture: Architecture) -> str:
    """Finds the norms that it can swap, of those in the modelling file, counted by hand. Others stay as they are."""
    model = architecture.model()
    sites = find_norms(model)
    if sites.obstacle:
        raise AssertionError(sites.obstacle)
    expected, found = norm_modules(model), {site.name for site in sites}
    if sum(architecture.norms.values()) != len(expected):
        raise AssertionError(f"{len(expected)} modules, {architecture.norms} in the modelling file")
    rest = Counter(type(module).__name__ for name, module in expected.items() if name not in found)
    if found - expected.keys():
        raise AssertionError(f"found what is no norm: {sorted(found - expected.keys())}")
    left = "".join(f"; {count} {name} left alone" for name, count in rest.items())
    return f"{len(sites)} of {len(expected)} norms{left}"


def swap(architecture: Architecture) -> str:
    """Swaps all norms, for each of four norms, and trains one step."""
    counts = []
    for norm in NORMS:
        model = swap_norm(architecture.model(), norm, where="all").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = model(**architecture.inputs()).loss
        loss.backward()
        optimizer.step()
        swapped = [site for site in find_norms(model) if site.kind == norm]
        if not loss.isfinite() or not swapped:
            raise AssertionError(f"{norm}: loss {loss.item()}, {len(swapped)} norms")
        silent = [
            site.name for site in swapped if isinstance(site.module, BatchStatisticNorm) and not site.module.records
        ]
        if silent:
            raise AssertionError(f"{norm}: no statistics of {silent}")
        counts.append(len(swapped))
    return f"{counts[0]} norms"


def pads(architecture: Architecture) -> str:
    """What stands at pads changes neither the outputs at real tokens nor any statistic."""
    if not architecture.takes_mask:
        return "no mask"
    inputs = architecture.inputs()
    other, is_pad = dict(inputs), inputs["attention_mask"] == 0
    other["input_ids"] = torch.where(is_pad, 7 + 0 * inputs["input_ids"], inputs["input_ids"])
    model = architecture.model()
    part = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model.base_model)
    names = ("input_ids", "attention_mask")
    hidden = [outputs_of(part, {name: batch[name] for name in names})[0][~is_pad] for batch in (inputs, other)]
    if not torch.allclose(*hidden, atol=1e-5):
        return "the model's own layers read pads"
    states = []
    for batch in (inputs, other):
        model = swap_norm(architecture.model(), "batchnorm", where="all").train()
        model(**batch)
        states.append({name: value for name, value in model.named_buffers() if "running" in name})
    for name, value in states[0].items():
        if not torch.allclose(value, states[1][name], atol=1e-6):
            raise AssertionError(f"{name} depends on pads")
    return f"{len(states[0])} statistics"


def dtypes(architecture: Architecture) -> str:
    """Statistics are float32 in models of 16 bits."""
    for dtype in (torch.bfloat16, torch.float16):
        model = swap_norm(architecture.model(), "batchnorm", where="all").to(dtype)
        kinds = {value.dtype for name, value in model.named_buffers() if "running" in name}
        if kinds != {torch.float32}:
            raise AssertionError(f"{dtype}: {kinds}")
    inputs = {
        name: value.to(torch.bfloat16) if is_float(value) else value for name, value in architecture.inputs().items()
    }
    model = swap_norm(architecture.model(), "batchnorm", where="all").to(torch.bfloat16).train()
    if not model(**inputs).loss.isfinite():
        raise AssertionError("the loss is not finite in bfloat16")
    return "float32"


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def save(architecture: Architecture) -> str:
    """Saves a swapped model, and loads it in a fresh process with the Auto class: equal bits."""
    model = swap_norm(architecture.model(), "batchnorm", where="all").train()
    model(**architecture.inputs())
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.save((architecture.inputs(), outputs_of(model, architecture.inputs())), f"{folder}/expected.pt")
        code = LOAD.format(auto=architecture.auto, folder=folder)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
        if run.returncode:
            raise AssertionError(run.stderr.strip().splitlines()[-1])
    return "equal bits"


LOAD = """
import torch, transformers, hf_normswap
from benchmarks.architectures import outputs_of
folder = {folder!r}
inputs, expected = torch.load(folder + "/expected.pt", weights_only=False)
model = transformers.{auto}.from_pretrained(folder).eval()
assert type(model).__name__.startswith("NormSwap"), type(model)
found = outputs_of(model, inputs)
assert len(found) == len(expected) and all(map(torch.equal, found, expected)), "other outputs"
"""


def checkpoint(architecture: Architecture) -> str:
    """Trains with activation checkpointing: the same loss, gradients and statistics."""
    seen = []
    for is_on in (False, True):
        model = swap_norm(architecture.model(), "rbn", where="blocks").train()
        if is_on:
            if not model.supports_gradient_checkpointing:
                return "transformers has none for it"
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (model(**architecture.inputs()).loss + norm_penalty(model)).backward()
        state = {name: value for name, value in model.named_buffers() if "running" in name}
        seen.append(state | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, value in seen[0].items():
        if not (seen[1][name] - value).norm() <= 1e-4 * value.norm() + 1e-6:
            raise AssertionError(f"{name} differs")
    return f"{len(seen[0])} equal tensors"


def probes(architecture: Architecture) -> str:
    """Measures the TID, gradients by sublayer, and activations."""
    model = swap_norm(architecture.model(), "batchnorm", where="blocks").train()
    batch = batches_of(architecture)[0] | ({"return_loss": True} if architecture.name == "clip" else {})
    model(**batch)
    tid, gradients = measure_tid(model.eval(), batches_of(architecture)), gradient_norms(model, batch)
    activations = probe_activations(model, batches_of(architecture)[:1])
    if not (tid and gradients and activations):
        raise AssertionError("a report is empty")
    return f"TID of {len(tid)} norms, {len(gradients)} groups of gradients, {len(activations)} activations"


def distilled(architecture: Architecture) -> str:
    """Distils the converted model against the original one, five steps."""
    model, _ = converted(architecture)
    distill(model, architecture.model(), batches_of(architecture), steps=5)
    if not all(value.isfinite().all() for value in outputs_of(model, architecture.inputs())):
        raise AssertionError("outputs are not finite")
    return "5 steps"


def batches_of(architecture: Architecture) -> list[dict]:
    batches = [architecture.inputs(seed) for seed in range(8)]
    return [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in batches]


def converted(architecture: Architecture):
    model = swap_norm(architecture.model(), "batchnorm", where="all")
    return model, calibrate(model, batches_of(architecture))


def calibrated(architecture: Architecture) -> str:
    """Calibrates all norms."""
    model, report = converted(architecture)
    if not all(value.isfinite().all() for value in outputs_of(model, architecture.inputs())):
        raise AssertionError("outputs are not finite")
    return f"{len(report)} norms, median R² {sorted(fit.r2 for fit in report)[len(report) // 2]:.2f}"


def fold(architecture: Architecture) -> str:
    """Folds the calibrated norms."""
    model, _ = converted(architecture)
    exact = copy.deepcopy(model)
    # Products over groups of experts know no float64.
    exact = exact if architecture.name == "mixtral" else exact.double()
    before = outputs_of(exact, architecture.inputs())
    report = fold_norms(model, untie=True)
    after = outputs_of(model, architecture.inputs())
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True))
    if not error <= 1e-5:
        raise AssertionError(f"error {error:.1e}")
    return f"{len(report.folded)} folded, {len(report.kept)} kept, error {error:.0e}"


def onnx(architecture: Architecture) -> str:
    """Exports the folded model to ONNX and runs it in ONNX Runtime."""
    model, _ = converted(architecture)
    fold_norms(model, untie=True)
    with tempfile.TemporaryDirectory() as folder:
        report = export_onnx(model, f"{folder}/onnx")
    return f"{report.norm_nodes} nodes of norms, error {report.error:.0e}"


STEPS = {
    "find": find,
    "swap": swap,
    "pads": pads,
    "dtypes": dtypes,
    "save": save,
    "checkpoint": checkpoint,
    "probes": probes,
    "calibrate": calibrated,
    "distill": distilled,
    "fold": fold,
    "onnx": onnx,
}


def run_step(step, architecture: Architecture, debug: bool) -> tuple[str, str]:
    """`"done"`, `"refused"` or `"failed"`, and what there is to say."""
    torch.manual_seed(0)
    try:
        return "done", step(architecture)
    except ValueError as error:
        if debug:
            traceback.print_exc()
        return "refused", str(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"[:300]


LEAD = """# Architectures

What was tried with the norms of each architecture, on tiny models with random weights, step by step:

{steps}

{done} of {count} steps succeed. Each of the others is refused, with nothing changed; the numbers lead to the reasons.
`python benchmarks/architectures.py` repeats the table. [`normswap inspect`](cli.md) says the same of one model, and
[Concepts](concepts.md#any-architecture) how a model is read; the words are those of the [glossary](glossary.md).
"""


def render(results: dict) -> str:
    """The page of the results, in Markdown."""
    names = list(dict.fromkeys(name for steps in results.values() for name in steps))
    reasons: dict[str, int] = {}
    rows = []
    for architecture, steps in results.items():
        cells = [architecture]
        for name in names:
            step = steps.get(name)
            if step is None or step["outcome"] == "done":
                cells.append("–" if step is None else "✓" if name != "find" else step["text"].split(" norms")[0])
            else:
                cells.append(f"({reasons.setdefault(step['text'], len(reasons) + 1)})")
        rows.append(cells)
    outcomes = [step["outcome"] for steps in results.values() for step in steps.values()]
    told = {name: STEPS[name].__doc__ for name in names}
    lead = LEAD.format(
        steps="\n".join(f"- **{name}**: {text[0].lower()}{text[1:]}" for name, text in told.items()),
        done=outcomes.count("done"),
        count=len(outcomes),
    )
    table = [["architecture", *names], ["---"] * (len(names) + 1), *rows]
    lines = [lead, *(f"| {' | '.join(row)} |" for row in table), ""]
    return "\n".join([*lines, *(f"{number}. {text}" for text, number in reasons.items()), ""])


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    if args.render:
        return print(render(json.loads(Path(args.render).read_text(encoding="utf-8"))), end="")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    path = args.output and Path(args.output)
    results = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    counts: Counter = Counter()
    for architecture in architectures():
        if args.only and architecture.name not in args.only:
            continue
        for name in args.steps or STEPS:
            outcome, text = run_step(STEPS[name], architecture, args.debug)
            results.setdefault(architecture.name, {})[name] = {"outcome": outcome, "text": text}
            counts[outcome] += 1
            print(f"{architecture.name:22}{name:12}{outcome:9}{text}", flush=True)
    print(dict(counts))
    if path:
        results = {name: {step: steps[step] for step in STEPS if step in steps} for name, steps in results.items()}
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
