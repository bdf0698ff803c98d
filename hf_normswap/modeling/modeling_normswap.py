"""Model classes with swapped norms: `NormSwapBertForMaskedLM` for `BertForMaskedLM`, and so on for every head.

They are made on first use, as attributes of this module, where pickle and the Hub's loader look for them.
"""

import functools
import importlib

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .activation_checkpointing import CHECKPOINTING, checkpoint_norms
from .base import BatchStatisticNorm, Norm
from .block_placement import place_blocks
from .configuration_normswap import CONFIGS, auto_heads, family_of
from .norm_sites import find_norms
from .padding_mask import unwatch_masks, watch_masks
from .rbn import RegularizedBatchNorm
from .record import check_record, fold_as_recorded, norms_of_record, read_record
from .replace import blend_norm, place_norms


logger = logging.get_logger(__name__)

_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "marian": "Marian", "gpt2": "GPT2"}
_READS_ITEM_COUNT = ("BertLMHeadModel", "RobertaForCausalLM", "GPT2LMHeadModel")


class NormSwapMixin:
    """What a swapped model has beside what its transformers class has."""

    stock_class = None  # of a user's class: that class
    push = None  # the installed package sets it to `push_model`, which writes a model card

    def __init__(self, config, *args, **kwargs):
        config.validate_norm_swap()  # an override given to from_pretrained is set after the configuration's own check
        super().__init__(config, *args, **kwargs)
        record = config.norm_swap or {}
        if "placement" in record:
            place_blocks(self, record["placement"])
        norms = norms_of_record(self, record)
        check_chunks(self, norms)
        place_norms(self, norms)
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

    def update_record(self) -> None:
        """Make `config.norm_swap` say what the modules are now; `save_pretrained` calls this first.

        Raises:
            ValueError: when no configuration describes them, such as one of fewer blocks. Nothing was changed then.
        """
        record = read_record(self)
        check_record(self, record)
        if self.config.norm_swap is not None or record["norms"]:
            self.config.norm_swap = record

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
    """The class that a model of `stock_class` becomes when its norms are swapped.

    Args:
        stock_class (`type`): a model class of transformers, or one derived from it.

    Returns:
        `type`: the same for every call; `None` where there is none. The Auto classes know those of transformers'
        classes. A model of a derived class loads through this one: `swapped_class(MyModel).from_pretrained(folder)`.

    Example:

    ```python
    >>> from transformers import BertForSequenceClassification
    >>> from hf_normswap import swapped_class
    >>> class MyModel(BertForSequenceClassification):
    ...     pass
    >>> swapped_class(MyModel).__name__
    'NormSwapMyModel'

    ```
    """
    if issubclass(stock_class, NormSwapMixin):
        return stock_class
    for base in stock_class.__mro__:
        for family, prefix in _FAMILIES.items():
            if base.__module__ == _modeling(family) and base.__name__.startswith(prefix):
                if base is stock_class:
                    return _make_class("NormSwap" + stock_class.__name__)
                return _derive_class(stock_class, family)
    return None


def stock_class(swapped: type) -> type | None:
    """The class that `swapped` was made from; `None` for a class that a user has derived from a swapped one."""
    return swapped.__bases__[1] if swapped.__bases__[0] is NormSwapMixin else None


@functools.cache
def _derive_class(stock_class: type, family: str) -> type:
    """The swapped class of a user's class, which has no place in a module where pickle would find it."""
    body = {
        "__module__": stock_class.__module__,
        "__qualname__": f"NormSwap{stock_class.__name__}",
        "__doc__": f"`{stock_class.__name__}` with swapped norms.",
        "__reduce_ex__": lambda self, protocol: (_new_of, (stock_class,), self.__getstate__()),
        "config_class": _config_class(family),
        "stock_class": stock_class,
    }
    base = next(base for base in stock_class.__mro__ if base.__module__ == _modeling(family))
    if stock_class.forward is base.forward:
        body["accepts_loss_kwargs"] = base.__name__ in _READS_ITEM_COUNT
    return type(f"NormSwap{stock_class.__name__}", (NormSwapMixin, stock_class), body)


def _new_of(stock_class: type):
    cls = swapped_class(stock_class)
    return cls.__new__(cls)


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
            "config_class": _config_class(family),
            # Most heads take **kwargs, ignore the number of items in the batch and return a plain mean. Trainer takes
            # them at their signature, does not divide by the accumulation steps, and the gradient comes out too large.
            "accepts_loss_kwargs": stock_name in _READS_ITEM_COUNT,
        },
    )
    return globals()[name]


def _config_class(family: str) -> type:
    return next(config for config in CONFIGS if family_of(config.model_type) == family)


def _enter_name(family: str, stock_name: str) -> None:
    # By class name Trainer shifts labels under label smoothing, and names the task in its card.
    for title, table in vars(modeling_auto).items():
        if title.startswith("MODEL_") and title.endswith("_NAMES") and table.get(family) == stock_name:
            table.setdefault(f"normswap_{family}", "NormSwap" + stock_name)


def prepare_swapped(model: PreTrainedModel) -> None:
    """Hooks and corrections that a model needs once its norms are swapped."""
    if any(isinstance(module, Norm) for module in model.modules()):
        watch_masks(model)
        model.register_forward_pre_hook(_tape_checkpointing)
    _tape_checkpointing(model)
    if model.loss_type is None and "AutoModelForCausalLM" in _auto_names(type(model)):
        # Trainer would count one token too many per row, and the loss log in every step of a compiled model.
        model.loss_type = "ForCausalLM"


def _tape_checkpointing(model: PreTrainedModel, args: tuple = ()) -> None:
    """Make checkpointing exact that was switched on, in the whole model or in one around it that knows of no norms."""
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        if (function := getattr(module, "_gradient_checkpointing_func", None)) is None:
            continue
        if getattr(function, "records_norms", False):
            return  # it is switched on and off for all modules at once
        module._gradient_checkpointing_func = _taped(model, function)


def release_swapped(model: PreTrainedModel) -> None:
    """Undo [`prepare_swapped`] on a model that is no longer swapped."""
    unwatch_masks(model)
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _tape_checkpointing]:
        del model._forward_pre_hooks[key]
    for module in model.modules():
        if (function := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = _untaped(function)


def check_chunks(model: PreTrainedModel, norms: dict[str, Norm]) -> None:
    """Raises `ValueError` where one of `norms`, by the name that it has or shall have, would see a batch in parts."""
    for site in find_norms(model):
        is_chunked = site.sublayer == "ffn" and getattr(model.get_submodule(site.block), "chunk_size_feed_forward", 0)
        if is_chunked and isinstance(norms.get(site.name), BatchStatisticNorm):
            raise ValueError(
                f"chunk_size_feed_forward > 0 calls {site.name} once per chunk, where a {norms[site.name].norm_name} "
                "needs the whole batch: build or load the model with chunk_size_feed_forward=0."
            )


def check_checkpointing(function, norms) -> None:
    """Raises `ValueError` where the checkpoint `function` cannot be exact for one of `norms`."""
    if function is None:
        return
    # PyTorch checkpoints reentrantly where nothing is said.
    reentrant = getattr(_untaped(function), "keywords", {}).get("use_reentrant") is not False
    if reentrant and any(isinstance(norm, RegularizedBatchNorm) for norm in norms):
        raise ValueError(
            "The RBN penalty has no gradient through reentrant checkpointing: pass "
            f"{CHECKPOINTING}_kwargs={{'use_reentrant': False}}."
        )


def _untaped(function):
    return function.__wrapped__ if getattr(function, "records_norms", False) else function


def _taped(model, function):
    if getattr(function, "records_norms", False):
        return function
    check_checkpointing(function, model.modules())
    return checkpoint_norms(function, any(isinstance(module, BatchStatisticNorm) for module in model.modules()))


def _auto_names(swapped: type) -> list[str]:
    return [auto for auto, head in auto_heads(swapped.config_class).items() if head == swapped.__name__]
