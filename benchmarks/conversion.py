"""
What it costs to replace all norms of a trained model by calibration alone, in one family of models.

    python benchmarks/conversion.py --family gpt2
    python benchmarks/conversion.py --family marian --dataset_name path/to/multi30k --norms batchnorm --examples 1024

Trains a small model with LayerNorm from scratch on real text, once: a later run finds it in the output folder. Then
each norm takes the place of all LayerNorms of a copy, calibrated on so many training examples and never fine-tuned, and
the copy is scored as the original was. Every conversion leaves a JSON file, and all of them make a table.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2LMHeadModel,
    HfArgumentParser,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_normswap import swap_norm
from hf_normswap.metrics import SacrebleuMetric
from hf_normswap.results import describe_environment, write_result


MAX_LENGTH = 128
MASKED = 0.15
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
HIGHER_IS_BETTER = {"bleu"}
RECORD = "training.json"  # written last: where it is, the model is whole


@dataclass
class Task:
    """What a family is trained on, converted with and scored by."""

    model_class: type[PreTrainedModel]
    config: dict
    tokenizer: PreTrainedTokenizerFast
    collator: Callable
    train: Dataset
    inputs: dict[str, Dataset]  # to calibrate on: such as are scored, then a kind that is easier to come by
    score: Callable[[PreTrainedModel], dict[str, float]]


def gpt2(data, args):
    """Language model: perplexity per token of the test split, packed into blocks."""
    tokenizer, lines = tokenize(data, "$A </s>", args)

    def pack(rows):
        tokens = list(chain(*rows["input_ids"]))
        blocks = [tokens[end - MAX_LENGTH : end] for end in range(MAX_LENGTH, len(tokens) + 1, MAX_LENGTH)]
        return {"input_ids": blocks, "labels": [[-100, *block[1:]] for block in blocks]}  # nothing predicts the first

    columns = lines["train"].column_names
    blocks = lines.map(pack, batched=True, batch_size=None, remove_columns=columns, desc="Packing")
    inputs = {"blocks": draw(blocks, args), "lines": draw(lines, args)}
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Task(
        GPT2LMHeadModel, {}, tokenizer, collator, blocks["train"], inputs, perplexity(blocks["test"], tokenizer)
    )


def roberta(data, args):
    """Masked language model: perplexity per masked token of the test split, with the same masks for every model."""
    tokenizer, lines = tokenize(data, "<s> $A </s>", args)

    def mask(rows):
        fixed = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=args.seed)
        return rows.map(lambda row: {name: value[0] for name, value in fixed([row]).items()}, desc="Masking")

    config = {"intermediate_size": 4 * args.hidden_size, "type_vocab_size": 1}
    sample = draw(lines, args)
    inputs = {"masked lines": mask(sample), "lines": sample}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    score = perplexity(mask(lines["test"]), tokenizer)
    return Task(RobertaForMaskedLM, config, tokenizer, collator, lines["train"], inputs, score)


def marian(data, args):
    """Translation from German to English: BLEU of greedy decoding on the test split, loss on the validation split."""
    if "translation" in data["train"].column_names:
        data = data.map(lambda row: row["translation"], remove_columns="translation")
    tokenizer, pairs = tokenize(data, "$A </s>", args, "de", "en")
    config = {
        "scale_embedding": True,
        "decoder_layers": args.layers,
        "decoder_attention_heads": args.heads,
        "encoder_ffn_dim": 4 * args.hidden_size,
        "decoder_ffn_dim": 4 * args.hidden_size,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    sample = draw(pairs, args)
    inputs = {"pairs": sample, "sources": sample.remove_columns("labels")}
    validate = perplexity(pairs["validation"], tokenizer)
    test = pairs["test"].add_column("reference", data["test"]["en"][:])

    def score(model):
        return {"bleu": bleu(model, test, tokenizer), "validation_loss": validate(model)["loss"]}

    return Task(MarianMTModel, config, tokenizer, DataCollatorForSeq2Seq(tokenizer), pairs["train"], inputs, score)


# The function of each family and, where no option says otherwise, data set, layers and training.
PTB, MULTI30K = "ptb-text-only/ptb_text_only", "bentrevett/multi30k"
FAMILIES = {
    "gpt2": (gpt2, {"dataset_name": PTB, "layers": 4, "batch_size": 16, "max_steps": 1500}),
    "roberta": (roberta, {"dataset_name": PTB, "layers": 4, "batch_size": 64, "max_steps": 1500}),
    "marian": (marian, {"dataset_name": MULTI30K, "layers": 3, "batch_size": 64, "max_steps": 1500}),
}


@dataclass
class Arguments:
    family: str = dataclasses.field(metadata={"help": "Family of the model.", "choices": list(FAMILIES)})
    dataset_name: str | None = HfArg(help="Data set of the Hub, or a local folder laid out like one.", default=None)
    output_dir: str = HfArg(help="Folder for models and results.", default="outputs/conversion")
    norms: list[str] = HfArg(help="Norms to swap in.", default_factory=lambda: ["batchnorm", "powernorm"])
    examples: list[int] = HfArg(help="Examples to calibrate on.", default_factory=lambda: [256, 1024, 4096])
    seed: int = HfArg(help="Seed of the training, the masks and the examples.", default=0)
    vocab_size: int = HfArg(help="Size of the vocabulary.", default=6000)
    hidden_size: int = HfArg(help="Width of the model.", default=192)
    heads: int = HfArg(help="Attention heads.", default=4)
    layers: int | None = HfArg(help="Layers, of encoder and decoder each.", default=None)
    batch_size: int | None = HfArg(help="Sequences in a training step.", default=None)
    max_steps: int | None = HfArg(help="Training steps.", default=None)
    learning_rate: float = HfArg(help="Largest learning rate.", default=1e-3)
    bf16: bool = HfArg(help="Train under bf16 autocast; scores are in float32 always.", default=True)

    def __post_init__(self):
        for name, value in FAMILIES[self.family][1].items():
            setattr(self, name, getattr(self, name) or value)
        self.folder = Path(self.output_dir, self.family)

    def of_training(self):
        """The options that decide what the trained model is."""
        options = dataclasses.asdict(self) | {"dataset_name": Path(self.dataset_name).name}
        return {name: options[name] for name in options if name not in ("output_dir", "norms", "examples")}


def tokenize(data, template, args, source=None, target=None):
    """A byte-pair encoding, that of the trained model if there is one, and the data in it, each text in `template`."""
    source = source or data["train"].column_names[0]
    if (args.folder / RECORD).exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    else:
        pieces = Tokenizer(models.BPE())
        pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        special = [AddedToken(token, lstrip=True) for token in SPECIAL.values()]
        options = {"special_tokens": special, "initial_alphabet": pieces.pre_tokenizer.alphabet()}
        texts = chain(*(data["train"][column][:] for column in (source, target) if column))
        pieces.train_from_iterator(texts, BpeTrainer(vocab_size=args.vocab_size, show_progress=False, **options))
        ids = [(token, pieces.token_to_id(token)) for token in ("<s>", "</s>")]
        pieces.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
        options = {"model_max_length": MAX_LENGTH, "model_input_names": ["input_ids", "attention_mask"], **SPECIAL}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, **options)

    def encode(rows):
        return tokenizer(rows[source], text_target=rows[target] if target else None, truncation=True)

    return tokenizer, data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


def draw(data, args):
    """The examples to calibrate on; fewer of them are the first of these."""
    rows = data["train"].shuffle(seed=args.seed)
    return rows.select(range(min(max(args.examples), len(rows))))


def train(task, args):
    """Trains a model with LayerNorm and saves it, unless that was done before."""
    record = args.folder / RECORD
    if not record.exists():
        set_seed(args.seed)
        options = TrainingArguments(
            args.folder,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.98,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            save_strategy="no",
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=True,  # scores that do not depend on the accelerator at hand
        )
        config = task.model_class.config_class(
            vocab_size=len(task.tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=MAX_LENGTH + 2,  # RoBERTa counts from there
            **{f"{name}_token_id": getattr(task.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            **task.config,
        )
        for name in {"initializer_range", "init_std"} & set(vars(config)):
            setattr(config, name, 0.02 * math.sqrt(768 / args.hidden_size))  # 0.02 is for a width of 768
        model = task.model_class(config)
        trainer = Trainer(model, options, task.collator, task.train, processing_class=task.tokenizer)
        trainer.train()
        trainer.save_model()
        record.write_text(json.dumps({"arguments": args.of_training(), "history": trainer.state.log_history}))
    if json.loads(record.read_text())["arguments"] != args.of_training():
        raise SystemExit(f"error: {args.folder} holds a model of other options: give another --output_dir.")


def grouped(rows, size=32):
    """Rows of similar length together, for little padding."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    return tqdm([rows[start : start + size] for start in range(0, len(rows), size)], "Scoring")


def perplexity(rows, tokenizer):
    """A function that gives a model's mean loss over all tokens of `rows` that are predicted, and their perplexity."""
    collator = DataCollatorForSeq2Seq(tokenizer)

    @torch.inference_mode()
    def score(model):
        total = count = 0
        for batch in map(collator, grouped(rows)):
            tokens = (batch["labels"] != -100).sum().item()
            total, count = total + tokens * model(**batch).loss.item(), count + tokens
        return {"perplexity": math.exp(total / count), "loss": total / count}

    return score


def bleu(model, rows, tokenizer):
    predictions, references = [], []
    for group in grouped(rows):
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in group], return_tensors="pt")
        written = model.generate(**batch, num_beams=1, do_sample=False, max_length=MAX_LENGTH)
        predictions += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        references += [row["reference"] for row in group]
    return SacrebleuMetric().compute(predictions=predictions, references=references)["score"]


def convert(task, args, norm, kind, count, before):
    """Converts a copy of the trained model and returns the record of it."""
    model = task.model_class.from_pretrained(args.folder)
    rows = task.inputs[kind].select(range(min(count, len(task.inputs[kind]))))
    start = time.perf_counter()
    swap_norm(model, norm, where="all", calibrate_on=rows, tokenizer=task.tokenizer)
    seconds = time.perf_counter() - start
    after, swapped = task.score(model), model.config.norm_swap
    losses = {
        name: before[name] - after[name] if name in HIGHER_IS_BETTER else after[name] - before[name] for name in before
    }
    return {
        "task": args.of_training()["dataset_name"],
        "model": f"{args.family}-{args.layers}x{args.hidden_size}",
        "norm": swapped["norms"][0]["norm"],
        "seed": args.seed,
        "metrics": after,
        "before": before,
        "relative_loss_percent": {name: 100 * loss / (before[name] or math.nan) for name, loss in losses.items()},
        "worst_r2": min(swapped["calibration"].values()),
        "calibration": {"examples": len(rows), "inputs": kind, "seconds": seconds, "threads": torch.get_num_threads()},
        "norm_swap": swapped,
        "arguments": args.of_training(),
        **describe_environment(),
    }
