"""A tiny stock checkpoint with its tokenizer, and texts for it."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
)

from tests.helpers.models import VOCABULARY, tiny_model


# Those that may be special tokens are in brackets: they are found inside of words, too.
WORDS = [f"w{number}" if 5 <= number < VOCABULARY - 2 else f"[{number}]" for number in range(VOCABULARY)]
TEXTS = [" ".join(WORDS[5 + (7 * i + j * (1 + i % 5)) % 30] for j in range(3 + i % 9)) for i in range(60)]


def save_stock(folder, family="bert", change=lambda model: None):
    """A tiny stock checkpoint with its tokenizer."""
    model = tiny_model(family).eval()
    change(model)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": WORDS[-1]} if family == "gpt2" else {"pad_token": WORDS[model.config.pad_token_id]}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=WORDS[2], **special).save_pretrained(folder)
    return str(folder)
