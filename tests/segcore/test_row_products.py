"""Graphs of one row's products read several weights at once, and give what they gave."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch.nn.functional import linear

from segcore.row_products import OneRow, row_products

OP = torch.ops.segcore.row_products.default
random = torch.Generator().manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=random).to(dtype)


def passed(act, *inputs):
    """What the pass makes of a function's graph: its value, and how many weights each of its nodes reads."""
    graphs = []

    def take(graph_module, _):
        OneRow()(graph_module.graph)
        graph_module.recompile()
        graphs.append(graph_module)
        return graph_module

    value = aot_function(act, fw_compiler=take, decompositions=select_decomp_table())(*inputs)
    return value, [len(node.args[1]) for node in graphs[0].graph.find_nodes(op="call_function", target=OP)]


def block(x_1TK, *weights):
    """A layer's products as transformers' code writes them: three of one row, then one of another, then two."""
    q, k, v = (linear(x_1TK, weight).view(1, x_1TK.shape[1], -1, 16) for weight in weights[:3])
    x_1TK = x_1TK + linear((q + k.mean() * v.mean()).flatten(2), weights[3])
    return linear(torch.nn.functional.silu(linear(x_1TK, weights[4])) * linear(x_1TK, weights[5]), weights[6])


WEIGHTS = [numbers(64, 64), numbers(32, 64), numbers(32, 64), *(numbers(64, 64) for _ in range(4))]


def test_products_of_one_row_are_one_launch():
    x_11K = numbers(1, 1, 64)
    value, launches = passed(block, x_11K, *WEIGHTS)
    assert launches == [3, 1, 2, 1]
    torch.testing.assert_close(value, block(x_11K, *WEIGHTS), rtol=2e-2, atol=2e-2 * float(value.abs().max()))


def test_more_weights_than_a_launch_reads_are_several():
    x_1K, weights = numbers(1, 32), [numbers(n, 32) for n in (16, 32, 48, 64)]
    value, launches = passed(lambda x, *ws: [x @ w.T for w in ws], x_1K, *weights)
    assert launches == [3, 1]
    for made, weight in zip(value, weights, strict=True):
        assert torch.equal(made, x_1K @ weight.T)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (numbers(2, 64), numbers(32, 64)),  # more rows
        (numbers(1, 64, dtype=torch.float32), numbers(32, 64, dtype=torch.float32)),
        (numbers(1, 8), numbers(32, 8)),  # rows that don't begin at wide loads
        (numbers(1, 64), numbers(32, 128)[:, ::2]),
    ],
)
def test_others_are_left_alone(x, weight):
    value, launches = passed(lambda x, w: x @ w.T, x, weight)
    assert launches == []
    torch.testing.assert_close(value, x @ weight.T)


def test_a_made_weight_is_left_alone():
    x_1K, weight_NK = numbers(1, 64), numbers(32, 64)
    value, launches = passed(lambda x, w: x @ (w + w).T, x_1K, weight_NK)
    assert launches == []
    torch.testing.assert_close(value, x_1K @ (2 * weight_NK).T)


def test_the_op_is_one_behind_the_other():
    x_1K, weights = numbers(1, 32), [numbers(n, 32) for n in (16, 48)]
    assert torch.equal(row_products(x_1K, weights), torch.cat([x_1K @ w.T for w in weights], dim=1))
