"""Whether two models compute the same: their outputs for random tokens."""

import torch
from transformers import PreTrainedModel


def probe_batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Two batches of one row of random tokens, the second one shorter and with padding."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    longest = min(32, config.max_position_embeddings - 2)  # RoBERTa counts positions from 2
    batches = []
    for length, pads in ((longest, 0), (longest - 1, longest // 4)):
        batch = {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator)}
        batch["attention_mask"] = (torch.arange(length)[None] < length - pads).long()
        if "MultipleChoice" in type(model).__name__:
            batch = {name: values[None] for name, values in batch.items()}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(config.vocab_size, (1, length), generator=generator)
        elif getattr(config, "add_cross_attention", False):
            states = torch.randn(1, length, config.hidden_size, generator=generator)
            batch["encoder_hidden_states"] = states.to(model.dtype)
        batches.append({name: values.to(model.device) for name, values in batch.items()})
    return batches


@torch.no_grad()
def compare_outputs(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest `‖Δ‖₂ / ‖y‖₂` of the logits of two models, or of the hidden states of models without head."""
    errors = []
    for batch in probe_batches(model):
        before, after = model(**batch), other(**batch)
        names = [name for name in before if name.endswith("logits") or name in ("last_hidden_state", "pooler_output")]
        errors += [relative_error(before[name], after[name]) for name in names]
    return max(errors)


def relative_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """`‖Δ‖₂ / ‖before‖₂`; NaN where one of them is not finite."""
    before, after = before.double(), after.double()
    return ((after - before).norm() / before.norm()).item()
