"""On an accelerator: the same numbers, in float32 and under bf16 autocast, and no wait for the device in a step."""

import copy

import pytest
import torch

from hf_normswap import available_norms, norm_penalty, swap_norm
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.norms import family_is_causal, norms_in


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def step(model, batch):
    (model(**batch).loss + norm_penalty(model)).backward()


def to_cuda(batch):
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize(("family", "norm"), norms_in(list(FAMILIES), family_is_causal))
def test_gpu_computes_what_the_cpu_computes(family, norm):
    on_cpu = swap_norm(tiny_model(family), norm, where="all")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    batch = tiny_batch(on_cpu)
    for _ in range(2):
        step(on_cpu, batch)
        step(on_gpu, to_cuda(batch))
    ours = dict(on_gpu.named_parameters())
    for name, parameter in on_cpu.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad.cpu(), parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    buffers = dict(on_gpu.named_buffers())
    for name, buffer in on_cpu.named_buffers():
        torch.testing.assert_close(buffers[name].cpu(), buffer, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_bf16_keeps_float32_statistics(norm, checkpointing):
    model = swap_norm(tiny_model("bert"), norm, where="all").cuda()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    with torch.autocast("cuda", dtype=torch.bfloat16):
        step(model, to_cuda(tiny_batch(model)))
    running = [buffer for name, buffer in model.named_buffers() if "running" in name]
    assert running
    assert all(buffer.dtype == torch.float32 and buffer.isfinite().all() for buffer in running)


@pytest.mark.parametrize("norm", available_norms())
def test_a_step_never_waits_for_the_device(norm):
    model = swap_norm(tiny_model("bert"), norm, where="all").cuda()
    batch = to_cuda(tiny_batch(model))
    batch.pop("attention_mask")  # transformers itself looks whether it is all ones
    step(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
