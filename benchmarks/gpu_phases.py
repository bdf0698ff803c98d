"""
The phases of `gpu.py`, which runs each in a process of its own. What only CUDA knows is in `timing.py`.

A phase yields cases, dictionaries that say what a row is about, each with a function that returns its figures.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import inference
import norms
import torch
import training
from gpu import write_json
from timing import (
    HostClock,
    allocated_bytes,
    copy_bandwidth,
    describe_device,
    make_clock,
    measure_peak,
    median_with_interval,
    profile,
    synchronize,
    take_turns,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_normswap import (
    NormSwapTrainer,
    NormSwapTrainingArguments,
    accumulate_norm_statistics,
    swap_norm,
    update_norm_statistics,
    use_kernels,
)
from hf_normswap.fusion.equivalence import relative_error
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from hf_normswap.reporting.results import describe_environment


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # a script finds its own folder only

from recipes.vocabulary import train_tokenizer  # noqa: E402


TOKENS = 16384
WARMERS = 7  # processes
STEPS_OF_A_TURN = 3  # the host runs ahead of the device, as in a training
# Path: the choice of `use_kernels`, and whether the norm is compiled. Kernels are in Triton, and on a CPU in C++.
PATHS = {"kernels": ("all", False), "pytorch": ("none", False), "compile": ("none", True)}
PEERS = {
    "nn.LayerNorm": None,
    "nn.RMSNorm": None,
    "nn.BatchNorm1d": None,
    "liger LayerNorm": "liger_kernel.transformers:LigerLayerNorm",
    "liger RMSNorm": "liger_kernel.transformers:LigerRMSNorm",
    "quack RMSNorm": "quack.rmsnorm:QuackRMSNorm",
}
# Tensors of the size of the input that a forward, and a forward and a backward, move at least. What batch norms read
# for their statistics are real tokens, three quarters of all.
MOVED = {"batchnorm": (2.75, 7.75), "rbn": (2.75, 7.75), "pnv": (2.75, 7.75), "nn.BatchNorm1d": (3, 8)}
# Error of a norm over that of LayerNorm, both against float64. Roundings of different values differ a little.
LARGEST_ERROR = 1.25
ROUNDING = 2 * torch.finfo(torch.float32).eps  # what is computed inside of a norm is float32
STEPS = [
    {"model": "BERT-base", "family": "bert", "hidden_size": 768, "layers": 12, "batch_size": 32, "length": 128},
    {"model": "GPT-2-small", "family": "gpt2", "hidden_size": 768, "layers": 12, "batch_size": 8, "length": 1024},
    {"model": "BERT-large", "family": "bert", "hidden_size": 1024, "layers": 24, "batch_size": 16, "length": 128},
    {"model": "BERT-base", "family": "bert", "hidden_size": 768, "layers": 12, "batch_size": 8, "length": 512},
]


def main(argument):
    args = SimpleNamespace(**json.loads(argument))
    if hasattr(args, "worker"):
        return WORKERS[args.worker](args)
    args.compiler = "inductor" if args.device == "cuda" else "aot_eager"  # no C++ to wait for in a dry run
    args.turns = 3 if args.quick else None
    started, path = time.monotonic(), Path(args.path)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "seconds": 0}
    record |= {"phase": args.phase, "device": args.device, "quick": args.quick, **describe_environment()}
    earlier, rows = record["seconds"], record["rows"]
    with contextlib.closing(PHASES[args.phase](args)) as cases:
        for case, measure in cases:
            record |= {"seconds": earlier + time.monotonic() - started, "ended": None, "running": case}
            if time.monotonic() - started > args.seconds:
                record["ended"] = "the budget is used up"
                break
            if any(row.items() >= case.items() for row in rows):
                continue
            write_json(path, record)
            began = time.monotonic()
            try:
                measured = measure()
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                print(f"{args.phase} {case}: {message}", file=sys.stderr)
                measured = {"error": message[:1000]}
            took = time.monotonic() - began
            measured = measured if isinstance(measured, list) else [measured]
            rows += [{**case, **row, "took": took / len(measured)} for row in measured]
            synchronize(args.device)  # with a broken device this fails, and a new process goes on
    record |= {"seconds": earlier + time.monotonic() - started, "ended": record["ended"] or "done"}
    record.pop("running", None)
    write_json(path, record)


def facts(args):
    """What this is measured on, and how fast it copies."""

    def measure():
        size = 2**20 if args.quick else 2**30
        return {**describe_device(args.device), "copied_bytes": size, "bandwidth": copy_bandwidth(args.device, size)}

    yield {"fact": "device"}, measure


def correctness(args):
    """The tests on a device, and the error of each path against float64, beside that of LayerNorm."""
    names = ["rbn", "powernorm"] if args.quick else list(norms.NORMS)
    dtypes = ["bfloat16", "float32"] if args.quick else ["bfloat16", "float32", "float16"]
    shape = (4, 16, 64) if args.quick else (32, 128, 1024)
    tests, workers = start_tests(), Workers(args)
    try:
        for index in range(WARMERS if args.device == "cuda" and not args.quick else 0):
            workers.start(index, [sys.executable, __file__], worker="warm", index=index)
        cases = [
            {"norm": name, "path": path, "dtype": dtype}
            for paths in (["kernels", "pytorch"], ["compile"])
            for dtype in dtypes
            for name in names
            for path in paths
        ]
        of_tests = {"norm": "tests/gpu"}, functools.partial(wait_for_tests, tests, 0.85 * args.seconds)
        was_waited_for = False
        for case in cases:
            if not was_waited_for and time.monotonic() - tests.started > 0.55 * args.seconds:
                was_waited_for = True
                yield of_tests
            yield case, functools.partial(compare_with_float64, **case, shape=shape, args=args)
        if not was_waited_for:
            yield of_tests
    finally:
        tests.kill()
        workers.stop()


def warm_up_compilers(args):
    """Worker: fills the caches of compilers with what later phases need. What it measures counts for nothing."""
    torch._inductor.config.autotune_local_cache = False  # on a busy device nothing shows what is fastest
    args.compiler, args.turns = "inductor", 1
    found = [measured for phase in ("norms", "steps", "inference") for measured in PHASES[phase](args)]
    compiled = [
        measure
        for case, measure in found
        if case.get("path") in ("kernels", "compile") or case.get("compiled") or case.get("way") == "compiled"
    ]
    for measure in compiled[args.index :: WARMERS]:
        with contextlib.suppress(Exception):
            measure()


def start_tests():
    """The GPU tests, on several processes where pytest can do that."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "tests/gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(6, os.cpu_count() - WARMERS)))]
    log = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    process.log, process.started = log, time.monotonic()
    return process


def wait_for_tests(process, seconds):
    """How many tests passed, failed and were skipped, and which failed: those of the first `seconds`."""
    try:
        code = process.wait(max(0, process.started + seconds - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
        process.kill()
    process.log.seek(0)
    log = process.log.read()
    found = dict(re.findall(r"(tests/gpu\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", log))
    found |= {name: state for state, name in re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/gpu\S+::.+)", log)}
    states = list(found.values())
    counts = {state.lower(): states.count(state) for state in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = sorted(name for name, state in found.items() if state in ("FAILED", "ERROR"))
    return {**counts, "exit_code": code, "failures": failed[:40], "end_of_log": log[-2000:] if failed or code else ""}


def compare_with_float64(norm, path, dtype, shape, args):
    """Relative errors of outputs and gradients, those of LayerNorm, and whether the former are as small."""
    kernels, compiled = PATHS[path]
    use_kernels(kernels)
    torch.compiler.reset()
    torch.use_deterministic_algorithms(path == "kernels", warn_only=True)  # one tiling: the tests are for the others
    errors = find_errors(norm, args.compiler if compiled else None, dtype, shape, args)
    of_layer_norm = find_errors("nn.LayerNorm", None, dtype, shape, args)
    limits = {key: LARGEST_ERROR * error + ROUNDING for key, error in of_layer_norm.items()}
    # All others are statistics.
    correct = all(error <= limits.get(key, 10 * ROUNDING) for key, error in errors.items())
    return {"errors": errors, "layernorm_errors": of_layer_norm, "correct": correct}


def find_errors(name, compiler, dtype, shape, args):
    """`‖Δ‖₂ / ‖y‖₂` of what a norm computes in a training step, against the same step in float64."""
    torch.manual_seed(0)
    norm = norms.make_norm(name, shape[-1])
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -1, 1)
    norm = norm.to(args.device, getattr(torch, dtype)).train()
    x, upstream = torch.randn(2, *shape, device=args.device).to(norm.weight.dtype)
    lengths = torch.linspace(0.5, 1, shape[0], device=args.device)[:, None] * shape[1]
    masks = [torch.arange(shape[1], device=args.device) < lengths] if name in norms.NORMS else []
    results = []
    for each, backend in ((copy.deepcopy(norm).double(), None), (norm, compiler)):
        tokens = x.to(each.weight.dtype, copy=True).requires_grad_()
        outputs = norms.make_run(each, masks, backend)(tokens)
        torch.autograd.backward(outputs, [upstream.to(tokens.dtype), *map(torch.ones_like, outputs[1:])])
        result = {"y": outputs[0], "dx": tokens.grad, "dweight": each.weight.grad, "dbias": each.bias.grad}
        floats = {name: buffer for name, buffer in each.named_buffers() if buffer.is_floating_point()}
        results.append(result | {name: buffer for name, buffer in floats.items() if buffer.any()})
    exact, ours = results
    return {key: relative_error(value.detach(), ours[key].detach()) for key, value in exact.items()}


def single_norms(args):
    """Single norms, forward, and forward and backward: time over that of nn.LayerNorm, and share of a copy's speed."""
    cases = [(dtype, channels) for dtype in ("bfloat16", "float32") for channels in (1024, 768, 4096)]
    names = list(norms.NORMS)
    if args.quick:
        cases, names = [("bfloat16", 64)], ["rbn", "powernorm"]
    bandwidth = copy_bandwidth(args.device, 2**20 if args.quick else 2**30)
    peers = [f"{name}={home}" for name, home in PEERS.items() if home and importlib.util.find_spec(home.split(".")[0])]
    found = [name for name, home in PEERS.items() if home is None or f"{name}={home}" in peers]
    of_stage = [[(name, path) for name in names for path in ("kernels", "pytorch")] + [(name, None) for name in found]]
    of_stage += [[(name, "compile") for name in [*names, "nn.LayerNorm"]]]
    for stage in of_stage:
        for dtype, channels in cases:
            for name, path in stage:
                case = {"norm": name, "path": path, "dtype": dtype, "channels": channels}
                case["tokens"] = 128 if args.quick else TOKENS
                yield case, functools.partial(measure_norm, **case, peers=peers, bandwidth=bandwidth, args=args)


def measure_norm(norm, path, dtype, channels, tokens, peers, bandwidth, args):
    """Figures of the forward, and of forward and backward."""
    kernels, compiled = PATHS.get(path, ("none", False))
    use_kernels(kernels)
    torch.compiler.reset()
    clock, figures = make_clock(args.device), {}
    for index, part in enumerate(("forward", "both")):
        options = norms.Arguments(device=args.device, forward_only=part == "forward", peers=peers)
        ours = norms.make_step(norm, channels, tokens, dtype, options, args.compiler if compiled else None)
        layer_norm = norms.make_step("nn.LayerNorm", channels, tokens, dtype, options)
        first, second = take_turns(ours, layer_norm, args.turns or 40, clock, norm)
        ratio, low, high = median_with_interval((first / second).numpy())
        seconds, size = first.median().item(), tokens * channels * getattr(torch, dtype).itemsize
        moved, host = size * MOVED.get(norm, (2, 5))[index], clock.host_seconds[0]
        figures[part] = {
            "ratio": ratio,
            "interval": [low, high],
            "milliseconds": 1e3 * seconds,
            "layernorm_milliseconds": 1e3 * second.median().item(),
            "host_milliseconds": host and 1e3 * host,
            "bytes": moved,
            "bandwidth_share": moved / seconds / bandwidth,
        }
    if channels == 1024 or args.quick:
        figures["profile"] = profile(args.device, ours)
    return figures


def training_steps(args):
    """Whole steps of the Trainer in bf16, over those of the stock one with LayerNorm: eager first, then compiled."""
    configs = STEPS
    names = ["rbn", "powernorm", "batchnorm"]
    if args.quick:
        configs = [{**STEPS[0], "hidden_size": 64, "layers": 1, "batch_size": 4, "length": 16}]
        names = names[:2]
    for compiled in (False, True):
        for config in configs:
            baseline = functools.cache(functools.partial(make_baseline, config, compiled, args))
            for name in names[: 1 if args.quick and compiled else None]:
                case = {**config, "norm": name, "compiled": compiled}
                yield case, functools.partial(measure_step, name, config, compiled, baseline, args)


def make_baseline(config, compiled, args):
    """The step with LayerNorm, and the memory that it takes."""
    if compiled:
        torch.compiler.reset()  # a forward is compiled for a few models only
    step, before = make_trainer_step("layernorm", config, compiled, args)
    return step, measure_peak(args.device, step, before)


def measure_step(name, config, compiled, baseline, args):
    """A row for each path. A compiler takes the reference: it sees through that."""
    layer_norm, layer_norm_peak = baseline()
    step, before = make_trainer_step(name, config, compiled, args)
    rows = []
    for path in ["pytorch"] if compiled else ["pytorch", "kernels"]:
        use_kernels(PATHS[path][0])
        first, second = take_turns(step, layer_norm, args.turns or 8, HostClock(args.device), name)
        ratio, low, high = median_with_interval((first / second).numpy())
        row = {"path": path, "ratio": ratio, "interval": [low, high]}
        for prefix, seconds in (("", first), ("layernorm_", second)):
            row[f"{prefix}milliseconds"] = 1e3 * seconds.median().item() / STEPS_OF_A_TURN
        row |= {"peak_bytes": measure_peak(args.device, step, before), "layernorm_peak_bytes": layer_norm_peak}
        if config is STEPS[0] and not args.quick:
            row["profile"] = profile(args.device, step)
            if not rows:
                row["layernorm_profile"] = profile(args.device, layer_norm)
        rows.append(row)
    return rows


def make_trainer_step(name, config, compiled, args):
    """A function that takes a few steps as `Trainer.train` does, and the bytes that were allocated before."""
    for variable in [variable for variable in os.environ if variable.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[variable]  # an earlier torch_compile would count for this one, too
    use_kernels("none")
    gc.collect()
    before = allocated_bytes(args.device)
    torch.manual_seed(0)
    sizes = SimpleNamespace(**config, device=args.device)
    with torch.device(args.device):
        model = training.make_model(sizes)
    options = {"bf16": True, "use_cpu": args.device == "cpu", "report_to": "none", "learning_rate": 1e-5}
    if compiled:
        options |= {"torch_compile": True, "torch_compile_backend": args.compiler}
    is_swapped = name != "layernorm"
    if is_swapped:
        swap_norm(model, name, where="all")
        trainer = NormSwapTrainer(model, NormSwapTrainingArguments(tempfile.mkdtemp(), **options))
        accumulate_norm_statistics(model)
    else:
        trainer = Trainer(model, TrainingArguments(tempfile.mkdtemp(), **options))
    trainer.current_gradient_accumulation_steps = 1
    prepared, optimizer = trainer.accelerator.prepare(model, trainer.create_optimizer())
    trainer.optimizer, batch = optimizer, training.make_batch(sizes)

    def step():
        for _ in range(STEPS_OF_A_TURN):
            trainer.training_step(prepared, batch)
            trainer.accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            if is_swapped:
                update_norm_statistics(model)
            optimizer.zero_grad()

    return step, before


def inference_without_norms(args):
    """Folded models and RMSNorm, over LayerNorm: eager and as a CUDA graph first, then compiled."""
    ways = ["eager", "graph", "compiled"] if args.device == "cuda" else ["eager", "compiled"]
    tasks = [("decode", 1), ("encode", 64), ("decode", 32), ("encode", 1)]
    dtypes = ["bfloat16", "float16", "float32"]
    sizes = {"hidden_size": 768, "layers": 12, "rounds": args.turns or 40}
    if args.quick:
        sizes, tasks, dtypes = {"hidden_size": 64, "layers": 1, "rounds": 3, "length": 4}, tasks[:2], dtypes[:1]
    bases = {}

    @functools.lru_cache(maxsize=2)
    def make_models(task, dtype):
        options = inference.Arguments(device=args.device, dtype=dtype, compiler=args.compiler, **sizes)
        if task not in bases:
            bases[task] = inference.make_base(task, options)
        kinds = inference.KINDS[task]
        models = {kind: inference.make_model(task, kind, options, bases[task]) for kind in kinds}
        originals = {kind: inference.make_original(task, kind, options, bases[task]).to(args.device) for kind in kinds}
        return options, models, originals

    def measure(task, batch_size, dtype, way):
        options, models, originals = make_models(task, dtype)
        errors = {}
        if way != "compiled":
            pairs = {kind: (model, originals[kind]) for kind, model in models.items()}
            errors = {kind: inference.measure_error(task, *pairs[kind], batch_size, way, options) for kind in pairs}
        options.ways = [way]
        rows = inference.make_rows(inference.measure(models, task, batch_size, options))
        return [{**row, "kind": kind, "difference": errors.get(kind)} for kind, row in zip(models, rows, strict=True)]

    for group in (ways[:-1], ways[-1:]):
        for dtype in dtypes:
            for task, batch_size in tasks:
                for way in group:
                    case = {"task": task, "batch_size": batch_size, "dtype": dtype, "way": way}
                    yield case, functools.partial(measure, **case)


def launching(args):
    """The same few steps, started in several ways, all at once: finite, and equal to those of a plain process."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    accelerate += ["--config_file", ROOT / "recipes" / "launch" / "fsdp2.yaml", "--num_processes", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    # Process: how it is started, and what it does one after the other.
    processes = {"plain": ([sys.executable], ["plain", "checkpointing", "resume"])}
    processes["torchrun"] = torchrun, ["one process of torchrun"]
    if args.device == "cuda":  # accelerate has no CPU for it
        processes["fsdp2"] = accelerate, ["fsdp2"]
    workers = Workers(args)
    try:
        for name, (command, modes) in processes.items():
            workers.start(name, [*command, __file__], worker="launch", modes=modes)
        for name, (_, modes) in processes.items():
            for mode in modes:
                yield {"launch": mode}, functools.partial(compare_logs, name, mode, workers)
    finally:
        workers.stop()


def compare_logs(name, mode, workers):
    """A row for each norm: the largest relative difference of what the steps logged, to those of the plain process."""
    rows, plain = [], workers.result("plain")["plain"]
    for norm, (distributed, logs) in workers.result(name)[mode].items():
        differences = [
            abs(value - entry[key]) / max(abs(value), 1e-3)
            for expected, entry in zip(plain[norm][1], logs, strict=True)
            for key, value in expected.items()
        ]
        largest = max(differences) if all(d == d for d in differences) else float("nan")
        losses = [entry["loss"] for entry in logs]
        row = {"norm": norm, "distributed": distributed, "losses": losses}
        rows.append({**row, "difference": largest, "equal": largest <= 1e-4})
    return rows


def train_a_little(args):
    """Worker: what a few steps log, in each mode, for two norms."""
    with tempfile.TemporaryDirectory() as folder:
        logs = {
            mode: {norm: log_steps(norm, mode, f"{folder}/{norm}-{index}", args) for norm in ("rbn", "powernorm")}
            for index, mode in enumerate(args.modes)
        }
    write_json(args.result, logs)


def log_steps(norm, mode, folder, args):
    """Six steps of a small BERT without dropout; to `resume` is to take the last three once more."""
    sizes = {"family": "bert", "hidden_size": 64, "layers": 2, "batch_size": 64, "length": 32, "device": "cpu"}
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    options = options if mode == "checkpointing" else {}
    options |= {"save_strategy": "steps", "save_steps": 3} if mode == "resume" else {"save_strategy": "no"}
    options |= {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True}

    def make_trainer():
        torch.manual_seed(0)
        model = training.make_model(SimpleNamespace(**sizes))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        swap_norm(model, norm, where="all")
        batch = training.make_batch(SimpleNamespace(**sizes))
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        arguments = NormSwapTrainingArguments(folder, use_cpu=args.device == "cpu", **options)
        return NormSwapTrainer(model, arguments, train_dataset=rows)

    trainer = make_trainer()
    trainer.train()
    if mode == "resume":
        trainer = make_trainer()
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = ("loss", "grad_norm", "rbn_penalty")
    logs = [{k: v for k, v in entry.items() if k in kept or k.startswith("tid")} for entry in entries]
    return trainer.accelerator.distributed_type.value, logs


class Workers:
    """Processes that run at the same time and leave one JSON file each."""

    def __init__(self, args):
        self.args, self.processes, self.folder = args, {}, tempfile.TemporaryDirectory()

    def stop(self):
        """End those that still run."""
        for process in self.processes.values():
            process.kill()
        self.folder.cleanup()

    def start(self, name, command, **options):
        """Start `command` with the options, and where its result is to go, as its argument."""
        result = Path(self.folder.name, f"{len(self.processes)}.json")
        options |= {"device": self.args.device, "quick": self.args.quick, "result": str(result)}
        log = tempfile.TemporaryFile("w+")
        command = [*map(str, command), json.dumps(options)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        process.log, process.path = log, result
        self.processes[name] = process

    def result(self, name):
        """What a worker left, once it has ended."""
        process = self.processes[name]
        code = process.wait()
        if code or not process.path.exists():
            process.log.seek(0)
            raise RuntimeError(f"{name} ended with exit code {code}: {process.log.read()[-800:]}")
        return json.loads(process.path.read_text(encoding="utf-8"))


def words(args):
    """A language model of words with LayerNorm, PowerNorm and RBN, all models at once, to the best validation loss."""
    runs = [(norm, seed) for seed in range(1 if args.quick else 2) for norm in ("layernorm", "powernorm", "rbn")]
    workers = Workers(args)
    try:
        for norm, seed in runs:
            options = {"worker": "words", "norm": norm, "seed": seed, "text": args.text}
            workers.start((norm, seed), [sys.executable, __file__], **options, seconds=args.seconds - 40)
        for norm, seed in runs:
            yield {"norm": norm, "seed": seed}, functools.partial(workers.result, (norm, seed))
    finally:
        workers.stop()


def read_words(paths):
    """The lines of the training, validation and test split; the last two are a twentieth of a single file each."""
    lines = [Path(path).read_text(encoding="utf-8").splitlines() for path in paths]
    if len(lines) == 1:
        held = max(1, len(lines[0]) // 20)
        lines = [lines[0][: -2 * held], lines[0][-2 * held : -held], lines[0][-held:]]
    return [[line for line in split if line.strip()] for split in lines]


def train_on_words(args):
    """Worker: GPT-2 of three layers, as in recipes/configs/lm/ptb-words.yaml, with early stopping."""
    length, batch_size, max_steps = (16, 4, 6) if args.quick else (256, 16, 12000)
    splits = read_words(args.text)
    tokenizer = train_tokenizer(iter(splits[0]), "$A </s>", length, 10000, words=True)
    blocks = []
    for lines in splits:
        tokens = torch.cat([torch.tensor(ids) for ids in tokenizer(lines)["input_ids"]])
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        blocks.append([{"input_ids": row, "labels": row} for row in rows])
    torch.manual_seed(args.seed)
    sizes = {"n_embd": 64 if args.quick else 512, "n_layer": 3, "n_head": 8, "n_positions": length}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids, **drop))
    swap_norm(model, args.norm)
    steps_of_an_epoch = max(1, len(blocks[0]) // batch_size)
    options = NormSwapTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * batch_size,
        learning_rate=2.5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=min(1000, max_steps // 10),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=min(steps_of_an_epoch, max_steps // 2),
        logging_steps=steps_of_an_epoch,
        save_strategy="no",
        bf16=True,
        seed=args.seed,
        disable_tqdm=True,
        report_to="none",
        use_cpu=args.device == "cpu",
    )
    best = KeepBest(args.seconds)
    trainer = NormSwapTrainer(
        model, options, train_dataset=blocks[0], eval_dataset=blocks[1], callbacks=[best], processing_class=tokenizer
    )
    trainer.train()
    model.load_state_dict(best.state)
    test_loss = trainer.evaluate(blocks[2], metric_key_prefix="test")["test_loss"]
    row = {"validation_loss": best.loss, "test_loss": test_loss, "best_step": best.step, "history": best.history}
    seconds = time.monotonic() - best.started
    row |= {"steps": trainer.state.global_step, "seconds": seconds, "vocabulary": len(tokenizer)}
    write_json(args.result, row)


class KeepBest(TrainerCallback):
    """Keeps the weights of the best validation loss; stops when that was long ago, or time is over."""

    PATIENCE = 8  # evaluations

    def __init__(self, seconds):
        self.started, self.seconds = time.monotonic(), seconds
        self.loss, self.step, self.state, self.history = float("inf"), 0, None, []

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        if "eval_loss" not in metrics:
            return
        self.history.append([state.global_step, metrics["eval_loss"]])
        if metrics["eval_loss"] < self.loss or self.state is None:
            self.loss, self.step = metrics["eval_loss"], state.global_step
            self.state = copy.deepcopy(model.state_dict())
        is_over = time.monotonic() - self.started > self.seconds
        behind = sum(step > self.step for step, _ in self.history)
        control.should_training_stop |= is_over or behind >= self.PATIENCE


PHASES = {
    "facts": facts,
    "correctness": correctness,
    "norms": single_norms,
    "steps": training_steps,
    "inference": inference_without_norms,
    "launch": launching,
    "train": words,
}
WORKERS = {"warm": warm_up_compilers, "launch": train_a_little, "words": train_on_words}

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever kills what started this, kills this
    main(sys.argv[1])
