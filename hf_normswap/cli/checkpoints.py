"""Checkpoints in and out of a verb."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def load_checkpoint(name):
    """Model and tokenizer of a checkpoint, the model of the class that its configuration names."""
    import transformers

    from hf_normswap.modeling import swapped

    with reading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        class_name = (config.architectures or [""])[0]
        home = swapped if hasattr(config, "norm_swap") else transformers
        model_class = getattr(home, class_name, None)
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            raise ValueError(
                f"its configuration names no model of transformers, but architectures {config.architectures}."
            )
        return model_class.from_pretrained(name), transformers.AutoTokenizer.from_pretrained(name)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Says what cannot be read. A damaged checkpoint or data set can raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {str(error).strip() or type(error).__name__}") from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` in the end: whole, or not at all on an error."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is no empty folder: name another one.")
    parent = next(folder for folder in output.parents if folder.exists())
    # Inside of a temporary folder, which is its owner's alone: what is made in it has the usual permissions.
    with tempfile.TemporaryDirectory(prefix=".normswap-", dir=parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()  # a rename onto an empty folder is not for every system
        folder.rename(output)
