"""Real text that comes with every Python: sentences of its language reference, and the topic that each is from."""

import random
import re
from pydoc_data.topics import topics as PAGES

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


# Which pages make a topic. Pages that are part of a longer one are left out, and so are those of a few lines.
TOPICS = {
    "special methods": ["specialnames"],
    "compound statements": ["compound"],
    "simple statements": ["assert", "assignment", "global", "import", "nonlocal", "pass", "raise", "return", "yield"],
    "expressions": ["binary", "booleans", "calls", "comparisons", "operator-summary", "slicings", "subscriptions"],
    "types": ["types", "objects"],
    "debugger": ["debugger"],
    "string methods": ["string-methods"],
    "string formatting": ["formatstrings"],
    "sequences": ["typesseq"],
    "mappings": ["typesmapping"],
    "names": ["execmodel", "identifiers"],
}


def paragraphs(page):
    """Yields the prose of a page, a list of sentences for each paragraph."""
    page = re.sub(r"^.*\n *[*=\-~^]{3,}$", "", page, flags=re.MULTILINE)  # a heading names the topic
    for block in re.split(r"\n\s*\n", page):
        if "::=" in block or ">>>" in block or block.lstrip().startswith(("+", "|")):  # grammar, code, tables
            continue
        text = re.sub(r'\[\d+\]|[*"“”]', "", " ".join(block.split()))
        text = re.sub(r"^(\d+\.|-|Note:|Warning:)\s+", "", text)
        yield [
            sentence
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
            if re.match(r"[A-Z].*\.$", sentence)
            and len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 6
            and not re.match(r"(New|Changed|Added|Deprecated) (in|since)|See also", sentence)
        ]


def load_data():
    """
    Returns the training and the dev sentences. No paragraph is in both, and no sentence of one is a near-duplicate of
    one of the other: the reference repeats itself often, word for word or with another name in the same sentence.
    """
    rng = random.Random(0)
    rows = []
    for label, pages in enumerate(TOPICS.values()):
        for page in pages:
            for paragraph in paragraphs(PAGES.get(page, "")):
                split = "dev" if rng.random() < 0.25 else "train"
                rows += [(sentence, label, split) for sentence in paragraph]
    texts, labels, splits = map(np.array, zip(*rows))

    words = CountVectorizer(binary=True, token_pattern="[a-z]+", dtype=float).fit_transform(texts)
    shared = (words @ words.T).toarray()
    counts = shared.diagonal()
    near = shared / (counts[:, None] + counts - shared) >= 0.6
    # Of near-duplicates under one topic the first stays, of those under several topics none.
    keep = ~(np.tril(near, -1) | (near & (labels[:, None] != labels))).any(axis=1)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))})
    for split in ("train", "dev"):
        chosen = keep & (splits == split)
        yield Dataset.from_dict({"text": texts[chosen].tolist(), "label": labels[chosen].tolist()}, features)


def score_baselines(train, dev):
    majority = np.bincount(train["label"]).argmax()
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    words.fit(train["text"], train["label"])
    return {
        "majority class": float(np.mean(np.array(dev["label"]) == majority)),
        "TF-IDF + logistic regression": float(words.score(dev["text"], dev["label"])),
    }
