"""How a frozen block's output and its twin's are blended. A new way is a small class registered here.

Shapes: hidden states are (batch, seq, hidden); a weight is (1,) for a site or (batch, seq, 1) for each token.
Every interpolation starts neutral: of two equal hidden states the blend is that state, bit by bit.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(NamedTuple):
    """Of the twin's output, 0..1."""

    alpha: Tensor
    """In the blend."""
    gate: Tensor
    """Of a token's divergence, where `divergence_alpha` is gate."""


class Interpolation(nn.Module):
    """Blend two hidden states; built as `Interpolation(hidden_size, alpha=...)` with the weight to start at."""

    alpha_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters that `train_alpha` is about; all others are always trained."""
    weighs_outputs: ClassVar[bool] = False
    """Whether the weight depends on the two outputs."""
    weighs_inputs: ClassVar[bool] = False
    """Whether it depends on the blocks' input."""
    twin_only: ClassVar[bool] = False
    """Whether the frozen output is no part of the blend."""
    restorable: ClassVar[bool] = True
    """Whether blend = a·frozen + b·expanded with the `coefficients` a and b, so that it gives both outputs back."""
    counts_chosen: ClassVar[bool] = False
    """Whether the divergence counts only tokens whose alpha is 1."""

    def __init__(self, hidden_size: int, *, alpha: float = 0.5):
        super().__init__()

    def without_gradient(self, *, measured: bool, gated: bool) -> tuple[str, ...]:
        """Parameters that no loss depends on, given whether there is a divergence and whether the gate weighs it."""
        return ()

    def weights(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
        """The block's output, its twin's, and the input of both."""
        raise NotImplementedError  # every registered class has its own

    def blend(self, frozen: Tensor, expanded: Tensor, alpha: Tensor) -> Tensor:
        """(1 - alpha)·frozen + alpha·expanded; torch.lerp of two equal values is that value exactly."""
        return torch.lerp(frozen, expanded, alpha.to(frozen.dtype))

    def coefficients(self, frozen: Tensor, expanded: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, in float32."""
        return 1 - alpha, alpha

    def teacher(self, frozen: Tensor) -> Tensor:
        """What the divergence compares the twin's output with."""
        return frozen

    def forward(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The blend, and alpha, the weight of `expanded` in it."""
        alpha = self.weights(frozen, expanded, inputs).alpha
        return self.blend(frozen, expanded, alpha), alpha

    @property
    def is_lerp(self) -> bool:
        """Whether blend and teacher are the plain ones, which need no recomputation in the backward pass."""
        return type(self).blend is Interpolation.blend and type(self).teacher is Interpolation.teacher


STRATEGIES: dict[str, type[Interpolation]] = {}


def strategy(name: str) -> Callable[[type[Interpolation]], type[Interpolation]]:
    """Register an interpolation under the name that `control.interpolation` uses."""

    def add(cls: type[Interpolation]) -> type[Interpolation]:
        if name in STRATEGIES:
            raise ValueError(f"interpolation {name!r} is registered twice")
        STRATEGIES[name] = cls
        return cls

    return add


def logit(alpha: float) -> float:
    """The θ of alpha = sigmoid(θ)."""
    return math.log(alpha / (1 - alpha))


@strategy("lerp")
class Lerp(Interpolation):
    """One weight w = sigmoid(θ) per site (equation 3 of the paper)."""

    alpha_parameters = ("alpha_logit",)

    def __init__(self, hidden_size: int, *, alpha: float = 0.5):
        super().__init__(hidden_size)
        self.alpha_logit = nn.Parameter(torch.tensor([logit(alpha)]))

    def weights(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
        alpha = torch.sigmoid(self.alpha_logit.float())
        return Weights(alpha, alpha)


@strategy("none")
class TwinOnly(Interpolation):
    """w = 1: only the twin's output counts, the frozen block is the teacher."""

    twin_only = True

    def weights(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
        one = torch.ones(1, device=frozen.device)
        return Weights(one, one)


class Gate(Interpolation):
    """A weight per token: the sigmoid of a linear map of `features` features, zero at the start."""

    alpha_parameters = ("gate_bias",)

    def __init__(self, hidden_size: int, *, alpha: float = 0.5, features: int = 1):
        super().__init__(hidden_size)
        self.gate_weight = nn.Parameter(torch.zeros(1, features * hidden_size))
        self.gate_bias = nn.Parameter(torch.tensor([logit(alpha)]))

    def weights(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
        alpha = torch.sigmoid(_linear(self.features(frozen, expanded, inputs), self.gate_weight, self.gate_bias))
        return Weights(alpha, alpha)

    def features(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Tensor:
        """What the gate sees."""
        raise NotImplementedError


def _linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(batch, seq, features) → (batch, seq, outputs) in float32.

    As sums of products: a matrix library's result for so few outputs depends on where in memory the weights lie, and a
    reloaded model must be the saved one. In the features' dtype, so that no copy of them is kept for the backward pass.
    """
    rows = weight.to(features.dtype)
    return torch.stack([(features * row).sum(-1, dtype=torch.float32) for row in rows], dim=-1) + bias.float()


@strategy("dlerp")
class Dlerp(Gate):
    """w = sigmoid(a·[frozen; expanded] + b) per token (section 3.2 of the paper)."""

    weighs_outputs = True

    def __init__(self, hidden_size: int, *, alpha: float = 0.5):
        super().__init__(hidden_size, alpha=alpha, features=2)

    def features(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Tensor:
        return torch.cat([frozen, expanded], dim=-1)


@strategy("dlerpin")
class DlerpIn(Gate):
    """w = sigmoid(a·inputs + b) per token."""

    weighs_inputs = True

    def features(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Tensor:
        return inputs


@strategy("slerp")
class Slerp(Lerp):
    """Along the arc between the two outputs, per token, in float32 (Shoemake 1985).

    With the angle θ between them: sin((1-w)θ)/sin θ · frozen + sin(wθ)/sin θ · expanded. Tokens whose outputs are
    almost parallel (or opposite) are interpolated linearly, each for itself: there the arc is a line.
    """

    softening: ClassVar[float] = 0.0
    """Added to sin²θ."""

    def blend(self, frozen: Tensor, expanded: Tensor, alpha: Tensor) -> Tensor:
        a, b = self.coefficients(frozen, expanded, alpha)
        arc = a * frozen.float() + b * expanded.float()
        line = torch.lerp(frozen.float(), expanded.float(), alpha)
        return torch.where(self._straight(self._cosine(frozen, expanded)), line, arc).to(frozen.dtype)

    def coefficients(self, frozen: Tensor, expanded: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        cosine = self._cosine(frozen, expanded)
        straight = self._straight(cosine)
        cosine = torch.where(straight, 0.0, cosine)  # keeps the other side's gradient finite
        theta = torch.acos(cosine)
        sine = torch.sqrt(1 - cosine.square() + self.softening)
        a, b = torch.sin((1 - alpha) * theta) / sine, torch.sin(alpha * theta) / sine
        return torch.where(straight, 1 - alpha, a), torch.where(straight, alpha, b)

    def _cosine(self, frozen: Tensor, expanded: Tensor) -> Tensor:
        return (F.normalize(frozen.float(), dim=-1) * F.normalize(expanded.float(), dim=-1)).sum(-1, keepdim=True)

    def _straight(self, cosine: Tensor) -> Tensor:
        return cosine.abs() > 1 - 1e-6


@strategy("slerp_softened")
class SlerpSoftened(Slerp):
    """As the prior implementation computed it, for its checkpoints: small angles lose length."""

    softening = 1e-8


@strategy("moe")
class MixtureOfTwo(Interpolation):
    """Top-1 of softmax(G·inputs + b) over block and twin; the twin wins a tie.

    The choice itself has no gradient. The weight's value is the choice, its gradient the probability's
    (straight-through, Bengio et al. 2013), so that the router learns from the task.
    """

    alpha_parameters = ("router_bias",)
    weighs_inputs = True
    counts_chosen = True
    learns: ClassVar[bool] = True

    def __init__(self, hidden_size: int, *, alpha: float = 0.5):
        super().__init__(hidden_size)
        self.router_weight = nn.Parameter(torch.zeros(2, hidden_size))
        self.router_bias = nn.Parameter(torch.tensor([0.0, logit(alpha)]))

    def weights(self, frozen: Tensor, expanded: Tensor, inputs: Tensor) -> Weights:
        logits = _linear(inputs, self.router_weight, self.router_bias)  # (batch, seq, 2)
        probability = torch.softmax(logits, dim=-1)[..., 1:]
        chosen = self.choose(logits)
        alpha = chosen + (probability - probability.detach()) if self.learns else chosen
        return Weights(alpha, probability * chosen)

    def choose(self, logits: Tensor) -> Tensor:
        return (logits[..., 1:] >= logits[..., :1]).float()


@strategy("moe_hard")
class HardMixtureOfTwo(MixtureOfTwo):
    """As the prior implementation routes: the router has no task gradient, and the frozen block wins a tie."""

    learns = False

    def without_gradient(self, *, measured: bool, gated: bool) -> tuple[str, ...]:
        return () if measured and gated else ("router_weight", "router_bias")

    def choose(self, logits: Tensor) -> Tensor:
        return (logits[..., 1:] > logits[..., :1]).float()


class Mapped(Lerp):
    """With a learned map M of the frozen output, kept as M = I + D so that D = 0 is exactly neutral."""

    def __init__(self, hidden_size: int, *, alpha: float = 0.5):
        super().__init__(hidden_size, alpha=alpha)
        self.map_delta = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def mapped(self, frozen: Tensor) -> Tensor:
        return frozen + F.linear(frozen, self.map_delta.to(frozen.dtype))


@strategy("prog")
class Prog(Mapped):
    """(1-w)·M·frozen + w·expanded: the lateral connection of progressive networks (Rusu et al. 2016)."""

    restorable = False

    def blend(self, frozen: Tensor, expanded: Tensor, alpha: Tensor) -> Tensor:
        return super().blend(self.mapped(frozen), expanded, alpha)


@strategy("proj")
class Proj(Mapped):
    """Blended as lerp; the divergence compares M·frozen with the twin's output."""

    def without_gradient(self, *, measured: bool, gated: bool) -> tuple[str, ...]:
        return () if measured else ("map_delta",)

    def teacher(self, frozen: Tensor) -> Tensor:
        return self.mapped(frozen)
