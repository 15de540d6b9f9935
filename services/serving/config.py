"""What a service is made of. Read from a YAML file or given in code; unknown keys are errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from segcore.config import GIB, KIB, MIB, CacheConfig, EngineConfig, SegmentConfig
from segcore.errors import ConfigError
from segcore.presets import DEFAULT_MODEL, cache_directory, model_segment

if TYPE_CHECKING:
    from segcore.pastkv.format import Cipher


class AutoscalingSettings(BaseModel):
    """Replicas by load, between `ServeConfig.replicas` and max_replicas.

    waiting_tokens: how many may wait on a replica. The load is averaged over look_back_s, and must be beyond what there
    is for as long as the delays before replicas come or go.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_replicas: int = Field(ge=1)
    waiting_tokens: int = Field(default=65_536, ge=1)
    look_back_s: float = Field(default=30, gt=0)
    upscale_delay_s: float = Field(default=30, ge=0)
    downscale_delay_s: float = Field(default=600, ge=0)


class ServeConfig(BaseModel):
    """A segcore service.

    adapter: the directory of one that was trained for the model; "default": the one that is shipped for it, if any;
    "none". Its policy is the preset then.
    segment: "policy", and its options that differ from the preset or the policy's defaults.
    heads: a file that `segcore heads`, or the training of gates, wrote for the model; None: what is shipped for it, if
    anything.
    threads: torch's, None for its own choice.
    replicas: engines, the least number of them with `autoscaling`.
    front_resources, engine_resources: Ray's custom resources that each takes, and so on which nodes it runs; `segcore
    serve`, on one node, leaves them out.
    past_directory: where past KV is written through to. past_shared: the tier that replicas share, a folder or the
    address of a Redis server (redis://...); past_shared_bytes: such a folder's budget. past_boundary_segments,
    past_restore_bytes_per_s: as `CacheConfig.boundary_segments` and restore_bytes_per_s.
    host, grpc_port, http_port: where each front listens, over TLS if there is a certificate (PEM files); with
    tls_client_ca clients need a certificate that it signed. serve_grpc_port: Serve's own proxy beside it, without TLS.
    fronts: how many there are; one a node.
    tracing: what makes span processors, such as "services.serving.tracing:otlp"; tracing_ratio: of the calls that
    aren't part of a trace already.
    tenants: a file of who may call (see tenants.py); None: everybody, as one tenant.
    sessions: the directory of sessions, a SQLite file or the address of a Redis server; session_ttl_s: how long one is
    kept after its last call, None: for ever. lease_s: how long others wait for a replica that is gone. slice_s: the
    longest a call keeps a replica from ending. redis_password: a file, on the engines, with the password of Redis
    servers that are named without one. encryption_keys: a file, on the engines, of keys for what is kept of sessions
    and past KV outside of memory (see encryption.py); None: it isn't encrypted. changed_sessions: what becomes of
    sessions that were begun with another model, adapter or policy: "refuse" them, or "recompute" their past from their
    tokens.
    window_bytes: what a client may send beyond what is committed; it bounds what waits when the last byte is sent, and
    so the time to the first token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = DEFAULT_MODEL
    adapter: Path | Literal["default", "none"] = "default"
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    segment: dict[str, Any] = {}
    heads: Path | None = None
    chunk_tokens: int = Field(default=1024, ge=1)
    replicas: int = Field(default=1, ge=1)
    autoscaling: AutoscalingSettings | None = None
    gpus_per_replica: float = Field(default=0, ge=0)
    front_resources: dict[str, float] = {}
    engine_resources: dict[str, float] = {}
    host: str = "127.0.0.1"
    grpc_port: int = Field(default=9100, ge=0, le=65535)
    http_port: int = Field(default=8100, ge=0, le=65535)
    serve_grpc_port: int | None = Field(default=None, ge=0, le=65535)
    fronts: int = Field(default=1, ge=1)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    grpc_reflection: bool = False
    tenants: Path | None = None
    tracing: str | None = None
    tracing_ratio: float = Field(default=0.01, ge=0, le=1)
    past_directory: Path = Field(default_factory=lambda: cache_directory() / "past-kv")
    past_host_bytes: int = Field(default=8 * GIB, ge=0)
    past_disk_bytes: int | None = Field(default=None, ge=0)
    past_shared: str | None = None
    past_shared_bytes: int | None = Field(default=None, ge=0)
    past_boundary_segments: int = Field(default=1, ge=1)
    past_restore_bytes_per_s: int | None = Field(default=None, ge=1)
    sessions: str = Field(default_factory=lambda: str(cache_directory() / "sessions.sqlite"))
    session_ttl_s: float | None = Field(default=30 * 24 * 3600.0, gt=0)
    lease_s: float = Field(default=5.0, gt=0)
    slice_s: float = Field(default=5.0, gt=0)
    redis_password: Path | None = None
    encryption_keys: Path | None = None
    changed_sessions: Literal["refuse", "recompute"] = "refuse"
    attention: str = "auto"
    compile: bool | None = None
    slots: int = Field(default=8, ge=1)
    max_sessions: int = Field(default=64, ge=1)
    max_session_tokens: int = Field(default=10_000_000, ge=1)
    max_document_bytes: int = Field(default=64 * MIB, ge=1)
    max_data_bytes: int = Field(default=1 * MIB, ge=1, le=3 * MIB)
    max_import_bytes: int = Field(default=256 * MIB, ge=1)
    window_bytes: int = Field(default=8 * KIB, ge=KIB)

    @model_validator(mode="after")
    def _check_tls(self) -> ServeConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self

    @classmethod
    def read(cls, path: Path) -> ServeConfig:
        """Read a YAML file. Raises ConfigError that names the file and each wrong key."""
        try:
            values = yaml.safe_load(path.read_text()) or {}
            return cls(**values)
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise ConfigError(f"{path} isn't a readable configuration: {error}") from error
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{path}: {faults}") from error

    def with_password(self) -> ServeConfig:
        """The same, with the password in the addresses of Redis servers that lack one. Raises ConfigError."""
        if self.redis_password is None:
            return self
        try:
            password = quote(self.redis_password.read_text().strip(), safe="")
        except OSError as error:
            raise ConfigError(f"redis_password: {self.redis_password} can't be read: {error.strerror}") from error
        places = {name: place for name in ("sessions", "past_shared") if (place := getattr(self, name)) is not None}
        lacking = re.compile(r"^(rediss?://)(?=[^@]*$)")
        return self.model_copy(
            update={name: lacking.sub(rf"\g<1>:{password}@", place) for name, place in places.items()}
        )

    def cipher(self) -> Cipher | None:
        """What past KV is encrypted with. Raises ConfigError."""
        if self.encryption_keys is None:
            return None
        from services.serving.encryption import Keys

        return Keys.read(self.encryption_keys)

    def engine_config(self) -> EngineConfig:
        """The engine's part. Raises as `segment_config` does."""
        return EngineConfig(
            segment=self.segment_config(),
            cache=CacheConfig(
                host_bytes=self.past_host_bytes,
                directory=self.past_directory,
                disk_bytes=self.past_disk_bytes,
                shared=self.past_shared,
                shared_bytes=self.past_shared_bytes,
                boundary_segments=self.past_boundary_segments,
                restore_bytes_per_s=self.past_restore_bytes_per_s,
            ),
            chunk_tokens=self.chunk_tokens,
            attention=self.attention,
            compile=self.compile,
            slots=self.slots,
            max_sessions=self.max_sessions,
            max_session_tokens=self.max_session_tokens,
        )

    def segment_config(self) -> SegmentConfig:
        """The adapter's or the model's preset with this configuration's changes, or a policy's defaults with them.

        Raises ConfigError, and NotFound for an adapter that isn't there.
        """
        return model_segment(self.model, self.segment, adapter=self.adapter, heads=self.heads)
