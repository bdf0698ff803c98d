"""Checkpoints that a verb reads."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager


def load_checkpoint(name, dtype=None):
    """Model and processor of a checkpoint, the model of the class that its configuration names.

    Without a dtype the model has that of the checkpoint. The processor is a tokenizer, an image processor or a feature
    extractor, or all that the model has of them.
    """
    import transformers

    with reading(name):
        model_class = _class_of(transformers.AutoConfig.from_pretrained(name))
        processor = _processor_class(model_class, name).from_pretrained(name)
        return model_class.from_pretrained(name, dtype=dtype or "auto"), processor


def load_to_convert(args):
    """Model and processor to convert; raises `ValueError` where an option wants another dtype."""
    import torch

    model, processor = load_checkpoint(args.model, args.dtype)
    for option in ("distill", "distillation_steps", "onnx"):
        if getattr(args, option, None) and model.dtype != torch.float32:
            raise ValueError(f"{option} wants float32, and {args.model} is {model.dtype}: pass --dtype float32 too.")
    return model, processor


def load_structure(name):
    """The model of a checkpoint to look at: one that is not swapped comes without weights, on the meta device."""
    import torch
    import transformers

    with reading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        if hasattr(config, "norm_swap"):
            return _class_of(config).from_pretrained(name)
        with torch.device("meta"):
            return _class_of(config)(config) if config.architectures else transformers.AutoModel.from_config(config)


def _class_of(config) -> type:
    """The class of models that a configuration names."""
    import transformers

    from hf_normswap.modeling import modeling_normswap

    class_name = (config.architectures or [""])[0]
    home = modeling_normswap if hasattr(config, "norm_swap") else transformers
    model_class = getattr(home, class_name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(
            f"its configuration names no model of transformers, but architectures {config.architectures}."
        )
    return model_class


def _processor_class(model_class, name):
    """The Auto class of everything that makes inputs of the model."""
    import transformers
    from transformers.utils import has_file

    main = model_class.main_input_name
    others = {"pixel_values", "input_values", "input_features"} & set(
        inspect.signature(model_class.forward).parameters
    )
    if not others:
        return transformers.AutoTokenizer
    # Some write text, as Whisper does, or read it, as CLIP does.
    if main == "input_ids" or has_file(name, "tokenizer_config.json"):
        return transformers.AutoProcessor
    return transformers.AutoImageProcessor if "pixel_values" in others else transformers.AutoFeatureExtractor


def with_pad_token(tokenizer):
    """A copy of a tokenizer that can pad, or of another processor; what is saved is the one that came."""
    reader = copy.deepcopy(tokenizer)
    if getattr(reader, "pad_token", "") is None:  # as in GPT-2, which pads with its end of text
        reader.pad_token = reader.eos_token
    return reader


def save_checkpoint(model, processor, folder, source) -> None:
    """Save what a verb made of the checkpoint `source`, with what sentence-transformers needs if that has it."""
    from hf_normswap import copy_sentence_modules

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    copy_sentence_modules(source, folder)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Says what cannot be read. A damaged checkpoint or data set can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error).strip() or type(error).__name__}") from error
