"""What has the shape of an id on the Hub, and which of these a text may name."""

import re

from tests.helpers.persistence import ROOT


# Ids that a text may name: all of these exist, and the reason says what for.
KNOWN = {
    "Helsinki-NLP/opus-mt-en-de": "the Marian model of the examples",
    "Helsinki-NLP/opus-mt-roa-en": "the Marian model that the recipe of translation goes on from",
    "Salesforce/wikitext": "WikiText, for language models",
    "SetFit/TREC-QC": "the questions of TREC, for classification",
    "bentrevett/multi30k": "Multi30k, for translation",
    "google-bert/bert-base-cased": "BERT, for named entities",
    "google-bert/bert-base-uncased": "BERT, the model of most examples",
    "google/vit-base-patch16-224": "ViT, for images",
    "google/vit-base-patch16-224-in21k": "the ViT that the recipe of images goes on from",
    "leondz/wnut_17": "WNUT-17, for named entities",
    "lhoestq/conll2003": "CoNLL-2003, for named entities",
    "nyu-mll/glue": "GLUE",
    "openai-community/gpt2": "GPT-2",
    "ptb-text-only/ptb_text_only": "Penn Treebank, for language models",
    "sentence-transformers/all-MiniLM-L6-v2": "the model that the cards were fine-tuned from",
    "stanfordnlp/imdb": "IMDB, for classification",
    "strombergnlp/broad_twitter_corpus": "the Broad Twitter Corpus, for named entities",
    "textattack/bert-base-uncased-SST-2": "a BERT that is fine-tuned already, for calibration",
    "uoft-cs/cifar10": "CIFAR-10, for images",
    "wmt/wmt14": "WMT14, for translation",
    "wmt/wmt16": "WMT16, for translation",
}
# What has the shape of an id and is none.
OTHERS = {
    "1/n": "a formula",
    "1/width": "a formula",
    "dL/dy": "a formula",
    "OUTPUT/onnx": "a folder in the one that an argument names",
    "NAMESPACE/NAME": "the form of an id, in an error",
    "TB/s": "a unit",
}
PLACEHOLDER = "<your-namespace>/"
PART = r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*"
# Two names and a slash, that are not a part of a longer path, of a pattern or of a placeholder.
SHAPE = re.compile(rf"(?<![\w./:@$<>*{{}}~-]){PART}/{PART}(?![\w*<>${{}}/-]|\.\w)")
ADDRESS = re.compile(rf"(?:huggingface\.co|hf\.co|hf:/)/(?:datasets/|spaces/)?({PART}/{PART})")
# A folder that is written to is no id; one that is loaded is one where it is missing.
WRITTEN = re.compile(r"(\boutput_(?:dir|file)(?:: str = \w+\(.*?default=|[ =:]+)[\"']?)[\w./-]+")


def is_in_repository(name, folder):
    """Whether `name` is a file here, or the beginning of the names of some results."""
    return any((home / name).exists() for home in (ROOT, folder)) or any((ROOT / "results").rglob(f"{name}-*"))


def unknown_ids(text, folder=ROOT):
    """What has the shape of an id in `text`, and is neither a known id nor a file of the repository."""
    text = WRITTEN.sub(r"\1", text)
    found = {*SHAPE.findall(text), *ADDRESS.findall(text)}
    return {name for name in found - KNOWN.keys() - OTHERS.keys() if not is_in_repository(name, folder)}
