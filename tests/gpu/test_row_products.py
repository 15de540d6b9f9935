"""One row's products on the device are as near to the truth as the library's."""

from __future__ import annotations

import pytest
import torch

from segcore.row_products import row_products


@pytest.mark.parametrize("features", [16, 576, 2048, 4096, 11008])
@pytest.mark.parametrize("counts", [[1], [577], [4096, 1024, 1024], [11008, 11008], [3, 5, 7]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_right(features, counts, dtype):
    random = torch.Generator("cuda").manual_seed(0)
    x_1K = torch.randn((1, features), generator=random, device="cuda").to(dtype)
    weights = [torch.randn((n, features), generator=random, device="cuda").to(dtype) for n in counts]
    exact_1N = torch.cat([x_1K.double() @ weight.double().T for weight in weights], dim=1)
    made_1N = row_products(x_1K, weights)
    library = torch.cat([x_1K @ weight.T for weight in weights], dim=1)
    assert made_1N.isfinite().all()
    scale = exact_1N.abs().max()
    assert (made_1N - exact_1N).abs().max() / scale <= max(1e-2, 2 * float((library - exact_1N).abs().max() / scale))


def test_weights_that_begin_anywhere_are_right():
    numbers = torch.randn(3 + 3 * 64 * 32, device="cuda").bfloat16()
    weights = [numbers[: 64 * 32].view(64, 32), numbers[3 + 64 * 32 : 3 + 2 * 64 * 32].view(64, 32)]
    x_1K = torch.randn((1, 32), device="cuda").bfloat16()
    torch.testing.assert_close(row_products(x_1K, weights), torch.cat([x_1K @ w.T for w in weights], dim=1))
