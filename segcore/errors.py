"""Every error that segcore raises on purpose.

SegcoreError
├── InvalidInput            the caller's value is wrong; the same call fails again
│   ├── ConfigError         a configuration that can't work
│   ├── InvalidDocument     bytes that aren't a text document
│   └── InvalidRequest      a parameter of a request
├── Unauthenticated         who calls isn't known here
├── UnsupportedModel        a model that can't be run exactly
├── NotFound                a session, document or model that isn't there
├── Conflict                the caller's view is out of date; read again, then retry
│   ├── AlreadyExists       a name that is taken
│   └── WrongOffset         an upload that doesn't continue where the last one ended
├── FailedPrecondition      right call, wrong moment; the message says what must come first
│   └── SessionFailed       an earlier error ended this session; delete it and begin anew
├── LimitExceeded           more than this service is configured to hold
│   └── Busy                the same call can succeed later
├── NonFiniteLoss           a loss, or its gradient, isn't finite; no weight was updated
├── Unavailable             what would do the work is going away or unreachable; try again
│   └── LeaseLost           another replica continues the session
├── DeadlineExceeded        the caller's time was up; what was done stays done
├── SessionLost             what was stored of a session is damaged, tokens and all
├── Cancelled               the caller, or the service's shutdown, ended the work
└── PastKVError             past KV that can't be stored or trusted
    ├── BlockMissing        a block isn't where it was put
    ├── BlockDamaged        a block's checksum doesn't match
    ├── BlockMismatch       a block of another model, layout, adapter or tenant
    ├── TierUnavailable     a tier that doesn't answer
    └── StorageFull         a tier's budget, or its disk, is used up
"""

from __future__ import annotations


class SegcoreError(Exception):
    """Base of the tree: one sentence that says what the caller can do, and `details` a program can read.

    `details` maps lower_snake_case names to strings and travels with the gRPC status.
    """

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = {name: str(value) for name, value in details.items()}

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword details would be lost by the default, and errors cross process boundaries.
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[SegcoreError], message: str, details: dict[str, str]) -> SegcoreError:
    return cls(message, **details)


class InvalidInput(SegcoreError):
    """The caller's value is wrong; the same call fails again."""


class ConfigError(InvalidInput):
    """A configuration that can't work."""


class InvalidDocument(InvalidInput):
    """Bytes that aren't a text document."""


class InvalidRequest(InvalidInput):
    """A parameter of a request is out of range."""


class Unauthenticated(SegcoreError):
    """Who calls isn't known here: no token, or a wrong one."""


class UnsupportedModel(SegcoreError):
    """The model can't be run exactly; the message names the architecture and the reason."""


class NotFound(SegcoreError):
    """The named session, document or model isn't there."""


class Conflict(SegcoreError):
    """The caller's view is out of date; read again, then retry."""


class AlreadyExists(Conflict):
    """A name that is taken."""


class WrongOffset(Conflict):
    """An upload that doesn't continue at `committed_offset` (a detail, in bytes)."""


class FailedPrecondition(SegcoreError):
    """Right call, wrong moment; the message says what must come first."""


class SessionFailed(FailedPrecondition):
    """An earlier error ended this session; delete it and begin anew."""


class LimitExceeded(SegcoreError):
    """More than this service is configured to hold."""


class Busy(LimitExceeded):
    """Full just now; the same call can succeed later, if known in `retry_after_s` (a detail)."""


class NonFiniteLoss(SegcoreError):
    """A loss, or its gradient, isn't finite. No weight was updated; of a loss, the detail `stream` names the data."""


class Unavailable(SegcoreError):
    """What would do the work is going away or unreachable; try again."""


class LeaseLost(Unavailable):
    """Another replica has taken the session over; a call that is made again reaches it there."""


class DeadlineExceeded(SegcoreError):
    """The time that the caller gave was up. What was done stays done; the details say how far it came."""


class SessionLost(SegcoreError):
    """What was stored of a session is damaged or gone, its tokens too."""


class Cancelled(SegcoreError):
    """The caller, or the service's shutdown, ended the work."""


class PastKVError(SegcoreError):
    """Past KV that can't be stored or trusted."""


class BlockMissing(PastKVError):
    """A block isn't where it was put."""


class BlockDamaged(PastKVError):
    """A block's checksum doesn't match its bytes."""


class BlockMismatch(PastKVError):
    """A block of another model, layout, adapter or tenant; the detail `fields` says in what it differs."""


class TierUnavailable(PastKVError):
    """A tier, a server or a file system, that doesn't answer or refuses."""


class StorageFull(PastKVError):
    """A tier's budget in bytes, or its disk, is used up."""
