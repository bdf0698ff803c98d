"""Which linear layers read the residual stream of a transformer, and which add to it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_normswap.modeling.configuration_normswap import family_of
from hf_normswap.modeling.norm_sites import NormSite, find_norms


@dataclass(frozen=True)
class Sublayer:
    """Linear layers of an attention or a feed-forward network, by their names in the model.

    Attributes:
        readers (tuple of `str`): they read the residual stream, or the norm in front of the sublayer.
        writer (`str`): its output is added to the stream.
        source_readers (tuple of `str`): those of cross-attention read the output of the encoder.
    """

    readers: tuple[str, ...]
    writer: str
    source_readers: tuple[str, ...] = ()

    def inside(self, block: str) -> "Sublayer":
        """The same with the names that they have in the model, in `block`."""
        groups = self.readers, (self.writer,), self.source_readers
        readers, (writer,), sources = (tuple(f"{block}.{name}" for name in names) for names in groups)
        return Sublayer(readers, writer, sources)


_BERT = {
    "attention": Sublayer(
        ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"
    ),
    "cross_attention": Sublayer(
        ("crossattention.self.query",),
        "crossattention.output.dense",
        ("crossattention.self.key", "crossattention.self.value"),
    ),
    "ffn": Sublayer(("intermediate.dense",), "output.dense"),
}
_SUBLAYERS = {
    "bert": _BERT,
    "roberta": _BERT,
    "marian": {
        "attention": Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
        "cross_attention": Sublayer(
            ("encoder_attn.q_proj",), "encoder_attn.out_proj", ("encoder_attn.k_proj", "encoder_attn.v_proj")
        ),
        "ffn": Sublayer(("fc1",), "fc2"),
    },
    "gpt2": {
        "attention": Sublayer(("attn.c_attn",), "attn.c_proj"),
        "cross_attention": Sublayer(("crossattention.q_attn",), "crossattention.c_proj", ("crossattention.c_attn",)),
        "ffn": Sublayer(("mlp.c_fc",), "mlp.c_proj"),
    },
}
# What reads the end of the last stack, in one head or another; those below read the pooler if there is one.
_HEADS = ("cls.predictions.transform.dense", "lm_head", "lm_head.dense", "score", "classifier.dense")
_HEADS_WITHOUT_POOLER = ("classifier", "qa_outputs", "multiple_choice_head.summary")
# What reads the norm of a head.
_AFTER_HEAD_NORM = ("cls.predictions.decoder", "lm_head.decoder")
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def sublayer_of(model: PreTrainedModel, site: NormSite) -> Sublayer:
    """The sublayer that a norm of a transformer block belongs to."""
    return _SUBLAYERS[family_of(model.config.model_type)][site.sublayer].inside(site.block)


def readers_of_stack(model: PreTrainedModel, stack: str) -> tuple[str, ...]:
    """What reads the output of a stack inside the model; nothing where it is returned, or for an unknown head."""
    if model.base_model is model:
        return ()
    if stack == "encoder" and model.config.is_encoder_decoder:
        sites = [site for site in find_norms(model) if site.stack == "decoder" and site.sublayer == "attention"]
        cross = _SUBLAYERS[family_of(model.config.model_type)]["cross_attention"]
        return tuple(name for site in sites for name in cross.inside(site.block).source_readers)
    pooler = f"{model.base_model_prefix}.pooler.dense"
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [*_HEADS, pooler] if pooler in linears else [*_HEADS, *_HEADS_WITHOUT_POOLER]
    return tuple(name for name in names if name in linears)


def reader_of_head_norm(model: PreTrainedModel) -> str:
    """The linear layer behind the norm of a language modelling head."""
    return next(name for name in _AFTER_HEAD_NORM if name in dict(model.named_modules()))


def embeddings_of(model: PreTrainedModel, site: NormSite) -> list[str]:
    """The tables whose sum the norm of an embedding reads."""
    parent = site.name.rpartition(".")[0]
    return [f"{parent}.{name}" for name in _EMBEDDINGS if hasattr(model.get_submodule(parent), name)]


def find_tied_head(model: PreTrainedModel) -> str | None:
    """The linear layer of a language modelling head that shares its weights with an embedding table."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if head is None or not any(table.weight is head.weight for table in tables):
        return None
    return next(name for name, module in model.named_modules() if module is head)
