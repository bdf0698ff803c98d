"""The norms of the papers in plain numpy, float64, token by token selection first: written from the formulas alone.

Everything takes the real tokens as rows, `(n, C)`.
"""

from dataclasses import dataclass, field

import numpy as np


def batchnorm(x, eps):
    """`(x̂, mean, variance)`, biased."""
    mean = x.mean(0)
    variance = ((x - mean) ** 2).mean(0)
    return (x - mean) / np.sqrt(variance + eps), mean, variance


def batchnorm_gradient(x, g, eps):
    x_hat, _, variance = batchnorm(x, eps)
    return (g - g.mean(0) - x_hat * (g * x_hat).mean(0)) / np.sqrt(variance + eps)


def pnv(x, eps):
    """`(x̂, ψ²)`."""
    power = (x**2).mean(0)
    return x / np.sqrt(power + eps), power


def pnv_gradient(x, g, eps):
    x_hat, power = pnv(x, eps)
    return (g - x_hat * (g * x_hat).mean(0)) / np.sqrt(power + eps)


def layernorm(x, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)


def rmsnorm(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@dataclass
class PowerNormalization:
    """Algorithm 2 of the PowerNorm paper, without group scaling."""

    width: int
    alpha: float = 0.9
    eps: float = 1e-5
    limited: bool = True  # the step of ν at most 1 / Γ; Algorithm 2 itself has no limit
    power: np.ndarray = field(init=False)
    nu: np.ndarray = field(init=False)

    def __post_init__(self):
        self.power, self.nu = np.ones(self.width), np.zeros(self.width)

    def step(self, x, g):
        """`(x̂, dx)` of one training step on tokens `x` whose upstream gradient, after the gain, is `g`."""
        psi = np.sqrt(self.power + self.eps)
        x_hat = x / psi
        dx = (g - self.nu * x_hat) / psi
        gamma, lambda_ = (x_hat**2).mean(0), (g * x_hat).mean(0)
        size = np.minimum(1 - self.alpha, 1 / gamma) if self.limited else 1 - self.alpha
        self.nu = self.nu * (1 - size * gamma) + size * lambda_
        self.power = self.alpha * self.power + (1 - self.alpha) * (x**2).mean(0)
        return x_hat, dx
