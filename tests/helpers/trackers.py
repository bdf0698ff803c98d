"""A run that a tracker of experiments follows."""

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments, ProgressiveSwapCallback, swap_norm
from tests.helpers.models import tiny_model
from tests.helpers.trainer import HEADS, rows


def make_trainer(folder, tracker):
    args = NormSwapTrainingArguments(
        str(folder),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=tracker,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = swap_norm(tiny_model("bert", HEADS["bert"]), "rbn")
    progressive = ProgressiveSwapCallback(ratio=1.0)
    return NormSwapTrainer(model, args, train_dataset=rows("bert", 16), callbacks=[progressive])


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]
