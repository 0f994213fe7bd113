"""A backward pass in two halves: the input's gradient now, that of the weights later.

Where a stage of a pipeline hands its input's gradient on before it looks at its weights, the stage
before can go on earlier. Together the halves multiply as many matrices as the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def input_gradient(
    y: Tensor, x: Tensor, gradient: Tensor | None = None
) -> tuple[Tensor, Callable[[], None]]:
    """The gradient of x, given that of y (1 for a scalar); and what adds those of the weights.

    y was computed from x, a leaf, and from weights. The function that is returned adds the
    weights' gradients to their `.grad`, once. Until then the graph is kept. A product x · w has
    two gradients, each made of what reached y's side of it: where the way from y to x passes an
    operation that also uses a weight, the gradient at its output is noted. Later only these
    operations run, and what lies between them and their weights. A weight that is used at
    several of these places gets its gradient in a whole backward pass of its own.

    Raises ValueError unless x is a leaf that needs a gradient and y depends on it.
    Source: Qi et al., Zero Bubble Pipeline Parallelism, 2023.

    >>> x, w = torch.tensor(2.0, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    >>> gradient, later = input_gradient(x * w, x)
    >>> gradient, w.grad
    (tensor(5.), None)
    >>> later()
    >>> w.grad
    tensor(2.)
    """
    if not (x.is_leaf and x.requires_grad):
        raise ValueError("x must be a leaf that needs a gradient")
    places = _places(y, x)
    noted: dict[Any, tuple] = {}
    hooks = [
        node.register_prehook(lambda grads, node=node: noted.update({node: grads}))
        for node in places
    ]
    try:
        (found,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    count = Counter(weight for weights in places.values() for weight in weights)
    several = [weight for weight, n in count.items() if n > 1]

    def later() -> None:
        if several:
            torch.autograd.backward(y, gradient, retain_graph=True, inputs=several)
        for node, weights in places.items():
            own = [weight for weight in weights if count[weight] == 1]
            reached = [(GradientEdge(node, i), g) for i, g in enumerate(noted[node])]
            edges, grads = zip(*[(e, g) for e, g in reached if g is not None], strict=True)
            if own:
                torch.autograd.backward(edges, grads, inputs=own)

    return found, later


def _places(y: Tensor, x: Tensor) -> dict[Any, set[Tensor]]:
    """Nodes on the way from y to x that other leaves feed into, not along this way; and these."""
    goal, start = get_gradient_edge(x).node, get_gradient_edge(y).node
    below: dict[Any, set[Tensor]] = {}
    """leaves under nodes that do not lead to x"""
    on_the_way, places, seen = {goal}, {}, set()
    stack = [(start, False)]
    while stack:  # depth first; a node is looked at once all its inputs have been
        node, ready = stack.pop()
        inputs = [child for child, _ in node.next_functions if child is not None]
        if not ready:
            if node not in seen:
                seen.add(node)
                stack += [(node, True), *((child, False) for child in inputs)]
            continue
        if node is goal:
            continue
        leaves = set().union(*(below.get(child, ()) for child in inputs))
        if any(child in on_the_way for child in inputs):
            on_the_way.add(node)
            if leaves:
                places[node] = leaves
        else:
            below[node] = leaves | ({node.variable} if hasattr(node, "variable") else set())
    if start not in on_the_way:
        raise ValueError("y does not depend on x, which has no gradient then")
    return places
