"""Products of one row on a GPU: a token's, whose cost is reading the weights.

The library's kernels read a weight of one row's product at half to three quarters of copy speed. Here a few rows of
weights belong to each program, and products of the same row are one launch, whatever weights they are of: a layer's
queries, keys and values, or its gate and its input. Torch's compiler is told so by a pass over its graphs; the model's
code stays as it is.

Shapes: K features in, N features out.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

try:
    import triton
    from triton import language as tl
except ImportError:  # it comes with torch where there is a GPU
    triton = None

# Weights that one launch reads, at most.
MOST = 3
# The quickest of some sixty sizes on an H200, for products between 4096 x 4096 and 4096 x 32000.
_BLOCK_N, _BLOCK_K, _WARPS = 2, 2048, 2
# Rows of weights begin at multiples of so many numbers: wide loads are safe.
_ALIGNED = 16


@torch.library.custom_op("segcore::row_products", mutates_args=())
def row_products(x_1K: Tensor, weights_NK: list[Tensor]) -> Tensor:
    """[1, N], of all weights' features: `x @ weight.T` for each, one behind the other. At most `MOST` weights."""
    return torch.cat([x_1K @ weight.T for weight in weights_NK], dim=1)


@row_products.register_fake
def _(x_1K: Tensor, weights_NK: list[Tensor]) -> Tensor:
    return x_1K.new_empty((1, sum(len(weight) for weight in weights_NK)))


@row_products.register_kernel("cuda")
def _on_gpu(x_1K: Tensor, weights_NK: list[Tensor]) -> Tensor:
    features, counts = x_1K.shape[1], [len(weight) for weight in weights_NK]
    out_1N = x_1K.new_empty((1, sum(counts)))
    anchor = weights_NK[0]
    # In numbers from the first weight: kernels take one address of a kind.
    offsets = [(weight.data_ptr() - anchor.data_ptr()) // anchor.element_size() for weight in weights_NK]
    if any(offset % _ALIGNED for offset in offsets):  # views of other tensors may begin anywhere
        return torch.cat([x_1K @ weight.T for weight in weights_NK], dim=1)
    lacking = [0] * (MOST - len(weights_NK))
    grid = sum(-(-count // _BLOCK_N) for count in counts)
    block_k = min(_BLOCK_K, 1 << (features - 1).bit_length())
    _products[(grid,)](
        *(x_1K, anchor, out_1N, features),
        *(offsets + lacking)[1:],
        *(counts + lacking),
        _ALIGNED,
        _BLOCK_N,
        block_k,
        num_warps=_WARPS,
    )
    return out_1N


def _products_tile(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    features,
    second,
    third,
    n0,
    n1,
    n2,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some features of one weight. second, third: where the other weights are, seen from the first."""
    block = tl.program_id(0)
    to_second = tl.cdiv(n0, BLOCK_N)
    to_third = to_second + tl.cdiv(n1, BLOCK_N)
    offset, count, before = tl.cast(0, tl.int64), n0, 0
    if block >= to_third:
        block, offset, count, before = block - to_third, tl.cast(third, tl.int64), n2, n0 + n1
    elif block >= to_second:
        block, offset, count, before = block - to_second, tl.cast(second, tl.int64), n1, n0
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = weight + tl.multiple_of(offset, ALIGNED) + n[:, None].to(tl.int64) * features
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, features, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < count)[:, None] & (k < features)[None, :]
        value = tl.load(x + k, mask=k < features, other=0.0).to(tl.float32)
        total += tl.load(rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first") * value[None, :]
    tl.store(out + before + n, tl.sum(total, axis=1), mask=n < count)


_products: Any = triton.jit(_products_tile) if triton is not None else None


class OneRow(CustomGraphPass):
    """A pass of Inductor's: products of one row in a graph become `row_products`."""

    def __call__(self, graph: fx.Graph) -> None:
        found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if _is_of_one_row(node):
                found[_unviewed(_given(node))].append(node)
        for products in found.values():
            for i in range(0, len(products), MOST):
                _replace(graph, products[i : i + MOST])
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _is_of_one_row(node: fx.Node) -> bool:
    """Whether it is [1, K] by the transpose of a weight as `Linear` keeps them."""
    transposed = _given(node, 1)
    if transposed.target is not torch.ops.aten.permute.default or _given(transposed).op != "placeholder":
        return False
    x, weight = _value(_given(node)), _value(_given(transposed))
    whole = weight.is_contiguous() and len(weight) == _value(node).shape[1] and x.shape[1] % _ALIGNED == 0
    return bool(x.shape[0] == 1 and whole and x.dtype == weight.dtype and x.dtype.itemsize == 2)


def _given(node: fx.Node, i: int = 0) -> fx.Node:
    return cast(fx.Node, node.args[i])


def _unviewed(x: fx.Node) -> fx.Node:
    """What a row is a view of: equal rows are then the same."""
    views = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
    while x.target in views:
        x = _given(x)
    return x


def _replace(graph: fx.Graph, products: list[fx.Node]) -> None:
    """By one node behind the last weight, and a slice of it for each product."""
    row, at = _given(products[0]), 0
    with graph.inserting_before(products[0]):
        weights = [_given(_given(product, 1)) for product in products]
        made = _call(graph, torch.ops.segcore.row_products.default, row, weights)
        for product in products:
            stop = at + _value(product).shape[1]
            product.replace_all_uses_with(_call(graph, torch.ops.aten.slice.Tensor, made, 1, at, stop))
            at = stop
    for product in products:
        graph.erase_node(product)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A node that knows what it gives."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _value(node: fx.Node) -> Tensor:
    return cast(Tensor, node.meta["val"])
