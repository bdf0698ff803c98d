"""Enters the swapped models in the tables of transformers, so that plain Auto classes know them.

Importing this package registers four configurations; a family's model classes follow with its first configuration.
"""

import functools
import sys

from transformers import AutoConfig

from .modeling.configuration_normswap import CONFIGS, family_of


def register_configurations() -> None:
    """Makes `AutoConfig` know the model types `normswap_bert` and so on."""
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_models = staticmethod(functools.partial(register_models, config_class))


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
        getattr(modeling_auto, auto).register(config_class, getattr(modeling_normswap, head), exist_ok=True)
    modeling_normswap.NormSwapMixin.push = _push
    stock_config = config_class.__bases__[-1]
    tokenizer = TOKENIZER_MAPPING.get(stock_config, None)
    if tokenizer is not None:  # that of Marian needs a package that few have
        AutoTokenizer.register(config_class, tokenizer, exist_ok=True)
