"""Training many models of one shape together: their weights are stacked, and one step is one set of kernels for all.

A model of 60,000 weights leaves a processor idle between kernels; ten of them at once take little longer than one. Each
keeps its own seed, order of rows, learning rate, weight decay and dropout, and ends where it would have ended alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from trackrec.ctr.embedding import Batch, Tables
from trackrec.ctr.layers import Dropout

# Steps of one batch shape after which it is compiled: compiling takes about as long as these do.
_OFTEN = 100


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
        state, self.buffers = stack_module_state(list(models))  # type: ignore[arg-type]
        self.shapes = {name: w.shape[1:] for name, w in state.items()}
        # One row a model, all its weights one after another: an optimiser's step is one kernel a model.
        self.flat = torch.cat([w.detach().flatten(1) for w in state.values()], dim=1)
        self.rows = [nn.Parameter(row) for row in self.flat]
        groups = [
            {"params": [row], "lr": hyper.learning_rate, "weight_decay": hyper.l2}
            for row, hyper in zip(self.rows, hypers, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        dropouts = {name: module for name, module in self.template.named_modules() if isinstance(module, Dropout)}
        self.keys = {f"{name}.key": layer for layer, name in enumerate(dropouts)}
        rates = torch.tensor([hyper.dropout for hyper in hypers])
        self.drops = bool(rates.any())
        self.buffers |= {f"{name}.rate": rates for name in dropouts}
        self.seeds = torch.tensor([hyper.seed for hyper in hypers], dtype=torch.int64)
        self.kept = self.flat.clone()
        self.steps = 0
        self.met: Counter[torch.Size] = Counter()
        self.programs: dict[torch.Size, Callable[..., tuple[Tensor, Tensor]]] = {}

    def step(self, batch: Batch, tables: Tables, labels: Tensor) -> Tensor:
        """One optimiser step of every model; the losses (BCE, eq. 8) before it, [M].

        Args:
            batch: each tensor [M, B, ...]: every model's own rows. labels: [M, B].
        """
        self.steps += 1
        if self.drops:
            for name, layer in self.keys.items():
                mixed = (self.seeds * 1_000_003 + self.steps) * 1_000_003 + layer
                self.buffers[name] = (mixed % 2**31).to(torch.int32)
        given = (self.flat, *self.buffers.values(), *batch, *tables, labels)
        self.template.train(self.drops)
        self.met[labels.shape] += 1
        if self.met[labels.shape] == _OFTEN:
            self.programs[labels.shape] = _compiled(self._gradients, given)
        losses, gradients = self.programs.get(labels.shape, self._gradients)(*given)
        for row, gradient in zip(self.rows, gradients, strict=True):
            row.grad = gradient
        self.optimizer.step()
        return losses

    def _gradients(self, flat: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [M] and gradients [M, weights] from weights, buffers, batch, tables and labels, one after another."""
        buffers = dict(zip(self.buffers, given[: len(self.buffers)], strict=True))
        *rest, labels = given[len(self.buffers) :]
        batch, tables = Batch(*rest[: len(Batch._fields)]), Tables(*rest[len(Batch._fields) :])

        def loss_of(weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, labels: Tensor) -> Tensor:
            logits = functional_call(self.template, (weights, buffers), (batch, tables))
            return F.binary_cross_entropy_with_logits(logits, labels)

        flat = flat.detach().requires_grad_(True)
        losses = vmap(loss_of)(self._named(flat), buffers, batch, labels)
        [gradients] = torch.autograd.grad(losses.sum(), [flat])
        return losses.detach(), gradients

    @property
    def weights(self) -> dict[str, Tensor]:
        """By name, [M, ...] each: views of `flat`."""
        return self._named(self.flat)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes.values()], dim=1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(len(part), *shape) for (name, shape), part in named}

    @torch.no_grad()
    def predict(self, batch: Batch, tables: Tables) -> Tensor:
        """P(liked) under every model, [M, B], for rows they share (each tensor [B, ...])."""
        self.template.eval()

        def answer(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.template, (weights, buffers), (batch, tables))
            return logits.sigmoid()

        return vmap(answer)(self.weights, self.buffers)

    def keep(self, models: Sequence[int]) -> None:
        """Keeps these models' weights as they are now, for `restore`."""
        self.kept[list(models)] = self.flat[list(models)]

    def restore(self) -> None:
        """Puts every model back to the weights that were kept of it last."""
        self.flat.copy_(self.kept)

    def weights_of(self, model: int) -> dict[str, Tensor]:
        """A copy of one model's weights."""
        return {name: w[model].clone() for name, w in self.weights.items()}


def _compiled(function: Callable[..., tuple[Tensor, Tensor]], given: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The kernels that `function` runs for tensors of these shapes, without what Python, vmap and autograd do between
    them, which takes longer than the kernels do."""
    graph = make_fx(function)(*given)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return torch.jit.trace(graph, given, check_trace=False)
