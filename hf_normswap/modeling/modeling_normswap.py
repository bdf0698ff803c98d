"""Model classes with swapped norms: `NormSwapBertForMaskedLM` for `BertForMaskedLM`, and so on for every head.

They are made on first use, as attributes of this module, where pickle and the Hub's loader look for them.
"""

import ast
import functools
import inspect
import textwrap

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .activation_checkpointing import CHECKPOINTING, checkpoint_norms
from .base import BatchStatisticNorm, Norm
from .block_placement import place_blocks
from .configuration_normswap import auto_heads, config_class_of, find_config_class
from .linears import ChangedLinear
from .model_norms import swapped_norms
from .padding_mask import unwatch_masks, watch_masks
from .rbn import RegularizedBatchNorm
from .record import check_record, fold_as_recorded, linears_of_record, norms_of_record, read_record
from .replace import blend_norm, change_linears, place_norms


logger = logging.get_logger(__name__)

_PREFIX = "NormSwap"


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
        change_linears(self, linears_of_record(self, record))
        fold_as_recorded(self, record)
        shares = record.get("layer_norm_share", {})
        for path, norm in swapped_norms(self).items():
            if path in shares:
                blend_norm(norm, shares[path])
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
            if isinstance(module, Norm | ChangedLinear):
                module.initialize()  # transformers knows nothing of what is ours

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
    base = class_of_transformers(stock_class)
    if base is None:
        return None
    return _make_class(base.__name__) if base is stock_class else _derive_class(stock_class, base)


def class_of_transformers(cls: type) -> type | None:
    """The first class of a model of transformers among a class and its bases.

    That may be the base class of all models of a family, for a class that a user has derived from it.
    """
    for base in cls.__mro__:
        if base.__module__.startswith("transformers.models.") and issubclass(base, PreTrainedModel):
            is_known = getattr(transformers, base.__name__, None) is base and base.config_class is not None
            is_abstract = base is cls and base.__name__.endswith("PreTrainedModel")
            return base if is_known and not is_abstract else None
    return None


def stock_class(swapped: type) -> type | None:
    """The class that `swapped` was made from; `None` for a class that a user has derived from a swapped one."""
    return swapped.__bases__[1] if swapped.__bases__[0] is NormSwapMixin else None


def stock_class_of(cls: type) -> type:
    """The class of transformers that a swapped class was made from; any other class as it is."""
    return (issubclass(cls, NormSwapMixin) and stock_class(cls)) or cls


@functools.cache
def _derive_class(stock_class: type, base: type) -> type:
    """The swapped class of a user's class, which has no place in a module where pickle would find it."""
    name = _PREFIX + stock_class.__name__
    body = {
        "__module__": stock_class.__module__,
        "__qualname__": name,
        "__doc__": f"`{stock_class.__name__}` with swapped norms.",
        "__reduce_ex__": lambda self, protocol: (_new_of, (stock_class,), self.__getstate__()),
        "config_class": config_class_of(base.config_class),
        "stock_class": stock_class,
    }
    if stock_class.forward is base.forward:
        body["accepts_loss_kwargs"] = _reads_item_count(base)
    return type(name, (NormSwapMixin, stock_class), body)


def _new_of(stock_class: type):
    cls = swapped_class(stock_class)
    return cls.__new__(cls)


def __getattr__(name: str):
    cls = _make_class(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
    cls = cls or find_config_class(name)  # the loader finds these here: see auto_map
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return cls


def _make_class(stock_name: str) -> type | None:
    name, stock = _PREFIX + stock_name, getattr(transformers, stock_name, None)
    if name in globals():
        return globals()[name]
    if (
        not isinstance(stock, type)
        or not issubclass(stock, PreTrainedModel)
        or class_of_transformers(stock) is not stock
    ):
        return None
    config_class = config_class_of(stock.config_class)
    _enter_name(stock.config_class.model_type, stock_name)
    _enter_renaming(stock_name, name)
    _enter_renaming(stock.config_class.model_type, config_class.model_type)
    globals()[name] = type(
        name,
        (NormSwapMixin, stock),
        {
            "__module__": __name__,
            "__doc__": f"`{stock_name}` with swapped norms.",
            "config_class": config_class,
            "accepts_loss_kwargs": _reads_item_count(stock),
        },
    )
    return globals()[name]


def _reads_item_count(stock: type) -> bool:
    """Whether the forward of a model hands its keyword arguments on to the loss function.

    Most heads take them, ignore the number of items in the batch and return a plain mean. Trainer takes them at their
    signature, does not divide by the accumulation steps, and the gradient comes out too large.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(stock.forward)))
    return any(
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "loss_function"
        and any(keyword.arg is None for keyword in node.keywords)
        for node in ast.walk(ast.parse(source))
    )


def _enter_renaming(stock_key: str, key: str) -> None:
    """Let weights be renamed on loading as those of the model of transformers are, by a class name or a model type."""
    renaming = get_checkpoint_conversion_mapping(stock_key)
    if renaming is not None:
        register_checkpoint_conversion_mapping(key, renaming, overwrite=True)


def _enter_name(family: str, stock_name: str) -> None:
    # By class name Trainer shifts labels under label smoothing, and names the task in its card.
    for title, table in vars(modeling_auto).items():
        if title.startswith("MODEL_") and title.endswith("_NAMES") and table.get(family) == stock_name:
            table.setdefault(f"normswap_{family}", _PREFIX + stock_name)


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
    blocks = [name for name, module in model.named_modules() if getattr(module, "chunk_size_feed_forward", 0)]
    for name, norm in norms.items():
        # The attention of a block, and what follows it there, sees the whole batch.
        inside = [name[len(block) :] for block in blocks if name.startswith(f"{block}.")]
        is_chunked = any("attention" not in part and "attn" not in part for part in inside)
        if is_chunked and not {"batch", "sentence"}.isdisjoint(norm.scope):
            raise ValueError(
                f"chunk_size_feed_forward > 0 calls {name} once per chunk, where a {norm.norm_name} "
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
