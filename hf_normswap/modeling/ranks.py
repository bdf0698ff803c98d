"""Collectives of the norms."""

import torch


def has_ranks() -> bool:
    """Whether there is another process to talk to."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather_over_ranks(values: torch.Tensor, group=None) -> torch.Tensor:
    """`values` of all ranks of a process group, by default of all, of shape `(ranks, *values.shape)`."""
    if not has_ranks():
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def sum_over_ranks(values: torch.Tensor, group=None) -> torch.Tensor:
    """The sum of `values` over all ranks of a process group, by default of all, in place."""
    if has_ranks():
        torch.distributed.all_reduce(values, group=group)
    return values
