"""Random inputs for any model of transformers, made from its configuration and the signature of its forward."""

import inspect
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from hf_normswap.modeling.modeling_normswap import class_of_transformers


ROWS, LENGTH, AUDIO_SAMPLES = 1, 8, 4000
_IDS = 64  # of a model without a vocabulary, such as Canine, which reads characters


def example_inputs(
    model: PreTrainedModel, forward: Callable | None = None, *, rows: int = ROWS, length: int = LENGTH, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of a forward of `model`, on the CPU, in float32 where they are no token ids.

    Args:
        model ([`~transformers.PreTrainedModel`]): of text, images or sound, or of several of them.
        forward (callable, *optional*): the function that reads them; that of the model if not given.
        rows (`int`, *optional*, defaults to 1): batch size.
        length (`int`, *optional*, defaults to 8): tokens of a text.
        seed (`int`, *optional*, defaults to 0): of the random values.

    Raises:
        ValueError: when the model takes none of these inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = parameters_of(model, forward)
    config, inputs = model.config, {}
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" in taken and main in ("input_ids", "pixel_values"):
        ids = torch.randint(vocabulary_of(model) or _IDS, (rows, length), generator=generator)
        end = getattr(config, "eos_token_id", None)
        if config.is_encoder_decoder and isinstance(end, int) and 0 <= end < (vocabulary_of(model) or 0):
            # Some heads need one end of sentence in each text. BART for classification reads the state there.
            ids[ids == end] = (end + 1) % vocabulary_of(model)
            ids[:, -1] = end
        inputs["input_ids"] = ids
        if "attention_mask" in taken:
            inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
    if "pixel_values" in taken and (main == "pixel_values" or hasattr(config, "vision_config")):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(rows, channels, height, width, generator=generator)
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        frames = 2 * getattr(config, "max_source_positions", 100)
        inputs["input_features"] = torch.randn(rows, bins, frames, generator=generator)
    if main == "input_values":
        inputs["input_values"] = torch.randn(rows, AUDIO_SAMPLES, generator=generator)
    if not inputs:
        raise ValueError(f"A {type(model).__name__} reads {main}, which is neither text nor images nor sound.")
    if "decoder_input_ids" in taken:
        vocabulary = getattr(config, "decoder_vocab_size", None) or config.get_text_config(decoder=True).vocab_size
        inputs["decoder_input_ids"] = torch.randint(vocabulary, (rows, length), generator=generator)
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: values[:, None] for name, values in inputs.items()}
    return inputs


def example_source(
    model: PreTrainedModel, forward: Callable | None = None, rows: int = ROWS
) -> dict[str, torch.Tensor]:
    """What a decoder by itself attends to: the states of an encoder; nothing for a model that takes none."""
    taken = parameters_of(model, forward)
    if "encoder_hidden_states" not in taken or model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        return {}
    width = getattr(model.config, "cross_attention_hidden_size", None) or model.config.hidden_size
    return {"encoder_hidden_states": torch.randn(rows, LENGTH, width, generator=torch.Generator().manual_seed(0))}


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """How many token ids a model knows; `None` where any number is one, as in Canine."""
    return getattr(text_config(model), "vocab_size", None)


def parameters_of(model: PreTrainedModel, forward: Callable | None = None) -> Mapping[str, inspect.Parameter]:
    """What a forward of `model` takes; where a user's class passes all of it on, what that of its base class takes."""
    parameters = inspect.signature(forward or model.forward).parameters
    passed_on = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    base = class_of_transformers(type(model)) if {each.kind for each in parameters.values()} <= passed_on else None
    return parameters if base is None else inspect.signature(base.forward).parameters


def text_config(model: PreTrainedModel):
    """The configuration of the part of a model that reads `input_ids`."""
    config = model.config
    return config.get_text_config(encoder=True) if config.is_encoder_decoder else config.get_text_config()
