"""What the recipes share: arguments, errors of one sentence, and the record of a run."""

import dataclasses
import difflib
import json
import math
import os
import shlex
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, HfArgumentParser, TrainerState, set_seed
from transformers.utils import ENV_VARS_TRUE_VALUES

from hf_normswap import ProgressiveSwapCallback, convert_norms, get_norm, reestimate_statistics, sample_batches
from hf_normswap.reporting.results import compare_results, describe_environment, write_result
from hf_normswap.training.checkpoints import LAST_FILE, check_checkpoint, find_last_checkpoint


FROM_SCRATCH = ("bert", "gpt2", "roberta")
PLACEMENTS = ("post", "pre", "deep", "sub", "peri", "rskip")
HELD_OUT = "held_out"  # the split that is a share of the training split
DEBUG = "HF_NORMSWAP_DEBUG"  # 1 shows the traceback of an error
LOADED = ("model_name_or_path", "dataset_name")  # options that take an id on the Hub or a folder


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model to start from."})
    norm: str | None = field(default=None, metadata={"help": "Norm to swap in; LayerNorm if not given."})
    norm_options: dict | str | None = field(default=None, metadata={"help": "Options of the norm, as JSON."})
    where: list[str] | None = field(
        default=None, metadata={"help": "Which norms to swap; those of the blocks if not given."}
    )
    placement: str | None = field(
        default=None,
        metadata={"help": "Where the norms of the blocks stand; as in the model if not given.", "choices": PLACEMENTS},
    )
    calibrate: int = field(
        default=0,
        metadata={"help": "Training examples that the swapped norms are fitted on, without labels; 0 fits none."},
    )
    progressive: float = field(
        default=0.0,
        metadata={"help": "Let LayerNorm give way to the norm over this share of the training; 0 does not."},
    )
    convert: int = field(
        default=0,
        metadata={
            "help": "Training examples that all norms, or those of `where`, become fixed maps on after the training, "
            "without labels; 0 leaves them LayerNorms."
        },
    )
    distill: int = field(default=0, metadata={"help": "Steps of a distillation after that conversion."})
    reestimate: int = field(
        default=0,
        metadata={
            "help": "Training examples that running statistics are estimated on once more after the training, without "
            "labels; 0 leaves them as the training did."
        },
    )
    early_stopping: int = field(
        default=0,
        metadata={"help": "Evaluations in a row without a better score that end the training; 0 never does."},
    )

    def __post_init__(self):
        self.norm_options = read_json_object("norm_options", self.norm_options)
        if self.calibrate < 0:
            raise ValueError(f"calibrate is a number of examples, not {self.calibrate}.")
        if not 0 <= self.progressive <= 1:
            raise ValueError(f"progressive is a share of the training between 0 and 1, not {self.progressive}.")
        if self.progressive and self.calibrate:
            raise ValueError("calibrate and progressive are two ways to one end: choose one of them.")
        if self.convert < 0 or self.distill < 0:
            raise ValueError(
                f"convert and distill are numbers of examples and steps, not {self.convert} and {self.distill}."
            )
        if self.distill and not self.convert:
            raise ValueError("distill trains a converted model: pass convert, too.")
        if self.convert and self.norm and get_norm(self.norm) is not get_norm("layernorm"):
            raise ValueError(f"convert replaces LayerNorms after the training: leave out norm={self.norm}.")
        if self.reestimate < 0:
            raise ValueError(f"reestimate is a number of examples, not {self.reestimate}.")
        if self.reestimate and "batch" not in get_norm(self.norm or "layernorm").scope:
            raise ValueError(
                f"{self.norm or 'layernorm'} has no running statistics: leave out reestimate, or pass another norm."
            )
        if self.early_stopping < 0:
            raise ValueError(f"early_stopping is a number of evaluations, not {self.early_stopping}.")


@dataclass
class ScratchArguments(ModelArguments):
    """Of recipes that train from scratch, too."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model to start from; none trains from scratch."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "Sizes and the like of a model from scratch, as JSON."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.config_overrides = read_json_object("config_overrides", self.config_overrides)
        if hasattr(self, "model_type") and (self.model_name_or_path is None) == (self.model_type is None):
            raise ValueError("Say either model_name_or_path, to go on, or model_type, to start from scratch.")


@dataclass
class TextScratchArguments(ScratchArguments):
    """Of recipes that train a tokenizer from scratch, too."""

    vocab_size: int = field(default=8000, metadata={"help": "Tokens of a tokenizer from scratch."})


@dataclass
class FamilyArguments(TextScratchArguments):
    """Of recipes that train a model of one of several families from scratch, too."""

    model_type: str | None = field(
        default=None, metadata={"help": "Family of a model from scratch.", "choices": FROM_SCRATCH}
    )
    vocabulary: str = field(
        default="pieces",
        metadata={"help": "What the tokens of a model from scratch are.", "choices": ["pieces", "words"]},
    )


@dataclass
class SplitArguments:
    """Of recipes that score a split of a data set with labels, which may be a share of the training split."""

    validation_split: str | None = field(
        default=None, metadata={"help": "The split to score; that named validation if not given."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Score this share of the training split instead, which is held out."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of that share."})
    test_split: str | None = field(default=None, metadata={"help": "A split to score in the end too, such as test."})

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is a share of the training split, not {self.validation_share}.")
        if self.validation_share and self.validation_split:
            raise ValueError("validation_share holds out a part of the training split: leave out validation_split.")

    @property
    def scored_splits(self):
        """The splits to score, by the prefix of their scores; early stopping looks at the first one."""
        validation = HELD_OUT if self.validation_share else self.validation_split or "validation"
        return {"": validation} | ({"test_": self.test_split} if self.test_split else {})


def read_json_object(name, value):
    """The object that the option `name` gives as JSON; the shell gives a string, a YAML file more likely an object."""
    try:
        return dict(json.loads(value) if isinstance(value, str) else value or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no JSON object ({error}): {value}") from error


def make_callbacks(model_args):
    """The callbacks of a progressive swap and of early stopping, if the arguments ask for them."""
    callbacks = [ProgressiveSwapCallback(model_args.progressive)] if model_args.progressive else []
    if model_args.early_stopping:
        callbacks.append(EarlyStoppingCallback(model_args.early_stopping))
    return callbacks


class _Parser(HfArgumentParser):
    def error(self, message):  # argparse would print the hundred options of the usage first
        raise ValueError(message)


def parse_arguments(groups, argv=None):
    """
    Reads the dataclasses `groups` from `[config.yaml] [--option value ...]`. An option has the same name in Python, in
    the YAML file and in the shell, and the shell has the last word.

    Returns the dataclasses, and a dictionary of the options that were given.
    """
    argv = _take_debug(sys.argv[1:] if argv is None else list(argv))
    if argv and not argv[0].startswith("-"):
        argv[:1] = _read_yaml(argv[0])
    parser = _Parser(groups, allow_abbrev=False)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    names = [item.name for group in groups for item in dataclasses.fields(group)]
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"There is no option {name!r}" + (f": did you mean {close[0]!r}?" if close else "."))
    for group in parsed:
        for name in LOADED:
            if isinstance(value := getattr(group, name, None), str):
                setattr(group, name, explicit_folder(value))
    explicit_args = {item.split("=")[0].lstrip("-").replace("-", "_") for item in argv if item.startswith("--")}
    return *parsed, {name: getattr(group, name) for group in parsed for name in vars(group) if name in explicit_args}


def _take_debug(argv):
    """
    The options without a bare `--debug`, which shows the traceback of every error from here on. With a value the
    option is that of `transformers.TrainingArguments`.
    """
    bare = [word == "--debug" and after.startswith("--") for word, after in zip(argv, [*argv[1:], "--"])]
    if any(bare):
        os.environ[DEBUG] = "1"
    return [word for word, is_bare in zip(argv, bare) if not is_bare]


def explicit_folder(name):
    """
    `name`, with a leading `./` where it is a folder. A relative path without it has the form of an id on the Hub,
    which anyone may register, and the cards of the results must not name one.
    """
    is_relative = not name.startswith((".", "~")) and not os.path.isabs(name)
    return f"./{name}" if is_relative and os.path.isdir(name) else name


def _with_explicit_folders(argv):
    """A command line with its folders as `explicit_folder` writes them."""
    for before, word in zip(["", *argv], argv):
        start = word[: word.index("=") + 1] if word.startswith("--") and "=" in word else ""
        option = (start or before).strip("-=").replace("-", "_")
        yield start + explicit_folder(word[len(start) :]) if option in LOADED else word


def _read_yaml(path):
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(f"{path} is no YAML file of options.")
    argv = []
    for name, value in options.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    return argv


@contextmanager
def one_sentence_errors(kinds=(ImportError, OSError, ValueError)):
    """
    Ends the recipe with one sentence and exit code 2 for what its user can cure: by default, before training. The
    traceback stands in front of the sentence with `--debug` or `HF_NORMSWAP_DEBUG=1`.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get(DEBUG, "").upper() in ENV_VARS_TRUE_VALUES:
            traceback.print_exception(error)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        raise SystemExit(2) from None


def parse_and_seed(groups, argv):
    """Reads and checks the options of a recipe, and seeds all that is random, such as the head of a model."""
    *parsed, explicit_args = parse_arguments(groups, argv)
    training_args = parsed[-1]
    if "output_dir" not in explicit_args:
        training_args.output_dir = explicit_args["output_dir"] = name_output(*parsed, argv)
    check_processes(training_args)
    if (parsed[0].convert or parsed[0].reestimate) and training_args.world_size > 1:
        raise ValueError("convert and reestimate run in one process: train without them, then call them on the model.")
    checkpoint = find_checkpoint(training_args)
    prepare_early_stopping(parsed[0].early_stopping, training_args, checkpoint)
    set_seed(training_args.seed)
    return *parsed, explicit_args, checkpoint


def name_output(model_args, data_args, training_args, argv):
    """The default folder of a run: its task, and what was said of norm and placement, and its seed."""
    argv = sys.argv[1:] if argv is None else argv
    config = Path(argv[0]).stem if argv and not argv[0].startswith("-") else None
    task = config or getattr(data_args, "task", None) or Path(data_args.dataset_name).name
    norm = model_args.norm and get_norm(model_args.norm).norm_name
    return "./outputs/" + "-".join(filter(None, [task, norm, model_args.placement, str(training_args.seed)]))


def check_processes(training_args):
    """Several command lines of launchers start processes that do not know of each other, or one instead of many."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if training_args.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched but {training_args.world_size} would train together: without GPUs, "
            "set ACCELERATE_USE_CPU=true or pass --use_cpu."
        )
    # accelerate sets the address when it was asked for several processes, and has no CPU launcher for them.
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError("accelerate started one process of several: launch on CPUs with torchrun and --use_cpu.")


def prepare_early_stopping(patience, training_args, checkpoint):
    """A resumed run counts on from where it was, and does not go on if it had stopped."""
    if not patience:
        return
    if not training_args.load_best_model_at_end:
        raise ValueError(
            "early_stopping returns the best checkpoint: pass load_best_model_at_end, and an eval_strategy and a "
            "save_strategy that are the same."
        )
    training_args.restore_callback_states_from_checkpoint = True
    if checkpoint:
        state = TrainerState.load_from_json(str(Path(checkpoint, LAST_FILE)))
        counted = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        if counted.get("early_stopping_patience_counter", 0) >= patience:
            training_args.max_steps = state.global_step


def find_checkpoint(training_args):
    """
    The checkpoint that `--resume_from_checkpoint` names; `true` is the last whole one of the output folder, `auto`
    too, or none where there is none yet.
    """
    path = training_args.resume_from_checkpoint
    if path is None:
        return None
    if path.lower() in ("true", "auto"):
        last = find_last_checkpoint(training_args.output_dir)
        if last is None and path.lower() == "auto":
            return None
        path = last
    check_checkpoint(path or training_args.output_dir)
    return path


def show_penalty_weights(trainer, tokens):
    """
    Says what the weights of RBN's penalty are in the convention of its paper, whose loss is a sum over tokens: as many
    times larger as a micro-batch has `tokens`. The distance `relative` is not in the paper.
    """
    if not tokens:
        return
    for norm in trainer.model.modules():
        if isinstance(norm, get_norm("rbn")) and norm.distance != "relative" and trainer.is_world_process_zero():
            for name in ("lambda_mean", "lambda_var"):
                value = getattr(norm, name)
                print(f"RBN: {name} {value:g} of a mean loss is {value * tokens:g} of a sum over {tokens} tokens")
            return


def score_splits(trainer, scored, compute_metrics):
    """The scores of several splits, each with the prefix of its split."""
    scores = {prefix: compute_metrics(trainer.predict(split)) for prefix, split in scored.items()}
    return {prefix + name: value for prefix, found in scores.items() for name, value in found.items()}


def convert_trained(trainer, model_args):
    """Converts the trained model in place, on batches as it was trained on. Returns what the record says of it."""
    report = convert_norms(
        model_in_evaluation(trainer),
        take_batches(trainer, model_args.convert),
        where=model_args.where or "all",
        distill_steps=model_args.distill,
        seed=trainer.args.seed,
    )
    print(report)
    return {"conversion": dataclasses.asdict(report)}


def reestimate_trained(trainer, model_args):
    """Gives the norms of the trained model the statistics of batches as it was trained on, in place."""
    batches = take_batches(trainer, model_args.reestimate)
    reestimate_statistics(model_in_evaluation(trainer), batches)
    return {"reestimation": {"examples": sum(len(batch["labels"]) for batch in batches)}}


# What is done to a trained model, by its option: the function, and the prefix of the scores, which is the folder, too.
AFTERWARDS = {"convert": (convert_trained, "converted"), "reestimate": (reestimate_trained, "reestimated")}


def take_batches(trainer, number):
    """Batches of the training with about `number` examples."""
    loader = trainer.get_train_dataloader()
    return sample_batches(loader, math.ceil(number * len(loader) / len(trainer.train_dataset)))


def model_in_evaluation(trainer):
    """The trained model in float32: mixed precision gives it another forward."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()


def train_and_record(trainer, task, model_args, data_args, data, explicit_args, score, checkpoint):
    """
    Trains, saves the model, and writes and prints the result with the metrics that `score()` returns: once more for
    what is done to the trained model, which is saved in a folder of its own.
    """
    with one_sentence_errors((OSError, SafetensorError)):  # a full disk
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
    metrics = score()
    if trainer.is_world_process_zero():
        examples = {
            "train_examples": len(data["train"]),
            "eval_examples": sum(map(len, data.values())) - len(data["train"]),
        }
        arguments = {"dataset_name": data_args.dataset_name, **examples, **explicit_args}
        family = trainer.model.config.model_type.removeprefix("normswap_")
        name = model_args.model_name_or_path or f"{family} from scratch"
        path = Path(trainer.args.output_dir, "result.json")
        result = make_result(task, name, trainer, metrics, arguments)
        write_result(result, path)  # what follows may fail
        for option, (change, prefix) in AFTERWARDS.items():
            if getattr(model_args, option):
                with one_sentence_errors():
                    result |= change(trainer, model_args)
                trainer.args.output_dir = str(path.parent / prefix)  # of all that is written from here on
                trainer.save_model()
                result["metrics"] |= {f"{prefix}_{name}": value for name, value in score().items()}
                write_result(result, path)
        compare_results([result]).show()


def make_result(task, model_name, trainer, metrics, arguments):
    """The record of one run (see `hf_normswap.reporting.results`)."""
    return {
        "task": task,
        **describe_run(trainer.model, model_name, trainer.args.seed, trainer.args.world_size),
        "metrics": metrics,
        "arguments": arguments,
        "history": trainer.state.log_history,
    }


def describe_run(model, model_name, seed, processes):
    """What was run, on what, and how to repeat it."""
    norm_swap = model.config.norm_swap
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    options = shlex.join(_with_explicit_folders(sys.argv[1:]))
    placement = {"placement": norm_swap["placement"]} if "placement" in norm_swap else {}
    return {
        "model": Path(model_name).name if os.path.isdir(model_name) else model_name,
        **placement,
        "norm": " + ".join(dict.fromkeys(entry["norm"] for entry in norm_swap["norms"])),
        "norm_swap": norm_swap,
        "seed": seed,
        "command": f"{launcher} -m recipes.{Path(sys.argv[0]).stem} {options}".strip(),
        **describe_environment(),
    }
