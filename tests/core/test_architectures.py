"""Where the norms of many architectures stand: held against hooks and gradients of their own forward."""

import collections
import functools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_normswap import find_norms
from tests.helpers.architectures import architectures, norm_modules, tiny_architecture


NAMES = [architecture.name for architecture in architectures()]
# Classes, with what sets them apart in tests.helpers.architectures, that normalise no channels of a token.
NOT_TAKEN = {"NoNorm", "NoNorm (bottleneck)", "ConvNextLayerNorm (channels first)", "GroupNorm (features)"}
# The residual stream passes these by.
PASSED_BY = {"pre", "sandwich", "inner"}
# Behind its first block DeBERTa adds a convolution of the embeddings, which passes that block by.
BESIDE = {("deberta-v2", 0)}


@functools.cache
def read(name):
    model, batch = tiny_architecture(name)
    return model, batch, find_norms(model)


@pytest.mark.parametrize("architecture", architectures(), ids=NAMES)
def test_every_norm_is_found_in_order(architecture):
    model, _, sites = read(architecture.name)
    assert sites.obstacle is None
    assert len(sites) == sum(count for kind, count in architecture.norms.items() if kind not in NOT_TAKEN)
    names = [site.name for site in sites]
    found = norm_modules(model)
    assert names == [name for name in found if name in names]
    left = {type(module).__name__ for name, module in found.items() if name not in names}
    assert left == {kind.partition(" ")[0] for kind in architecture.norms if kind in NOT_TAKEN}
    assert all(site.kind == ("rmsnorm" if is_rms_norm(site.module) else "layernorm") for site in sites)


def is_rms_norm(norm):
    """Whether a norm lets the mean of a token pass."""
    token = torch.ones(1, 1, *norm.weight.shape)
    return not torch.allclose(norm(token), norm(torch.zeros_like(token)))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_calls(name):
    model, batch, sites = read(name)
    calls = collections.Counter()
    handles = [
        site.module.register_forward_hook(lambda module, args, output, name=site.name: calls.update([name]))
        for site in sites
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    assert {site.name: site.calls for site in sites} == calls


@pytest.mark.parametrize("name", NAMES)
def test_placement(name):
    """Detached, the output of a norm on the only path cuts the output of the model off from the embeddings."""
    model, batch, sites = read(name)
    for site in sites:
        assert (site.block is None) == (site.layer is None) == (site.placement is None)
        if site.sublayer == "other":
            continue
        passes = reaches_embeddings(model, batch, site, {other.block for other in sites if other.block})
        assert passes == (site.placement in PASSED_BY or (name, site.layer) in BESIDE), (site.name, site.placement)


def reaches_embeddings(model, batch, site, blocks):
    """Whether a gradient of the model's output gets past a norm, to the first layer of its tower."""
    first, leaves = first_layer(model, batch, site.name, blocks), []

    def mark(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1] * 1  # what follows may change it in place

    handles = [
        first.register_forward_hook(mark),
        site.module.register_forward_hook(lambda module, args, output: output.detach().clone()),
    ]
    output = model(**batch)
    for handle in handles:
        handle.remove()
    logits = output["logits" if "logits" in output else "logits_per_image"]
    gradients = torch.autograd.grad(logits.square().sum(), leaves, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@torch.no_grad()
def first_layer(model, batch, name, blocks):
    """The layer that makes the input of the innermost tower with such a layer around the module `name`."""
    called = []
    handles = [
        module.register_forward_hook(lambda module, args, output: called.append(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d)
        and not any(path.startswith(f"{block}.") for block in blocks)
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    inside = [[module for module in called if module in set(tower.modules())] for tower in towers_around(model, name)]
    return next(layers for layers in inside if layers)[0]


def towers_around(model, name):
    """The models that a module is in, the innermost one first."""
    parents = [model.get_submodule(name.rsplit(".", count)[0]) for count in range(1, name.count(".") + 1)]
    return [parent for parent in [*parents, model] if isinstance(parent, PreTrainedModel)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_norms_outside_the_blocks_stand_before_or_behind_them(name):
    model, batch, sites = read(name)
    order = []
    handles = [site.module.register_forward_hook(lambda *_, name=site.name: order.append(name)) for site in sites]
    model(**batch)
    for handle in handles:
        handle.remove()
    for site in sites:
        inside = set(towers_around(model, site.name)[0].modules())
        blocks = [order.index(other.name) for other in sites if other.block and other.module in inside]
        if site.sublayer == "embedding":
            assert all(order.index(site.name) < index for index in blocks), site.name
        if site.sublayer in ("final", "head"):
            assert all(order.index(site.name) > index for index in blocks), site.name


def test_norms_that_only_their_place_tells_apart():
    """Names mislead: that of Hubert is called as the final one of Wav2Vec2, and stands before the layers."""
    for name, path, sublayer in [
        ("hubert", "hubert.encoder.layer_norm", "embedding"),
        ("wav2vec2", "wav2vec2.encoder.layer_norm", "final"),
        ("wav2vec2", "wav2vec2.feature_extractor.conv_layers.0.layer_norm", "other"),
        ("deberta-v2", "deberta.encoder.conv.LayerNorm", "other"),  # between the first two layers
        ("deberta-v2", "deberta.encoder.LayerNorm", "other"),  # of the table of relative positions
        ("swin", "swin.encoder.layers.0.downsample.norm", "other"),
        ("clip", "vision_model.pre_layrnorm", "embedding"),
        ("clip", "vision_model.post_layernorm", "final"),
        ("beit", "beit.pooler.layernorm", "head"),
        ("opt", "model.decoder.layers.1.final_layer_norm", "ffn"),
        ("esm", "esm.encoder.emb_layer_norm_after", "final"),
        ("nomic_bert", "nomic_bert.layers.0.post_attention_layernorm", "attention"),
        ("llama", "model.layers.0.post_attention_layernorm", "ffn"),
        ("gemma2", "model.layers.0.post_attention_layernorm", "attention"),
        ("qwen3", "model.layers.0.self_attn.q_norm", "query_key"),
    ]:
        assert {site.name: site.sublayer for site in read(name)[2]}[path] == sublayer, path


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_counted_along_each_tower(name):
    model, _, sites = read(name)
    blocks = collections.defaultdict(dict)
    for site in sites:
        if site.block is not None:
            assert site.name.startswith(f"{site.block}.")
            blocks[id(towers_around(model, site.name)[0])].setdefault(site.block, site.layer)
    for found in blocks.values():
        assert list(found.values()) == list(range(len(found)))
