"""Configurations of swapped models: those of transformers and one field, `norm_swap`, that says what was swapped."""

import functools
import types
from collections.abc import Collection, Mapping

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


FORMAT_VERSION = 1
# The entries of norm_swap with their types in JSON.
REQUIRED_ENTRIES = {"format_version": int, "norms": [{"norm": str, "options": dict, "modules": [str]}]}
OPTIONAL_ENTRIES = {
    "biases": [str],
    "calibration": dict,
    "folded": [str],
    "layer_norm_share": dict,
    "linears": dict,
    "placement": str,
    "untied": [str],
}
# A stock class would load LayerNorms with a mere warning. It raises at a fusion that it does not know, by its name:
# "Unknown fusion type: hf_normswap, ...".
STOCK_CLASS_GUARD = (
    "hf_normswap, whose norms this folder has: load it with an Auto class after `import hf_normswap`, or with "
    "trust_remote_code=True"
)
# See block_placement.py. Those with a norm in front of each sublayer have one behind the last block, too.
PLACEMENTS = ("post", "pre", "deep", "sub", "peri", "rskip")
NORMS_IN_FRONT = ("pre", "sub", "peri")
SCALED_PLACEMENTS = ("deep", "sub")  # a new model has other initial weights in them
# Where the norms of the blocks stand in the models that `set_norm_placement` can change.
STOCK_PLACEMENTS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "marian", "bart"), "post"),
    "gpt2": "pre",
}
_PREFIX, _TYPE_PREFIX = "NormSwap", "normswap_"


def family_of(model_type: str) -> str:
    """`"bert"` for `"bert"` and for its swapped `"normswap_bert"`."""
    return model_type.removeprefix(_TYPE_PREFIX)


def auto_heads(config_class: type) -> dict[str, str]:
    """Auto class name → swapped class name, for every head that transformers has for the model type."""
    from transformers.models.auto import modeling_auto  # takes long to import, and few need it

    family = family_of(config_class.model_type)
    heads = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and family in mapping._model_mapping:
            head = mapping._model_mapping[family]
            heads[name] = _PREFIX + (head if isinstance(head, str) else head[0])
    return heads


def auto_map(config_class: type) -> dict[str, str]:
    """The `auto_map` of a saved configuration: every head, so that a language model opens as a classifier too.

    All in one file: the loader imports a local folder anew for each file that it is sent to.
    """
    classes = {"AutoConfig": config_class.__name__, **auto_heads(config_class)}
    return {auto: f"modeling_normswap.{name}" for auto, name in classes.items()}


def placement_of(config) -> str | None:
    """One of `PLACEMENTS`: where the norms stand in a model of a family that `set_norm_placement` can change."""
    record = getattr(config, "norm_swap", None) or {}
    return record.get("placement", STOCK_PLACEMENTS.get(family_of(config.model_type or "")))


def layer_norm_eps(config) -> float:
    """ε of the LayerNorms that transformers makes from this configuration."""
    return getattr(config, "layer_norm_eps", getattr(config, "layer_norm_epsilon", 1e-5))


def check_layer_norm_shares(shares: Mapping, swapped: Collection[str]) -> None:
    """Raises `ValueError` unless each of `shares` is a number between 0 and 1 for a path of `swapped`."""
    for path, share in shares.items():
        if path not in swapped or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(
                f"layer_norm_share cannot be {share!r} for {path!r}: it takes paths of swapped norms and numbers "
                "between 0 and 1."
            )


def _misfits(value, shape, name: str) -> list[str]:
    """Names of what has another type in a JSON `value` than in `shape`, among the entries that both have."""
    if not isinstance(value, shape if isinstance(shape, type) else type(shape)):
        return [name]
    if isinstance(shape, list):
        return [misfit for item in value for misfit in _misfits(item, shape[0], name)]
    if isinstance(shape, dict):
        shared = [key for key in shape if key in value]
        return [misfit for key in shared for misfit in _misfits(value[key], shape[key], key)]
    return []


class NormSwapConfigMixin:
    """Makes a configuration of transformers that of a swapped model.

    `norm_swap` is a JSON object: `format_version`, and `norms`, a list of objects `norm` (registered name), `options`
    and `modules` (paths of the modules in a model with a head). In the middle of a progressive swap there is also
    `layer_norm_share`, the share that LayerNorm still has in a norm, by path; after a calibration there is
    `calibration`, the R² of each norm's fit, by path; after a folding there is `folded`, the paths of the norms that
    are gone. `biases` and `untied` are linear layers of the head that got a bias, or weights of their own. `linears`
    are the linear layers that have changed in the place of a norm, by path, and the norm.
    """

    def __post_init__(self, **kwargs):
        kwargs.pop("model_type", None)  # that of a stock config.json would shadow ours and be saved back
        fusions = kwargs.pop("fusion_config", None) or {}
        if fusions := {name: value for name, value in fusions.items() if not name.startswith("hf_normswap")}:
            kwargs["fusion_config"] = fusions
        super().__post_init__(**kwargs)
        self.validate_norm_swap()
        self.register_models()

    def validate_norm_swap(self):
        """Checks the shape of `norm_swap`; the norms themselves are checked when the model is built.

        Raises:
            ValueError: when it comes from a newer version, has entries of no meaning or of another type, or lacks one.
        """
        record = self.norm_swap
        if record is None:
            return
        version = record.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"This model was saved in format {version!r} of norm_swap and this hf_normswap reads up to "
                f"{FORMAT_VERSION}: upgrade hf_normswap."
            )
        if misfits := _misfits(record, REQUIRED_ENTRIES | OPTIONAL_ENTRIES, "norm_swap"):
            raise ValueError(
                f"norm_swap in the model's configuration has entries of the wrong type {misfits}: correct them."
            )
        wrong = (record.keys() - OPTIONAL_ENTRIES.keys()) ^ REQUIRED_ENTRIES.keys()
        wrong |= {key for entry in record.get("norms", []) for key in set(entry) ^ {"norm", "options", "modules"}}
        if wrong:
            raise ValueError(
                f"norm_swap in the model's configuration has unknown or missing entries {sorted(wrong)}: correct them."
            )
        if record.get("placement", "pre") not in PLACEMENTS:
            raise ValueError(f"placement is one of {', '.join(PLACEMENTS)}, not {record['placement']!r}.")
        swapped = {path for entry in record["norms"] for path in entry["modules"]}
        check_layer_norm_shares(record.get("layer_norm_share", {}), swapped)

    @classmethod
    def register_models(cls):
        """Called with every configuration: the installed package enters the model classes in the Auto classes."""

    def to_dict(self):
        self.register_models()  # PEFT looks the model type up right after this, and may have been imported just now
        output = super().to_dict()
        return {**output, "fusion_config": {**(output.get("fusion_config") or {}), STOCK_CLASS_GUARD: False}}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Save the configuration, and beside it the code that loads the model where this package is not installed."""
        from .saving import save_custom_code

        self.auto_map = auto_map(type(self))
        self._auto_class = None  # else transformers writes code and map once more, its own way
        save_custom_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


@functools.cache
def config_class_of(stock: type) -> type:
    """The configuration class of swapped models for one of transformers: `NormSwapBertConfig` for `BertConfig`.

    It is an attribute of this module, where pickle and the loader of the Hub look for it.
    """
    name = _PREFIX + stock.__name__

    def fill(body):
        body["__module__"], body["__qualname__"] = __name__, name
        body["__doc__"] = f"[`{stock.__name__}`] of a swapped model."
        body["__annotations__"] = {"norm_swap": dict | None}
        body["model_type"], body["norm_swap"] = _TYPE_PREFIX + stock.model_type, None

    globals()[name] = strict(types.new_class(name, (NormSwapConfigMixin, stock), {}, fill))
    return globals()[name]


def find_config_class(name: str) -> type | None:
    """The configuration class of swapped models that has this name."""
    stock = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    return config_class_of(stock) if isinstance(stock, type) and issubclass(stock, PreTrainedConfig) else None


def __getattr__(name: str):
    if (cls := find_config_class(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return cls
