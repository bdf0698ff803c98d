"""Training arguments of the trainers of this package, for `HfArgumentParser` too."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_normswap.modeling.powernorm import WARMUP_RATIO


@dataclass
class _NormSwapArguments:
    norm_warmup_ratio: float = field(
        default=WARMUP_RATIO,
        metadata={"help": "Share of the training steps in which PowerNorm uses the statistics of the batch."},
    )
    norm_freeze_ratio: float = field(
        default=1.0,
        metadata={"help": "Share of the training steps after which norms keep their running statistics and use them."},
    )
    norm_sync: str = field(
        default="all",
        metadata={"help": "Processes that make up a batch for the norms.", "choices": ["all", "node", "none"]},
    )

    def __post_init__(self):
        if self.norm_sync not in ("all", "node", "none"):
            raise ValueError(f"norm_sync is one of all, node, none, not {self.norm_sync!r}.")
        for name in ("norm_warmup_ratio", "norm_freeze_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # rank 0's would overwrite the statistics of all ranks
        super().__post_init__()


@dataclass
class NormSwapTrainingArguments(_NormSwapArguments, TrainingArguments):
    """[`~transformers.TrainingArguments`] and what concerns norms.

    Args:
        norm_warmup_ratio (`float`, *optional*, defaults to 0.1):
            share of the training steps in which PowerNorm is PN-V, while its running statistics settle.
        norm_freeze_ratio (`float`, *optional*, defaults to 1.0):
            share of the training steps after which norms normalise with their running statistics and keep them as they
            are: the rest of the training is with what counts at inference. With 0, for calibrated models, all of it.
        norm_sync (`str`, *optional*, defaults to `"all"`):
            which processes make up the batch that a norm takes its statistics of: `"all"`, those of one `"node"`, or
            `"none"` but its own. Running statistics are those of all in any case.
    """


@dataclass
class NormSwapSeq2SeqTrainingArguments(_NormSwapArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the fields of [`NormSwapTrainingArguments`]."""
