"""The forward of a model, one module at a time, over a whole set of data.

Calibration changes a norm once it has seen all its inputs, and what follows has to see the outputs of the changed
norm. So every block runs over all batches before the next one does. Block inputs are kept, which makes the cost linear
in the depth: in memory up to a budget, in memory-mapped files beyond it.
"""

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from hf_normswap.core.model_state import device_of, is_composite, run_model, swapped_parts
from hf_normswap.core.norm_sites import find_norms
from hf_normswap.modeling.moments import has_ranks
from hf_normswap.modeling.padding_mask import current_mask, fit_mask, read_mask


class ActivationStore:
    """Trees of tensors by key: in memory while they fit into `budget` bytes, in memory-mapped files beyond.

    Args:
        budget (`int`): bytes of activations that may stay in memory.
    """

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self._trees: dict = {}
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files = itertools.count()

    def __setitem__(self, key, tree):
        self.pop(key)
        leaves, spec = pytree.tree_flatten(tree)
        self._trees[key] = [self._put(leaf) for leaf in leaves], spec

    def __getitem__(self, key):
        leaves, spec = self._trees[key]
        return pytree.tree_unflatten([self._get(leaf) for leaf in leaves], spec)

    def pop(self, key) -> None:
        """Forget a tree, if there is one of this key."""
        for leaf in self._trees.pop(key, ([], None))[0]:
            if isinstance(leaf, torch.Tensor):
                self.used -= leaf.nbytes
            elif isinstance(leaf, _OnDisk):
                leaf.path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._trees.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _put(self, leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # A copy: a view would keep all that it is a view of.
        leaf = leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if self.used + leaf.nbytes <= self.budget:
            self.used += leaf.nbytes
            return leaf
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hf_normswap-")
        on_disk = _OnDisk(Path(self._folder.name, str(next(self._files))), leaf.shape, leaf.dtype)
        on_disk.load().copy_(leaf)
        return on_disk

    @staticmethod
    def _get(leaf):
        return leaf.load() if isinstance(leaf, _OnDisk) else leaf


class _OnDisk:
    def __init__(self, path: Path, shape: torch.Size, dtype: torch.dtype):
        self.path, self.shape, self.dtype = path, shape, dtype

    def load(self) -> torch.Tensor:
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        values = torch.from_file(str(self.path), shared=True, size=self.shape.numel(), dtype=self.dtype)
        return values.view(self.shape)


class _Value(NamedTuple):
    """What is no tensor, in a tree of tensors."""

    value: object


class Reached(Exception):
    """Ends a forward at the last module that is visited in it."""


class SequentialRunner:
    """Visits modules of a model in the order of its forward, each with all its inputs.

    Iterating yields names of modules. [`SequentialRunner.inputs`] then has the inputs of this one, and of that before.

    Args:
        model (`torch.nn.Module`): in evaluation mode; a model of transformers with its masks watched, or one around
            swapped models, which it may call any number of times.
        batches (list of dict): inputs of the model.
        order (list of tuples of `str`): names of the modules to visit, as [`call_order`] returns them.
        store ([`ActivationStore`]): keeps the activations.
        changes (`bool`, *optional*, defaults to `True`):
            whether the visitor may change a module, or those before it in the same block, so that what comes later has
            to be computed after the visit; else a block runs once.
    """

    def __init__(self, model, batches: list, order: list[tuple], store: ActivationStore, changes: bool = True):
        self.model, self.batches, self.order, self.store, self.changes = model, batches, order, store, changes
        self.device = device_of(model)
        self._blocks, self._once = blocks_of(model), not is_composite(model)
        self._group = {name: group for group in order for name in group}
        self._count: Counter = Counter()  # inputs that are kept, of a group and of the block that is running
        self._first = None  # what is visited first in the block, if there is one
        self._calls: dict = {}  # what else a block is called with, by block and input
        self._mask, self._others = None, []  # of the block call that is running

    def __iter__(self) -> Iterator[str]:
        previous, visited = None, []
        for block, groups in itertools.groupby(self.order, key=lambda group: self._block_of(group[0])):
            groups = list(groups)
            if block and (previous is None or not self._follows(previous, block)):
                self._capture_calls(block)
            previous = block
            if block and not self.changes:
                self._capture_inputs(groups, block)
            self._first = groups[0] if block else None
            for group in groups:
                if self.changes or not block:
                    self._capture_inputs([group], block)
                visited.append(group)
                if len(visited) > 2:
                    self._forget(visited.pop(0))
                yield from group
            if block:
                self._capture_block_outputs(block)
        for group in visited:
            self._forget(group)

    def inputs(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """What came to a module, call by call: `(B, T, C)`, and its token mask `(B, T)` or `None`."""
        group = self._group[name]
        for index in range(self._count[group]):
            yield send_to_device(self.store[id(self), group, index], self.device)

    def add(self, name: str, changes: Iterable[torch.Tensor]) -> None:
        """Change the inputs of the module that is visited, as what was changed before it would."""
        is_block_input = self._group[name] == self._first
        for index, change in enumerate(changes):
            values, mask = self.store[id(self), self._group[name], index]
            values = values + change.to(values).view_as(values)
            self.store[id(self), self._group[name], index] = values, mask
            if is_block_input:
                self.store[id(self), "hidden", index] = values

    def _forget(self, group: tuple) -> None:
        for index in range(self._count.pop(group, 0)):
            self.store.pop((id(self), group, index))

    def _follows(self, previous: str, block: str) -> bool:
        """Whether a block reads what the previous one returns: none between them was left out, nor a stack ended."""
        return block in self._row_of(previous)[1:2] and (block, 0) in self._calls

    def _row_of(self, block: str) -> list[str]:
        """A block, and those behind it in the same list of modules."""
        rest = self._blocks[self._blocks.index(block) :]
        parent = block.rpartition(".")[0]
        return list(itertools.takewhile(lambda other: other.rpartition(".")[0] == parent, rest))

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self._blocks if name.startswith(f"{block}.")), None)

    def _capture_inputs(self, groups: list[tuple], block: str | None) -> None:
        def capture(name, index, args, kwargs):
            mask = self._mask if block else given_mask(args, kwargs)
            if block and any(args[0] is other for other in self._others):
                mask = _source_mask(self.model, self.batches[index], args[0])
            self._add(self._group[name], (args[0], fit_mask(mask, args[0])))

        for group in groups:
            self._count[group] = 0
        names = [group[0] for group in groups]
        if block is None:
            self._reach(names, self._run_model, len(self.batches), capture, self._once)
        else:
            self._reach(names, functools.partial(self._run_block, block), self._count["hidden"], capture, once=True)

    def _capture_calls(self, block: str) -> None:
        """Keep the inputs of a block, and what this one and those behind it are called with besides.

        That may differ from block to block, as the masks of models with windows do. A block that reads something else
        than what the one before it returned is left out here, and gets its turn when it is reached.
        """
        row = self._row_of(block)
        kept: list[torch.Tensor] = []  # tensors of the running batch: most are the same for all blocks
        returned: dict = {}

        def capture(name, index, args, kwargs):
            hidden, *args = args or (kwargs.pop("hidden_states"),)
            if name == block:
                kept.clear()
                returned.clear()
                self._add("hidden", hidden)
            elif returned.get("block") != row[row.index(name) - 1] or returned["states"] is not hidden:
                return
            call = self._count["hidden"] - 1
            self._calls[name, call] = (
                self._keep_shared((args, kwargs), call, kept),
                fit_mask(current_mask(hidden), hidden),
            )

        def note(module, args, output, name):
            returned.update(block=name, states=output[0] if isinstance(output, tuple) else output)

        self._count["hidden"] = 0
        self._calls.clear()
        names = row if self._once else [block]
        handles = [
            self.model.get_submodule(name).register_forward_hook(functools.partial(note, name=name)) for name in names
        ]
        try:
            self._reach(names, self._run_model, len(self.batches), capture, self._once)
        finally:
            for handle in handles:
                handle.remove()

    def _keep_shared(self, tree, index: int, kept: list) -> tuple:
        """A tree of which the tensors are in the store, each of them once."""
        leaves, spec = pytree.tree_flatten(tree)
        places = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                places.append(_Value(leaf))
                continue
            place = next((place for place, other in enumerate(kept) if other is leaf), None)
            if place is None:
                place = len(kept)
                kept.append(leaf)
                self.store[id(self), "shared", index, place] = leaf
            places.append(place)
        return places, spec

    def _load_shared(self, shared: tuple, index: int):
        places, spec = shared
        leaves = [
            place.value if isinstance(place, _Value) else self.store[id(self), "shared", index, place]
            for place in places
        ]
        return pytree.tree_unflatten(leaves, spec)

    def _capture_block_outputs(self, block: str) -> None:
        for index in range(self._count["hidden"]):
            output = self._run_block(block, index)
            self.store[id(self), "hidden", index] = output[0] if isinstance(output, tuple) else output

    def _add(self, key, values) -> None:
        self.store[id(self), key, self._count[key]] = values
        self._count[key] += 1

    def _reach(self, names: list[str], run: Callable, runs: int, capture: Callable, once: bool) -> None:
        """Give `capture` the arguments of every call of these modules, over `runs` runs.

        Where a run calls each `once`, it ends there: nothing is computed after the last of them.
        """
        for index in range(runs):
            missing = list(names)

            def stop(module, args, kwargs, name, index=index, missing=missing):
                if name in missing or not once:
                    capture(name, index, args, dict(kwargs))
                if name in missing:
                    missing.remove(name)
                if once and not missing:
                    raise Reached

            handles = [
                self.model.get_submodule(name).register_forward_pre_hook(
                    # Before hooks of the user, which it must not call.
                    functools.partial(stop, name=name),
                    prepend=True,
                    with_kwargs=True,
                )
                for name in names
            ]
            try:
                run(index)
            except Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            if missing and once:
                raise ValueError(f"A batch does not reach {missing[0]}, as others do: pass batches of one kind.")

    def _run_model(self, index: int) -> None:
        run_model(self.model, self.batches[index])

    def _run_block(self, block: str, index: int):
        shared, mask = self._calls[block, index]
        kept = self.store[id(self), "hidden", index], self._load_shared(shared, index), mask
        hidden, (args, kwargs), self._mask = send_to_device(kept, self.device)
        self._others = pytree.tree_leaves((args, kwargs))  # such as the encoder's output
        return self.model.get_submodule(block)(hidden, *args, **kwargs)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the transformer blocks of `model`, or of the swapped models in it, in the order of the modules."""
    parts = swapped_parts(model) or ({"": model} if isinstance(model, PreTrainedModel) else {})
    blocks = [(name, site.block) for name, part in parts.items() for site in find_norms(part) if site.block]
    return list(dict.fromkeys(f"{name}.{block}".lstrip(".") for name, block in blocks))


def given_mask(args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The token mask that a norm is called with, or else that of the model call."""
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    return current_mask(args[0]) if mask is None else mask.bool()


def call_order(model, batches: list, modules: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Names of the `modules` that the first batch reaches, in the order of their first calls; the same on all ranks.

    Of a module around swapped models it is all batches: one may reach what another does not. Modules that are called
    one right after the other with the same input, as the query, key and value of an attention are, stand in one tuple.

    Raises:
        ValueError: when one forward of a model of transformers, or of a block, calls a module more than once.
    """
    inputs, calls = {}, Counter()

    def note(module, args, kwargs, name):
        inputs.setdefault(name, (*args[:2], kwargs.get("mask")))
        calls[name] += 1

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name=name), with_kwargs=True)
        for name, module in modules.items()
    ]
    blocks = {block: model.get_submodule(block) for block in blocks_of(model)}
    for block, module in blocks.items():
        handles.append(module.register_forward_pre_hook(lambda module, args, block=block: calls.update([block])))
    once = not is_composite(model)
    try:
        for batch in batches[:1] if once else batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for name in inputs:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        expected = 1 if once else calls[block or name]
        if calls[name] > expected:
            raise ValueError(
                f"{name} is called {calls[name]} times in place of {expected}, with other inputs each time: give each "
                "place a layer of its own, and set chunk_size_feed_forward to 0."
            )
    same = itertools.groupby(inputs, key=lambda name: [id(value) for value in inputs[name]])
    order = [tuple(names) for _, names in same]
    if has_ranks():
        orders = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(orders, order)
        order = next(filter(None, orders))
    return order


def _source_mask(model, batch: dict, source: torch.Tensor) -> torch.Tensor | None:
    """Token mask `(B, T)` of the `source`, which cross-attention attends to; `None` where all tokens are real."""
    name = "attention_mask" if model.config.is_encoder_decoder else "encoder_attention_mask"
    tokens = read_mask(batch.get(name), source.shape[:2])
    return None if tokens is None else tokens.real
