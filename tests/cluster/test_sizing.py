"""docs/deploy.md's sizes are the formulas'."""

from __future__ import annotations

import re
from math import ceil

import torch

from segcore.memory import lines, total
from services.memory import SHAPES, engine_config
from tests.cluster.conftest import ROOT

SEGMENTS = {"smollm2-135m-instruct": None, "llama-3.1-8b": "segment_tokens=4096,selectors=[[0,0],[0,1]]"}
ROW = re.compile(
    r"^\| (smollm2\S+|llama\S+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d,.]+) \|$", re.MULTILINE
)

SERVICE_ROW = re.compile(r"^\| ([\d,]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def sizes(model: str, sessions: int, tokens: int) -> list[str]:
    """GiB on the device, in host memory and on disk, of one engine."""
    config, shape = engine_config(model, SEGMENTS[model]), SHAPES[model]
    made = lines(shape.spec(torch.bfloat16), shape.parameters, config, tokens)
    sums = total(made, config, sessions=sessions, tokens=tokens)
    return [f"{sums[place] / 2**30:,.1f}" for place in ("device", "host", "disk")]


def test_the_table_is_what_the_formulas_say():
    rows = ROW.findall((ROOT / "docs" / "deploy.md").read_text())
    assert len(rows) >= 6
    for model, sessions, tokens, *told in rows:
        assert told == sizes(model, int(sessions.replace(",", "")), int(tokens.replace(",", ""))), (model, sessions)


def test_the_service_table_is_made_of_engines():
    rows = SERVICE_ROW.findall((ROOT / "docs" / "deploy.md").read_text())
    assert len(rows) == 3
    device, host, disk = sizes("llama-3.1-8b", 64, 100_000)
    for told, *row in rows:
        sessions = int(told.replace(",", ""))
        assert row == [str(ceil(sessions / 40)), device, host, f"{float(disk) / 64 * sessions / 1024:.1f}"], told
