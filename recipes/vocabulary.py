"""Tokenizers trained on the data of a recipe, for models trained from scratch."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import PreTrainedTokenizerFast


SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def train_tokenizer(texts, template, max_length, vocab_size, words=False):
    """
    A tokenizer trained on `texts`, an iterator: byte-level pieces, or whole `words` between spaces.

    `template` is what stands around a text, such as `"<s> $A </s>"`. The second text of a pair ends with `</s>`, too.
    """
    special = [AddedToken(token, lstrip=True) for token in SPECIAL.values()]
    options = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False}
    if words:
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = WordLevelTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        trainer = BpeTrainer(**options, initial_alphabet=tokenizer.pre_tokenizer.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    if words:
        # A text may have a special token as a word, as Penn Treebank has <unk>. The trainer then numbers it anew, and
        # leaves a number without a token.
        found = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
        tokens = dict.fromkeys([*SPECIAL.values(), *found])
        tokenizer.model = models.WordLevel({token: n for n, token in enumerate(tokens)}, SPECIAL["unk_token"])
        tokenizer.add_special_tokens(special)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B </s>", special_tokens=ids
    )
    options = {"model_max_length": max_length, "model_input_names": ["input_ids", "attention_mask"], **SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
