"""TLS of a front: the certificate is read again when its file changes, so that it can be renewed without a restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from segcore.errors import ConfigError

log = logging.getLogger(__name__)


class Certificate:
    """A server's certificate chain and key; with `client_ca`, clients must show a certificate that it signed."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        """Raises ConfigError for files that can't be used."""
        self._files = (certificate, key) if client_ca is None else (certificate, key, client_ca)
        try:
            self._stamp = self._now()
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.load_cert_chain(certificate, key)
            if client_ca is not None:
                self._context.load_verify_locations(client_ca)
                self._context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl's own errors are among them
            raise ConfigError(f"TLS: {', '.join(map(str, self._files))}: {error}") from error

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server, which asks for what is new before each handshake."""
        mutual = len(self._files) == 3
        return grpc.dynamic_ssl_server_credentials(self._grpc_files(), self._grpc_news, mutual)  # type: ignore[arg-type]

    def ssl_context(self) -> ssl.SSLContext:
        """For an HTTP server; `renew` keeps it up to date."""
        return self._context

    def renew(self) -> None:
        """Take up files that have changed; ones that can't be used leave things as they were."""
        try:
            stamp = self._now()
            if stamp != self._stamp:
                self._context.load_cert_chain(*self._files[:2])
                self._stamp = stamp
        except OSError as error:
            log.error("the renewed certificate can't be used, the old one stays: %s", error)

    def _grpc_news(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            return self._grpc_files()
        except OSError:
            return None  # as before

    def _grpc_files(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, *ca = (file.read_bytes() for file in self._files)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], *ca)

    def _now(self) -> tuple[int, ...]:
        return tuple(file.stat().st_mtime_ns for file in self._files)
