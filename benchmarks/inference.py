"""
Time and memory of inference without norms, against the model with LayerNorm, eager and compiled, in one run.

    python benchmarks/inference.py --output_file outputs/inference.json
    python benchmarks/inference.py --device cuda --hidden_size 768 --layers 12 --ways eager compiled graph

The task `encode` is a forward of BERT over a batch of tokens, `decode` the next token of GPT-2 after 128 others with
their keys and values cached. The model without norms is the same one, swapped to BatchNorm and folded; for GPT-2 there
is one with RMSNorm, too, from `convert_to_rmsnorm`. Variants take turns, in an order that rotates: what counts is the
ratio of times within a round.
"""

import copy
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timing import WARM_UP, HostClock, capture, median_with_interval, peak_memory
from tqdm.auto import trange
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, HfArgumentParser
from transformers.cache_utils import StaticCache

from hf_normswap import convert_to_rmsnorm, fold_norms, swap_norm
from hf_normswap.core.statistics import statistic_norms
from hf_normswap.fusion.equivalence import relative_error
from hf_normswap.reporting.results import describe_environment


PAST = 128
VOCABULARY = 8000
WAYS = ("eager", "compiled", "graph")
KINDS = {"encode": ("layernorm", "folded"), "decode": ("layernorm", "folded", "rmsnorm")}


@dataclass
class Arguments:
    output_file: str = field(default="outputs/inference.json", metadata={"help": "Where the figures go."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Of the models."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the models."})
    layers: int = field(default=6, metadata={"help": "Layers of the models."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Rows to encode at a time."})
    length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rounds: int = field(default=40, metadata={"help": "Rounds, in each of which every variant runs once."})
    ways: list[str] = field(
        default_factory=lambda: ["eager", "compiled"], metadata={"help": f"How to run the models: {', '.join(WAYS)}."}
    )
    compiler: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})

    def __post_init__(self):
        if self.rounds > PAST - 16:  # each call, of a warm-up too, is one more token in a cache of 2 * PAST
            raise ValueError(f"The cache has room for {PAST - 16} rounds: lower --rounds.")


def make_original(task, kind, args, base=None):
    """What the model of a kind is made from, on the CPU: a model with LayerNorms, or the one to fold."""
    torch.manual_seed(0)
    model = (copy.deepcopy(base) if base else make_base(task, args)).to(getattr(torch, args.dtype))
    if kind == "folded":
        for norm in statistic_norms(swap_norm(model, "batchnorm", where="all")):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.num_batches_tracked.fill_(1)
    return model


def make_base(task, args):
    """A model with LayerNorms."""
    if task == "decode":
        sizes = {"n_embd": args.hidden_size, "n_layer": args.layers, "n_head": args.hidden_size // 64}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=2 * PAST, **sizes)).eval()
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
    sizes |= {"intermediate_size": 4 * args.hidden_size, "num_attention_heads": args.hidden_size // 64}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes)).eval()


def make_model(task, kind, args, base=None):
    """A model with LayerNorms, the same one with RMSNorms, or one without norms."""
    model = make_original(task, kind, args, base)
    if kind == "folded":
        fold_norms(model, untie=True)
    if kind == "rmsnorm":
        convert_to_rmsnorm(model, untie=True)
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
        # Calls are alike: attention is over all places of the cache, those that are still empty masked.
        inputs |= {"past_key_values": cache, "position_ids": torch.full((batch_size, 1), PAST, device=args.device)}
    return lambda forward: forward(**inputs)


@torch.inference_mode()
def measure_error(task, model, original, batch_size, way, args):
    """`‖Δ‖₂ / ‖y‖₂` of what `model`, run in one way, and what its `original`, run eagerly, return."""
    logits = []
    for each, is_graph in ((original, False), (model, way == "graph")):
        run = functools.partial(make_call(task, each, batch_size, args), each)
        if is_graph:
            run = capture(run)
        else:
            for _ in range(WARM_UP):  # as often as in the capture, for each is one more token in the cache
                run()
        logits.append(run().logits.clone())
    return relative_error(*logits)


def compile_forward(model, args):
    """The forward of a model, compiled, and the model as it was."""
    return torch.compile(copy.copy(model).forward, backend=args.compiler)


def measure(models, task, batch_size, args):
    """Seconds of each variant, of shape `(rounds,)`."""
    torch.compiler.reset()  # a function is compiled anew for a few models only
    runs, clock = {}, HostClock(args.device)
    with torch.inference_mode():
        for way in args.ways:
            for kind, model in models.items():
                call = make_call(task, model, batch_size, args)
                forward = compile_forward(model, args) if way == "compiled" else model
                run = functools.partial(call, forward)
                runs[f"{kind} {way}"] = capture(run) if way == "graph" else run
        clock.warm_up(*runs.values())
        names = list(runs)
        seconds = {name: [] for name in names}
        for index in trange(args.rounds, desc=f"{task}, batch {batch_size}", disable=None):
            for name in np.roll(names, index):
                seconds[name].append(clock(runs[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def make_rows(seconds, **case):
    """A row of figures for each variant: its time, and the ratio to that of LayerNorm, run in the same way."""
    rows = []
    for name, values in seconds.items():
        way = name.partition(" ")[2]
        ratio, low, high = median_with_interval(values / seconds[f"layernorm {way}"])
        row = {**case, "variant": name, "milliseconds": 1e3 * np.median(values)}
        rows.append({**row, "ratio": ratio, "interval": [low, high]})
    return rows


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
        models = {kind: make_model(task, kind, args) for kind in KINDS[task]}
        memory = {kind: peak_memory(args.device, run_calls, task, kind, batch_size, args) for kind in models}
        for row in make_rows(measure(models, task, batch_size, args), task=task, batch_size=batch_size):
            rows.append({**row, "peak_bytes": memory[row["variant"].partition(" ")[0]]})
            figures = "{milliseconds:8.2f} ms {ratio:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]".format(**row)
            print(f"{task} {batch_size:3} {row['variant']:20} {figures}")
    arguments = {name: value for name, value in vars(args).items() if name != "output_file"}
    result = {"arguments": arguments, "threads": torch.get_num_threads(), "rows": rows, **describe_environment()}
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
