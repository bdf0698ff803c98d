"""Checkpoints that a verb reads."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager


def load_checkpoint(name):
    """Model and tokenizer of a checkpoint, the model of the class that its configuration names."""
    import transformers

    from hf_normswap.modeling import modeling_normswap

    with reading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        class_name = (config.architectures or [""])[0]
        home = modeling_normswap if hasattr(config, "norm_swap") else transformers
        model_class = getattr(home, class_name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise ValueError(
                f"its configuration names no model of transformers, but architectures {config.architectures}."
            )
        return model_class.from_pretrained(name), transformers.AutoTokenizer.from_pretrained(name)


def with_pad_token(tokenizer):
    """A copy of a tokenizer that can pad; what is saved is the tokenizer that came."""
    reader = copy.deepcopy(tokenizer)
    if reader.pad_token is None:  # as in GPT-2, which pads with its end of text
        reader.pad_token = reader.eos_token
    return reader


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Says what cannot be read. A damaged checkpoint or data set can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error).strip() or type(error).__name__}") from error
