"""Training many models of one shape together: their weights are stacked, and one step is one set of kernels for all.

A model of 60,000 weights leaves a processor idle between kernels; ten of them at once take little longer than one. Each
keeps its own seed, order of rows, learning rate, weight decay and dropout, and ends where it would have ended alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from trackrec.ctr.embedding import Batch, Tables
from trackrec.ctr.layers import Dropout

# Steps for which compiling is worth its time: it takes about as long as what it saves on these.
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
        steps: about how many optimiser steps are to come.
    """

    def __init__(self, models: Sequence[nn.Module], hypers: Sequence[Hyper], steps: int) -> None:
        self.template = models[0]
        state, self.buffers = stack_module_state(list(models))  # type: ignore[arg-type]
        self.weights = {name: weight.detach() for name, weight in state.items()}
        # Neighbours with the same settings are one of the optimiser's groups: its kernels are fewer, and larger.
        alike = [(key, len(list(of_key))) for key, of_key in groupby((h.learning_rate, h.l2) for h in hypers)]
        self.sizes = [size for _, size in alike]
        self.parts = [nn.Parameter(part) for weight in self.weights.values() for part in weight.split(self.sizes)]
        groups = [
            {"params": self.parts[group :: len(alike)], "lr": learning_rate, "weight_decay": l2}
            for group, ((learning_rate, l2), _) in enumerate(alike)
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        dropouts = {name: module for name, module in self.template.named_modules() if isinstance(module, Dropout)}
        self.keys = {f"{name}.key": layer for layer, name in enumerate(dropouts)}
        rates = torch.tensor([hyper.dropout for hyper in hypers])
        self.drops = bool(rates.any())
        self.buffers |= {f"{name}.rate": rates for name in dropouts}
        self.seeds = torch.tensor([hyper.seed for hyper in hypers], dtype=torch.int64)
        self.kept = {name: weight.clone() for name, weight in self.weights.items()}
        self.steps = 0
        self.compiles = steps >= _OFTEN
        self.programs: dict[torch.Size, Callable[..., tuple[Tensor, tuple[Tensor, ...]]]] = {}

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
        given = (*self.weights.values(), *self.buffers.values(), *batch, *tables, labels)
        if self.compiles and not self.programs:  # the first batch is a full one; an epoch's last may not be
            self.programs[labels.shape] = _compiled(self._gradients, given)
        if program := self.programs.get(labels.shape):
            with torch.inference_mode():  # the gradients' graph is part of the program
                losses, gradients = program(*given)
        else:
            losses, gradients = self._gradients(*given)
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = gradient
        self.optimizer.step()
        return losses

    def _gradients(self, *given: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses [M] and `parts`' gradients, from weights, buffers, batch, tables and labels, one after another."""
        rest = iter(given)
        weights = {name: next(rest).detach().requires_grad_(True) for name in self.weights}
        buffers = {name: next(rest) for name in self.buffers}
        batch, tables = Batch(*islice(rest, len(Batch._fields))), Tables(*islice(rest, len(Tables._fields)))
        [labels] = rest

        def answer(weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch) -> Tensor:
            logits: Tensor = functional_call(self.template, (weights, buffers), (batch, tables))
            return logits

        self.template.train(self.drops)
        logits = vmap(answer)(weights, buffers, batch)
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        # Most backbones have no linear part, and leave the first-order weights alone.
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()), materialize_grads=True)
        # The fused optimiser walks through memory, and takes a transposed gradient for what it is not.
        parts = [part for gradient in gradients for part in gradient.contiguous().split(self.sizes)]
        return losses.detach(), tuple(parts)

    @torch.inference_mode()
    def predict(self, batch: Batch, tables: Tables) -> Tensor:
        """P(liked) under every model, [M, B], for rows they share (each tensor [B, ...])."""
        self.template.eval()

        def answer(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(self.template, (weights, buffers), (batch, tables))
            return logits.sigmoid()

        return vmap(answer)(self.weights, self.buffers)

    def keep(self, models: Sequence[int]) -> None:
        """Keeps these models' weights as they are now, for `restore`."""
        for name, weight in self.weights.items():
            self.kept[name][list(models)] = weight[list(models)]

    def restore(self) -> None:
        """Puts every model back to the weights that were kept of it last."""
        for name, weight in self.weights.items():
            weight.copy_(self.kept[name])

    def weights_of(self, model: int) -> dict[str, Tensor]:
        """A copy of one model's weights."""
        return {name: w[model].clone() for name, w in self.weights.items()}


def _compiled(function: Callable[..., Any], given: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The kernels that `function` runs for tensors of these shapes, without what Python, vmap and autograd do between
    them, which takes longer than the kernels do."""
    graph = make_fx(function)(*given)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return torch.jit.trace(graph, given, check_trace=False)
