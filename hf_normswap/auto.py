"""Enters the swapped models in the tables of transformers: plain Auto classes, pipelines and Trainer know them then.

Importing this package registers four configurations; a family's model classes follow with its first configuration.
"""

import functools
import sys

from transformers import AutoConfig

from .modeling.configuration import CONFIGS


def register_configurations() -> None:
    """Makes `AutoConfig` know the model types `normswap_bert` and so on."""
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_models = staticmethod(functools.partial(register_models, config_class))


def register_models(config_class: type) -> None:
    """Makes the Auto classes, and the tables that go by name, know every head of a family."""
    _register_heads(config_class)
    # PEFT may be imported at any time, and importing it for its tables would cost every user a second.
    if "peft.utils.constants" in sys.modules:
        _share_entries(vars(sys.modules["peft.utils.constants"]), "TRANSFORMERS_MODELS_TO_", config_class)


@functools.cache
def _register_heads(config_class: type) -> None:
    from transformers.models.auto import modeling_auto, tokenization_auto

    from .modeling import swapped
    from .modeling.travel import auto_heads

    for auto, head in auto_heads(config_class).items():
        getattr(modeling_auto, auto).register(config_class, getattr(swapped, head), exist_ok=True)
    # Trainer shifts labels, and pipelines accept models, by class name.
    _share_entries(vars(modeling_auto), "MODEL_", config_class, rename=lambda name: "NormSwap" + name)
    _share_entries(vars(tokenization_auto), "TOKENIZER_MAPPING_NAMES", config_class)


def _share_entries(tables: dict, prefix: str, config_class: type, rename=lambda value: value) -> None:
    family = config_class.model_type.removeprefix("normswap_")
    for name, table in tables.items():
        if name.startswith(prefix) and isinstance(table, dict) and family in table:
            table.setdefault(config_class.model_type, rename(table[family]))
