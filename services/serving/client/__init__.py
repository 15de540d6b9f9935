"""Clients of a segcore service, asynchronous and synchronous. They hide offsets, back-pressure, retries, resumption.

    with Client("127.0.0.1:9100") as client:
        session = client.create_session()
        client.upload(session.session_id, Path("book.txt"))
        for part in client.generate(session.session_id, "Who did it?"):
            print(part.text, end="")

Every failure is a `segcore.errors.SegcoreError`.
"""

from services.serving.client.asynchronous import AsyncClient
from services.serving.client.synchronous import Client

__all__ = ["AsyncClient", "Client"]
