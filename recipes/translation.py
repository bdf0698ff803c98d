"""
Trains a Marian model with swapped norms to translate, from scratch or further, and scores it by BLEU and chrF.

    python -m recipes.translation recipes/configs/translation/multi30k.yaml --norm rbn
    python -m recipes.translation --dataset_name wmt/wmt16 --dataset_config_name ro-en --source ro --target en \\
        --norm powernorm --where encoder --model_name_or_path Helsinki-NLP/opus-mt-roa-en

The data set has a column `translation` with a text in each language, as those of WMT have. Without
--model_name_or_path a model is trained from scratch, with a tokenizer of both languages trained on the same text.
Options are those of the dataclasses below and of `transformers.Seq2SeqTrainingArguments`, in a YAML file, in the shell
or in both. The output folder then holds the model, the tokenizer, the translations and `result.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sacrebleu.metrics import CHRF
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, MarianConfig, MarianMTModel

from hf_normswap import NormSwapSeq2SeqTrainer, NormSwapSeq2SeqTrainingArguments
from hf_normswap.metrics import SacrebleuMetric
from recipes.common import (
    TextScratchArguments,
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    show_penalty_weights,
    train_and_record,
)
from recipes.loading import apply_norm_args, load_splits, load_swapped
from recipes.ngram import limit_attention
from recipes.token_batches import TokenBatches
from recipes.vocabulary import train_tokenizer


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": "Data set of the Hub, or a local folder laid out like one."})
    source: str = field(metadata={"help": "Language to translate from, as the data set calls it."})
    target: str = field(metadata={"help": "Language to translate to."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this number of tokens."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a batch and device, in place of a number of sentences."}
    )
    test_split: str | None = field(default=None, metadata={"help": "A split to score in the end too, such as test."})
    ngram: int | None = field(
        default=None, metadata={"help": "Tokens of the target that its tokens attend to: themselves and those before."}
    )


def load_pairs(data_args):
    """The splits, with nothing but a column for each of the two languages."""
    splits = ["train", "validation", *filter(None, [data_args.test_split])]
    data = load_splits(data_args.dataset_name, data_args.dataset_config_name, splits, ["translation"])
    languages = data_args.source, data_args.target
    for split, rows in data.items():
        if len(rows) == 0:
            raise ValueError(f"The split {split!r} of {data_args.dataset_name!r} is empty.")
        if missing := [language for language in languages if language not in rows[0]["translation"]]:
            known = ", ".join(rows[0]["translation"])
            raise ValueError(f"The split {split!r} has no language {missing[0]!r}, only {known}.")
    columns = data["train"].column_names
    return data.map(
        lambda row: {language: row["translation"][language] for language in languages},
        remove_columns=columns,
        desc="Reading pairs",
    )


def make_model(model_args, data_args, data):
    """A model from scratch, with a tokenizer trained on both languages of the training split."""
    texts = (text for batch in data["train"].iter(1000) for texts in batch.values() for text in texts)
    tokenizer = train_tokenizer(texts, "$A </s>", data_args.max_length, model_args.vocab_size)
    config = MarianConfig(
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": data_args.max_length,
            "scale_embedding": True,
            "decoder_start_token_id": tokenizer.pad_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "forced_eos_token_id": tokenizer.eos_token_id,
            **model_args.config_overrides,
        }
    )
    return tokenizer, apply_norm_args(MarianMTModel(config), tokenizer, model_args, data["train"], is_new=True)


def tokenize(data, tokenizer, data_args):
    def encode(rows):
        return tokenizer(
            rows[data_args.source],
            text_target=rows[data_args.target],
            truncation=True,
            max_length=data_args.max_length,
        )

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


class TranslationTrainer(NormSwapSeq2SeqTrainer):
    """Trains on batches of `max_tokens` tokens, if that is given."""

    def __init__(self, *args, max_tokens=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens

    def get_train_dataloader(self):
        if self.max_tokens is None:
            return super().get_train_dataloader()
        rows = self.train_dataset
        lengths = [max(map(len, pair)) for pair in zip(rows["input_ids"], rows["labels"], strict=True)]
        batches = TokenBatches(lengths, self.max_tokens, self.args.seed, self.args.world_size)
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator))


def score_texts(found, references):
    """BLEU with its signature, and chrF."""
    bleu = SacrebleuMetric().compute(predictions=found, references=references)
    chrf = CHRF()
    scores = {"bleu": bleu["score"], "chrf": chrf.corpus_score(found, [references]).score}
    return scores, {"bleu": bleu["signature"], "chrf": str(chrf.get_signature())}


def main(argv=None):
    with one_sentence_errors():
        groups = (TextScratchArguments, DataArguments, NormSwapSeq2SeqTrainingArguments)
        model_args, data_args, training_args, explicit_args, checkpoint = parse_and_seed(groups, argv)
        data = load_pairs(data_args)
        if model_args.model_name_or_path:
            tokenizer, model = load_swapped(AutoModelForSeq2SeqLM, model_args, data["train"])
        else:
            tokenizer, model = make_model(model_args, data_args, data)
        positions = model.config.max_position_embeddings
        if data_args.max_length > positions:
            raise ValueError(f"max_length is {data_args.max_length}, but the model has {positions} positions.")
        if data_args.ngram is not None:
            limit_attention(model, data_args.ngram)
        with training_args.main_process_first(desc="tokenizing"):
            encoded = tokenize(data, tokenizer, data_args)
        training_args.predict_with_generate = explicit_args.get("predict_with_generate", True)
        training_args.generation_max_length = training_args.generation_max_length or data_args.max_length
        if data_args.max_tokens:
            training_args.accelerator_config.even_batches = False  # batches are not of one size

        def decode(ids):
            ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
            return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

        def compute_metrics(evaluated):
            return score_texts(decode(evaluated.predictions), decode(evaluated.label_ids))[0]

        trainer = TranslationTrainer(
            model,
            training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model),
            compute_metrics=compute_metrics if training_args.predict_with_generate else None,
            callbacks=make_callbacks(model_args),
            max_tokens=data_args.max_tokens,
        )
        show_penalty_weights(trainer, data_args.max_tokens)

    def score():
        metrics, texts = {}, {}
        trainer.args.predict_with_generate = True
        for split, prefix in [("validation", ""), (data_args.test_split, "test_")]:
            if split is None:
                continue
            # In the order of the data: the references are its texts, not what a tokenizer makes of them.
            trainer.args.train_sampling_strategy = "random"
            found = decode(trainer.predict(encoded[split]).predictions)
            scores, explicit_args["signatures"] = score_texts(found, data[split][data_args.target][:])
            metrics |= {prefix + name: value for name, value in scores.items()}
            texts[split] = found
        if trainer.is_world_process_zero():
            path = Path(training_args.output_dir, "translations.json")
            path.write_text(json.dumps(texts, indent=2, ensure_ascii=False), encoding="utf-8")
        return metrics

    task = f"{Path(data_args.dataset_name).name} {data_args.source}-{data_args.target}"
    train_and_record(trainer, task, model_args, data_args, data, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
