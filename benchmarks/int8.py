"""
What 8 bits cost a model with LayerNorms, the converted one and the folded one, in ONNX Runtime.

    python benchmarks/int8.py --task sst2 --model ./outputs/sst2-layernorm-0
    python benchmarks/int8.py --task wnut17 --model ./outputs/wnut17-layernorm-0 --dataset_name leondz/wnut_17
    python benchmarks/int8.py --task stsb --model sentence-transformers/all-MiniLM-L6-v2

All norms are converted with training texts. Each form is exported in float32 and in 8 bits, dynamic and static, and
scored: accuracy on SST-2, the F1 of entities on the test split of WNUT-17, the Spearman correlation of the cosines of
pooled embeddings on STS-B. The error is `‖Δ‖₂ / ‖outputs‖₂` against the same form in float32. The folded model
computes what the converted one does.

In the end each graph and that of LayerNorm in float32 take turns on batches of 32 examples, on one thread. The record
has the median of the ratios of their times, and its 95 % interval: run nothing else meanwhile.
"""

import copy
import dataclasses
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from datasets import load_dataset
from timing import make_clock, median_with_interval, take_turns
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    HfArgumentParser,
)
from transformers.hf_argparser import HfArg

from hf_normswap import convert_norms, export_onnx, fold_norms, restore_norm
from hf_normswap.metrics import GlueMetric, SeqevalMetric
from hf_normswap.reporting.results import describe_environment, write_result


FORMS = {"converted": None, "folded": {}, "folded, affine_every=4": {"affine_every": 4}}


@dataclass
class Arguments:
    task: str = dataclasses.field(metadata={"help": "What to score.", "choices": ["sst2", "wnut17", "stsb"]})
    model: str = dataclasses.field(metadata={"help": "Folder or Hub id of the model with LayerNorms."})
    dataset_name: str = HfArg(help="Data set of the Hub, or a local folder laid out like one.", default="nyu-mll/glue")
    output_dir: str = HfArg(help="Folder for the record.", default="outputs/int8")
    norm: str = HfArg(help="Norm to convert to.", default="batchnorm")
    texts: int = HfArg(help="Training texts to convert with, and to find the ranges with.", default=512)
    pairs: int = HfArg(help="Pairs of runs that time a graph.", default=40)
    seed: int = HfArg(help="Seed of the choice of texts, and of the model in the name of the record.", default=0)


class Sentiment:
    """Accuracy on SST-2."""

    model_class, metric = AutoModelForSequenceClassification, "accuracy"

    def __init__(self, args, tokenizer):
        data = load_dataset(args.dataset_name, "sst2")
        # Training examples are phrases, those of the validation split sentences: these are nearer to them.
        self.texts = data["train"].filter(lambda row: row["sentence"].rstrip().endswith("."))["sentence"]
        self.encoded = tokenizer(list(data["validation"]["sentence"]), truncation=True, max_length=128)
        self.labels = np.array(data["validation"]["label"])

    def read(self, output, mask):
        return output

    def score(self, outputs, model):
        return float((np.stack(outputs).argmax(-1) == self.labels).mean())


class Entities:
    """F1 of entities on the test split of WNUT-17."""

    model_class, metric = AutoModelForTokenClassification, "f1"

    def __init__(self, args, tokenizer):
        data = load_dataset(args.dataset_name)
        self.texts = [" ".join(words) for words in data["train"]["tokens"]]
        words = list(data["test"]["tokens"])
        self.encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
        self.tags, self.names = data["test"]["ner_tags"], data["test"].features["ner_tags"].feature.names

    def read(self, output, mask):
        return output[: mask.sum()]

    def score(self, outputs, model):
        found, true = [], []
        for index, (logits, tags) in enumerate(zip(outputs, self.tags, strict=True)):
            words = self.encoded.word_ids(index)
            first = [
                at
                for at, (word, before) in enumerate(zip(words, [None, *words[:-1]], strict=True))
                if word is not None and word != before
            ]
            found.append([model.config.id2label[label] for label in logits[first].argmax(-1)])
            true.append([self.names[tags[words[at]]] for at in first])
        return SeqevalMetric().compute(predictions=found, references=true)["overall_f1"]


class Similarity:
    """Spearman correlation of cosines with the scores of STS-B, validation split."""

    model_class, metric = AutoModel, "spearmanr"

    def __init__(self, args, tokenizer):
        data = load_dataset(args.dataset_name, "stsb")
        self.texts = sorted({*data["train"]["sentence1"], *data["train"]["sentence2"]})
        sentences = [*data["validation"]["sentence1"], *data["validation"]["sentence2"]]
        self.encoded = tokenizer(sentences, truncation=True, max_length=128)
        self.labels = data["validation"]["label"]

    def read(self, output, mask):
        return output[mask.astype(bool)].mean(0)

    def score(self, outputs, model):
        embeddings = np.stack(outputs)
        embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
        first, second = np.split(embeddings, 2)
        return GlueMetric("stsb").compute(predictions=(first * second).sum(-1), references=self.labels)["spearmanr"]


TASKS = {"sst2": Sentiment, "wnut17": Entities, "stsb": Similarity}


def open_graph(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(Path(folder, "model.onnx")), options, providers=["CPUExecutionProvider"])


def make_batches(task, tokenizer, size=32):
    """Batches of examples of about the same length, and the numbers of their examples."""
    order = np.argsort([len(ids) for ids in task.encoded["input_ids"]], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        encoded = {name: [values[row] for row in rows] for name, values in task.encoded.items()}
        yield rows, tokenizer.pad(encoded, return_tensors="np")


def feed(session, batch):
    """The outputs of a graph for a batch."""
    return session.run(None, {value.name: batch[value.name].astype(np.int64) for value in session.get_inputs()})[0]


def predict(session, task, tokenizer):
    """What a graph returns for each example."""
    outputs = [None] * len(task.encoded["input_ids"])
    for rows, batch in make_batches(task, tokenizer):
        for row, output, mask in zip(rows, feed(session, batch), batch["attention_mask"], strict=True):
            outputs[row] = task.read(output, mask)
    return outputs


def time_graphs(rows, sessions, task, tokenizer, pairs):
    """Adds to each row how long its graph takes, in times of the first one, on a batch of usual length."""
    batches = [batch for _, batch in make_batches(task, tokenizer)]
    batch = batches[len(batches) // 2]
    first, *others = (functools.partial(feed, session, batch) for session in sessions)
    for row, other in zip(rows[1:], others, strict=True):
        ours, theirs = take_turns(other, first, pairs, make_clock("cpu"))
        row["time"] = [round(value, 3) for value in median_with_interval((ours / theirs).numpy())]
        print(row["form"], row["graph"], row["time"], flush=True)


def relative_error(outputs, exact):
    """`‖Δ‖₂ / ‖exact‖₂` over the outputs for all examples."""
    outputs, exact = (np.concatenate([np.ravel(output) for output in each]) for each in (outputs, exact))
    return float(np.linalg.norm(outputs - exact) / np.linalg.norm(exact))


def measure(model, form, task, texts, tokenizer, exact=None):
    """Rows for the graphs of a model, their sessions, and its outputs in float32, which may be known as `exact`."""
    rows, sessions = [], []
    for bits in ("dynamic", "static") if exact else (False, "dynamic", "static"):
        with tempfile.TemporaryDirectory() as folder:
            options = {"data": texts, "tokenizer": tokenizer, "tolerance": np.inf} if bits else {}
            export_onnx(model, folder, int8=bits, **options)
            sessions.append(open_graph(folder))
            outputs = predict(sessions[-1], task, tokenizer)
            size = sum(Path(folder, name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        exact = exact or outputs
        row = {
            "form": form,
            "graph": bits or "float32",
            "score": 100 * task.score(outputs, model),
            "error": relative_error(outputs, exact),
            "megabytes": round(size / 1e6, 1),
        }
        print(row, flush=True)
        rows.append(row)
    return rows, sessions, exact


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    task = TASKS[args.task](args, tokenizer)
    texts = list(np.random.default_rng(args.seed).permutation(np.array(task.texts, dtype=object))[: args.texts])
    model = task.model_class.from_pretrained(args.model).eval()
    if hasattr(model.config, "norm_swap"):  # the LayerNorm baseline of the recipes
        restore_norm(model)
    rows, sessions, _ = measure(model, "LayerNorm", task, texts, tokenizer)
    convert_norms(model, texts, args.norm, tokenizer=tokenizer)
    exact = None
    for form, options in FORMS.items():
        changed = copy.deepcopy(model)
        if options is not None:
            fold_norms(changed, **options)
        more, opened, exact = measure(changed, form, task, texts, tokenizer, exact)
        rows, sessions = rows + more, sessions + opened
    time_graphs(rows, sessions, task, tokenizer, args.pairs)
    record = {
        "task": args.task,
        "model": "all-MiniLM-L6-v2" + ("" if args.task == "stsb" else ", fine-tuned"),
        "norm": args.norm,
        "seed": args.seed,
        "metrics": {f"{row['form']}, {row['graph']}": row["score"] for row in rows},
        "metric": task.metric,
        "rows": rows,
        "texts": len(texts),
        **describe_environment(),
    }
    print(write_result(record, Path(args.output_dir, f"{args.task}-{args.seed}.json")))


if __name__ == "__main__":
    main()
