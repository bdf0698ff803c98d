"""Changes that may not change what a model computes, tried on a copy first: outputs for random tokens."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from hf_normswap.core.example_inputs import example_inputs, example_source
from hf_normswap.core.model_state import run_model
from hf_normswap.core.residual_stream import is_result


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
    error = compare_outputs(model, trial)
    limit = rounding_of(model, error)
    if not error <= limit:
        name = str(model.dtype).removeprefix("torch.")
        cure = "" if model.dtype == torch.float64 else ", or use a wider dtype, as in model.double()"
        raise ValueError(
            f"The outputs would change by {error:.1e}, more than the {limit:.0e} of rounding in {name}: check that "
            f"the model's own outputs are finite and nothing was added around its norms{cure}."
        )
    change(model)
    return error


def rounding_of(model: PreTrainedModel, error: float) -> float:
    """The error that rounding in the dtype of a model may make; it is measured where `error` is above the usual."""
    limit = TOLERANCES[model.dtype]
    if error <= limit:
        return limit
    # Random tokens are nothing that a model was trained on: some amplify rounding on them.
    return max(limit, 4 * compare_outputs(copy.deepcopy(model).double(), model))


def example_batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Eight batches of one row of random inputs; of a text, every other one is shorter and has padding."""
    # RoBERTa counts positions from 2.
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_target_positions")
    positions = min([value for name in names if (value := getattr(config, name, None))], default=34)
    longest = min(32, positions - 2)
    batches = []
    for index, (length, pads) in enumerate(4 * [(longest, 0), (max(longest - 1, 1), longest // 4)]):
        batch = example_inputs(model, rows=1, length=length, seed=index)
        if not model.config.is_encoder_decoder:
            batch |= example_source(model, rows=1) if getattr(model.config, "add_cross_attention", False) else {}
        if pads and "attention_mask" in batch:
            batch["attention_mask"][..., -pads:] = 0
        batches.append({name: _like(model, values) for name, values in batch.items()})
    return batches


def _like(model: PreTrainedModel, values: torch.Tensor) -> torch.Tensor:
    return values.to(model.device, model.dtype if values.is_floating_point() else values.dtype)


@torch.no_grad()
def compare_outputs(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """`‖Δ‖₂ / ‖y‖₂` of what two models return, without the states between their layers: the largest, NaN if any is."""
    pairs = {}
    for ours, theirs in zip(example_batches(model), example_batches(other), strict=True):
        before, after = run_model(model, ours), run_model(other, theirs)
        for name, value in before.items():
            if is_result(name) and isinstance(value, torch.Tensor) and value.is_floating_point():
                pairs.setdefault(name, []).append((value.flatten(), after[name].flatten()))
    errors = [relative_error(*map(torch.cat, zip(*values, strict=True))) for values in pairs.values()]
    return torch.tensor(errors).max().item()  # max() would lose a NaN


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """`‖Δ‖₂ / ‖before‖₂`; NaN where one of them is not finite."""
    before, after = before.double(), after.double()
    error = (after - before).norm()
    return 0.0 if error == 0 else (error / before.norm()).item()
