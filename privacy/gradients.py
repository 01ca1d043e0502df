"""What each visitor adds to the gradient of a layer: its norm, and the sum of all, weighted.

A layer's gradient is made of what went in and of the gradient of what came out, at each position
(touchpoint) where the layer was used. Where each visitor's own gradient is no larger than those
two, it is computed and kept. Else it never exists: its norm has a closed form in the two
(Goodfellow, "Efficient Per-Example Gradient Computations", 2015, for one position; Li et al.,
"Large Language Models Can Be Strong Differentially Private Learners", 2022, section 4, for more),
and the weighted sum is one product over all visitors and positions ("book-keeping": Bu et al.,
"Differentially Private Optimization on Large Foundation Models at Moderate Cost", 2022).

V: visitors. P: positions of a visitor, over all its examples and all uses of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import layer_norm

from privacy.chain import LinearUse

LARGEST_NORM = 1.8e19
"""Above it a float32 has no square; the gradient of such a visitor counts as broken."""

KEPT = 3
"""A visitor's own gradient is kept if it has at most so many times the numbers that it is made of.
About there it also costs as much as the closed form."""

Use = tuple[Tensor, Tensor]
"""What went into a layer and the gradient of what came out, (R, ..., width); R: examples."""
Sums = Mapping[Tensor, Tensor]
"""Of each parameter a tensor of its shape."""


class VisitorGradients(Protocol):
    """One gradient a visitor, of some parameters."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Of which the gradients are."""

    def norms(self) -> Tensor:
        """(V,) at least the L2 norm of what `add_weighted` adds for a visitor at weight 1.

        Above it by rounding only. Rounding inside of a sum of n squares, at most n x 2^-24 of it,
        is left to the caller. Infinite or NaN where the gradient is broken.
        """

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        """Add each visitor's gradient, times its weight of (V,), to its parameters' `sums`."""

    def without(self, broken: Tensor) -> VisitorGradients:
        """The same with zeros for the visitors in `broken`, bool (V,)."""


class Kept:
    """Gradients that exist: one row a visitor."""

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`rows`: each parameter with its gradients (V, ...)."""
        self.rows = [(p, gradient.flatten(1)) for p, gradient in rows]
        self.parameters = [p for p, _ in rows]

    def norms(self) -> Tensor:
        """(V,) L2 norms over all parameters."""
        return together([vector_norm(gradient, dim=1) for _, gradient in self.rows])

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        """Add one product for each parameter."""
        for p, gradient in self.rows:
            sums[p].view(-1).addmv_(gradient.t(), weights)

    def without(self, broken: Tensor) -> Kept:
        """The same with zeros for `broken`."""
        return Kept([(p, _without(gradient, broken)) for p, gradient in self.rows])


class Products:
    """Of a linear layer: sums over positions of output gradient x input."""

    def __init__(self, layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> None:
        """`inputs` (V, P, I), `outputs` (V, P, O): the gradient of what came out."""
        self.layer, self.inputs, self.outputs = layer, inputs, outputs
        self.parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]

    def norms(self) -> Tensor:
        """float64 (V,) from the inner products of positions."""
        inputs, outputs = _inner_products(self.inputs), _inner_products(self.outputs)
        if self.layer.bias is not None:
            inputs += 1
        return _norms(inputs, outputs, inputs.shape[1], self.inputs.dtype)

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        """Add one product over visitors and positions for each parameter."""
        outputs = (self.outputs * weights[:, None, None]).flatten(0, 1)
        sums[self.layer.weight].addmm_(outputs.t(), self.inputs.flatten(0, 1))
        if self.layer.bias is not None:
            sums[self.layer.bias].add_(outputs.sum(dim=0))

    def without(self, broken: Tensor) -> Products:
        """The same with zeros for `broken`."""
        return Products(self.layer, *(_without(x, broken) for x in (self.inputs, self.outputs)))


class OuterProducts:
    """Of linear layers with a bias, each used once for a visitor: output gradient x (input, 1)."""

    def __init__(self, uses: Sequence[LinearUse]) -> None:
        """`uses`: of each layer, by V visitors."""
        self.uses = uses
        self.parameters = [p for weight, bias, *_ in uses for p in (weight, bias)]

    def norms(self) -> Tensor:
        """float64 (V,) from the norms of inputs and output gradients."""
        # The bias makes up for what vanishes in the inputs' squares; inf is what overflows.
        inputs = torch.stack([vector_norm(x, dim=1) for *_, x, _ in self.uses])
        outputs = torch.stack([vector_norm(x, dim=1, dtype=torch.float64) for *_, x in self.uses])
        return outputs.square_().mul_(inputs.square_().add_(1)).sum(dim=0).sqrt_()

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        """Add two products over visitors for each layer."""
        column = weights.unsqueeze(1)
        for weight, bias, inputs, outputs in self.uses:
            sums[weight].addmm_((outputs * column).t(), inputs)
            sums[bias].addmv_(outputs.t(), weights)

    def without(self, broken: Tensor) -> OuterProducts:
        """The same with zeros for `broken`."""
        return OuterProducts(
            [(w, b, _without(x, broken), _without(y, broken)) for w, b, x, y in self.uses]
        )


class Lookups:
    """Of an embedding: sums of the output gradients of equal indices."""

    def __init__(self, table: nn.Embedding, indices: Tensor, outputs: Tensor) -> None:
        """`indices` int64 (V, P, C): rows that share an output gradient of (V, P, W)."""
        self.table, self.indices, self.outputs = table, indices, outputs
        self.parameters = [table.weight]

    def norms(self) -> Tensor:
        """float64 (V,) from inner products and how many indices two positions have in common."""
        size, positions, columns = self.indices.shape
        flat = self.indices.flatten(1)
        equal = flat.unsqueeze(2) == flat.unsqueeze(1)
        common = equal.view(size, positions, columns, positions, columns).sum((2, 4))
        outputs, terms = _inner_products(self.outputs), positions * columns**2
        return _norms(common.double(), outputs, terms, self.outputs.dtype)

    def add_weighted(self, weights: Tensor, sums: Sums) -> None:
        """Add each output gradient to its rows of the table."""
        _add_up(sums[self.table.weight], self.indices, self.outputs * weights[:, None, None])

    def without(self, broken: Tensor) -> Lookups:
        """The same with zeros for `broken`."""
        return Lookups(self.table, self.indices, _without(self.outputs, broken))


def together(norms: list[Tensor]) -> Tensor:
    """(V,) the norm of vectors whose parts have `norms` (V,)."""
    return norms[0] if len(norms) == 1 else torch.stack(norms).square_().sum(dim=0).sqrt_()


def visitor_gradients(uses: Mapping[nn.Module, Sequence[Use]], each: int) -> list[VisitorGradients]:
    """Of all layers.

    Args:
        uses: of each layer; of kinds in `GRADIENTS`.
        each: examples of a visitor, in a row.
    """
    found: list[VisitorGradients] = []
    once: list[LinearUse] = []
    for layer, used in uses.items():
        if isinstance(layer, nn.Linear) and _is_once(layer, used, each):
            once.append((layer.weight, layer.bias, *used[0]))
        else:
            found.append(GRADIENTS[type(layer)](layer, used, each))
    return [*found, OuterProducts(once)] if once else found


def linear_gradients(layer: nn.Linear, uses: Sequence[Use], each: int) -> VisitorGradients:
    """Of weight and bias."""
    inputs = _positions([use[0] for use in uses], each)
    outputs = _positions([use[1] for use in uses], each)
    positions, parts = inputs.shape[1], inputs.shape[2] + outputs.shape[2]
    if positions == 1 or layer.weight.numel() > KEPT * positions * parts:
        return Products(layer, inputs, outputs)
    own = (outputs.transpose(1, 2) @ inputs, outputs.sum(dim=1))
    return Kept(list(zip(layer.parameters(), own, strict=False)))


def embedding_gradients(table: nn.Embedding, uses: Sequence[Use], each: int) -> VisitorGradients:
    """Of the table."""
    if len(uses) == 1 and _summed(uses[0]):
        (indices, outputs) = uses[0]
        indices, outputs = _positions([indices], each), _positions([outputs.select(-2, 0)], each)
    else:
        indices = _positions([use[0].unsqueeze(-1) for use in uses], each)
        outputs = _positions([use[1] for use in uses], each)
    size, positions, columns = indices.shape
    rows, width = table.weight.shape
    if rows > KEPT * positions * columns:
        return Lookups(table, indices, outputs)
    own = outputs.new_zeros(size * rows, width)
    first = torch.arange(0, size * rows, rows)[:, None, None]
    _add_up(own, indices + first, outputs)
    return Kept([(p, own.view(size, rows, width)) for p in table.parameters()])


def layer_norm_gradients(layer: nn.LayerNorm, uses: Sequence[Use], each: int) -> VisitorGradients:
    """Of weight and bias, always kept: they are no larger than one position."""
    shape = layer.normalized_shape
    dims = len(shape)
    normed = [layer_norm(use[0], shape, eps=layer.eps).flatten(-dims) for use in uses]
    outputs = _positions([use[1].flatten(-dims) for use in uses], each)
    own = ((outputs * _positions(normed, each)).sum(dim=1), outputs.sum(dim=1))
    return Kept(list(zip(layer.parameters(), own, strict=False)))


GRADIENTS: dict[type[nn.Module], Callable[..., VisitorGradients]] = {
    nn.Linear: linear_gradients,
    nn.Embedding: embedding_gradients,
    nn.LayerNorm: layer_norm_gradients,
}
"""For each kind of layer: its `VisitorGradients` of (layer, uses, examples of each visitor)."""


def _positions(uses: list[Tensor], each: int) -> Tensor:
    """(V, P, width): examples of (R, ..., width), those of a visitor in a row, all uses."""
    parts = [x.reshape(len(x) // each, each * math.prod(x.shape[1:-1]), x.shape[-1]) for x in uses]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _is_once(layer: nn.Linear, uses: Sequence[Use], each: int) -> bool:
    """Whether each visitor has one example with one position, and the layer a bias."""
    if each > 1 or len(uses) > 1 or layer.bias is None:
        return False
    return all(x.dim() == 2 for x in uses[0])


def _summed(use: Use) -> bool:
    """Whether the embeddings along the last axis of indices were summed.

    Autograd then gives them all the same gradient, by a stride of 0.
    """
    indices, outputs = use
    return indices.dim() > 1 and outputs.stride(-2) == 0


def _add_up(total: Tensor, indices: Tensor, outputs: Tensor) -> Tensor:
    """Add `outputs` (V, P, W) to the rows of `total` that `indices` (V, P, C) name."""
    rows = outputs.flatten(0, 1)
    for column in indices.flatten(0, 1).unbind(1):
        total.index_add_(0, column, rows)
    return total


def _inner_products(x: Tensor) -> Tensor:
    """(V, P, P) of (V, P, width); in float64, as their sums may cancel."""
    if x.shape[1] == 1:
        norms: Tensor = vector_norm(x, dim=2, keepdim=True, dtype=torch.float64)
        return norms.square_()
    x = x.double()
    return x @ x.transpose(1, 2)


def _norms(inputs: Tensor, outputs: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """float64 (V,) from inner products: the norm, plus what the sum of `terms` may round.

    The parts of several positions may cancel in the norm more exactly than in the sum, where each
    addition is off by up to `dtype`'s rounding x the norms of all parts. Infinite where an input
    is beyond `LARGEST_NORM`.
    """
    if terms == 1:
        sizes = inputs.view(-1)
        norms = (outputs.view(-1) * sizes).sqrt_()
    else:
        sizes = inputs.diagonal(dim1=1, dim2=2)
        apart = (sizes * outputs.diagonal(dim1=1, dim2=2)).sqrt_().sum(dim=1)
        norms = (outputs * inputs).sum((1, 2)).clamp_(min=0).sqrt_()
        norms += (terms + 2) * torch.finfo(dtype).eps * apart
        sizes = sizes.amax(dim=1)
    return norms.masked_fill_(sizes > LARGEST_NORM**2, math.inf)


def _without(x: Tensor, broken: Tensor) -> Tensor:
    return x.masked_fill(broken.view(-1, *[1] * (x.dim() - 1)), 0)
