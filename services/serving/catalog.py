"""Sessions as wholes: made, listed, copied, taken back, ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict

from segcore.engine.engine import Engine
from segcore.errors import AlreadyExists, FailedPrecondition, InvalidRequest, NotFound, SegcoreError, SessionLost
from segcore.weights import LoadedModel
from services.serving.config import ServeConfig
from services.serving.directory.base import Directory, Name, Stored, absent, changed, request_name
from services.serving.live import Live
from services.serving.lives import Lives
from services.serving.messages import DocumentInfo, SessionInfo, SessionPage, check_name, check_request_id, check_tenant
from services.serving.record import Done, Record, digest_of
from services.serving.transfer import export_bytes, import_bytes

log = logging.getLogger(__name__)

# How long the results of calls outlive their session.
_REMNANT_S = 3600.0
_MOST_ON_A_PAGE = 1000
_PIECE_BYTES = 2**20
# Its key is gone, or it is damaged.
UNREADABLE = (FailedPrecondition, SessionLost)


class Catalog:
    """All sessions of one directory; see `Sessions`, which it is a part of."""

    def __init__(self, model: LoadedModel, engine: Engine, directory: Directory, config: ServeConfig) -> None:
        self._model, self._engine, self._config, self._directory = model, engine, config, directory
        self._lives = Lives(model, engine, directory, config)

    async def create(
        self, tenant: str, session_id: str, model: str = "", *, ttl_s: float | None = None, request_id: str = ""
    ) -> SessionInfo:
        """Begin an empty session. Raises InvalidRequest, NotFound (model), AlreadyExists."""
        name = name_of(tenant, session_id)
        if model and model != self._model.name:
            raise NotFound(f"model {model!r} isn't served here; this service runs {self._model.name!r}", model=model)
        if ttl_s is not None and not 0 < ttl_s <= 10 * 365 * 24 * 3600:
            raise InvalidRequest(f"ttl_s={ttl_s} must be above 0, and at most ten years", field="ttl")
        record = Record(
            model=self._model.name,
            fingerprint=asdict(self._engine.fingerprint),
            create_time=time.time(),
            ttl_s=self._config.session_ttl_s if ttl_s is None else ttl_s,
        )
        return await self._make(name, record, [], request_id, digest_of("create", model=model, ttl_s=ttl_s))

    async def get(self, tenant: str, session_id: str) -> SessionInfo:
        name = name_of(tenant, session_id)
        stored = await self._read(name)
        return self._info(name, stored, Record.read(stored.record))

    async def list_sessions(self, tenant: str, page_size: int = 100, page_token: str = "") -> SessionPage:
        """Sessions in the order of their ids, those that can't be read among them. page_token: of the page before."""
        check_tenant(tenant)
        if not 0 <= page_size <= _MOST_ON_A_PAGE:
            raise InvalidRequest(f"page_size={page_size} must be at most {_MOST_ON_A_PAGE}", field="page_size")
        if page_token:
            check_name("page_token", page_token)
        most = page_size or 100
        ids = await self._lives.run(self._directory.names, tenant, page_token, most)
        sessions = []
        for session_id in ids:
            try:
                sessions.append(await self.get(tenant, session_id))
            except NotFound:  # it went meanwhile
                continue
            except UNREADABLE as error:
                log.warning("session %s can't be read: %s", session_id, error.message)
                sessions.append(SessionInfo(session_id=session_id, unreadable=error.message))
        return SessionPage(sessions=sessions, next_page_token=ids[-1] if len(ids) == most else "")

    async def delete(
        self, tenant: str, session_id: str, *, request_id: str = "", expected_generation: int | None = None
    ) -> None:
        """End a session, one that can't be read, too, and all that is under way on it. Raises NotFound, Conflict."""
        name = name_of(tenant, session_id)
        check_request_id(request_id)
        digest = digest_of("delete", expected_generation=expected_generation)
        remnant = Record(model=self._model.name, fingerprint={}, create_time=time.time(), ttl_s=None)
        with suppress(*UNREADABLE):
            stored = await self._lives.run(self._directory.read, name)
            if stored is None:
                raise absent(name)
            record = Record.read(stored.record)
            if record.known(request_id, digest) is not None:
                return
            if stored.deleted:
                raise absent(name)
            remnant = Record(**record.model_dump(include={"model", "fingerprint", "create_time", "ttl_s", "requests"}))
        remnant.remember(request_id, Done(digest=digest))
        async with self._lives.ending(name):
            await self._lives.run(self._directory.delete, name, remnant.to_bytes(), _REMNANT_S, expected_generation)

    async def fork(
        self,
        tenant: str,
        session_id: str,
        new_id: str,
        *,
        request_id: str = "",
        expected_generation: int | None = None,
    ) -> SessionInfo:
        """A second session that goes on from where this one stands; past KV is shared, not copied.

        Raises NotFound, AlreadyExists, and FailedPrecondition while the session answers.
        """
        name, new = name_of(tenant, session_id), name_of(tenant, new_id)
        digest = digest_of("fork", source=session_id, expected_generation=expected_generation)
        if (made := await self._made(new, request_id, digest)) is not None:
            return made
        async with self._lives.using(name) as live, self._lives.claimed(live):
            self._check(live, expected_generation)
            record = live.record.model_copy(deep=True)
            record.create_time, record.requests = time.time(), {}
            # What is read here is the directory's own: no other replica writes meanwhile.
            log = await self._lives.run(lambda: list(self._directory.log(name, 0, live.entries)))
            return await self._make(new, record, log, request_id, digest)

    async def rewind(
        self,
        tenant: str,
        session_id: str,
        tokens: int,
        *,
        request_id: str = "",
        expected_generation: int | None = None,
    ) -> SessionInfo:
        """Go back to one of the session's `points`, or to 0; what came after is forgotten.

        Raises InvalidRequest for another position, FailedPrecondition while the session answers.
        """
        name = name_of(tenant, session_id)
        check_request_id(request_id)
        digest = digest_of("rewind", tokens=tokens, expected_generation=expected_generation)
        async with self._lives.using(name) as live:
            async with self._lives.claimed(live):
                if live.record.known(request_id, digest) is None:
                    self._check(live, expected_generation)
                    await self._lives.residents.let_go(live)
                    point = live.record.rewind(tokens)
                    live.tokens = tokens
                    live.record.remember(request_id, Done(digest=digest))
                    await self._lives.commit(live, keep=point.entries)
            return await self.get(tenant, session_id)

    async def export(self, tenant: str, session_id: str) -> AsyncIterator[bytes]:
        """The session as bytes, for `import_session` here or elsewhere: its texts and tokens, no past KV."""
        name = name_of(tenant, session_id)
        async with self._lives.using(name) as live, self._lives.claimed(live):
            self._check(live, None)
            log = await self._lives.run(lambda: list(self._directory.log(name, 0, live.entries)))
            data = export_bytes(live.record, log)
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]

    async def import_session(self, tenant: str, session_id: str, data: bytes, *, request_id: str = "") -> SessionInfo:
        """A new session that goes on where an exported one stood. Raises InvalidRequest, AlreadyExists."""
        name = name_of(tenant, session_id)
        record, log = await asyncio.to_thread(import_bytes, data, self._engine.spec.vocabulary)
        digest = digest_of("import", data=data[-32:].hex())
        return await self._make(name, record, log, request_id, digest)

    async def once(self, tenant: str, request_id: str, digest: str) -> None:
        """Remember for an hour what a call of no session asks for. Raises AlreadyExists if its id stood for another."""
        check_tenant(tenant)
        check_request_id(request_id)
        name = request_name(tenant, request_id)
        record = Record(model=self._model.name, fingerprint={}, create_time=time.time(), ttl_s=_REMNANT_S)
        record.remember(request_id, Done(digest=digest))
        try:
            await self._lives.run(self._directory.create, name, record.to_bytes(), ttl_s=_REMNANT_S)
        except AlreadyExists:
            Record.read((await self._read(name)).record).known(request_id, digest)

    async def count(self, tenant: str, most: int) -> int:
        """How many sessions there are, but at most `most`."""
        return len(await self._lives.run(self._directory.names, tenant, "", most))

    async def _read(self, name: Name) -> Stored:
        stored: Stored | None = await self._lives.run(self._directory.read, name)
        if stored is None or stored.deleted:
            raise absent(name)
        return stored

    async def _make(self, name: Name, record: Record, log: list[bytes], request_id: str, digest: str) -> SessionInfo:
        """Put a new session into the directory, once for each request."""
        if (made := await self._made(name, request_id, digest)) is not None:
            return made
        record.remember(request_id, Done(digest=digest))
        try:
            await self._lives.run(self._directory.create, name, record.to_bytes(), log, ttl_s=record.ttl_s)
        except AlreadyExists:
            if (made := await self._made(name, request_id, digest)) is not None:
                return made
            raise
        return await self.get(*name)

    async def _made(self, name: Name, request_id: str, digest: str) -> SessionInfo | None:
        """The session that this request has made already, though it may have gone meanwhile."""
        check_request_id(request_id)
        stored = await self._lives.run(self._directory.read, name) if request_id else None
        if stored is None:
            return None
        record = Record.read(stored.record)
        return None if record.known(request_id, digest) is None else self._info(name, stored, record)

    def _check(self, live: Live, expected_generation: int | None) -> None:
        if expected_generation is not None and expected_generation != live.generation:
            raise changed(live.name, live.generation)
        if live.record.answer is not None:
            raise FailedPrecondition(
                f"session {live.name.session_id!r} is answering; wait for the answer's end, or cancel it",
                request_id=live.record.answer.request_id,
            )

    def _info(self, name: Name, stored: Stored, record: Record) -> SessionInfo:
        tokens, pending = record.tokens, 0
        live = self._lives.find(name)
        if live is not None and live.resident:
            try:
                stats = self._engine.session_stats(live.key)
                tokens, pending = stats.tokens, stats.pending_tokens
            except SegcoreError:  # just let go of
                pass
        return SessionInfo(
            session_id=name.session_id,
            model=record.model,
            create_time=record.create_time,
            processed_tokens=tokens,
            pending_tokens=pending,
            segments=tokens // self._engine.config.segment.segment_tokens,
            documents=[
                DocumentInfo(
                    document_id=document.id, committed_offset=document.committed_offset, finished=document.finished
                )
                for document in record.documents
            ],
            generation=stored.generation,
            ttl_s=record.ttl_s,
            points=[point.tokens for point in record.points],
            answering=record.answer is not None,
        )


def name_of(tenant: str, session_id: str) -> Name:
    """Raises InvalidRequest for what can't be a name."""
    check_tenant(tenant)
    check_name("session_id", session_id)
    return Name(tenant, session_id)
