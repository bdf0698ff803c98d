"""What all norms share: gain and shift, precision, padding; and running statistics of those that use the batch."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .activation_checkpointing import may_run_again, replay_or_record, snapshot
from .autograd import NormalizeBatch
from .backends import get_backend, promote, select_finite
from .discrepancy import Statistics
from .moments import Moments
from .padding_mask import find_mask, warn_of_unknown_mask
from .registry import check_number
from .saving import guard_saving


guard_saving()

MOMENT_OF_BUFFER = {f"running_{kind}": kind for kind in ("mean", "var", "power")}
KEPT_RECORDS = 16


class Norm(nn.Module):
    """Base of every norm of the registry: `y = weight · normalize(x) + bias` over the last dimension.

    A subclass implements [`Norm.normalize`]; its keyword arguments are the options of
    [`NormSwapConfig`](hf_normswap.NormSwapConfig). Computation is at least float32, the output has the input's dtype
    (only [`LayerNorm`] does as PyTorch's does under autocast, and returns float32).

    Args:
        num_features (`int`): number of channels C.
        eps (`float`, *optional*, defaults to 1e-5): added to the squared quantity, inside the root.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    norm_name: str  # set by register_norm
    scope: tuple[str, ...] = ("token",)  # what it takes statistics of: "token", "sentence", "batch"
    has_gain = True  # whether there is a gain for each channel to train; else `weight` is a constant 1
    keeps_eps = False  # whether a swap takes the eps of the layer it replaces
    options: dict = {}  # those it was made with in a swap
    stock = None  # the StockNorm that it replaced in a swap
    replaced: nn.Module | None = None  # that module, without parameters
    calibrated_options: dict = {}  # defaults in a swap that is calibrated
    linear_classes: dict[type, type] = {}  # what a swap makes of the linear layers of its sublayer, by their class
    earlier_defaults: dict = {}  # what a record without these options means; from now on they are always recorded

    def __init__(self, num_features: int, *, eps: float = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_number("eps", eps)
        self.num_features, self.eps = num_features, eps
        if self.has_gain:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        else:
            ones = torch.ones(num_features, device=_device_of_unsaved(device), dtype=dtype)
            self.register_buffer("weight", ones, persistent=False)
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if bias else None

    def normalize(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Normalised tokens x̂, before gain and shift.

        Args:
            x (`torch.Tensor` of shape `(..., C)`): activations, float32 or float64.
            mask (`torch.Tensor` of shape `(...)`, *optional*): True at real tokens; `None` when all are.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement normalize(x, mask).")

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `x` of shape `(..., C)`; without a `mask` `(...)` that of the running model call counts."""
        if x.shape[-1] != self.num_features:
            raise ValueError(f"Tokens of {x.shape[-1]} channels do not fit a norm of {self.num_features}.")
        if "sentence" in self.scope and x.dim() < 3:
            raise ValueError(
                f"A {self.norm_name} needs sentences, and cannot tell them apart in tokens of shape {tuple(x.shape)}: "
                "give it (sentences, tokens, channels), or leave the place out of the swap."
            )
        mask = self.token_mask(x, mask)
        compute = self.forward_train if self.training else self.forward_eval
        if not torch.is_autocast_enabled(x.device.type):
            return compute(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            return compute(x, mask)

    def forward_train(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What [`Norm.forward`] does in training mode once the mask is known; here, the same as in evaluation."""
        return self.forward_eval(x, mask)

    def forward_eval(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What [`Norm.forward`] does in evaluation mode once the mask is known; the output has the dtype of `x`."""
        values = self.select_finite(promote(x), mask)
        return self.scale_and_shift(self.normalize(values, mask)).to(x.dtype)

    def scale_and_shift(self, x_hat: torch.Tensor) -> torch.Tensor:
        """`weight · x_hat + bias`, with those of the two that there are."""
        if not self.has_gain:
            return x_hat if self.bias is None else x_hat + self.bias
        return x_hat * self.weight if self.bias is None else torch.addcmul(self.bias, x_hat, self.weight)

    def token_mask(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """`mask`, of shape `(...)` for `x` of shape `(..., C)`, as booleans; without one, that of the model call.

        In evaluation norms without statistics of a sentence have no use for the latter, and exported models no trace
        of it. Where it matters and is not known, a norm of a swapped model warns once.
        """
        if mask is None:
            sees_sentence = "sentence" in self.scope
            if not self.training and not sees_sentence:
                return None
            is_known, mask = find_mask(x)
            if not is_known and (sees_sentence or isinstance(self, BatchStatisticNorm)) and self.stock is not None:
                warn_of_unknown_mask(sees_sentence)
            return mask
        if mask.shape != x.shape[:-1]:
            # One that broadcasts would be counted wrongly.
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)} for tokens of shape {tuple(x.shape[:-1])}: "
                "give one entry for each token."
            )
        return mask.bool()

    def obstacle_to_affine(self) -> str:
        """What keeps [`Norm.affine_map`] from being one, as the predicate of a sentence."""
        if not self.scope:
            return "computes no affine map at inference"
        return f"needs statistics of each {'sentence' if 'sentence' in self.scope else 'token'} at inference"

    def channel_gain(self) -> torch.Tensor:
        """The gain of each channel that a LayerNorm in the place of this norm goes on with."""
        return self.weight

    @classmethod
    def wants_shift(cls, had_shift: bool) -> bool:
        """Whether a swap gives the norm a shift, if nobody says so, in place of a norm that had one or not."""
        return had_shift and cls.has_gain

    def affine_map(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(a, b)` of shape `(C,)` if in evaluation the norm is `y = a ⊙ x + b`, else `None`."""
        return None

    def fit_candidates(self) -> list[dict[str, torch.Tensor]]:
        """Values of further parameters by name, which calibration tries: it keeps those that gain and shift fit best.

        Gain and shift are fitted to [`Norm.normalize`], so what else acts on the output has to be out of use in each.
        """
        return []

    select_finite = staticmethod(select_finite)

    @classmethod
    def default_options(cls, config, num_features: int) -> dict:
        """Options that depend on the transformers `config` of the model, and on the width of the norm."""
        return {}

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options, of this class and its bases, and their defaults."""
        defaults = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Norm):
                parameters = inspect.signature(base.__init__).parameters.values()
                defaults |= {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        return {name: default for name, default in defaults.items() if name not in ("device", "dtype")}

    def initialize(self) -> None:
        """Set parameters and statistics to those of a new norm, except what was just loaded from a checkpoint."""
        options = {**self.options, "bias": self.bias is not None}
        new = type(self)(self.num_features, device="cpu", **options).state_of_its_own()
        for name, tensor in self.state_of_its_own().items():
            init.copy_(tensor, new[name])

    def state_of_its_own(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer by name, those that are not saved too."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _apply(self, fn, recurse=True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype.itemsize < torch.float32.itemsize and name != "weight":
                self._buffers[name] = old.to(new.device)  # .half() and .bfloat16() never demote a statistic
        return self

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def _device_of_unsaved(device):
    """The device of a buffer that no checkpoint has, and that what loads one would leave on meta."""
    return "cpu" if device is None and torch.get_default_device().type == "meta" else device


class BatchRecord(NamedTuple):
    """The statistics of the batch of one training forward, and the running ones from before it.

    Attributes:
        moments ([`Moments`]): of the batch, without a graph.
        running (`dict` of `str` to `torch.Tensor`): running values by the name of their buffer.
    """

    moments: Moments
    running: dict[str, torch.Tensor]


class BatchStatisticNorm(Norm):
    """Base of the norms that normalise with statistics of the batch and keep running ones for inference.

    A subclass names its buffers in `running`. Those called `running_mean`, `running_var` and `running_power` follow
    what [`Moments`] of a batch have under the rest of the name; others are its own to update. They are float32 at
    least, whatever the model's dtype.

    In a bare loop running values update once per training forward. While `accumulating` is set they stay as they are:
    what the micro-batches contribute is pooled until [`update_norm_statistics`](hf_normswap.update_norm_statistics).
    While `paused` is set training forwards leave all of that alone
    (see [`pause_norm_statistics`](hf_normswap.pause_norm_statistics)). While `frozen` is set the norm stays in
    evaluation mode, whatever its model is in. With a `process_group` the batch is that of all its ranks together (see
    [`set_norm_process_group`](hf_normswap.set_norm_process_group)).

    Args:
        momentum (`float`, *optional*, defaults to 0.1): weight m of the batch in `r ← (1 − m) r + m · batch`.

    Attributes:
        records (`tuple` of [`BatchRecord`]):
            of the training forwards since [`BatchStatisticNorm.forget_statistics`], the oldest first: the last 16, or
            the last one in a compiled graph.
        penalties (`tuple`): of the training forwards of RBN whose penalty nobody has taken yet; empty elsewhere.
    """

    scope = ("batch",)
    running: dict[str, float]  # buffer name: value at the start
    centered: bool  # of those that normalise a batch: whether by mean and variance, else by the mean square
    regularization: tuple | None = None  # what follows the running values in the penalty, if there is one

    def __init__(self, num_features: int, *, momentum: float = 0.1, **kwargs):
        super().__init__(num_features, **kwargs)
        check_number("momentum", momentum, high=1)
        self.momentum = momentum
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # Not the device of the weight: init_empty_weights of accelerate moves parameters to meta, and no buffers.
        device = kwargs.get("device")
        for name, value in self.running.items():
            self.register_buffer(name, torch.full((num_features,), value, dtype=dtype, device=device))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self._register_pending("pending", dtype, device)
        self.accumulating = self.frozen = self.paused = False
        self.process_group = None
        self.records: tuple[BatchRecord, ...] = ()
        self.penalties: tuple = ()

    def _register_pending(self, name, dtype, device):
        device = _device_of_unsaved(device)
        self.register_buffer(
            name, torch.zeros(2 * self.num_features + 1, dtype=dtype, device=device), persistent=False
        )

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def discard_pending(self) -> None:
        """Forget what was pooled since the last update."""
        self.pending.zero_()

    def copy_running(self) -> dict[str, torch.Tensor]:
        """The running values as they are now."""
        return {name: snapshot(getattr(self, name)) for name in self.running}

    def running_snapshot(self) -> tuple[dict[str, torch.Tensor], bool]:
        """The running values from before this batch, and whether this is the first run of the forward."""
        return replay_or_record(self.copy_running)

    def compare(self, moments: Moments, running: dict[str, torch.Tensor]) -> Statistics:
        """The batch's statistics beside the running ones from before it; equal to these where there are no tokens.

        Called without a graph.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement compare(moments, running).")

    def record_batch(self, moments: Moments, running: dict[str, torch.Tensor], is_first_run: bool) -> None:
        """Record the batch's statistics for the TID, and track them: once, in the first run."""
        if is_first_run:
            self._record(moments, running)
            self.update_running(moments)

    def normalize_batch(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """A training forward with the statistics of the batch, which it records (see [`NormalizeBatch`])."""
        return self._normalize_batch(x, mask, self.weight, self.bias)[0]

    def standardize_batch(self, x: torch.Tensor, mask: torch.Tensor | None):
        """x̂ of a training forward with the statistics of the batch, which it records; float32 at least.

        Returns:
            x̂; the [`Moments`] of the batch, which can be differentiated; and the running values from before it.
        """
        values, ones = promote(x), torch.ones_like(self.weight)
        return self._normalize_batch(values, mask, ones, torch.zeros_like(ones))

    def _normalize_batch(self, x, mask, weight, bias):
        self.refuse_transforms()
        running, is_first_run = self.running_snapshot() if may_run_again() else (None, True)
        y, packed, penalty, before = NormalizeBatch.apply(x, weight, bias, mask, self, running)
        moments = Moments(packed)
        if is_first_run:
            self._record(moments, before)
            if self.regularization is not None:
                self.keep_penalty(moments, before, penalty)
            if running is not None:
                self.update_running(moments)
        return y, moments, before

    def refuse_transforms(self) -> None:
        """Raises `RuntimeError` inside a transform of `torch.func`, which cannot see that statistics are updated."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"torch.func cannot transform a {type(self).__name__} in training mode, which updates running "
                "statistics: use torch.autograd, or keep the statistics with freeze_norm_statistics(model)."
            )

    def _record(self, moments: Moments, running: dict[str, torch.Tensor]) -> None:
        if self.paused:
            return
        # torch.compile makes a graph for each number of records that it meets: it does not look at them here.
        older = () if torch.compiler.is_compiling() else self.records[1 - KEPT_RECORDS :]
        self.records = (*older, BatchRecord(Moments(moments.packed.detach()), running))

    @property
    def statistics(self) -> Statistics | None:
        """Those of the last training forward and the running ones from before it, `None` where there was none."""
        if not self.has_observed:
            return None
        with torch.no_grad():
            return self.compare(*self.records[-1])

    @property
    def has_observed(self) -> bool:
        """Whether there are statistics of a training forward."""
        return bool(self.records)

    def forget_statistics(self) -> None:
        """As if there had been no training forward."""
        self.records = self.penalties = ()

    def update_running(self, moments: Moments) -> None:
        """Update the running values with a batch, or pool it while `accumulating`; do neither while `paused`."""
        if self.paused:
            return
        if not self.accumulating:
            return self.update_statistics(moments)
        with torch.no_grad():
            get_backend(self.pending, moments.packed).merge_pending(self.pending, moments)

    def update_weight(self) -> float | torch.Tensor:
        """Weight of the batch in the next update."""
        return self.momentum

    @torch.no_grad()
    def update_statistics(self, moments: Moments, weight: float | torch.Tensor | None = None) -> None:
        """One update of the running values; none where there are no tokens or a value is not finite.

        `weight` is that of the batch, [`BatchStatisticNorm.update_weight`] by default; 1 forgets what was before.
        """
        running = {kind: getattr(self, name) for name, kind in MOMENT_OF_BUFFER.items() if name in self.running}
        weight = self.update_weight() if weight is None else weight
        get_backend(moments.packed, *running.values()).update_running(
            running, moments, self.num_batches_tracked, weight
        )

    def __getstate__(self):
        # A part of an autograd graph, and a connection: they can be neither pickled nor copied.
        return {**self.__dict__, "records": (), "penalties": (), "process_group": None}


class PowerStatisticNorm(BatchStatisticNorm):
    """Base of the norms on the second moment ψ² = mean(x²), `running_power`, without a mean (PN-V, PowerNorm)."""

    running = {"running_power": 1.0}

    def affine_map(self):
        scale = self.weight * torch.rsqrt(self.running_power + self.eps)
        return scale, torch.zeros_like(scale) if self.bias is None else self.bias

    def compare(self, moments, running):
        power = torch.where(moments.count > 0, moments.power, running["running_power"])
        return Statistics(None, power, None, running["running_power"])


class GradientStatisticNorm(PowerStatisticNorm):
    """Base of those whose backward has a statistic of earlier gradients in it (PowerNorm, MABN, UN).

    While `accumulating` is set, a backward adds `(n, Σ x̂², Σ γ g x̂)` of its real tokens to `pending_gradient`, for
    [`GradientStatisticNorm.update_gradient_statistic`]. Gradients are those of a loss times `loss_scale`.
    """

    def __init__(self, num_features: int, **kwargs):
        super().__init__(num_features, **kwargs)
        dtype, device = self.running_power.dtype, self.pending.device
        self._register_pending("pending_gradient", dtype, device)
        self.register_buffer("loss_scale", torch.ones((), dtype=dtype, device=device), persistent=False)

    def discard_pending(self):
        super().discard_pending()
        self.pending_gradient.zero_()

    def update_gradient_statistic(self, sums: torch.Tensor) -> None:
        """One update with what was pooled in `pending_gradient`, before that of the running values."""
        raise NotImplementedError(f"{type(self).__name__} must implement update_gradient_statistic(sums).")
