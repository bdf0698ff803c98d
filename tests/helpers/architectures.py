"""Tiny random models of many architectures of transformers, a batch for each, and how many norms each one has."""

import dataclasses
from collections.abc import Callable

import torch
import transformers
from torch import nn


VOCABULARY, LABELS = 40, 3
PAD, BOS, EOS = 1, 0, 2  # MPNet takes 1 as the padding token, whatever its configuration says
FIRST_TOKEN = 5  # ids below are special tokens
ROWS, LENGTHS = 2, (6, 3)  # of the texts: the second row ends with padding

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model type of transformers as a tiny model.

    `auto` is the Auto class that makes the model and loads it from a folder. `fields` are those of its configuration.
    `takes_mask` says whether the model takes an `attention_mask` with one entry for each token of a text.

    `norms` counts the norms by their class, from the modelling files. A word in brackets tells the norms of a class
    apart where they differ in what they see: another width, one head, a pooled vector, a table of positions.
    """

    name: str
    auto: str
    fields: dict
    batch: Callable[[torch.Generator], Batch]
    norms: dict[str, int]
    takes_mask: bool = True

    def model(self, seed: int = 0) -> nn.Module:
        """The stock model without dropout, in evaluation mode. Its gains and shifts are not 1 and 0."""
        auto = getattr(transformers, self.auto)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(transformers.AutoConfig.for_model(self.name, **self.fields))
            with torch.no_grad():
                for norm in norm_modules(model).values():
                    for parameter in norm.parameters():  # added, for some classes store the gain minus one
                        parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        return model.eval()

    def inputs(self, seed: int = 0) -> Batch:
        """A batch for a training step: with it, `model(**inputs).loss` is a number."""
        return self.batch(torch.Generator().manual_seed(seed))


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of `model` by path: modules without children whose class has a name that ends with "Norm"."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and not type(module).__name__.startswith("_")  # the weight norm of a convolution
        and not any(module.children())
    }


def architectures() -> list[Architecture]:
    """All architectures: text encoders, decoders, encoder-decoders, vision, image with text, speech."""
    return list(_ARCHITECTURES)


def tiny_architecture(name: str, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The model of `name` in evaluation mode, and a batch for it."""
    architecture = {architecture.name: architecture for architecture in _ARCHITECTURES}[name]
    return architecture.model(seed), architecture.inputs(seed)


# Batches


def _tokens(generator: torch.Generator, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(rows, lengths):
        row[: length - 1] = torch.randint(FIRST_TOKEN, VOCABULARY, (length - 1,), generator=generator)
        row[length - 1] = EOS
    return rows


def _text(generator: torch.Generator) -> Batch:
    ids = _tokens(generator)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def _classes() -> torch.Tensor:
    return torch.arange(ROWS) % LABELS


def _classified_text(generator):
    return {**_text(generator), "labels": _classes()}


def _tagged_text(generator):
    batch = _text(generator)
    return {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"] % LABELS, -100)}


def _language_model(generator):
    batch = _text(generator)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == PAD, -100)}


def _targets(generator) -> torch.Tensor:
    targets = _tokens(generator, (4, 7))
    return targets.masked_fill(targets == PAD, -100)


def _pair_of_texts(generator):
    return {**_text(generator), "labels": _targets(generator)}


def _pixels(generator) -> torch.Tensor:
    return torch.randn(ROWS, 3, 16, 16, generator=generator)


def _image(generator):
    return {"pixel_values": _pixels(generator), "labels": _classes()}


def _image_with_text(generator):
    return {**_text(generator), "pixel_values": _pixels(generator), "return_loss": True}


def _mel_with_text(generator):
    return {"input_features": torch.randn(ROWS, 8, 20, generator=generator), "labels": _targets(generator)}


def _wave_with_text(generator):
    mask = torch.ones(ROWS, 200, dtype=torch.long)
    mask[1, 120:] = 0  # samples, of which a token spans several
    waves = torch.randn(ROWS, 200, generator=generator) * mask
    return {"input_values": waves, "attention_mask": mask, "labels": _targets(generator)}


# Fields of configurations that families share


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_INIT = {"initializer_range": 0.2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LABELS = {"num_labels": LABELS}

_BERT = {**_TOKENS, **_WIDTHS, **_INIT, **_NO_DROPOUT, **_LABELS, "max_position_embeddings": 40}
_GPT2 = {
    **_TOKENS,
    **_INIT,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 24,
    "n_positions": 40,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_LLAMA = {**_TOKENS, **_WIDTHS, **_INIT, "num_key_value_heads": 2, "max_position_embeddings": 40}
_BART = {
    **_TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.2,
    "decoder_start_token_id": EOS,
    "max_position_embeddings": 40,
}
_T5 = {
    **_TOKENS,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": PAD,
}
_IMAGE = {"image_size": 16, "patch_size": 4}
_VIT = {**_WIDTHS, **_INIT, **_NO_DROPOUT, **_LABELS, **_IMAGE}
_WAV2VEC2 = {
    **_TOKENS,
    **_WIDTHS,
    **_INIT,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "ctc_zero_infinity": True,
}


def _classifier(name, fields, norms, **options):
    return Architecture(name, "AutoModelForSequenceClassification", fields, _classified_text, norms, **options)


def _tagger(name, fields, norms):
    return Architecture(name, "AutoModelForTokenClassification", fields, _tagged_text, norms)


def _masked_lm(name, fields, norms):
    return Architecture(name, "AutoModelForMaskedLM", fields, _language_model, norms)


def _causal_lm(name, fields, norms):
    return Architecture(name, "AutoModelForCausalLM", fields, _language_model, norms)


def _seq2seq(name, fields, norms):
    return Architecture(name, "AutoModelForSeq2SeqLM", fields, _pair_of_texts, norms)


def _image_classifier(name, fields, norms):
    return Architecture(name, "AutoModelForImageClassification", fields, _image, norms, takes_mask=False)


_ARCHITECTURES = (
    # Text encoders: norm of the embeddings, two for each layer, and one in the head of a masked language model.
    _classifier("bert", _BERT, {"LayerNorm": 5}),
    _masked_lm("roberta", _BERT, {"LayerNorm": 6}),
    _tagger("xlm-roberta", _BERT, {"LayerNorm": 5}),
    _masked_lm("camembert", _BERT, {"LayerNorm": 6}),
    _classifier("data2vec-text", _BERT, {"LayerNorm": 5}),
    _causal_lm("bert-generation", {**_BERT, "is_decoder": True}, {"LayerNorm": 5}),
    _masked_lm(
        "distilbert",
        {
            **_TOKENS,
            **_INIT,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        {"LayerNorm": 6},
    ),
    _tagger("electra", {**_BERT, "embedding_size": 8}, {"LayerNorm": 4, "LayerNorm (embeddings)": 1}),
    _masked_lm("mpnet", _BERT, {"LayerNorm": 6}),
    _masked_lm("nomic_bert", _BERT, {"LayerNorm": 6}),
    # Norms stand before the sublayers: one norm more, after the last layer.
    _classifier("roberta-prelayernorm", _BERT, {"LayerNorm": 6}),
    # The same without a norm of the embeddings.
    _classifier("xlm-roberta-xl", _BERT, {"LayerNorm": 5}),
    # All layers are one module.
    _masked_lm("albert", {**_BERT, "embedding_size": 8}, {"LayerNorm": 2, "LayerNorm (embeddings)": 2}),
    _classifier(
        "deberta-v2",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
        },
        {"LayerNorm": 6, "LayerNorm (positions)": 1},
    ),
    # No norm before the attention of the first layer.
    _classifier(
        "modernbert",
        {
            **_TOKENS,
            **_WIDTHS,
            **_INIT,
            **_LABELS,
            "max_position_embeddings": 40,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
            "local_attention": 4,
        },
        {"LayerNorm": 5, "LayerNorm (pooled)": 1},
    ),
    _masked_lm(
        "mobilebert",
        {**_BERT, "embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
        {"NoNorm": 3, "NoNorm (bottleneck)": 10, "LayerNorm": 1},
    ),
    _classifier("ernie", _BERT, {"LayerNorm": 5}),
    _tagger("convbert", {**_BERT, "embedding_size": 8}, {"LayerNorm": 4, "LayerNorm (embeddings)": 1}),
    _tagger("layoutlm", {**_BERT, "max_2d_position_embeddings": 40}, {"LayerNorm": 5}),
    _masked_lm("esm", {**_BERT, "mask_token_id": 3}, {"LayerNorm": 6}),
    # Decoders: two norms for each layer and one after the last.
    _causal_lm("gpt2", _GPT2, {"LayerNorm": 5}),
    _causal_lm(
        "gpt_neo",
        {
            **_TOKENS,
            **_INIT,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 24,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
        },
        {"LayerNorm": 5},
    ),
    _causal_lm("gptj", {**_GPT2, "rotary_dim": 4}, {"LayerNorm": 3}),  # attention and MLP side by side, after one norm
    _causal_lm("gpt_neox", {**_TOKENS, **_WIDTHS, **_INIT, "max_position_embeddings": 40}, {"LayerNorm": 5}),
    _causal_lm(
        "opt",
        {
            **_TOKENS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 24,
            "dropout": 0.0,
            "init_std": 0.2,
            "max_position_embeddings": 40,
        },
        {"LayerNorm": 5},
    ),
    _causal_lm("bloom", {**_TOKENS, **_INIT, "hidden_size": 16, "n_layer": 2, "n_head": 4}, {"LayerNorm": 6}),
    _causal_lm(
        "falcon",
        {
            **_TOKENS,
            **_INIT,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 24,
            "max_position_embeddings": 40,
        },
        {"LayerNorm": 3},
    ),
    _causal_lm("llama", _LLAMA, {"LlamaRMSNorm": 5}),
    _causal_lm("mistral", _LLAMA, {"MistralRMSNorm": 5}),
    _causal_lm("qwen2", _LLAMA, {"Qwen2RMSNorm": 5}),
    _causal_lm("qwen3", {**_LLAMA, "head_dim": 4}, {"Qwen3RMSNorm": 5, "Qwen3RMSNorm (query, key)": 4}),
    _causal_lm("gemma2", {**_LLAMA, "head_dim": 4, "query_pre_attn_scalar": 4}, {"Gemma2RMSNorm": 9}),
    _causal_lm("phi", {**_LLAMA, "resid_pdrop": 0.0}, {"LayerNorm": 3}),
    # The norms of queries and keys see all heads at once.
    _causal_lm("olmo2", _LLAMA, {"Olmo2RMSNorm": 5, "Olmo2RMSNorm (query, key)": 4}),
    _causal_lm("stablelm", _LLAMA, {"LayerNorm": 5}),
    _causal_lm("mixtral", {**_LLAMA, "num_local_experts": 2}, {"MixtralRMSNorm": 5}),
    # Encoder-decoders: two norms for each layer of the encoder and three for each of the decoder; then, for each
    # stack, none, one at the embeddings or after the last layer, or both.
    _seq2seq("marian", {**_BART, "decoder_vocab_size": VOCABULARY}, {"LayerNorm": 10}),
    _seq2seq("bart", _BART, {"LayerNorm": 12}),
    _seq2seq("mbart", _BART, {"LayerNorm": 14}),
    _seq2seq("pegasus", _BART, {"LayerNorm": 12}),
    _seq2seq("m2m_100", _BART, {"LayerNorm": 12}),
    _seq2seq("blenderbot", _BART, {"LayerNorm": 12}),
    _seq2seq("t5", _T5, {"T5LayerNorm": 12}),
    _seq2seq("mt5", _T5, {"MT5LayerNorm": 12}),
    _seq2seq("umt5", _T5, {"UMT5LayerNorm": 12}),
    # Vision: two norms for each layer and one after the last.
    _image_classifier("vit", _VIT, {"LayerNorm": 5}),
    # Two classes of the Auto class fit: the configuration names one.
    _image_classifier("deit", {**_VIT, "architectures": ["DeiTForImageClassification"]}, {"LayerNorm": 5}),
    _image_classifier("beit", {**_VIT, "drop_path_rate": 0.0}, {"LayerNorm": 4, "LayerNorm (pooled)": 1}),
    _image_classifier("dinov2", {**_VIT, "mlp_ratio": 2}, {"LayerNorm": 5}),
    _image_classifier(
        "swin",
        {
            **_INIT,
            **_LABELS,
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 4),
            "window_size": 2,
            "mlp_ratio": 2.0,
            "drop_path_rate": 0.0,
        },
        {"LayerNorm": 3, "LayerNorm (merged patches)": 1, "LayerNorm (second stage)": 3},
    ),
    _image_classifier(
        "convnext",
        {
            **_INIT,
            **_LABELS,
            "num_stages": 2,
            "hidden_sizes": (16, 32),
            "depths": (1, 1),
            "patch_size": 2,
            "image_size": 16,
            "layer_scale_init_value": 0.5,
        },
        {
            "ConvNextLayerNorm (channels first)": 2,
            "ConvNextLayerNorm": 1,
            "ConvNextLayerNorm (second stage)": 1,
            "LayerNorm (pooled)": 1,
        },
    ),
    _image_classifier(
        "segformer",
        {
            **_INIT,
            **_LABELS,
            "num_encoder_blocks": 2,
            "depths": (1, 1),
            "sr_ratios": (2, 1),
            "hidden_sizes": (16, 32),
            "patch_sizes": (3, 3),
            "strides": (2, 2),
            "num_attention_heads": (2, 4),
            "mlp_ratios": (2, 2),
            "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
        },
        {"LayerNorm": 4, "LayerNorm (reduced patches)": 1, "LayerNorm (second stage)": 4},
    ),
    _image_classifier(
        "siglip",
        {
            **_LABELS,
            "text_config": {**_TOKENS, **_WIDTHS},  # the classifier has no text tower
            "vision_config": {**_WIDTHS, **_IMAGE, "vision_use_head": False},
        },
        {"LayerNorm": 5},
    ),
    # Image with text.
    Architecture(
        "clip",
        "AutoModelForZeroShotImageClassification",
        {
            "text_config": {**_TOKENS, **_WIDTHS, "max_position_embeddings": 40},
            "vision_config": {**_WIDTHS, **_IMAGE, "hidden_size": 32},
            "projection_dim": 16,
        },
        _image_with_text,
        {"LayerNorm (text)": 5, "LayerNorm (image)": 5, "LayerNorm (pooled)": 1},
    ),
    # Speech. Their masks are of audio, not of the tokens of the model.
    Architecture(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        {
            **{field: value for field, value in _BART.items() if field != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 20,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        _mel_with_text,
        {"LayerNorm": 12},
        takes_mask=False,
    ),
    Architecture(
        "wav2vec2",
        "AutoModelForCTC",
        {**_WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        _wave_with_text,
        {"LayerNorm": 5, "LayerNorm (features)": 3},
        takes_mask=False,
    ),
    Architecture(
        "hubert",
        "AutoModelForCTC",
        _WAV2VEC2,
        _wave_with_text,
        {"LayerNorm": 5, "LayerNorm (features)": 1, "GroupNorm (features)": 1},
        takes_mask=False,
    ),
)
