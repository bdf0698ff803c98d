"""Whole models compile in one graph and compute the same, in training and in evaluation."""

import copy

import pytest
import torch

from hf_normswap import norm_penalty, swap_norm
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model


DEPTH = {
    "bert": {"num_hidden_layers": 1},
    "roberta": {"num_hidden_layers": 1},
    "marian": {"encoder_layers": 1, "decoder_layers": 1},
    "gpt2": {"n_layer": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norm"), [*((family, "powernorm") for family in FAMILIES), ("bert", "rbn")])
def test_compiled_model_is_the_eager_one(family, norm):
    torch._dynamo.reset()
    eager = swap_norm(tiny_model(family, **DEPTH[family]), norm, where="all")
    compiled = copy.deepcopy(eager)
    batch = tiny_batch(eager)
    for model, call in ((eager, eager), (compiled, torch.compile(compiled, fullgraph=True))):
        for _ in range(2):
            model.zero_grad()
            (call(**batch).loss + norm_penalty(model)).backward()
    theirs = dict(compiled.named_parameters())
    for name, parameter in eager.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    buffers = dict(compiled.named_buffers())
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6, msg=name)
    call.eval()
    torch.testing.assert_close(call(**batch).logits, eager.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
