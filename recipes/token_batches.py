"""Batches of about as many tokens, whatever the lengths of their rows."""

import torch
from torch.utils.data import Sampler


class TokenBatches(Sampler):
    """
    Batches of rows of like length, of `max_tokens` at most with their padding, in an order of their own in each epoch.

    Every rank gets as many batches: up to `ranks − 1` of an epoch are left out.
    """

    def __init__(self, lengths, max_tokens, seed, ranks=1):
        if max(lengths) > max_tokens:
            raise ValueError(f"A row has {max(lengths)} tokens, and a batch is to have {max_tokens} at most.")
        self.lengths, self.max_tokens, self.seed, self.ranks = lengths, max_tokens, seed, ranks
        self.epoch, self.drop_last = 0, True
        self.sampler = self  # where accelerate looks for set_epoch, behind a sampler that divides batches over ranks

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self._batches())

    def __iter__(self):
        return iter(self._batches())

    def _batches(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # The sort is stable: rows of one length are in an order of their own in each epoch.
        order.sort(key=lambda index: self.lengths[index])
        batches = [[]]
        for index in order:
            if (len(batches[-1]) + 1) * self.lengths[index] > self.max_tokens:
                batches.append([])
            batches[-1].append(index)
        # Cut at the same places in every epoch, there are as many batches: the length of a run is known.
        batches = [batches[number] for number in torch.randperm(len(batches), generator=generator)]
        return batches[: len(batches) - len(batches) % self.ranks]
