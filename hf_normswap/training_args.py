"""Training arguments of the trainers of this package, for `HfArgumentParser` too."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments


@dataclass
class _NormSwapArguments:
    norm_warmup_ratio: float = field(
        default=0.1,
        metadata={"help": "Share of the training steps in which PowerNorm uses the statistics of the batch."},
    )
    freeze_norm_statistics: bool = field(
        default=False,
        metadata={"help": "Train with the running statistics as they are, as those of a calibrated model."},
    )

    def __post_init__(self):
        if not 0 <= self.norm_warmup_ratio <= 1:
            raise ValueError(f"norm_warmup_ratio is a share between 0 and 1, not {self.norm_warmup_ratio}.")
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # rank 0's would overwrite the statistics of all ranks
        super().__post_init__()


@dataclass
class NormSwapTrainingArguments(_NormSwapArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] and what concerns norms.

    Args:
        norm_warmup_ratio (`float`, *optional*, defaults to 0.1):
            share of the training steps in which PowerNorm is PN-V, while its running statistics settle.
        freeze_norm_statistics (`bool`, *optional*, defaults to `False`):
            whether norms normalise with their running statistics in training too, and keep them as they are: for a
            calibrated model.
    """


@dataclass
class NormSwapSeq2SeqTrainingArguments(_NormSwapArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the fields of [`NormSwapTrainingArguments`]."""
