"""Where the norms of a block stand: in front of a sublayer F, behind its residual sum, or both.

| placement | stream | final norm | |
|---|---|---|---|
| post | `x ← N(x + F(x))` | | Vaswani et al., 2017, arXiv 1706.03762 |
| pre | `x ← x + F(N(x))` | yes | Xiong et al., 2020, arXiv 2002.04745 |
| deep | `x ← N(α·x + F(x))` | | DeepNorm: Wang et al., 2022, arXiv 2203.00555 |
| sub | `x ← x + F(N(x))`, and a norm in front of the last linear layer of F | yes | Magneto: arXiv 2210.06423 |
| peri | `x ← x + N'(F(N(x)))` | yes | Kim et al., 2025, arXiv 2502.02732 |
| rskip | `x ← N'(x + N(x + F(x)))` | | Liu et al., 2021, arXiv 2105.07205, with k = 2 |

N is the same module at the same path in all of them. The norms that a placement needs besides are added, and go away
with it. What changes otherwise is the class of the parts of a block. These classes are named as those of transformers
are, which device maps and sharding policies go by.
"""

import functools
import importlib
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_normswap import NORMS_IN_FRONT, PLACEMENTS, STOCK_PLACEMENTS, family_of, layer_norm_eps
from .model_norms import is_norm
from .replace import change_class, pass_through


def enter(owner: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """What a sublayer reads of the stream `x`; `owner` has its norm, `name`."""
    return getattr(owner, name)(x) if owner.placement in NORMS_IN_FRONT else x


def leave(owner: nn.Module, name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The stream behind a sublayer that has computed `output` from the stream `x`."""
    norm, placement = getattr(owner, name), owner.placement
    if placement in ("pre", "sub"):
        return x + output
    if placement == "peri":
        return x + getattr(owner, _outer(name))(output)
    if placement == "deep":
        return norm(torch.add(output, x, alpha=owner.skip_scale))
    normed = norm(x + output)
    return getattr(owner, _outer(name))(x + normed) if placement == "rskip" else normed


def _outer(name: str) -> str:
    """Name of the norm N' of the sublayer whose norm N is `name`."""
    return f"{name}_outer"


class PlacedBertOutput:
    """The linear layer at the end of a sublayer of BERT, without residual sum and norm."""

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class PlacedBertAttention:
    """An attention of BERT; its output layer is a [`PlacedBertOutput`]."""

    def forward(self, hidden_states, *args, **kwargs):
        output, *weights = super().forward(enter(self.output, "LayerNorm", hidden_states), *args, **kwargs)
        return leave(self.output, "LayerNorm", hidden_states, output), *weights


class PlacedBertLayer:
    """A block of BERT; its output layer is a [`PlacedBertOutput`], its attentions are [`PlacedBertAttention`]s."""

    def feed_forward_chunk(self, attention_output):
        hidden_states = enter(self.output, "LayerNorm", attention_output)
        output = self.output(self.intermediate(hidden_states), attention_output)
        return leave(self.output, "LayerNorm", attention_output, output)


class FinalNormStack:
    """A stack of blocks with a norm behind the last one."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        last = getattr(self, self.final_norm)(output[0])
        if isinstance(output, tuple):
            return last, *output[1:]
        output.last_hidden_state = last
        if output.hidden_states is not None:
            output.hidden_states = *output.hidden_states[:-1], last
        return output


class _PlacedMarianLayer:
    def _attend(self, x, name, attention, **kwargs):
        output, _ = attention(enter(self, name, x), **kwargs)
        return leave(self, name, x, dropout(output, p=self.dropout, training=self.training))

    def _feed_forward(self, x):
        inner = self.activation_fn(self.fc1(enter(self, "final_layer_norm", x)))
        inner = dropout(inner, p=self.activation_dropout, training=self.training)
        return leave(self, "final_layer_norm", x, dropout(self.fc2(inner), p=self.dropout, training=self.training))


class PlacedMarianEncoderLayer(_PlacedMarianLayer):
    """A block of the encoder of Marian."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        x = self._attend(
            hidden_states, "self_attn_layer_norm", self.self_attn, attention_mask=attention_mask, **kwargs
        )
        return self._feed_forward(x)


class PlacedMarianDecoderLayer(_PlacedMarianLayer):
    """A block of the decoder of Marian."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=True,
        **kwargs,
    ):
        kwargs["past_key_values"] = past_key_values
        x = self._attend(
            hidden_states, "self_attn_layer_norm", self.self_attn, attention_mask=attention_mask, **kwargs
        )
        if encoder_hidden_states is not None:
            x = self._attend(
                x,
                "encoder_attn_layer_norm",
                self.encoder_attn,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
        return self._feed_forward(x)


class PlacedGPT2Block:
    """A block of GPT-2."""

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        output, _ = self.attn(
            enter(self, "ln_1", hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        x = leave(self, "ln_1", hidden_states, output)
        if encoder_hidden_states is not None:
            output, _ = self.crossattention(
                enter(self, "ln_cross_attn", x),
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            x = leave(self, "ln_cross_attn", x, output)
        return leave(self, "ln_2", x, self.mlp(enter(self, "ln_2", x)))


class NormFirst(nn.Module):
    """The last linear layer of a sublayer, with a norm in front of it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.train(linear.training)

    def forward(self, x):
        return self.linear(self.norm(x))


class Family(NamedTuple):
    """The blocks of a family. Its classes in transformers are named here without the prefix of the family.

    Attributes:
        prefix (`str`): of the names of classes.
        stacks (tuple of `str`): classes of the stacks of blocks.
        blocks (tuple of `str`): classes of the blocks, that of an encoder first.
        final_norm (`str`): name, in a stack, of the norm behind its last block.
        placed (dict of `str` to `type`): what is put before a part of a block in a placement that is not its own.
        last_linears (dict of `str` to `str`): name of the last linear layer of a sublayer, in a part of a block.
        other_linears (dict of `str` to `str`): that of the values, and the first one of a feed-forward network.
    """

    prefix: str
    stacks: tuple[str, ...]
    blocks: tuple[str, ...]
    final_norm: str
    placed: dict[str, type]
    last_linears: dict[str, str]
    other_linears: dict[str, str]


_BERT = Family(
    prefix="Bert",
    stacks=("Encoder",),
    blocks=("Layer",),
    final_norm="LayerNorm",
    placed={
        "Attention": PlacedBertAttention,
        "SelfOutput": PlacedBertOutput,
        "Output": PlacedBertOutput,
        "Layer": PlacedBertLayer,
    },
    last_linears={"SelfOutput": "dense", "Output": "dense"},
    other_linears={"SelfAttention": "value", "CrossAttention": "value", "Intermediate": "dense"},
)
_MARIAN = Family(
    prefix="Marian",
    stacks=("Encoder", "Decoder"),
    blocks=("EncoderLayer", "DecoderLayer"),
    final_norm="layer_norm",
    placed={"EncoderLayer": PlacedMarianEncoderLayer, "DecoderLayer": PlacedMarianDecoderLayer},
    last_linears={"Attention": "out_proj", "EncoderLayer": "fc2", "DecoderLayer": "fc2"},
    other_linears={"Attention": "v_proj", "EncoderLayer": "fc1", "DecoderLayer": "fc1"},
)
_GPT2 = Family(
    prefix="GPT2",
    stacks=("Model",),
    blocks=("Block",),
    final_norm="ln_f",
    placed={"Block": PlacedGPT2Block},
    last_linears={"Attention": "c_proj", "MLP": "c_proj"},
    other_linears={"Attention": "c_attn", "MLP": "c_fc"},
)
# By model type. The blocks of the others are copies of those of BERT and Marian in transformers.
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT._replace(prefix="Roberta"),
    "xlm-roberta": _BERT._replace(prefix="XLMRoberta"),
    "camembert": _BERT._replace(prefix="Camembert"),
    "electra": _BERT._replace(prefix="Electra"),
    "ernie": _BERT._replace(prefix="Ernie"),
    "marian": _MARIAN,
    "bart": _MARIAN._replace(prefix="Bart"),
    "gpt2": _GPT2,
}


def place_blocks(model: nn.Module, placement: str) -> None:
    """Give the blocks of `model` the forward of a placement, and the norms that it needs.

    A new norm is a LayerNorm with gain 1 and shift 0.

    Raises:
        ValueError: when a block has a forward of its own. Nothing was changed then.
    """
    name = family_of(model.config.model_type)
    family, stock = FAMILIES[name], STOCK_PLACEMENTS[name]
    parts = [module for module, _ in parts_of(model, family.placed)]
    stacks = [module for module, _ in parts_of(model, family.stacks)] if stock not in NORMS_IN_FRONT else []
    if any("forward" in module.__dict__ for module in (*parts, *stacks)):
        raise ValueError(
            "A block has a forward of its own, as accelerate gives it to models on several devices: load the model "
            "without device_map."
        )
    for module in parts:
        change_class(module, _stock(type(module)) if placement == stock else _placed(name, _stock(type(module))))
        module.__dict__.pop("placement", None)
        module.__dict__.pop("skip_scale", None)
        if placement != stock:
            module.placement = placement
    for module in stacks:
        change_class(
            module, _placed(name, _stock(type(module))) if placement in NORMS_IN_FRONT else _stock(type(module))
        )
    if placement == "deep":
        for block, skip_scale, _ in branch_scales(model, placement):
            for module in block.modules():
                if hasattr(module, "placement"):
                    module.skip_scale = skip_scale
    for module, part in parts_of(model, family.last_linears):
        linear = linear_of(module, family.last_linears[part])
        setattr(module, family.last_linears[part], NormFirst(linear) if placement == "sub" else linear)
    wanted = added_norms(model, placement)
    for path in {path for other in PLACEMENTS for path in added_norms(model, other)} - wanted.keys():
        parent, _, child = path.rpartition(".")
        parent = model.get_submodule(parent)
        if child in parent._modules:
            del parent._modules[child]
            if stock in NORMS_IN_FRONT and child == family.final_norm:
                setattr(parent, child, pass_through)  # the forward of transformers calls it
    for path, width in wanted.items():
        parent, _, child = path.rpartition(".")
        parent = model.get_submodule(parent)
        if child not in parent._modules:
            *_, like = parent.parameters()  # of a stack, on the device of its last block
            norm = nn.LayerNorm(width, eps=layer_norm_eps(model.config), device=like.device, dtype=like.dtype)
            setattr(parent, child, norm.train(parent.training))


def added_norms(model: nn.Module, placement: str) -> dict[str, int]:
    """The norms that a placement has beside those of every placement: their names, and numbers of channels."""
    family, width = FAMILIES[family_of(model.config.model_type)], model.config.hidden_size
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    added = {}
    if placement in NORMS_IN_FRONT:
        added |= {f"{prefixes[stack]}{family.final_norm}": width for stack, _ in parts_of(model, family.stacks)}
    if placement in ("peri", "rskip"):
        for module, _ in parts_of(model, family.placed):
            norms = [
                name for name, child in module.named_children() if is_norm(child) and not name.endswith(_outer(""))
            ]
            added |= {f"{prefixes[module]}{_outer(name)}": width for name in norms}
    if placement == "sub":
        for module, part in parts_of(model, family.last_linears):
            linear = linear_of(module, family.last_linears[part])
            width = linear.nx if isinstance(linear, Conv1D) else linear.in_features
            added[f"{prefixes[module]}{family.last_linears[part]}.norm"] = width
    return added


def linear_of(part: nn.Module, name: str) -> nn.Module:
    """The linear layer `name` of a part of a block, with a norm in front of it or without."""
    module = getattr(part, name)
    return module.linear if isinstance(module, NormFirst) else module


def branch_scales(model: nn.Module, placement: str) -> list[tuple[nn.Module, float, float]]:
    """For each block: α, which scales the stream in deep, and the factor of the initial weights in deep and sub.

    The factor is β of DeepNorm and γ of Magneto. It is for the linear layers of the values, those at the end of each
    attention, and both of a feed-forward network. In another placement both are 1.
    """
    family = FAMILIES[family_of(model.config.model_type)]
    stacks = [[block for block, part in parts_of(model, family.blocks) if part == name] for name in family.blocks]
    stacks = [blocks for blocks in stacks if blocks]
    scales = [(1.0, 1.0)] * len(stacks)
    if len(stacks) == 2:
        n, m = map(len, stacks)
        if placement == "deep":
            depth = n**4 * m
            scales = [(0.81 * depth ** (1 / 16), 0.87 * depth ** (-1 / 16)), ((3 * m) ** 0.25, (12 * m) ** -0.25)]
        elif placement == "sub":
            scales = [(1.0, math.sqrt(math.log(3 * m) * math.log(2 * n) / 3)), (1.0, math.sqrt(math.log(3 * m)))]
    elif stacks:
        (n,) = map(len, stacks)
        if placement == "deep":
            scales = [((2 * n) ** 0.25, (8 * n) ** -0.25)]
        elif placement == "sub":
            scales = [(1.0, math.sqrt(math.log(2 * n)))]
    return [(block, *scale) for blocks, scale in zip(stacks, scales, strict=True) for block in blocks]


def parts_of(model: nn.Module, names: Collection[str]) -> list[tuple[nn.Module, str]]:
    """The modules of `model` that are of a class of transformers in `names`, and that name."""
    family = family_of(model.config.model_type)
    prefix, source = FAMILIES[family].prefix, _source(family)
    found = []
    for module in model.modules():
        # A model, such as that of GPT-2, may be of a class derived from it; blocks of a user's class stay as they are.
        classes = type(module).__mro__ if isinstance(module, PreTrainedModel) else [_stock(type(module))]
        known = [cls.__name__.removeprefix(prefix) for cls in classes if cls.__module__ == source]
        found += [(module, name) for name in known[:1] if name in names]
    return found


def _source(family: str) -> str:
    name = family.replace("-", "_")
    return f"transformers.models.{name}.modeling_{name}"


def _stock(cls: type) -> type:
    return cls.__bases__[-1] if cls.__module__ == __name__ else cls


def _placed(family: str, stock: type) -> type:
    """The class of a part of a block, or of a stack, in a placement that is not that of transformers."""
    name = stock.__name__
    if name not in globals():
        body = {"__module__": __name__, "__doc__": f"`{name}` with its norms in another placement."}
        cls = FAMILIES[family].placed.get(name.removeprefix(FAMILIES[family].prefix), FinalNormStack)
        if cls is FinalNormStack:
            body |= {"final_norm": FAMILIES[family].final_norm, "forward": _with_signature_of(stock.forward)}
        globals()[name] = type(name, (cls, stock), body)
    return globals()[name]


def _with_signature_of(forward: Callable) -> Callable:
    """The forward of [`FinalNormStack`]; masks, and generation, go by the names of its arguments."""

    @functools.wraps(forward)
    def placed(self, *args, **kwargs):
        return FinalNormStack.forward(self, *args, **kwargs)

    return placed


def __getattr__(name: str):
    for family, described in FAMILIES.items():  # where pickle looks for them
        if name.removeprefix(described.prefix) in {*described.placed, *described.stacks} - {name}:
            return _placed(family, getattr(importlib.import_module(_source(family)), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
