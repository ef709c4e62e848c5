"""The capstone of chapter 06: what its judge demands of a transport is what stdio does."""

from __future__ import annotations

import sys
from typing import Any

import judging
import pytest
from conftest import ROOT
from mcp import Client, StdioServerParameters

JUDGES = ROOT / "exercises" / "judges"
judge: Any = judging.load(JUDGES / "judge_06_mcp_implementation.py", "judge_06")


@pytest.mark.asyncio
async def test_the_conversations_of_the_judge_work_over_stdio() -> None:
    """The same server, and the same checks."""
    target = StdioServerParameters(command=sys.executable, args=[str(JUDGES / "shelf_06.py")])
    async with Client(target) as client:
        for _title, talk in judge.conversations():
            await talk(client)
