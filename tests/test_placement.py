"""Pre- and Post-LN, against the models of transformers that have their norms in the other place."""

import copy
import math
import pickle
import re

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    MegatronBertConfig,
    OpenAIGPTConfig,
    PegasusConfig,
    RobertaPreLayerNormConfig,
)
from transformers.models.megatron_bert import modeling_megatron_bert
from transformers.models.openai import modeling_openai
from transformers.models.pegasus import modeling_pegasus
from transformers.models.roberta_prelayernorm import modeling_roberta_prelayernorm

from hf_normswap import calibrate, find_norms, fold_norms, norm_penalty, restore_norm, set_norm_placement, swap_norm
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import FAMILIES, USUAL_HEAD, all_heads, tiny_batch, tiny_model
from tests.helpers.persistence import outputs, run_fresh, same, train
from tests.helpers.versions import BEFORE_5_23, NO_LAYERDROP_IN_A_GRAPH


OTHER = {"bert": "pre", "roberta": "pre", "marian": "pre", "gpt2": "post"}
FURTHER = ["deep", "sub", "peri", "rskip"]
NORMS = ["layernorm", "rmsnorm", "batchnorm", "rbn", "pnv", "powernorm"]
BERT_HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
ORACLES = {
    "bert": [*BERT_HEADS, "ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining"],
    "roberta": [*BERT_HEADS, "ForMultipleChoice"],
    "marian": ["Model", "MTModel"],
    "gpt2": ["Model", "LMHeadModel", "ForSequenceClassification"],
}
# Parts of the names of our weights, and those of the oracle.
RENAMED = {
    "bert": [
        (r"attention\.output\.LayerNorm", "attention.ln"),
        (r"(\d)\.output\.LayerNorm", r"\1.ln"),
        (r"encoder\.LayerNorm", "encoder.ln"),
    ],
    "roberta": [
        (r"attention\.output\.LayerNorm", "attention.LayerNorm"),
        (r"(\d)\.output\.LayerNorm", r"\1.intermediate.LayerNorm"),
        (r"encoder\.LayerNorm", "LayerNorm"),
        (r"^roberta\.", "roberta_prelayernorm."),
    ],
    "marian": [],
    "gpt2": [("wte", "tokens_embed"), ("wpe", "positions_embed")],
}


def make_oracle(family, head, config):
    shared = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range"}
    shared |= {"vocab_size", "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob"}
    shared |= {"num_labels", "pad_token_id", "bos_token_id", "eos_token_id", "layer_norm_eps", "type_vocab_size"}
    if family == "marian":
        shared = {"vocab_size", "d_model", "max_position_embeddings", "dropout", "init_std", "scale_embedding"}
        shared |= {f"{stack}_{part}" for stack in ("encoder", "decoder") for part in ("layers", "ffn_dim")}
        shared |= {"encoder_attention_heads", "decoder_attention_heads", "activation_function"}
        shared |= {"pad_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"}
    if family == "gpt2":
        shared = {"vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "num_labels", "pad_token_id"}
        shared |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range"}
    fields = {name: getattr(config, name) for name in shared}
    made = {
        "bert": (MegatronBertConfig, modeling_megatron_bert, f"MegatronBert{head}"),
        "roberta": (RobertaPreLayerNormConfig, modeling_roberta_prelayernorm, f"RobertaPreLayerNorm{head}"),
        "marian": (PegasusConfig, modeling_pegasus, {"MTModel": "PegasusForConditionalGeneration"}.get(head)),
        "gpt2": (OpenAIGPTConfig, modeling_openai, f"OpenAIGPT{head}"),
    }
    config_class, module, name = made[family]
    oracle = getattr(module, name or "PegasusModel")(config_class(**fields)).train()
    if family == "gpt2":
        for block in oracle.modules():
            if hasattr(block, "act"):
                block.act = nn.GELU(approximate="tanh")
    return oracle


def rename(family, name):
    for ours, theirs in RENAMED[family]:
        name = re.sub(ours, theirs, name)
    return name


def real_outputs(output, batch):
    """What is returned for real tokens, and for whole rows."""
    real = batch["attention_mask"].bool()
    if "decoder_input_ids" in batch or output.get("encoder_last_hidden_state") is not None:
        real = batch["labels"].ne(-100) if "labels" in batch else torch.ones_like(batch["decoder_input_ids"]).bool()
    names = [name for name in output if name.endswith(("logits", "last_hidden_state", "pooler_output"))]
    values = {name: output[name] for name in names if name != "encoder_last_hidden_state"}
    return {name: value[real] if value.shape[:2] == real.shape else value for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("family", "head"), [(family, head) for family in ORACLES for head in ORACLES[family]])
def test_the_other_placement_is_that_of_another_family(family, head, dtype):
    prefix = {"bert": "Bert", "roberta": "Roberta", "marian": "Marian", "gpt2": "GPT2"}[family]
    overrides = {"n_inner": None, "use_cache": False} if family == "gpt2" else {}
    model = tiny_model(family, prefix + head, **overrides)
    if family == "bert":
        model.base_model.embeddings.LayerNorm = nn.Identity()  # which Megatron has not
    set_norm_placement(model, OTHER[family], drop_final=True)
    for site in find_norms(model):
        nn.init.uniform_(site.module.weight, 0.5, 1.5)
        nn.init.uniform_(site.module.bias, -0.5, 0.5)
    oracle = make_oracle(family, head, model.config)
    model, oracle = model.to(dtype), oracle.to(dtype)
    weights = {rename(family, name): value for name, value in model.state_dict().items()}
    missing = oracle.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all("position" in name or "final_logits_bias" in name for name in missing.missing_keys)
    if family == "marian":
        for ours, theirs in zip(
            (model.get_encoder(), model.get_decoder()), (oracle.get_encoder(), oracle.get_decoder()), strict=True
        ):
            theirs.embed_positions.weight.data = ours.embed_positions.weight.data.clone()
    batch = tiny_batch(model, lengths=(7, 4, 5))
    returned, expected = model(**batch), oracle(**batch)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    values, theirs = real_outputs(returned, batch), real_outputs(expected, batch)
    assert values.keys() == theirs.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance)
    for either in (values, theirs):
        sum(value.square().mean() for value in either.values()).backward()
    gradients = dict(oracle.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        theirs = gradients[rename(family, name)].grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(parameter.grad, theirs, rtol=0, atol=tolerance * scale, msg=name)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize(("family", "head"), all_heads())
@pytest.mark.parametrize("norm", [None, "batchnorm"])
def test_there_and_back(family, head, norm):
    model = tiny_model(family, head)
    for site in find_norms(model):
        if site.sublayer == "final":
            nn.init.ones_(site.module.weight)
            nn.init.zeros_(site.module.bias)
    if norm:
        swap_norm(model, norm)
    stock, config = type(model), copy.deepcopy(model.config)
    weights, before = dict(model.named_parameters()), outputs(model)
    set_norm_placement(model, OTHER[family])
    assert {site.placement for site in find_norms(model)} <= {OTHER[family], None}
    assert not same(before, outputs(model))
    assert type(model).__name__.startswith("NormSwap")
    set_norm_placement(model, OTHER[family])
    set_norm_placement(model, "pre" if OTHER[family] == "post" else "post")
    assert same(before, outputs(model))
    assert type(model) is stock
    assert model.config.to_dict() == config.to_dict()
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[name] is weights[name] for name in weights if "ln_f" not in name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_any_norm_in_any_place_is_saved_and_loaded(family, norm, tmp_path):
    model = set_norm_placement(tiny_model(family), OTHER[family], drop_final=True)
    model = train(swap_norm(model, norm, where="all"))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same(expected, outputs(loaded))
    assert same(expected, outputs(copy.deepcopy(model)))
    assert same(expected, outputs(pickle.loads(pickle.dumps(model))))
    assert [(site.path, site.placement, site.kind) for site in find_norms(loaded)] == [
        (site.path, site.placement, site.kind) for site in find_norms(model)
    ]
    # Norms go back to LayerNorm where they stand, then the blocks to where they were.
    restore_norm(loaded)
    assert {site.kind for site in find_norms(loaded)} == {"layernorm"}
    assert {site.placement for site in find_norms(loaded)} <= {OTHER[family], None}
    set_norm_placement(loaded, "pre" if family == "gpt2" else "post", drop_final=True)
    assert type(loaded).__name__ == USUAL_HEAD[family]


def test_a_placement_alone_is_saved_and_loaded(tmp_path):
    model = set_norm_placement(tiny_model("bert"), "pre").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.norm_swap == {"format_version": 1, "norms": [], "placement": "pre"}
    assert same(outputs(model), outputs(loaded))


def test_it_loads_without_the_package(tmp_path):
    expected = {}
    for family, placement, norm in (("roberta", "pre", "rbn"), ("marian", "sub", "weightnorm")):
        model = train(swap_norm(set_norm_placement(tiny_model(family), placement), norm, where="all"), 1)
        model.save_pretrained(tmp_path / family)
        batch = tiny_batch(model, labels=False)
        expected[family] = batch, model(**batch).logits
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM
autos = {"roberta": AutoModelForMaskedLM, "marian": AutoModelForSeq2SeqLM}
for folder, (batch, expected) in torch.load("expected.pt").items():
    model = autos[folder].from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(**batch).logits, expected)
"""
    run_fresh(script, tmp_path, package=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_checkpointing_is_exact(family, norm):
    gradients = []
    for checkpointing in (False, True):
        model = set_norm_placement(tiny_model(family), OTHER[family], drop_final=True).double()
        swap_norm(model, norm, where="all")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        (model(**tiny_batch(model)).loss + norm_penalty(model)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        gradients[-1] |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model = set_norm_placement(tiny_model(family), OTHER[family], drop_final=True).double()
    swap_norm(model, "batchnorm", where="all")
    results = []
    for options in ({}, {"columns": 12, "filler": 7}):
        trained = copy.deepcopy(model)
        trained(**tiny_batch(trained, **options)).loss.backward()
        results.append([b for name, b in trained.named_buffers() if name.endswith(("_mean", "_var"))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_is_the_same(family):
    if family == "marian" and BEFORE_5_23:
        pytest.skip(NO_LAYERDROP_IN_A_GRAPH)
    model = set_norm_placement(tiny_model(family), OTHER[family], drop_final=True).double()
    swap_norm(model, "batchnorm", where="all")
    batch, results = tiny_batch(model), []
    for compiled in (False, True):
        trained = copy.deepcopy(model)
        call = torch.compile(trained, backend="aot_eager", fullgraph=True) if compiled else trained
        call(**batch).loss.backward()
        results.append({name: p.grad for name, p in trained.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_a_calibrated_model_is_folded(family, head):
    model = set_norm_placement(tiny_model(family, head).double().eval(), OTHER[family], drop_final=True)
    model = train(swap_norm(model, "batchnorm", where="all"))
    expected = outputs(model)
    report = fold_norms(model, untie=True)
    assert report.error < 1e-12
    assert set(report.kept) <= {site.name for site in find_norms(model)}
    returned = outputs(model)
    for name in ("logits", "last_hidden_state", "pooler_output"):
        if name in expected:
            torch.testing.assert_close(returned[name], expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_in_the_other_placement(family):
    model = set_norm_placement(tiny_model(family).eval(), OTHER[family], drop_final=True)
    layer_norms = copy.deepcopy(model)
    batches = [tiny_batch(model, (6, 3, 9, 5), seed=seed) for seed in range(8)]
    swap_norm(model, "batchnorm", where="all")
    naive = relative(model, layer_norms, batches)
    report = calibrate(model, batches)
    assert len(report) == len(find_norms(model))
    assert relative(model, layer_norms, batches) < 0.7 * naive


@torch.no_grad()
def relative(model, other, batches):
    pairs = [(model.eval()(**batch).logits, other.eval()(**batch).logits) for batch in batches]
    return sum((a - b).norm() for a, b in pairs) / sum(b.norm() for _, b in pairs)


def test_marian_generates():
    model = set_norm_placement(tiny_model("marian").eval(), "pre")
    model = train(swap_norm(model, "batchnorm", where="all"))
    batch = tiny_batch(model, labels=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**inputs, num_beams=3, max_new_tokens=6, use_cache=True)
    assert torch.equal(found, model.generate(**inputs, num_beams=3, max_new_tokens=6, use_cache=False))


def test_a_model_on_several_devices_is_refused():
    model = dispatch_model(tiny_model("bert").eval(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="without device_map"):
        set_norm_placement(model, "pre")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert {site.placement for site in find_norms(model)} == {"post", None}


def test_post_norm_cross_attention_is_folded():
    model = tiny_model("gpt2", add_cross_attention=True).double().eval()
    set_norm_placement(model, "post", drop_final=True)
    swap_norm(model, "batchnorm", where="all")
    states = torch.randn(2, 5, 16, dtype=torch.float64)
    batch = {**tiny_batch(model), "encoder_hidden_states": states}
    model.train()(**batch)
    expected = model.eval()(**batch).logits
    assert fold_norms(model, untie=True).error < 1e-12
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-10, atol=1e-10)


def test_what_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"placement is one of post, pre, deep, sub, peri, rskip, not 'sandwich'"):
        set_norm_placement(model, "sandwich")
    with pytest.raises(ValueError, match=r"ln_f has a gain .* drop_final=True"):
        set_norm_placement(model, "post")
    assert type(model).__name__ == "GPT2LMHeadModel"
    with pytest.raises(ValueError, match="wrapped in"):
        set_norm_placement(nn.DataParallel(model), "post")
    with pytest.raises(ValueError, match="for the placements deep and sub, not for peri"):
        set_norm_placement(model, "peri", scale_weights=True)
    model.name_or_path = "a checkpoint"
    with pytest.raises(ValueError, match="this one is pretrained"):
        set_norm_placement(model, "deep", drop_final=True, scale_weights=True)
    with pytest.raises(ValueError, match="LayerNorms already"):
        restore_norm(set_norm_placement(tiny_model("bert"), "pre"))
    folded = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all")
    fold_norms(folded)
    with pytest.raises(ValueError, match="folded away"):
        set_norm_placement(folded, "pre")
    with pytest.raises(ValueError, match=r"wrong type \['placement'\]"):
        type(set_norm_placement(tiny_model("bert"), "pre").config)(
            norm_swap={"format_version": 1, "norms": [], "placement": 3}
        )


def test_what_is_known_of_a_lost_norm_is_forgotten():
    model = set_norm_placement(tiny_model("bert").eval(), "pre")
    swap_norm(model, "batchnorm", where="all", calibrate_on=[tiny_batch(model)])
    path = "bert.encoder.LayerNorm"
    assert path in model.config.norm_swap["calibration"]
    with pytest.raises(ValueError, match="drop_final"):
        set_norm_placement(model, "post")
    set_norm_placement(model, "post", drop_final=True)
    assert path not in str(model.config.norm_swap)
    assert "placement" not in model.config.norm_swap


# Names of the parts of a block: query, key, value and output of an attention, and its norm; both layers of a
# feed-forward network, and its norm.
PARTS = {
    "bert": (
        {"": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")},
        ("intermediate.dense", "output.dense"),
        {"": "attention.output.LayerNorm", "ffn": "output.LayerNorm"},
    ),
    "marian": (
        {
            "": tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            "cross": tuple(f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        },
        ("fc1", "fc2"),
        {"": "self_attn_layer_norm", "cross": "encoder_attn_layer_norm", "ffn": "final_layer_norm"},
    ),
    "gpt2": (
        {"": ("attn.q", "attn.k", "attn.v", "attn.c_proj")},
        ("mlp.c_fc", "mlp.c_proj"),
        {"": "ln_1", "ffn": "ln_2"},
    ),
}


class Block:
    """One block of a tiny model, written out from the equations of its placement."""

    def __init__(self, family, weights, prefix, placement, alpha):
        self.attentions, self.ffn, self.norms = PARTS[family]
        self.weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        if family == "gpt2":  # its weights are transposed, and those of queries, keys and values are in one
            self.weights = {
                name: w.T if "ln_" not in name and "norm" not in name and w.dim() == 2 else w
                for name, w in self.weights.items()
            }
            for kind in ("weight", "bias"):
                whole = self.weights.pop(f"attn.c_attn.{kind}")
                self.weights |= {f"attn.{k}.{kind}": w for k, w in zip("qkv", whole.chunk(3), strict=True)}
        self.placement, self.alpha = placement, alpha
        self.family, self.eps = family, {"bert": 1e-12}.get(family, 1e-5)

    def norm(self, name, x):
        centered = x - x.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centered / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def last(self, name, x):
        if self.placement != "sub":
            return self.linear(name, x)
        return self.linear(f"{name}.linear", self.norm(f"{name}.norm", x))

    def attend(self, kind, x, states, causal):
        query, key, value, out = self.attentions[kind]
        states = x if states is None else states
        heads = []
        q, k, v = self.linear(query, x), self.linear(key, states), self.linear(value, states)
        for channels in torch.arange(16).chunk(4):
            scores = q[:, channels] @ k[:, channels].T / 2
            if causal:
                scores += torch.full_like(scores, -torch.inf).triu(1)
            heads.append(scores.softmax(-1) @ v[:, channels])
        return self.last(out, torch.cat(heads, -1))

    def feed_forward(self, x):
        inner = self.linear(self.ffn[0], x)
        inner = {
            "bert": nn.functional.gelu,
            "marian": nn.functional.gelu,
            "gpt2": lambda z: z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        }[self.family](inner)
        return self.last(self.ffn[1], inner)

    def sublayer(self, x, kind, function):
        name = self.norms[kind]
        if self.placement == "deep":
            return self.norm(name, self.alpha * x + function(x))
        if self.placement == "sub":
            return x + function(self.norm(name, x))
        if self.placement == "peri":
            return x + self.norm(f"{name}_outer", function(self.norm(name, x)))
        return self.norm(f"{name}_outer", x + self.norm(name, x + function(x)))

    def __call__(self, x, states=None, causal=False):
        x = self.sublayer(x, "", lambda x: self.attend("", x, None, causal))
        if states is not None:
            x = self.sublayer(x, "cross", lambda x: self.attend("cross", x, states, False))
        return self.sublayer(x, "ffn", self.feed_forward)


# α of two blocks in each stack.
ALPHAS = {
    "bert": {"encoder.layer.": 4**0.25},
    "gpt2": {"h.": 4**0.25},
    "marian": {"encoder.layers.": 0.81 * 32 ** (1 / 16), "decoder.layers.": 6**0.25},
}
HEADLESS = {"bert": "BertModel", "marian": "MarianModel", "gpt2": "GPT2Model"}
FINAL = {"encoder.layer.": "encoder.LayerNorm", "h.": "ln_f"}


@pytest.mark.parametrize("family", HEADLESS)
@pytest.mark.parametrize("placement", FURTHER)
def test_blocks_compute_their_equations(family, placement):
    model = set_norm_placement(tiny_model(family, HEADLESS[family]), placement, drop_final=True).double().eval()
    for site in find_norms(model):
        nn.init.uniform_(site.module.weight, 0.5, 1.5)
        nn.init.uniform_(site.module.bias, -0.5, 0.5)
    weights = model.state_dict()
    streams = {}  # what each stack is given
    stacks = {prefix: model.get_submodule(f"{prefix}0") for prefix in ALPHAS[family]}
    for prefix, block in stacks.items():
        block.register_forward_pre_hook(lambda _, args, prefix=prefix: streams.update({prefix: args[0][0]}))
    batch = tiny_batch(model, lengths=(6,))
    with torch.no_grad():
        returned = model(**batch).last_hidden_state[0]
    states = None
    for prefix, alpha in ALPHAS[family].items():
        x = streams[prefix]
        causal = prefix in ("h.", "decoder.layers.")
        for layer in range(2):
            x = Block(family, weights, f"{prefix}{layer}.", placement, alpha)(x, states, causal)
        if placement in ("sub", "peri"):
            name = FINAL.get(prefix, f"{prefix[:7]}.layer_norm")
            eps = {"bert": 1e-12}.get(family, 1e-5)
            x = nn.functional.layer_norm(x, [16], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
        states = x
    torch.testing.assert_close(returned, states, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_through_every_placement_and_back(family):
    model = tiny_model(family)
    for site in find_norms(model):
        if site.sublayer == "final":
            nn.init.ones_(site.module.weight)
            nn.init.zeros_(site.module.bias)
    swap_norm(model, "batchnorm")
    stock, config, before, names = type(model), copy.deepcopy(model.config), outputs(model), set(model.state_dict())
    places = {"deep": {"post"}, "sub": {"pre", "inner"}, "peri": {"pre", "sandwich"}, "rskip": {"sandwich", "post"}}
    for placement, found in places.items():
        set_norm_placement(model, placement)
        assert {site.placement for site in find_norms(model) if site.block} == found
        assert not same(before, outputs(model))
    set_norm_placement(model, "pre" if family == "gpt2" else "post")
    assert same(before, outputs(model))
    assert type(model) is stock
    assert model.config.to_dict() == config.to_dict()
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("name", ["xlm-roberta", "camembert", "electra", "ernie", "bart"])
def test_families_with_the_same_blocks(name, tmp_path):
    """A block computes what that of BERT, or of Marian, computes with its weights."""
    like, head, cls = ("marian", "MarianModel", "EncoderLayer") if name == "bart" else ("bert", "BertModel", "Layer")
    model, inputs = tiny_architecture(name)
    set_norm_placement(model, "pre")
    for placement in FURTHER:
        set_norm_placement(model, placement)
        other = set_norm_placement(tiny_model(like, head, hidden_act="gelu"), placement).eval()
        block, theirs = (
            next(module for module in each.modules() if type(module).__name__.endswith(cls)) for each in (model, other)
        )
        theirs.load_state_dict(block.state_dict())
        x = torch.randn(2, 5, 16)
        torch.testing.assert_close(block.eval()(x, None), theirs(x, None), rtol=1e-5, atol=1e-6)
    swap_norm(model, "batchnorm").eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(outputs(model, inputs), outputs(loaded, inputs))


@pytest.mark.parametrize(
    ("family", "placement"), [("bert", "sub"), ("roberta", "peri"), ("marian", "rskip"), ("gpt2", "deep")]
)
def test_further_placements_are_saved_and_loaded(family, placement, tmp_path):
    model = set_norm_placement(tiny_model(family), placement, drop_final=True)
    model = train(swap_norm(model, "batchnorm", where="all"))
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same(outputs(model), outputs(loaded))
    assert same(outputs(model), outputs(pickle.loads(pickle.dumps(model))))
    if placement != "rskip":
        assert fold_norms(loaded, untie=True).error < 1e-5


# Factors for two blocks in each stack, and a part of the names of the weights that they are for.
SCALES = {
    ("bert", "deep"): {r"\.(value|dense)(\.linear)?\.weight": 16**-0.25},
    ("bert", "sub"): {r"\.(value|dense)(\.linear)?\.weight": math.sqrt(math.log(4))},
    ("marian", "deep"): {
        r"encoder\.layers.*(v_proj|out_proj|fc1|fc2)\.weight": 0.87 * 32 ** (-1 / 16),
        r"decoder\.layers.*(v_proj|out_proj|fc1|fc2)\.weight": 24**-0.25,
    },
    ("marian", "sub"): {
        r"encoder\.layers.*(v_proj|out_proj|fc1|fc2)(\.linear)?\.weight": math.sqrt(math.log(6) * math.log(4) / 3),
        r"decoder\.layers.*(v_proj|out_proj|fc1|fc2)(\.linear)?\.weight": math.sqrt(math.log(6)),
    },
    ("gpt2", "deep"): {r"c_(attn|proj|fc)\.weight": 16**-0.25},
}


@pytest.mark.parametrize(("family", "placement"), SCALES)
def test_initial_weights_are_scaled(family, placement):
    head = {"bert": "BertForMaskedLM"}.get(family)
    plain = set_norm_placement(tiny_model(family, head), placement, drop_final=True)
    scaled = set_norm_placement(tiny_model(family, head), placement, drop_final=True, scale_weights=True)
    before = dict(plain.named_parameters())
    for name, weight in scaled.named_parameters():
        is_inside = re.search(r"\.(layer|layers|h)\.\d", name)
        scales = [scale for pattern, scale in SCALES[family, placement].items() if re.search(pattern, name)]
        expected = before[name].detach().clone()
        if is_inside and scales:
            part = expected[:, 32:] if "c_attn" in name else expected
            part *= scales[0]
        torch.testing.assert_close(weight.detach(), expected)
        if not (is_inside and scales):
            assert torch.equal(weight, before[name])
