"""
What swapped norms cost in a training step of BERT or GPT-2: against LayerNorm, with their logs, on several processes.

    python benchmarks/training.py --compare layernorm --norm powernorm
    python benchmarks/training.py --compare layernorm --norm rbn --family gpt2 --checkpointing
    python benchmarks/training.py --compare layernorm --norm batchnorm --kernels none
    python benchmarks/training.py --compare logging --norm rbn
    torchrun --nproc_per_node 2 benchmarks/training.py --compare synchronization --norm batchnorm

Two kinds of steps take turns, ABBA, in one process; a quarter of the tokens is padding. What counts is the ratio of
times within a pair: its median, and the 95 % interval of that.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from timing import HostClock, median_with_interval, take_turns
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, HfArgumentParser

from hf_normswap import (
    accumulate_norm_statistics,
    norm_penalty,
    set_norm_process_group,
    swap_norm,
    update_norm_statistics,
    use_kernels,
)
from hf_normswap.core.statistics import statistic_norms, sum_discrepancies
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from hf_normswap.reporting.results import describe_environment


VOCABULARY = 30522
COMPARISONS = {
    "layernorm": "the step with LayerNorm",
    "logging": "the step without logs",
    "synchronization": "the step in which each process has statistics of its own",
}


@dataclass
class Arguments:
    compare: str = field(metadata={"help": "What the swapped step is compared with.", "choices": list(COMPARISONS)})
    norm: str = field(default="batchnorm", metadata={"help": "Norm of the swapped model, all of them."})
    output_file: str = field(default="outputs/training.json", metadata={"help": "Where the figures go."})
    family: str = field(default="bert", metadata={"help": "Model.", "choices": ["bert", "gpt2"]})
    checkpointing: bool = field(default=False, metadata={"help": "Activation checkpointing."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the model."})
    layers: int = field(default=12, metadata={"help": "Layers of the model."})
    batch_size: int = field(default=8, metadata={"help": "Rows of a step, in each process."})
    length: int = field(default=64, metadata={"help": "Tokens of a row."})
    kernels: str = field(default="auto", metadata={"help": "auto, all or none, see use_kernels."})
    pairs: int = field(default=30, metadata={"help": "Pairs of steps."})


def make_model(args):
    """BERT or GPT-2 of the size that is asked for."""
    width, heads = args.hidden_size, args.hidden_size // 64
    if args.family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=args.layers, n_head=heads, use_cache=False))
    sizes = {"num_hidden_layers": args.layers, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, hidden_size=width, **sizes))


def make_batch(args):
    """Random tokens, a quarter of them padding."""
    ids = torch.randint(VOCABULARY, (args.batch_size, args.length), device=args.device)
    mask = (torch.arange(args.length) < torch.linspace(args.length / 2, args.length, args.batch_size)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask.to(args.device), "labels": ids}


def make_step(norm, args):
    """A function that trains for one step; with `logs` it takes the TID and the penalty as the trainer does."""
    torch.manual_seed(0)
    model = make_model(args)
    if norm != "layernorm":
        swap_norm(model, norm, where="all")
    if args.checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()
    model = model.to(args.device).train()
    accumulate_norm_statistics(model)
    norms = statistic_norms(model)
    parallel = model
    if torch.distributed.is_initialized():
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = make_batch(args)
    totals = [0, 0]

    def step(logs=True, synchronized=True):
        set_norm_process_group(model, synchronized=synchronized)
        loss = parallel(**batch).loss
        if logs and norms:
            totals[0] = totals[0] + sum_discrepancies(norms)[0]
        penalty = norm_penalty(model)
        for norm in norms:
            norm.forget_statistics()
        if logs:
            totals[1] = totals[1] + penalty.detach()
        (loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_norm_statistics(model)

    return step


def measure(args):
    """Seconds of the two kinds of steps, each of shape `(pairs,)`."""
    swapped = make_step(args.norm, args)
    first, second = {
        "logging": (swapped, lambda: swapped(logs=False)),
        "synchronization": (swapped, lambda: swapped(synchronized=False)),
        "layernorm": (swapped, make_step("layernorm", args) if args.compare == "layernorm" else None),
    }[args.compare]
    return take_turns(first, second, args.pairs, HostClock(args.device))


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    use_kernels(args.kernels)
    if "WORLD_SIZE" in os.environ:
        PartialState(cpu=args.device == "cpu")
    first, second = measure(args)
    ratio, low, high = median_with_interval((first / second).numpy())
    if int(os.environ.get("RANK", 0)) > 0:
        return
    result = {
        **vars(args),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "ratio": ratio,
        "interval": [low, high],
        "seconds": second.median().item(),
        **describe_environment(),
    }
    del result["output_file"]
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps(result, indent=2), encoding="utf-8")
    of = f"{COMPARISONS[args.compare]}, {result['seconds']:.2f} s"
    print(f"{args.norm}: {ratio:.3f} ({low:.3f} to {high:.3f}) of {of}")


if __name__ == "__main__":
    main()
