"""Model classes with swapped norms: `NormSwapBertForMaskedLM` for `BertForMaskedLM`, and so on for every head.

They are made on first use, as attributes of this module, where pickle and the Hub's loader look for them.
"""

import importlib

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .blend import blend_norm
from .configuration import CONFIGS, family_of
from .folded import add_bias, remove_norms, untie_head
from .norm import BatchStatisticNorm, Norm
from .placement import place_blocks
from .rbn import RegularizedBatchNorm
from .recompute import tape_checkpoint
from .replace import new_norm, place_norms
from .sites import NormSite, find_norms, is_site
from .swap_config import NormSwapConfig
from .token_mask import unwatch_masks, watch_masks
from .travel import auto_heads


logger = logging.get_logger(__name__)

_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "marian": "Marian", "gpt2": "GPT2"}
_READS_ITEM_COUNT = ("BertLMHeadModel", "RobertaForCausalLM", "GPT2LMHeadModel")


class NormSwapMixin:
    """What a swapped model has beside what its transformers class has."""

    push = None  # the installed package sets it to `push_model`, which writes a model card

    def __init__(self, config, *args, **kwargs):
        config.validate_norm_swap()  # an override given to from_pretrained is set after the configuration's own check
        super().__init__(config, *args, **kwargs)
        record = config.norm_swap or {}
        if "placement" in record:
            place_blocks(self, record["placement"])
        place_norms(self, norms_of_record(self, record))
        fold_as_recorded(self, record)
        shares = record.get("layer_norm_share", {})
        for site in find_norms(self):
            if site.path in shares:
                blend_norm(site.module, shares[site.path])
        prepare_swapped(self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"The weights in {pretrained_model_name_or_path} are damaged ({error}): fetch or save them again."
            ) from error

    def push_to_hub(self, repo_id, **kwargs):
        """Push this model: see `hf_normswap.push_model`; without the package, as any model of transformers."""
        return super().push_to_hub(repo_id, **kwargs) if self.push is None else self.push(repo_id, **kwargs)

    def initialize_weights(self):
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Norm):
                module.initialize()  # transformers knows nothing of our buffers

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        # Of an encoder-decoder transformers would resize the embeddings alone.
        if new_num_tokens and self.config.is_encoder_decoder and "untied" in (self.config.norm_swap or {}):
            raise ValueError("The head has weights of its own since the model was folded: resize it before that.")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **kwargs
    ):
        if enable:
            gradient_checkpointing_func = _taped(self, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


def swapped_class(stock_class: type) -> type | None:
    """The swapped class of a class of transformers, `None` where there is none."""
    for family, prefix in _FAMILIES.items():
        if stock_class.__module__ == _modeling(family) and stock_class.__name__.startswith(prefix):
            return _make_class("NormSwap" + stock_class.__name__)
    return None


def stock_class(swapped: type) -> type:
    """The class of transformers that `swapped` was made from."""
    return swapped.__bases__[1]


def __getattr__(name: str):
    configs = {config.__name__: config for config in CONFIGS}  # the loader finds these here too: see auto_map
    cls = configs.get(name) or _make_class(name)
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return cls


def _modeling(family: str) -> str:
    return f"transformers.models.{family}.modeling_{family}"


def _make_class(name: str) -> type | None:
    if name in globals():
        return globals()[name]
    stock_name = name.removeprefix("NormSwap")
    family = next((family for family, prefix in _FAMILIES.items() if stock_name.startswith(prefix)), None)
    if stock_name == name or family is None:
        return None
    module = importlib.import_module(_modeling(family))
    stock = getattr(module, stock_name, None) if stock_name in module.__all__ else None
    if not isinstance(stock, type) or not issubclass(stock, PreTrainedModel) or stock_name.endswith("PreTrainedModel"):
        return None
    _enter_name(family, stock_name)
    globals()[name] = type(
        name,
        (NormSwapMixin, stock),
        {
            "__module__": __name__,
            "__doc__": f"`{stock_name}` with swapped norms.",
            "config_class": next(config for config in CONFIGS if family_of(config.model_type) == family),
            # Most heads take **kwargs, ignore the number of items in the batch and return a plain mean. Trainer takes
            # them at their signature, does not divide by the accumulation steps, and the gradient comes out too large.
            "accepts_loss_kwargs": stock_name in _READS_ITEM_COUNT,
        },
    )
    return globals()[name]


def _enter_name(family: str, stock_name: str) -> None:
    # By class name Trainer shifts labels under label smoothing, and names the task in its card.
    for title, table in vars(modeling_auto).items():
        if title.startswith("MODEL_") and title.endswith("_NAMES") and table.get(family) == stock_name:
            table.setdefault(f"normswap_{family}", "NormSwap" + stock_name)


def norms_of_record(model: PreTrainedModel, record: dict) -> dict[str, Norm]:
    """New norms by module name, for what a configuration's `norm_swap` lists.

    A checkpoint of one head opens in another: parts that this model has not, such as another head, are left out.

    Raises:
        ValueError: when a listed module is missing from a part that the model has, or no norm of the family at all.
    """
    norms = {}
    for entry in record.get("norms", []):
        config = NormSwapConfig(entry["norm"], **entry["options"])
        sites = _find_recorded(model, entry["modules"])
        norms |= {site.name: new_norm(site.module, config, on_default_device=True) for site in sites}
    return norms


def _find_recorded(model: PreTrainedModel, paths: list[str]) -> list[NormSite]:
    sites = {site.path: site for site in find_norms(model)}
    parts = {_part(path) for path in sites}
    for path in paths:
        if path in sites:
            continue
        if not is_site(model, path):
            raise ValueError(
                f"norm_swap in the configuration lists {path!r}, which is no norm of this family: remove it."
            )
        if _part(path) in parts:
            raise ValueError(
                f"The configuration swaps {path!r}, which this {type(model).__name__} does not have: "
                "load it with the number of layers that it was saved with."
            )
    return [sites[path] for path in paths if path in sites]


def _part(path: str) -> str:
    return ".".join(path.split(".")[:2])


def fold_as_recorded(model: PreTrainedModel, record: dict) -> None:
    """Make a new model what a configuration's `norm_swap` says of folding; a head that it does not name stays."""
    gone = [site.name for site in _find_recorded(model, record.get("folded", []))]
    ends = {site.stack: site.name for site in find_norms(model)}.values()  # the last norm of each stack
    if model.base_model is model and not set(ends).isdisjoint(gone):
        logger.warning(
            "This checkpoint was folded with a head, and the hidden states that it returns without one are in "
            "coordinates of their own: fold the model without head instead to use them."
        )
    remove_norms(model, gone)
    modules = dict(model.named_modules())
    for name in modules.keys() & {*record.get("untied", []), *record.get("biases", [])}:
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(
                f"norm_swap in the configuration lists {name!r} as a head, which is no linear layer: remove it."
            )
    for name in modules.keys() & set(record.get("untied", [])):
        untie_head(model, name)
    for name in modules.keys() & set(record.get("biases", [])):
        add_bias(modules[name])


def prepare_swapped(model: PreTrainedModel) -> None:
    """Hooks and corrections that a model needs once its norms are swapped."""
    if any(isinstance(module, Norm) for module in model.modules()):
        watch_masks(model)
    for module in model.modules():
        if getattr(module, "_gradient_checkpointing_func", None) is not None:
            module._gradient_checkpointing_func = _taped(model, module._gradient_checkpointing_func)
    if model.loss_type is None and "AutoModelForCausalLM" in _auto_names(type(model)):
        # Trainer would count one token too many per row, and the loss log in every step of a compiled model.
        model.loss_type = "ForCausalLM"


def release_swapped(model: PreTrainedModel) -> None:
    """Undo [`prepare_swapped`] on a model that is no longer swapped."""
    unwatch_masks(model)
    for module in model.modules():
        if (function := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = _untaped(function)


def check_checkpointing(function, norms) -> None:
    """Raises `ValueError` where the checkpoint `function` cannot be exact for one of `norms`."""
    if function is None:
        return
    # PyTorch checkpoints reentrantly where nothing is said.
    reentrant = getattr(_untaped(function), "keywords", {}).get("use_reentrant") is not False
    if reentrant and any(isinstance(norm, RegularizedBatchNorm) for norm in norms):
        raise ValueError(
            "The RBN penalty has no gradient through reentrant checkpointing: pass "
            "activation_checkpointing_kwargs={'use_reentrant': False}."
        )


def _untaped(function):
    return function.__wrapped__ if getattr(function, "is_taped", False) else function


def _taped(model, function):
    if getattr(function, "is_taped", False):
        return function
    check_checkpointing(function, model.modules())
    return tape_checkpoint(function, any(isinstance(module, BatchStatisticNorm) for module in model.modules()))


def _auto_names(swapped: type) -> list[str]:
    return [auto for auto, head in auto_heads(swapped.config_class).items() if head == swapped.__name__]
