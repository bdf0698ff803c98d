"""
Time and memory of single norms in training, forward and backward, against nn.LayerNorm.

    python benchmarks/norms.py
    python benchmarks/norms.py --device cuda --kernels all --dtypes bfloat16 --tokens 16384 --channels 1024
    python benchmarks/norms.py --peers liger=liger_kernel.transformers:LigerLayerNorm

A quarter of the tokens is padding, statistics update, and the penalty of RBN is taken. Norm and LayerNorm take turns,
ABBA, in one process: what counts is the median ratio of times within a pair. Batch norms of PyTorch know no mask.
"""

import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timing import make_clock, median_with_interval, peak_memory, take_turns
from torch import nn
from transformers import HfArgumentParser

from hf_normswap import BatchNorm, PowerNorm, PowerNormV, RegularizedBatchNorm, RMSNorm, use_kernels
from hf_normswap.reporting.results import describe_environment


HEAD = 64  # channels of a group of PowerNorm
ROWS = 32  # sequences of a batch


class DynamicTanh(nn.Module):
    """Zhu et al., 2025: γ tanh(αx) + β."""

    def __init__(self, num_features):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        return torch.addcmul(self.bias, self.weight, torch.tanh(self.alpha * x))


class TokenBatchNorm(nn.BatchNorm1d):
    """That of PyTorch over all positions."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)


NORMS = {
    "powernorm": lambda c: PowerNorm(c, group_scaling=False),
    "powernorm, group scaling": lambda c: PowerNorm(c, num_groups=c // HEAD),
    "batchnorm": BatchNorm,
    "rbn": RegularizedBatchNorm,
    "pnv": PowerNormV,
    "rmsnorm": RMSNorm,
}
PEERS = {"nn.BatchNorm1d": TokenBatchNorm, "nn.RMSNorm": nn.RMSNorm, "dyt": DynamicTanh}


@dataclass
class Arguments:
    output_file: str = field(default="outputs/norms.json", metadata={"help": "Where the figures go."})
    norms: list[str] = field(default_factory=lambda: [*NORMS, *PEERS], metadata={"help": "What to measure."})
    peers: list[str] = field(
        default_factory=list,
        metadata={"help": "Further norms, NAME=MODULE:CLASS, made of a number of channels and called with tokens."},
    )
    kernels: str = field(default="auto", metadata={"help": "auto, all or none, see use_kernels."})
    compiler: str | None = field(
        default=None, metadata={"help": "Backend of torch.compile for the norms, such as inductor; not for LayerNorm."}
    )
    channels: list[int] = field(default_factory=lambda: [768, 1024], metadata={"help": "Channels."})
    tokens: list[int] = field(default_factory=lambda: [4096, 16384], metadata={"help": "Tokens, pads among them."})
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"], metadata={"help": "Of the tokens."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    pairs: int = field(default=30, metadata={"help": "Pairs of steps."})
    forward_only: bool = field(default=False, metadata={"help": "Leave out the backward."})
    memory: bool = field(default=True, metadata={"help": "Whether to measure peak memory too."})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Earlier figures; where a ratio has become larger than all of its interval by a tenth, fail."
        },
    )


def make_step(name, channels, tokens, dtype, args, compiler=None):
    """A function that runs a norm forward, and backward if asked for."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    norm = make_norm(name, channels, args.peers).to(args.device, dtype).train()
    x = torch.randn(ROWS, tokens // ROWS, channels, device=args.device, dtype=dtype)
    upstream = torch.randn_like(x)
    lengths = torch.linspace(0.5, 1.0, ROWS, device=args.device)[:, None] * x.shape[1]
    masks = [torch.arange(x.shape[1], device=args.device) < lengths] if name in NORMS else []

    run = make_run(norm, masks, compiler)

    def step():
        y, *penalty = run(x.detach().requires_grad_(not args.forward_only))
        if not args.forward_only:
            torch.autograd.backward([y, *penalty], [upstream, *map(torch.ones_like, penalty)])
        norm.zero_grad()

    return step


def make_run(norm, masks, compiler=None):
    """A function of tokens that returns what has a gradient: the output, and the penalty of RBN."""

    def run(tokens):
        y = norm(tokens, *masks)
        return [y, norm.penalty()] if isinstance(norm, RegularizedBatchNorm) else [y]

    return torch.compile(run, backend=compiler) if compiler else run


def make_norm(name, channels, peers=()):
    """One of [`NORMS`], of [`PEERS`], of `peers`, or else LayerNorm."""
    for peer in peers:
        label, _, home = peer.partition("=")
        if label == name:
            module, _, attribute = home.partition(":")
            return getattr(importlib.import_module(module), attribute)(channels)
    return {**NORMS, **PEERS}.get(name, nn.LayerNorm)(channels)


def measure(name, case, args):
    """Seconds of a norm and of LayerNorm, each of shape `(pairs,)`."""
    ours, layer_norm = make_step(name, *case, args, args.compiler), make_step("nn.LayerNorm", *case, args)
    return take_turns(ours, layer_norm, args.pairs, make_clock(args.device), f"{name} {case}")


def run_steps(name, case, args):
    """The first steps of a norm."""
    use_kernels(args.kernels)
    step = make_step(name, *case, args, args.compiler)
    for _ in range(3):
        step()


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    use_kernels(args.kernels)
    rows = []
    for case in [(c, n, dtype) for dtype in args.dtypes for c in args.channels for n in args.tokens]:
        channels, tokens, dtype = case
        baseline = peak_memory(args.device, run_steps, "nn.LayerNorm", case, args) if args.memory else None
        for name in [*args.norms, *(peer.partition("=")[0] for peer in args.peers)]:
            ours, layer_norm = measure(name, case, args)
            ratio, low, high = median_with_interval((ours / layer_norm).numpy())
            row = {"norm": name, "channels": channels, "tokens": tokens, "dtype": dtype, "ratio": ratio}
            row |= {"interval": [low, high], "layernorm_milliseconds": 1e3 * layer_norm.median().item()}
            if args.memory:
                row["memory_ratio"] = peak_memory(args.device, run_steps, name, case, args) / baseline
            rows.append(row)
            said = f"{name:24} {tokens:6} x {channels:4} {dtype:8} {ratio:.3f} [{low:.3f}, {high:.3f}]"
            print(said + (f"  memory {row['memory_ratio']:.3f}" if args.memory else ""), flush=True)
    arguments = {name: value for name, value in vars(args).items() if name != "output_file"}
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    result = {"arguments": arguments, "threads": torch.get_num_threads(), "allocator": allocator, "rows": rows}
    result |= describe_environment()
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps(result, indent=2), encoding="utf-8")
    if args.baseline:
        earlier = json.loads(Path(args.baseline).read_text(encoding="utf-8"))["rows"]
        if slower := find_slower(rows, earlier):
            raise SystemExit("\n".join(["Slower than before, against LayerNorm:", *slower]))


def find_slower(rows, earlier):
    """Cases whose whole interval lies more than a tenth above that of the earlier figures."""
    case = ("norm", "channels", "tokens", "dtype")
    before = {tuple(row[key] for key in case): row for row in earlier}
    found = []
    for row in rows:
        old = before.get(tuple(row[key] for key in case))
        if old and row["interval"][0] > 1.1 * old["interval"][1]:
            found.append(" ".join(str(row[key]) for key in case) + f": {row['ratio']:.3f}, was {old['ratio']:.3f}")
    return found


if __name__ == "__main__":
    main()
