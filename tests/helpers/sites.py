"""Models that have every norm of their family, and which of them each name stands for."""

from torch import nn

from tests.helpers.models import tiny_model


# Model that has every norm of its family, and what each `where` stands for: a pattern of module names.
EVERY_NORM = {
    "bert": ("BertForPreTraining", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "marian": ("MarianMTModel", {}),
    "gpt2": ("GPT2LMHeadModel", {"add_cross_attention": True}),
}
_OF_AN_ENCODER = {
    "blocks": r"encoder\.layer\.",
    "all": r"",
    "encoder": r"encoder\.layer\.",
    "attention": r"attention",
    "ffn": r"\.\d\.output\.",
    "embedding": r"embeddings",
    "head": r"^(cls|lm_head)\.",
    "encoder.attention": r"attention",
    "encoder.ffn": r"\.\d\.output\.",
    "encoder.embedding": r"embeddings",
    "encoder.head": r"^(cls|lm_head)\.",
}
STANDS_FOR = {
    "bert": _OF_AN_ENCODER,
    "roberta": _OF_AN_ENCODER,
    "marian": {
        "blocks": r"",
        "all": r"",
        "encoder": r"model\.encoder",
        "decoder": r"model\.decoder",
        "attention": r"self_attn",
        "cross_attention": r"encoder_attn",
        "ffn": r"final",
        "encoder.attention": r"encoder\..*self_attn",
        "encoder.ffn": r"encoder\..*final",
        "decoder.attention": r"decoder\..*self_attn",
        "decoder.cross_attention": r"encoder_attn",
        "decoder.ffn": r"decoder\..*final",
    },
    "gpt2": {
        "blocks": r"\.h\.",
        "all": r"",
        "decoder": r"\.h\.",
        "attention": r"ln_1",
        "cross_attention": r"ln_cross",
        "ffn": r"ln_2",
        "final": r"ln_f",
        "decoder.attention": r"ln_1",
        "decoder.cross_attention": r"ln_cross",
        "decoder.ffn": r"ln_2",
        "decoder.final": r"ln_f",
    },
}


def layer_norms(model):
    return [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]


def full_model(family):
    head, overrides = EVERY_NORM[family]
    return tiny_model(family, head, **overrides)
