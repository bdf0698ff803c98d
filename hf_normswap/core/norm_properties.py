"""What the registered norms are like: found by trying each of them, not by a list that somebody keeps."""

from dataclasses import dataclass

import torch

from hf_normswap.modeling.norms import Norm, available_norms, get_norm


_CHANNELS = 24  # no other size of a parameter is 24


@dataclass(frozen=True)
class NormProperties:
    """What one norm is like with its default options.

    Attributes:
        name (`str`): its registered name.
        statistics (`str`): what it takes them of: `"token"`, `"sentence"`, `"batch"`, or several of these.
        later (`str`): when the output of a token depends on later ones: `"no"`, `"in training"` or `"always"`.
        affine (`str`): whether it is one affine map in evaluation: `"yes"`, `"no"`, or the options with which it is.
        parameters (`str`): the parameters beside gain and shift, with their shapes; and the gain, where it has none.
    """

    name: str
    statistics: str
    later: str
    affine: str
    parameters: str


def describe_norms() -> list[NormProperties]:
    """The properties of every registered norm, in the order of their names.

    Example:

    ```python
    >>> from hf_normswap.core.norm_properties import describe_norms
    >>> next(norm for norm in describe_norms() if norm.name == "batchnorm")
    NormProperties(name='batchnorm', statistics='batch', later='in training', affine='yes', parameters='-')

    ```
    """
    return [_describe(get_norm(name)) for name in available_norms()]


def rows_of_norms() -> list[tuple]:
    """Cells of a table of the norms, the first row its heading."""
    heading = ("norm", "statistics of", "sees later tokens", "affine in evaluation", "beside gain and shift")
    cells = [(norm.name, norm.statistics, norm.later, norm.affine, norm.parameters) for norm in describe_norms()]
    return [heading, *cells]


def _describe(cls: type[Norm]) -> NormProperties:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        norm = cls(_CHANNELS, dtype=torch.float64)
        with torch.no_grad():  # no number may be the 0 or the 1 of the start, which hides what it is for
            for number, parameter in enumerate(norm.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
        later = [word for word, mode in (("training", True), ("evaluation", False)) if _sees_later(norm.train(mode))]
    return NormProperties(
        cls.norm_name,
        statistics=", ".join(cls.scope) or "nothing",
        later={0: "no", 1: f"in {later[0]}" if later else "no", 2: "always"}[len(later)],
        affine=_affine(cls),
        parameters=_parameters(norm),
    )


@torch.no_grad()
def _sees_later(norm: Norm) -> bool:
    """Whether the output of the first token of a sentence changes with the last one."""
    tokens = torch.randn(1, 4, _CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.cat([tokens[:, :-1], 2 - tokens[:, -1:]], dim=1)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    first = norm(tokens)[0, 0]
    norm.load_state_dict(state)
    return not torch.equal(first, norm(other)[0, 0])


def _affine(cls: type[Norm]) -> str:
    if cls(_CHANNELS).affine_map() is not None:
        return "yes"
    options = cls.calibrated_options
    if options and cls(_CHANNELS, **options).affine_map() is not None:
        return "with " + ", ".join(f"{name}={value}" for name, value in options.items())
    return "no"


def _parameters(norm: Norm) -> str:
    own = {name: value for name, value in norm.named_parameters() if name not in ("weight", "bias")}
    sizes = {name: "×".join("C" if size == _CHANNELS else str(size) for size in own[name].shape) for name in own}
    told = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    return told or "-" if norm.has_gain else f"in place of both: {told or 'nothing'}"
