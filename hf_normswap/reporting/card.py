"""Model cards, rendered from the results of runs (see `hf_normswap/reporting/results.py`) and from nothing else."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel

from hf_normswap.modeling.configuration_normswap import auto_heads, family_of
from hf_normswap.modeling.norms import get_norm
from hf_normswap.modeling.powernorm import WARMUP_RATIO

from .comparison import compare_results


_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

_PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "translation",
}

_POWERNORM = """@inproceedings{shen2020powernorm,
  title = {{PowerNorm}: Rethinking Batch Normalization in Transformers},
  author = {Shen, Sheng and Yao, Zhewei and Gholami, Amir and Mahoney, Michael W. and Keutzer, Kurt},
  booktitle = {International Conference on Machine Learning},
  year = {2020},
  url = {https://arxiv.org/abs/2003.07845}
}"""
_RMSNORM = """@inproceedings{zhang2019root,
  title = {Root Mean Square Layer Normalization},
  author = {Zhang, Biao and Sennrich, Rico},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019},
  url = {https://arxiv.org/abs/1910.07467}
}"""
_XU = """@inproceedings{xu2019understanding,
  title = {Understanding and Improving Layer Normalization},
  author = {Xu, Jingjing and Sun, Xu and Zhang, Zhiyuan and Zhao, Guangxiang and Lin, Junyang},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019},
  url = {https://arxiv.org/abs/1911.07013}
}"""
_CITATIONS = {
    "powernorm": _POWERNORM,
    "pnv": _POWERNORM,
    "rbn": """@inproceedings{wang2022understanding,
  title = {Understanding the Failure of Batch Normalization for Transformers in {NLP}},
  author = {Wang, Jiaxi and Wu, Ji and Huang, Lei},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  url = {https://arxiv.org/abs/2210.05153}
}""",
    "batchnorm": """@inproceedings{ioffe2015batch,
  title = {Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift},
  author = {Ioffe, Sergey and Szegedy, Christian},
  booktitle = {International Conference on Machine Learning},
  year = {2015},
  url = {https://arxiv.org/abs/1502.03167}
}""",
    "layernorm": """@article{ba2016layer,
  title = {Layer Normalization},
  author = {Ba, Jimmy Lei and Kiros, Jamie Ryan and Hinton, Geoffrey E.},
  journal = {arXiv preprint arXiv:1607.06450},
  year = {2016},
  url = {https://arxiv.org/abs/1607.06450}
}""",
    "rmsnorm": _RMSNORM,
    "layernorm_simple": _XU,
    "adanorm": _XU,
    "rmsnorm_simple": _RMSNORM,
    "scalenorm": """@inproceedings{nguyen2019transformers,
  title = {Transformers without Tears: Improving the Normalization of Self-Attention},
  author = {Nguyen, Toan Q. and Salazar, Julian},
  booktitle = {International Conference on Spoken Language Translation},
  year = {2019},
  url = {https://arxiv.org/abs/1910.05895}
}""",
    "groupnorm": """@inproceedings{wu2018group,
  title = {Group Normalization},
  author = {Wu, Yuxin and He, Kaiming},
  booktitle = {European Conference on Computer Vision},
  year = {2018},
  url = {https://arxiv.org/abs/1803.08494}
}""",
    "dyt": """@inproceedings{zhu2025transformers,
  title = {Transformers without Normalization},
  author = {Zhu, Jiachen and Chen, Xinlei and He, Kaiming and LeCun, Yann and Liu, Zhuang},
  booktitle = {Computer Vision and Pattern Recognition},
  year = {2025},
  url = {https://arxiv.org/abs/2503.10622}
}""",
    "derf": """@article{chen2025stronger,
  title = {Stronger Normalization-Free Transformers},
  author = {Chen, Mingzhi and others},
  journal = {arXiv preprint arXiv:2512.10938},
  year = {2025},
  url = {https://arxiv.org/abs/2512.10938}
}""",
    "batchrenorm": """@inproceedings{ioffe2017batch,
  title = {Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models},
  author = {Ioffe, Sergey},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017},
  url = {https://arxiv.org/abs/1702.03275}
}""",
    "repbn": """@inproceedings{guo2024slab,
  title = {{SLAB}: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
    Normalization},
  author = {Guo, Jialong and Chen, Xinghao and Tang, Yehui and Wang, Yunhe},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  url = {https://arxiv.org/abs/2405.11582}
}""",
    "mabn": """@inproceedings{yan2020towards,
  title = {Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization},
  author = {Yan, Junjie and Wan, Ruosi and Zhang, Xiangyu and Zhang, Wei and Wei, Yichen and Sun, Jian},
  booktitle = {International Conference on Learning Representations},
  year = {2020},
  url = {https://arxiv.org/abs/2001.06838}
}""",
    "unifiednorm": """@inproceedings{yang2022unified,
  title = {Unified Normalization for Accelerating and Stabilizing Transformers},
  author = {Yang, Qiming and others},
  booktitle = {ACM International Conference on Multimedia},
  year = {2022},
  url = {https://github.com/hikvision-research/Unified-Normalization}
}""",
    "instancenorm": """@article{ulyanov2016instance,
  title = {Instance Normalization: The Missing Ingredient for Fast Stylization},
  author = {Ulyanov, Dmitry and Vedaldi, Andrea and Lempitsky, Victor},
  journal = {arXiv preprint arXiv:1607.08022},
  year = {2016},
  url = {https://arxiv.org/abs/1607.08022}
}""",
    "frn": """@inproceedings{singh2020filter,
  title = {Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural Networks},
  author = {Singh, Saurabh and Krishnan, Shankar},
  booktitle = {Computer Vision and Pattern Recognition},
  year = {2020},
  url = {https://arxiv.org/abs/1911.09737}
}""",
    "switchablenorm": """@inproceedings{luo2019differentiable,
  title = {Differentiable Learning-to-Normalize via Switchable Normalization},
  author = {Luo, Ping and Ren, Jiamin and Peng, Zhanglin and Zhang, Ruimao and Li, Jingyu},
  booktitle = {International Conference on Learning Representations},
  year = {2019},
  url = {https://arxiv.org/abs/1806.10779}
}""",
    "attentivenorm": """@inproceedings{li2020attentive,
  title = {Attentive Normalization},
  author = {Li, Xilai and Sun, Wei and Wu, Tianfu},
  booktitle = {European Conference on Computer Vision},
  year = {2020},
  url = {https://arxiv.org/abs/1908.01259}
}""",
}


def render_card(
    results: Iterable[dict[str, Any]],
    *,
    norm: str,
    repo_id: str | None = None,
    folder: str | os.PathLike | None = None,
    auto_class: str = "AutoModelForSequenceClassification",
    title: str | None = None,
    description: str | None = None,
    limits: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """
    Renders the card of a model with swapped norms. Every figure of it comes from `results`.

    Anyone may register a free name on the Hub, and `trust_remote_code=True` runs the code that lies there. So the card
    names an id only where a push gives it. Elsewhere it shows the placeholder `<your-namespace>/NAME`, which does not
    load.

    Args:
        results (`Iterable[dict]`):
            Results on one task: the runs of the model's norm, and those of the norms that it is compared with.
        norm (`str`):
            The norm of the model, as in the results.
        repo_id (`str`, *optional*):
            The id on the Hub that a push gives the model. Do not pass one that nobody has pushed to.
        folder (`str` or `os.PathLike`, *optional*):
            The folder of a model without `repo_id`. The placeholder takes its name, or else that of the model and its
            norm.
        auto_class (`str`, *optional*, defaults to `"AutoModelForSequenceClassification"`):
            The class of transformers that loads it.
        title (`str`, *optional*):
            Title of the card. The model and its norm if not given.
        description (`str`, *optional*):
            What the model is, in Markdown.
        limits (`str`, *optional*):
            What it must not be used for, in Markdown, ahead of what holds for all models with swapped norms.
        license (`str`, *optional*):
            License of the weights.
        language (`str` or list of `str`, *optional*):
            Languages of the text, as in `"en"`.
        base_model (`str`, *optional*):
            Id on the Hub of the model that it was trained from, where the results name a folder.

    Returns:
        `huggingface_hub.ModelCard`: The card; `card.save("README.md")` writes it.

    Raises:
        ValueError: when no result is of the norm, the results are of several tasks or models, `auto_class` is unknown,
            or `repo_id` or `base_model` is no id on the Hub.

    Example:

    ```python
    >>> from hf_normswap.reporting.card import render_card

    >>> swapped = {"norm": "rbn", "options": {"momentum": 0.1}, "modules": ["bert.encoder.layer.0.output.LayerNorm"]}
    >>> result = {
    ...     "task": "rte",
    ...     "model": "bert",
    ...     "norm": "rbn",
    ...     "norm_swap": {"format_version": 1, "norms": [swapped]},
    ...     "seed": 0,
    ...     "metrics": {"accuracy": 0.7},
    ... }
    >>> card = render_card([result], norm="rbn", folder="./outputs/bert-rbn")
    >>> card.data.model_name, card.data.eval_results[0].metric_value
    ('bert-rbn', 0.7)
    >>> 'model_id = "<your-namespace>/bert-rbn"' in card.text
    True

    ```
    """
    results = list(results)
    runs = [result for result in results if result["norm"] == norm]
    if not runs:
        known = ", ".join(dict.fromkeys(result["norm"] for result in results))
        raise ValueError(f"No result is of the norm {norm!r}, only of {known}: pass the runs of the model's norm.")
    if len(tasks := {(result["task"], result["model"]) for result in results}) > 1:
        named = ", ".join(f"{task} with {model}" for task, model in sorted(tasks))
        raise ValueError(
            f"These results are of {len(tasks)} tasks or models ({named}): pass those of one to its card."
        )
    if auto_class not in _PIPELINES:
        raise ValueError(f"auto_class {auto_class!r} is none of {', '.join(_PIPELINES)}: choose one of them.")
    for option, given in {"repo_id": repo_id, "base_model": base_model}.items():
        if given is not None and not _is_id(given):
            raise ValueError(f"{option} {given!r} is no id on the Hub: give one in the form NAMESPACE/NAME.")

    run, recipe = runs[0], _recipe(runs[0])
    swap = run.get("norm_swap") or {}
    base_model = base_model or (run["model"] if _is_id(run["model"]) else None)
    folder = _explicit(folder or f"{Path(run['model']).name}-{norm}")
    name = (repo_id or folder).rpartition("/")[2]
    dataset = recipe.get("dataset_name", run["task"])
    if norm == "powernorm" and recipe:
        recipe = {"norm_warmup_ratio": WARMUP_RATIO} | recipe
    scores = {
        metric: values
        for metric in run["metrics"]
        if (values := [run["metrics"][metric] for run in runs if run["metrics"].get(metric) is not None])
    }
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=_PIPELINES[auto_class],
        license=license,
        language=language,
        base_model=base_model,
        base_model_relation="finetune" if base_model and run["metrics"] else None,
        datasets=[dataset] if dataset and _is_id(dataset) else None,
        tags=["hf_normswap", norm, "custom_code"],
        metrics=list(dict.fromkeys(metric.removeprefix("test_") for metric in scores)) or None,
        eval_results=[
            EvalResult(
                task_type=_PIPELINES[auto_class],
                dataset_type=dataset,
                dataset_name=run["task"],
                dataset_split=_split_of(metric, scores),
                metric_type=metric.removeprefix("test_"),
                metric_name=f"{metric} ({_describe_mean(len(values), len(runs))})" if len(runs) > 1 else metric,
                metric_value=round(fmean(values), 4),
            )
            for metric, values in scores.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=title or f"{run['model']} {'without norms' if norm == 'norm-free' else f'with {norm}'}",
        description=description,
        limits=limits,
        norm=norm,
        model_id=repo_id or f"<your-namespace>/{name}",
        folder=None if repo_id else folder,
        auto_class=auto_class,
        run=run,
        swapped=[
            {**entry, "options": _options(entry), "places": _describe_places(entry["modules"])}
            for entry in swap.get("norms", [])
        ],
        placement=swap.get("placement"),
        calibrated=_describe_range(swap.get("calibration", {}).values()),
        folded=len(swap.get("folded", [])),
        results_table=compare_results(results).to_markdown() if run["metrics"] else None,
        differing=_differing(map(_recipe, results)),
        seeds=", ".join(str(run["seed"]) for run in runs),
        discrepancies=_discrepancies(runs),
        arguments={name: value if isinstance(value, str) else json.dumps(value) for name, value in recipe.items()},
        commands=list(dict.fromkeys(_without_places(run["command"]) for run in runs if "command" in run)),
        citation=_CITATIONS.get(norm),
    )


def card_of_model(
    model: PreTrainedModel, repo_id: str | None = None, results: Iterable[dict[str, Any]] = (), **options
) -> ModelCard:
    """
    Renders the card of a live model: with `results` as [`render_card`], else of what its configuration says of the
    swap alone.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A swapped model.
        repo_id (`str`, *optional*):
            The id on the Hub that a push gives it, as in [`render_card`].
        results (`Iterable[dict]`, *optional*):
            Results on one task, those of its norm among them.
        options:
            Of [`render_card`].

    Returns:
        `huggingface_hub.ModelCard`: The card.

    Raises:
        ValueError: when the model is not swapped, no result is of its norm, or `repo_id` is no id on the Hub.
    """
    record = getattr(model.config, "norm_swap", None)
    if record is None:
        raise ValueError(
            f"This {type(model).__name__} has no swapped norms: swap them first, with swap_norm or normswap swap."
        )
    entries = sorted(record["norms"], key=lambda entry: len(entry["modules"]))
    norm = entries[-1]["norm"] if entries else "norm-free" if record.get("folded") else "layernorm"
    base = _name_of_base(model.name_or_path) or f"{family_of(model.config.model_type)} from scratch"
    run = {"task": None, "model": base, "norm": norm, "norm_swap": record, "seed": None, "metrics": {}}
    auto_classes = [name for name, head in auto_heads(type(model.config)).items() if head == type(model).__name__]
    known = [name for name in auto_classes if name in _PIPELINES]
    return render_card(
        list(results) or [run], norm=norm, repo_id=repo_id, **{"auto_class": (known or ["AutoModel"])[0], **options}
    )


def add_tags(card: ModelCard, tags: str | Iterable[str] | None) -> None:
    """Add tags to those of a card."""
    more = [tags] if isinstance(tags, str) else tags or []
    card.data.tags = list(dict.fromkeys([*card.data.tags, *more]))


def _is_id(name: str) -> bool:
    """Whether `name` is an id on the Hub with its namespace. `./name`, `/name` and a placeholder are none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _name_of_base(name: str) -> str:
    """What a model was loaded from: its id on the Hub, or the mere name of a folder."""
    # A relative path looks like an id, and transformers does not record which of them it was. It prefers a folder, and
    # keeps what came from the Hub in the cache.
    if _is_id(name) and not os.path.isdir(name):
        if Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            return name
    return Path(name).name


def _explicit(folder: str | os.PathLike) -> str:
    """A folder as a path that is no id on the Hub, without its place on somebody's disk."""
    path = Path(os.path.normpath(folder))
    if path.is_absolute() or path.as_posix().startswith((".", "~")):
        path = Path(Path(os.path.abspath(folder)).name)
    return "./" + re.sub(r"[^\w./-]+", "-", path.as_posix())


def drop_local_base(path: str | os.PathLike) -> None:
    """Take a base model that did not come from the Hub out of a card that transformers or PEFT wrote."""
    card = ModelCard.load(path)
    base = card.data.base_model
    if not isinstance(base, str) or (name := _name_of_base(base)) == base:
        return
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.endswith(f":{base}")] or None
    card.text = card.text.replace(f"[{base}](https://huggingface.co/{base})", name)
    card.save(path)


def _split_of(metric: str, metrics: Iterable[str]) -> str | None:
    """The split of a metric, where there are several."""
    if not any(name.startswith("test_") for name in metrics):
        return None
    return "test" if metric.startswith("test_") else "validation"


def _describe_range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}" if values else ""


def _recipe(result: dict) -> dict[str, Any]:
    """The arguments that runs to be compared have in common: not their norm and seed, and no places on a disk."""
    own = {"norm", "norm_options", "seed", "output_dir", "resume_from_checkpoint"}
    return {
        name: value
        for name, value in result.get("arguments", {}).items()
        if name not in own and not (isinstance(value, str) and value.startswith((".", "/", "~")))
    }


def _describe_places(modules: list[str]) -> str:
    """`a.0.b, a.1.b` → "2 × `a.*.b`"."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", module) for module in modules)
    return ", ".join(f"{count} × `{place}`" for place, count in counts.items())


def _without_places(command: str) -> str:
    """A command with the names of files and folders in place of where they lie on somebody's disk."""
    return re.sub(r"(?<![^\s=])[/~][^\s]*/([^\s/]+)", r"\1", command)


def _options(entry: dict) -> dict[str, Any]:
    """All options of a norm, those that are not its own too. `eps` and `bias` are those of the LayerNorm."""
    try:
        defaults = get_norm(entry["norm"]).option_defaults() | get_norm(entry["norm"]).earlier_defaults
    except ValueError:  # a norm of somebody else's
        defaults = {}
    known = {name: value for name, value in defaults.items() if name not in ("eps", "bias")}
    return known | entry["options"]


def _differing(recipes: Iterable[dict]) -> list[str]:
    """Arguments that are not the same in all recipes."""
    recipes = list(recipes)
    return [
        name for name in dict.fromkeys(chain(*recipes)) if any(r.get(name) != recipes[0].get(name) for r in recipes)
    ]


def _describe_mean(count: int, total: int) -> str:
    """Of how many runs a mean is: those that diverged have no score."""
    return f"mean over {total} seeds" if count == total else f"mean over {count} of {total} seeds"


def _discrepancies(runs: list[dict]) -> list[dict[str, float]]:
    """The TID over the training in up to six points, averaged over the runs. A norm without a mean logs none of it."""
    logs = [[entry for entry in run.get("history", []) if entry.get("tid_var_max")] for run in runs]
    points = min(map(len, logs))
    chosen = sorted({round(i * (points - 1) / 5) for i in range(6)}) if points else []
    names = [
        name
        for name in ("tid_mean_max", "tid_var_max")
        if points and all(log[-1].get(name) and all(log[i].get(name) is not None for i in chosen) for log in logs)
    ]
    return [
        {"step": logs[0][i]["step"], **{name: fmean(log[i][name] for log in logs) for name in names}} for i in chosen
    ]
