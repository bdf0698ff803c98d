"""AdaNorm."""

from torch.nn import functional

from .registry import check_number, register_norm
from .simple import WithoutGain


@register_norm("adanorm")
class AdaNorm(WithoutGain):
    """AdaNorm (Xu et al., NeurIPS 2019, arXiv 1911.07013): `z = φ(y) y` of each token, `φ(y) = C (1 − k y)`.

    y is `(x − μ) / √(σ² + ε)`. No gradient goes through φ(y): `dz = φ(y) dy`. So a large positive y becomes smaller,
    and its gradient with it.

    Args:
        num_features (`int`): number of channels.
        scale (`float`, *optional*, defaults to 1.0): C, which the authors' command for translation sets to 1.
        k (`float`, *optional*, defaults to 0.1): k.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift; the paper has none.
    """

    def __init__(self, num_features: int, *, scale: float = 1.0, k: float = 0.1, **kwargs):
        super().__init__(num_features, **kwargs)
        check_number("scale", scale)
        check_number("k", k)
        self.scale, self.k = scale, k

    def normalize(self, x, mask):
        y = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return (self.scale * (1 - self.k * y)).detach() * y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, k={self.k}"
