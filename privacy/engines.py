"""A model wrapped, as an extension of Opacus, so that it gives each visitor's gradients.

Both ways give the same gradients; `privacy.optimizer` clips them, adds them up and adds noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from opacus import GradSampleModule
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from models.feed_forward import FeedForward
from privacy.chain import Chain
from privacy.gradients import (
    GRADIENTS,
    Kept,
    OuterProducts,
    Use,
    VisitorGradients,
    visitor_gradients,
)

ADVICE = "use layers of privacy.gradients.GRADIENTS, or set privacy.clipping_engine=opacus"
NOT_PER_VISITOR = (
    "{} has no gradient for each visitor: every layer must take part, and see examples as its "
    "first dimension, in every forward pass"
)


class Engine(Protocol):
    """A wrapped model. Calls take turns: forward, then the gradients of what came out of it."""

    def forward(self, batch: Any) -> Tensor:
        """What the model gives for `batch`: one row an example."""

    def visitor_gradients(
        self, output: Tensor, gradient: Tensor, each: int
    ) -> list[VisitorGradients]:
        """Of all of the model's parameters.

        Args:
            output: of the last call: one row for each of R examples, those of a visitor in a row.
            gradient: of a sum over examples by `output`, of the same shape.
            each: how many examples each visitor has.

        Raises:
            RuntimeError: A parameter has no gradient for each visitor: it took no part, or its
                layer saw something else than examples as the first dimension. To clip such
                gradients would protect no visitor.
        """


class BookKeeping(AbstractGradSampleModule):  # type: ignore[misc]
    """Keeps what goes into each layer, and asks autograd for no gradient but of what comes out.

    Of the two `privacy.gradients` makes each visitor's: autograd computes no parameter's gradient,
    and of large layers nobody computes a visitor's. Where layers come one after the other
    (`privacy.chain`), there is no need of autograd.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to the layers of `model`, which stays usable without this wrapper.

        Raises:
            TypeError: A layer of which no closed form is known, or which may mix visitors up.
        """
        layers = {layer: name for name, layer in model.named_modules()}
        for layer, name in layers.items():
            _check_layer(layer, name)
        parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
        if len(parameters) > len(set(parameters)):
            raise TypeError(f"two layers share a parameter: {ADVICE}")
        super().__init__(model, loss_reduction="sum")
        self._layers = {layer: name for layer, name in layers.items() if _has_parameters(layer)}
        self._chain = _chain(model)
        if isinstance(model, FeedForward):
            # Not by way of the model, which takes its time to find its parts.
            self._bag = model.bag.forward
        hooked = self._layers if self._chain is None else ()
        self._hooks = [layer.register_forward_hook(self._keep) for layer in hooked]
        self._pass = _Pass()

    def forward(self, batch: Any) -> Tensor:
        """What the model gives for `batch`."""
        if self._chain is not None:
            return self._chain.forward(self._bag(batch)).squeeze(1)
        self._pass.clear()
        self._pass.keeping = True
        try:
            result: Tensor = self._module(batch)
        finally:
            self._pass.keeping = False
        return result

    def visitor_gradients(
        self, output: Tensor, gradient: Tensor, each: int
    ) -> list[VisitorGradients]:
        """Of all parameters, layer by layer; see `Engine`."""
        if self._chain is not None:
            once = self._chain.backward(gradient.unsqueeze(1))
            if each == 1:
                return [OuterProducts(once)]
            layers = reversed(self._chain.layers)
            return visitor_gradients(
                {layer: [use[2:]] for layer, use in zip(layers, once, strict=True)}, each
            )
        uses = self._uses_by_autograd(output, gradient)
        examples = output.shape[0]
        for layer, used in uses.items():
            if not used or any(x.shape[0] != examples for use in used for x in use):
                raise RuntimeError(NOT_PER_VISITOR.format(self._layers[layer]))
        return visitor_gradients(uses, each)

    def _uses_by_autograd(self, output: Tensor, gradient: Tensor) -> dict[nn.Module, list[Use]]:
        gradients = torch.autograd.grad(output, self._pass.outputs, gradient, allow_unused=True)
        uses: dict[nn.Module, list[Use]] = {layer: [] for layer in self._layers}
        for (layer, entered), of_output in zip(self._pass.inputs, gradients, strict=True):
            if of_output is not None:
                uses[layer].append((entered, of_output))
        self._pass.clear()
        return uses

    def remove_hooks(self) -> None:
        """Detach from the layers."""
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: nn.Module, entered: tuple[Tensor, ...], came_out: Tensor) -> None:
        if self._pass.keeping and came_out.requires_grad:
            self._pass.inputs.append((layer, entered[0].detach()))
            self._pass.outputs.append(get_gradient_edge(came_out))


class _Pass:
    """What a forward pass keeps. Not on the module, of which each attribute is slow to set."""

    def __init__(self) -> None:
        self.keeping = False
        self.clear()

    def clear(self) -> None:
        self.inputs: list[tuple[nn.Module, Tensor]] = []
        self.outputs: list[GradientEdge] = []


class OpacusHooks(GradSampleModule):  # type: ignore[misc]
    """Opacus's own way: a gradient of each parameter for each example, all stored."""

    def __init__(self, model: nn.Module) -> None:
        """Attach to the layers of `model`, which stays usable without this wrapper."""
        super().__init__(model, loss_reduction="sum")
        # Attached for a forward and a backward pass alone: another engine may have its turn.
        self.remove_hooks()

    def forward(self, batch: Any) -> Tensor:
        """What the model gives for `batch`."""
        self.remove_hooks()
        self.add_hooks(loss_reduction="sum")
        result: Tensor = super().forward(batch)
        return result

    def visitor_gradients(
        self, output: Tensor, gradient: Tensor, each: int
    ) -> list[VisitorGradients]:
        """Of all parameters, one by one; see `Engine`."""
        examples = len(output)
        with warnings.catch_warnings():
            # Torch says so of layers whose input needs no gradient; their own is right.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            torch.autograd.backward(output, gradient)
        self.remove_hooks()
        result: list[VisitorGradients] = []
        for name, p in self._module.named_parameters():
            rows, p.grad_sample = p.grad_sample, None
            if not isinstance(rows, Tensor) or len(rows) != examples:
                raise RuntimeError(NOT_PER_VISITOR.format(name))
            own = rows.view(examples // each, each, -1).sum(dim=1) if each > 1 else rows
            result.append(Kept([(p, own)]))
        return result


ENGINES: dict[str, Callable[[nn.Module], Engine]] = {
    "bookkeeping": BookKeeping,
    "opacus": OpacusHooks,
}
"""By the name in `privacy.clipping_engine`."""


def _check_layer(layer: nn.Module, name: str) -> None:
    kind = type(layer).__name__
    if list(layer.buffers(recurse=False)):
        raise TypeError(f"{name} ({kind}) keeps a buffer, which may mix visitors up: {ADVICE}")
    if _has_parameters(layer) and type(layer) not in GRADIENTS:
        raise TypeError(f"{name} ({kind}) has parameters but no known closed form: {ADVICE}")
    if isinstance(layer, nn.Embedding) and (
        layer.padding_idx is not None or layer.max_norm is not None or layer.scale_grad_by_freq
    ):
        raise TypeError(f"{name} ({kind}) does more than look up: {ADVICE}")


def _chain(model: nn.Module) -> Chain | None:
    """The model's layers, if they are all there is to it."""
    if not isinstance(model, FeedForward) or type(model).forward is not FeedForward.forward:
        return None
    own = {p for layer in model.layers for p in layer.parameters()}
    return Chain.of(model.layers) if own == set(model.parameters()) else None


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(recurse=False), None) is not None
