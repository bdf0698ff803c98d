"""Trains every case of a family in every process of a launcher, and leaves what each rank ended with."""

import contextlib
import hashlib
import itertools
import sys

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_normswap import (
    PowerNorm,
    accumulate_norm_statistics,
    norm_penalty,
    set_norm_process_group,
    swap_norm,
    update_norm_statistics,
)
from tests.helpers.models import tiny_batch, tiny_model


HEADS = {"bert": "BertForMaskedLM", "marian": "MarianMTModel", "gpt2": "GPT2LMHeadModel"}
NORMS = ["layernorm", "rmsnorm", "batchnorm", "rbn", "pnv", "powernorm", "powernorm_warm"]
SHARES = {"even": 3, "unequal": 1, "empty": 0}  # rows of the first rank, of six
CASES = {
    "bert": [
        *itertools.product(["bert"], NORMS, SHARES, ["plain"]),
        *itertools.product(["bert"], NORMS[2:], ["unequal", "empty"], ["accumulation"]),
        *itertools.product(["bert"], NORMS[2:], ["unequal"], ["sharded checkpointing"]),
        *itertools.product(["bert"], ["batchnorm", "rbn", "powernorm"], ["even"], ["compiled"]),
    ]
}
# Norms do the same in every family; masks, stacks and what is reached differ.
for family in ("marian", "gpt2"):
    CASES[family] = list(itertools.product([family], ["rbn", "powernorm_warm"], SHARES, ["plain"]))
    CASES[family] += itertools.product(
        [family], ["rbn", "powernorm_warm"], ["unequal"], ["accumulation", "sharded checkpointing"]
    )
STEPS, MICRO_BATCHES = 3, 2


def take_share(batch, division, rank):
    """The rows of a rank, or all of them; a rank without rows has one of padding alone."""
    if rank is None:
        return batch
    rows = slice(SHARES[division]) if rank == 0 else slice(SHARES[division], None)
    if division == "empty" and rank == 0:
        nothing = {"attention_mask": 0, "labels": -100}
        return {name: value[:1].clone().fill_(nothing.get(name, 1)) for name, value in batch.items()}
    return {name: value[rows] for name, value in batch.items()}


def count_labels(head, labels):
    return (labels[:, 1:] if head == "GPT2LMHeadModel" else labels).ne(-100).sum()


def sum_losses(head, logits, labels):
    if head == "GPT2LMHeadModel":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def train(family, norm, division, mode, rank=None):
    """Three steps of SGD: gradients, penalty, buffers and collectives of norms in each, and weights in the end."""
    world = 1 if rank is None else 2
    head = HEADS[family]
    model = swap_norm(tiny_model(family, head).double(), norm.removesuffix("_warm"), where="all")
    if mode.endswith("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, PowerNorm):
            module.warmup_steps = STEPS if norm.endswith("_warm") else 0
            module.loss_scale.fill_(world)  # DDP averages, the loss is a sum over ranks
    set_norm_process_group(model)
    if norm == "powernorm":  # has statistics from before the batch: no need
        set_norm_process_group(model, synchronized=False)
    accumulate_norm_statistics(model)
    if rank is not None and mode == "compiled":
        torch._dynamo.reset()
        model.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    parallel = model if rank is None else make_parallel(model, sharded=mode.startswith("sharded"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parts = MICRO_BATCHES if mode == "accumulation" else 1
    recorded = []
    # A counter would be traced, too.
    with contextlib.nullcontext([]) if mode == "compiled" else count_collectives() as calls:
        for step in range(STEPS):
            calls.clear()
            batches = [
                tiny_batch(model, (6, 3, 9, 5, 4, 7), seed=parts * step + number, columns=9) for number in range(parts)
            ]
            tokens = sum(count_labels(head, batch["labels"]) for batch in batches)
            penalties = []
            for number, batch in enumerate(batches):
                batch = take_share(batch, division, rank)
                later = rank is not None and number < parts - 1
                with parallel.no_sync() if later else contextlib.nullcontext():
                    labels = batch.pop("labels")
                    if family == "marian":
                        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
                        batch["decoder_attention_mask"] = labels.ne(-100)
                    logits = parallel(**batch).logits
                    penalty = norm_penalty(model)
                    (sum_losses(head, logits, labels) / tokens * world + penalty / parts).backward()
                penalties.append(penalty.detach())
            gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
            update_norm_statistics(model)
            saved = model.state_dict()
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
            recorded.append(
                {"gradients": gradients, "penalty": torch.stack(penalties), "buffers": buffers, "calls": list(calls)}
            )
    return {"steps": recorded, "weights": {name: whole(p.detach()) for name, p in model.named_parameters()}}


def make_parallel(model, sharded):
    if not sharded:
        return DistributedDataParallel(model, broadcast_buffers=False)
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__.endswith(("Layer", "Block")):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


@contextlib.contextmanager
def count_collectives():
    """Names of the collectives that Python code calls; those of DDP are not among them."""
    calls, originals = [], {name: getattr(torch.distributed, name) for name in ("all_gather", "all_reduce")}

    def counted(name):
        def call(*args, **kwargs):
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(torch.distributed, name, counted(name))
        yield calls
    finally:
        for name, function in originals.items():
            setattr(torch.distributed, name, function)


def hash_buffers(result):
    values = [buffer.numpy().tobytes() for step in result["steps"] for buffer in step["buffers"].values()]
    return hashlib.sha256(b"".join(values)).hexdigest()[:16]


if __name__ == "__main__":
    family, folder = sys.argv[1:]
    rank = PartialState(cpu=True).process_index
    assert torch.distributed.get_world_size() == 2
    results = {}
    for case in CASES[family]:
        results[case] = train(*case, rank)
        print(f"rank {rank} of 2, {'-'.join(case)}: {hash_buffers(results[case])}", flush=True)
    torch.save(results, f"{folder}/rank{rank}.pt")
