"""
Time and memory of inference without norms, against the model with LayerNorm, eager and compiled, in one run.

    python benchmarks/inference.py --output_file outputs/inference.json
    python benchmarks/inference.py --device cuda --hidden_size 768 --layers 12

The task `encode` is a forward of BERT over a batch of tokens, `decode` the next token of GPT-2 after 128 others with
their keys and values cached. The model without norms is the same one, swapped to BatchNorm and folded. Variants take
turns, in an order that rotates: what counts is the ratio of times within a round.
"""

import copy
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import trange
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, HfArgumentParser
from transformers.cache_utils import StaticCache

from hf_normswap import fold_norms, swap_norm
from hf_normswap.results import describe_environment


PAST = 128
VOCABULARY = 8000
VARIANTS = ("layernorm eager", "folded eager", "layernorm compiled", "folded compiled")


@dataclass
class Arguments:
    output_file: str = field(default="outputs/inference.json", metadata={"help": "Where the figures go."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the models."})
    layers: int = field(default=6, metadata={"help": "Layers of the models."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Rows to encode at a time."})
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rounds: int = field(default=40, metadata={"help": "Rounds, in each of which every variant runs once."})
    compiled: bool = field(default=True, metadata={"help": "Whether to measure compiled models too."})


def make_model(task, kind, args):
    """A model with LayerNorms, or the same one without norms."""
    torch.manual_seed(0)
    if task == "decode":
        sizes = {"n_embd": args.hidden_size, "n_layer": args.layers, "n_head": args.hidden_size // 64}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=2 * PAST, **sizes))
    else:
        sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
        sizes |= {"intermediate_size": 4 * args.hidden_size, "num_attention_heads": args.hidden_size // 64}
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))
    model.eval()
    if kind == "folded":
        fold_norms(swap_norm(model, "batchnorm", where="all"), untie=True)
    return model.to(args.device)


def make_call(task, model, batch_size, args):
    """A function that runs `model` once."""
    generator = torch.Generator().manual_seed(0)
    length = 1 if task == "decode" else args.length
    ids = torch.randint(VOCABULARY, (batch_size, length), generator=generator).to(args.device)
    inputs = {"input_ids": ids}
    if task == "decode":
        past = torch.randint(VOCABULARY, (batch_size, PAST), generator=generator).to(args.device)
        cache = StaticCache(config=model.config, max_cache_len=2 * PAST)
        with torch.inference_mode():
            model(input_ids=past, past_key_values=cache)
        # Each call writes to the same place of the cache, so that calls are alike.
        inputs |= {"past_key_values": cache, "position_ids": torch.full((batch_size, 1), PAST, device=args.device)}
    return lambda forward: forward(**inputs)


def measure(task, batch_size, args):
    """Seconds of each variant, of shape `(rounds,)`."""
    calls = {}
    for name in VARIANTS if args.compiled else VARIANTS[:2]:
        kind, _, way = name.partition(" ")
        model = make_model(task, kind, args)
        call = make_call(task, model, batch_size, args)
        forward = torch.compile(copy.copy(model).forward) if way == "compiled" else model
        calls[name] = call, forward
    seconds = {name: [] for name in calls}
    with torch.inference_mode():
        for call, forward in calls.values():
            for _ in range(3):
                call(forward)
        names = list(calls)
        for index in trange(args.rounds, desc=f"{task}, batch {batch_size}"):
            for name in np.roll(names, index):
                call, forward = calls[name]
                synchronize(args)
                start = time.perf_counter()
                call(forward)
                synchronize(args)
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def median_with_interval(values):
    """Median and its 95 % interval, from resampled rounds."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(values, (5000, len(values))), axis=1)
    return [float(np.median(values)), *map(float, np.percentile(medians, [2.5, 97.5]))]


def peak_memory(device, run, *arguments):
    """Bytes that `run(*arguments)` needs at most in a new process: of the device, or of the process on a CPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (device, run, arguments))


def _peak_memory(device, run, arguments):
    torch.set_num_threads(1)
    run(*arguments)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: that begins with what the process that started this one held.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    return 1024 * int(peak)


def run_calls(task, kind, batch_size, args):
    """The first calls of a model."""
    model = make_model(task, kind, args)
    call = make_call(task, model, batch_size, args)
    with torch.inference_mode():
        for _ in range(3):
            call(model)


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    rows = []
    for task, batch_size in [*(("encode", size) for size in args.batch_sizes), ("decode", 1)]:
        seconds = measure(task, batch_size, args)
        kinds = "layernorm", "folded"
        memory = {kind: peak_memory(args.device, run_calls, task, kind, batch_size, args) for kind in kinds}
        for name, values in seconds.items():
            kind, _, way = name.partition(" ")
            ratio, low, high = median_with_interval(values / seconds[f"layernorm {way}"])
            row = {"task": task, "batch_size": batch_size, "variant": name, "milliseconds": 1e3 * np.median(values)}
            rows.append({**row, "ratio": ratio, "interval": [low, high], "peak_bytes": memory[kind]})
            milliseconds = f"{rows[-1]['milliseconds']:8.2f} ms"
            print(f"{task} {batch_size:3} {name:20} {milliseconds} {ratio:.3f} [{low:.3f}, {high:.3f}]")
    arguments = {name: value for name, value in vars(args).items() if name != "output_file"}
    result = {"arguments": arguments, "threads": torch.get_num_threads(), "rows": rows, **describe_environment()}
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
