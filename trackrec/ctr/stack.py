"""Training many models of one shape together: their weights are stacked, and one step is one set of kernels for all.

A model of 60,000 weights leaves a processor idle between kernels; ten of them at once take little longer than one. Each
keeps its own seed, order of rows, learning rate, weight decay and dropout, and ends where it would have ended alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from trackrec.ctr.embedding import Batch, Tables
from trackrec.ctr.layers import Dropout

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


@dataclass(frozen=True)
class Hyper:
    """What models that train together may differ in."""

    seed: int
    learning_rate: float
    dropout: float
    l2: float


class Stack:
    """M models and their Adam.

    Args:
        models: built alike, each under its own seed.
        hypers: one a model.
    """

    def __init__(self, models: Sequence[nn.Module], hypers: Sequence[Hyper]) -> None:
        self.template = models[0]
        state, buffers = stack_module_state(list(models))  # type: ignore[arg-type]
        self.weights: dict[str, Tensor] = {name: w.detach().requires_grad_(True) for name, w in state.items()}
        self.buffers: dict[str, Tensor] = buffers
        dropouts = [name for name, module in self.template.named_modules() if isinstance(module, Dropout)]
        self.keys = {f"{name}.key": layer for layer, name in enumerate(dropouts)}
        rates = torch.tensor([hyper.dropout for hyper in hypers])
        self.buffers |= {f"{name}.rate": rates for name in dropouts}
        self.seeds = torch.tensor([hyper.seed for hyper in hypers], dtype=torch.int64)
        self.learning_rate = torch.tensor([hyper.learning_rate for hyper in hypers])
        self.l2 = torch.tensor([hyper.l2 for hyper in hypers])
        self.mean = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.square = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.kept: dict[str, Tensor] = {}
        self.steps = 0

    def step(self, batch: Batch, tables: Tables, labels: Tensor) -> Tensor:
        """One optimiser step of every model; the losses (BCE, eq. 8) before it, [M].

        Args:
            batch: each tensor [M, B, ...]: every model's own rows. labels: [M, B].
        """
        self.steps += 1
        for name, layer in self.keys.items():
            mixed = (self.seeds * 1_000_003 + self.steps) * 1_000_003 + layer
            self.buffers[name] = (mixed % 2**31).to(torch.int32)
        self.template.train()

        def loss_of(weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, labels: Tensor) -> Tensor:
            logits = functional_call(self.template, (weights, buffers), (batch, tables))
            return F.binary_cross_entropy_with_logits(logits, labels)

        losses = vmap(loss_of)(self.weights, self.buffers, batch, labels)
        gradients = torch.autograd.grad(losses.sum(), list(self.weights.values()), materialize_grads=True)
        self._adam(dict(zip(self.weights, gradients, strict=True)))
        return losses.detach()

    @torch.no_grad()
    def predict(self, batch: Batch, tables: Tables) -> Tensor:
        """P(liked) under every model, [M, B], for rows they share (each tensor [B, ...])."""
        self.template.eval()

        def answer(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.template, (weights, buffers), (batch, tables))
            return logits.sigmoid()

        return vmap(answer)(self.weights, self.buffers)

    @torch.no_grad()
    def keep(self, models: Sequence[int]) -> None:
        """Keeps these models' weights as they are now, for `restore`."""
        if not self.kept:
            self.kept = {name: w.detach().clone() for name, w in self.weights.items()}
        for name, kept in self.kept.items():
            kept[list(models)] = self.weights[name][list(models)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts every model back to the weights that were kept of it last."""
        for name, kept in self.kept.items():
            self.weights[name].copy_(kept)

    def weights_of(self, model: int) -> dict[str, Tensor]:
        """A copy of one model's weights."""
        return {name: w[model].detach().clone() for name, w in self.weights.items()}

    @torch.no_grad()
    def _adam(self, gradients: dict[str, Tensor]) -> None:
        first, second = (1 - beta**self.steps for beta in _BETAS)
        for name, weight in self.weights.items():
            per_model = (-1,) + (1,) * (weight.dim() - 1)
            gradient = torch.addcmul(gradients[name], weight, self.l2.view(per_model))
            mean, square = self.mean[name], self.square[name]
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            change = (mean / first) / ((square / second).sqrt_().add_(_EPSILON))
            weight.sub_(change.mul_(self.learning_rate.view(per_model)))
