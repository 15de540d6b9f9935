"""The page as a person sees it, with the default model: a document read, a question asked, what was chosen marked.

.venv/bin/python -m benchmarks.page_picture      # writes docs/page.png; needs Chromium
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from pydoc_data import topics

from benchmarks.record import ROOT
from services.serving.config import ServeConfig
from tests.chromium import chromium
from tests.services.serving.fronts import Loop, Replica, RunningFront

BYTES = 40_000
QUESTION = "What is the assert statement used for?"


async def picture(address: str, document: Path) -> None:
    async with chromium() as tab:
        await tab.open(address)
        await tab.until("!at('send').disabled")
        await tab.choose_file("#file", document)
        await tab.until("current.documents[0]?.finished === true", 600)
        await tab.js(f"at('question').value = {json.dumps(QUESTION)}; at('ask').requestSubmit()")
        await tab.until("document.querySelectorAll('#turns .facts button').length === 1", 600)
        await tab.picture(ROOT / "docs" / "page.png", 1280, 800)


def main() -> None:
    loop = Loop()
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "language-reference.txt"
        document.write_text("\n\n".join(topics.topics.values())[:BYTES])
        config = ServeConfig(past_directory=Path(folder) / "past-kv", sessions=f"{folder}/sessions.sqlite")

        async def made() -> Replica:
            return Replica(config)

        engine = loop.call(made())
        front = RunningFront(loop, engine, config)
        asyncio.run(picture(front.http, document))
        front.close()
        loop.call(engine.end())
    loop.close()


if __name__ == "__main__":
    main()
