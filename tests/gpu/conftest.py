"""What only a GPU can show. Without one these tests aren't collected; with one, `make test-gpu` runs them alone."""

from __future__ import annotations

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
