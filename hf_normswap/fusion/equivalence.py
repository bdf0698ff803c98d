"""Changes that may not change what a model computes, tried on a copy first: outputs for random tokens."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel


# ‖Δ‖₂/‖logits‖₂ that rounding may cost.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def apply_if_equivalent(model: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> float:
    """Apply `change` to a copy of `model`, compare the outputs, and apply it to `model` too.

    Returns:
        `float`: the relative error of the outputs of the copy.

    Raises:
        ValueError: when that is more than rounding in the dtype of the model. The model is untouched then.
    """
    trial = copy.deepcopy(model)
    change(trial)
    error, limit = compare_outputs(model, trial), TOLERANCES[model.dtype]
    if not error <= limit:
        # Random tokens are nothing that a model was trained on: some amplify rounding on them.
        limit = max(limit, 4 * compare_outputs(copy.deepcopy(model).double(), model))
    if not error <= limit:
        name = str(model.dtype).removeprefix("torch.")
        cure = "" if model.dtype == torch.float64 else ", or use a wider dtype, as in model.double()"
        raise ValueError(
            f"The outputs would change by {error:.1e}, more than the {limit:.0e} of rounding in {name}: check that "
            f"the model's own outputs are finite and nothing was added around its norms{cure}."
        )
    change(model)
    return error


def example_batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Eight batches of one row of random tokens, every other one shorter and with padding."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    longest = min(32, config.max_position_embeddings - 2)  # RoBERTa counts positions from 2
    decoder_vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    batches = []
    for length, pads in 4 * [(longest, 0), (max(longest - 1, 1), longest // 4)]:
        batch = {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator)}
        batch["attention_mask"] = (torch.arange(length)[None] < length - pads).long()
        if "MultipleChoice" in type(model).__name__:
            batch = {name: values[None] for name, values in batch.items()}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(decoder_vocab_size, (1, length), generator=generator)
        elif getattr(config, "add_cross_attention", False):
            states = torch.randn(1, length, config.hidden_size, generator=generator)
            batch["encoder_hidden_states"] = states.to(model.dtype)
        batches.append({name: values.to(model.device) for name, values in batch.items()})
    return batches


@torch.no_grad()
def compare_outputs(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """`‖Δ‖₂ / ‖y‖₂` of the logits of two models, or of hidden states without a head: the largest, NaN if any is."""
    pairs = {}
    for ours, theirs in zip(example_batches(model), example_batches(other), strict=True):
        before, after = model(**ours, return_dict=True), other(**theirs, return_dict=True)
        for name in before:
            if name.endswith("logits") or name in ("last_hidden_state", "pooler_output"):
                pairs.setdefault(name, []).append((before[name].flatten(), after[name].flatten()))
    errors = [relative_error(*map(torch.cat, zip(*values, strict=True))) for values in pairs.values()]
    return torch.tensor(errors).max().item()  # max() would lose a NaN


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """`‖Δ‖₂ / ‖before‖₂`; NaN where one of them is not finite."""
    before, after = before.double(), after.double()
    error = (after - before).norm()
    return 0.0 if error == 0 else (error / before.norm()).item()
