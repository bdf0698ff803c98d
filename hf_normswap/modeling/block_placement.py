"""Where the norms of a block stand: before a sublayer (pre), or behind its residual sum (post).

Post is `x ← N(x + F(x))`. Pre is `x ← x + F(N(x))`, with a final norm behind the last block (Xiong et al., "On Layer
Normalization in the Transformer Architecture", 2020, arXiv 2002.04745). A norm is the same module at the same path in
both; what changes is the class of the blocks, which here have the other forward. These classes are named as those of
transformers are, which device maps and sharding policies go by.
"""

import functools
import importlib
from collections.abc import Callable

from torch import nn
from torch.nn.functional import dropout

from .configuration_normswap import STOCK_PLACEMENTS, family_of, layer_norm_eps
from .replace import change_class, remove_norms


# Name, in a stack, of the norm behind its last block.
FINAL_NORMS = {"bert": "LayerNorm", "roberta": "LayerNorm", "marian": "layer_norm", "gpt2": "ln_f"}


class PreNormOutput:
    """The linear layer at the end of a sublayer of BERT, without residual sum and norm."""

    def forward(self, hidden_states, input_tensor):
        return self.dropout(self.dense(hidden_states))


class PreNormAttention:
    """An attention of BERT; its output layer is a [`PreNormOutput`]."""

    def forward(self, hidden_states, *args, **kwargs):
        output, *weights = super().forward(self.output.LayerNorm(hidden_states), *args, **kwargs)
        return hidden_states + output, *weights


class PreNormLayer:
    """A block of BERT; its output layer is a [`PreNormOutput`], its attentions are [`PreNormAttention`]s."""

    def feed_forward_chunk(self, attention_output):
        hidden_states = self.output.LayerNorm(attention_output)
        return attention_output + self.output(self.intermediate(hidden_states), attention_output)


class PreNormStack:
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


class _PreNormMarianLayer:
    def _attend(self, x, norm, attention, **kwargs):
        output, _ = attention(norm(x), **kwargs)
        return x + dropout(output, p=self.dropout, training=self.training)

    def _feed_forward(self, x):
        inner = self.activation_fn(self.fc1(self.final_layer_norm(x)))
        inner = dropout(inner, p=self.activation_dropout, training=self.training)
        return x + dropout(self.fc2(inner), p=self.dropout, training=self.training)


class PreNormEncoderLayer(_PreNormMarianLayer):
    """A block of the encoder of Marian."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        attention = {"attention_mask": attention_mask, **kwargs}
        return self._feed_forward(self._attend(hidden_states, self.self_attn_layer_norm, self.self_attn, **attention))


class PreNormDecoderLayer(_PreNormMarianLayer):
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
            hidden_states, self.self_attn_layer_norm, self.self_attn, attention_mask=attention_mask, **kwargs
        )
        if encoder_hidden_states is not None:
            x = self._attend(
                x,
                self.encoder_attn_layer_norm,
                self.encoder_attn,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            )
        return self._feed_forward(x)


class PostNormBlock:
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
            hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        x = self.ln_1(hidden_states + output)
        if encoder_hidden_states is not None:
            output, _ = self.crossattention(
                x,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            x = self.ln_cross_attn(x + output)
        return self.ln_2(x + self.mlp(x))


_BERT = {
    "Attention": PreNormAttention,
    "SelfOutput": PreNormOutput,
    "Output": PreNormOutput,
    "Layer": PreNormLayer,
    "Encoder": PreNormStack,
}
# family: what is put before a class of transformers in the placement that is not its own.
_PLACED = {
    "bert": {f"Bert{name}": cls for name, cls in _BERT.items()},
    "roberta": {f"Roberta{name}": cls for name, cls in _BERT.items()},
    "marian": {
        "MarianEncoderLayer": PreNormEncoderLayer,
        "MarianDecoderLayer": PreNormDecoderLayer,
        "MarianEncoder": PreNormStack,
        "MarianDecoder": PreNormStack,
    },
    "gpt2": {"GPT2Block": PostNormBlock},
}


def place_blocks(model: nn.Module, placement: str) -> None:
    """Give the blocks of `model` the forward of a placement, and its stacks a final norm, or none.

    A new final norm is a LayerNorm with gain 1 and shift 0.

    Raises:
        ValueError: when a block has a forward of its own. Nothing was changed then.
    """
    family = family_of(model.config.model_type)
    changed = [(module, _stock(type(module))) for module in model.modules()]
    changed = [(module, stock) for module, stock in changed if _is_placed_by(family, stock)]
    if any("forward" in module.__dict__ for module, _ in changed):
        raise ValueError(
            "A block has a forward of its own, as accelerate gives it to models on several devices: load the model "
            "without device_map."
        )
    for module, stock in changed:
        change_class(module, stock if placement == STOCK_PLACEMENTS[family] else _placed(family, stock.__name__))
    name = FINAL_NORMS[family]
    for stack in stacks_of(model):
        if placement == "post" and family == "gpt2":
            remove_norms(stack, [name] if name in stack._modules else [])  # the forward of transformers calls it
        elif placement == "post":
            stack._modules.pop(name, None)
        elif name not in stack._modules:
            *_, like = stack.parameters()  # on the device of the last block
            width, eps = model.config.hidden_size, layer_norm_eps(model.config)
            norm = nn.LayerNorm(width, eps=eps, device=like.device, dtype=like.dtype)
            setattr(stack, name, norm.train(stack.training))


def stacks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that have a final norm in the pre placement."""
    names = {"bert": ("BertEncoder",), "roberta": ("RobertaEncoder",), "gpt2": ("GPT2Model",)}
    names["marian"] = "MarianEncoder", "MarianDecoder"
    names = names[family_of(model.config.model_type)]
    return [module for module in model.modules() if any(base.__name__ in names for base in type(module).__mro__)]


def _is_placed_by(family: str, stock: type) -> bool:
    return stock.__module__ == _modeling(family) and stock.__name__ in _PLACED[family]


def _modeling(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _stock(cls: type) -> type:
    return cls.__bases__[1] if cls.__module__ == __name__ else cls


def _placed(family: str, name: str) -> type:
    if name not in globals():
        stock = getattr(importlib.import_module(_modeling(family)), name)
        body = {"__module__": __name__, "__doc__": f"`{name}` with its norms in the other placement."}
        if (cls := _PLACED[family][name]) is PreNormStack:
            body |= {"final_norm": FINAL_NORMS[family], "forward": _with_signature_of(stock.forward)}
        globals()[name] = type(name, (cls, stock), body)
    return globals()[name]


def _with_signature_of(forward: Callable) -> Callable:
    """The forward of [`PreNormStack`]; masks, and generation, go by the names of its arguments."""

    @functools.wraps(forward)
    def placed(self, *args, **kwargs):
        return PreNormStack.forward(self, *args, **kwargs)

    return placed


def __getattr__(name: str):
    for family, classes in _PLACED.items():  # where pickle looks for them
        if name in classes:
            return _placed(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
