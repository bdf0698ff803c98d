"""Enters the swapped models in the tables of transformers, so that plain Auto classes know them.

The configuration class of a model type is made when it is looked up; its model classes follow with its first
configuration. So importing this package costs nothing for the hundreds of model types of transformers.
"""

import functools
import sys

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .modeling.configuration_normswap import NormSwapConfigMixin, config_class_of, family_of


class _Configurations(dict):
    """The table of registered configurations, in which each `normswap_<model type>` is made on demand."""

    def __contains__(self, model_type):
        return super().__contains__(model_type) or _stock_type(model_type) is not None

    def __getitem__(self, model_type):
        if not super().__contains__(model_type) and (stock := _stock_type(model_type)) is not None:
            self[model_type] = config_class_of(CONFIG_MAPPING[stock])
        return super().__getitem__(model_type)


def _stock_type(model_type) -> str | None:
    """`"bert"` for `"normswap_bert"`; `None` for what is no model type of a swapped model."""
    stock = family_of(model_type) if isinstance(model_type, str) else model_type
    return stock if stock != model_type and stock in CONFIG_MAPPING._mapping else None


def register_configurations() -> None:
    """Makes `AutoConfig` know the model types `normswap_bert` and so on, of every model of transformers."""
    CONFIG_MAPPING._extra_content = _Configurations(CONFIG_MAPPING._extra_content)
    NormSwapConfigMixin.register_models = classmethod(register_models)


def register_models(config_class: type) -> None:
    """Makes the Auto classes and PEFT know every head of a family."""
    _register_heads(config_class)
    # PEFT may be imported at any time, and importing it for its tables would cost every user a second.
    peft = sys.modules.get("peft.utils.constants")
    family = family_of(config_class.model_type)
    for name, table in vars(peft).items() if peft else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and family in table:
            table.setdefault(config_class.model_type, table[family])


def _push(model, repo_id: str, **options):
    from .reporting.hub import push_model

    return push_model(model, repo_id, **options)


@functools.cache
def _register_heads(config_class: type) -> None:
    from transformers import AutoTokenizer
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from .modeling import modeling_normswap
    from .modeling.configuration_normswap import auto_heads

    for auto, head in auto_heads(config_class).items():
        model_class = getattr(modeling_normswap, head)
        if model_class.config_class is config_class:  # a few heads are those of another model type
            getattr(modeling_auto, auto).register(config_class, model_class, exist_ok=True)
    modeling_normswap.NormSwapMixin.push = _push
    stock_config = config_class.__bases__[-1]
    # That of Marian needs a package that few have, and models of images have none.
    tokenizer = TOKENIZER_MAPPING.get(stock_config, None) if stock_config in TOKENIZER_MAPPING else None
    if tokenizer is not None:
        AutoTokenizer.register(config_class, tokenizer, exist_ok=True)
