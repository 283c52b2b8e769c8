"""Every error the proxy raises, and how each reaches a client.

The tree::

    HeliumError                     500  server_error
    ├── InvalidRequest              400  invalid_request_error
    │   └── ConfigError             (never over HTTP: printed by the command line)
    ├── Unauthorized                401  invalid_api_key
    ├── Forbidden                   403  insufficient_permissions
    ├── NotFound                    404  not_found_error
    │   └── ModelNotFound           404  model_not_found
    ├── BodyTooLarge                413  request_too_large
    ├── HeadersTooLarge             431  headers_too_large
    ├── QueueFull                   429  queue_full          (+ Retry-After)
    ├── ClientGone                  499  client_disconnected (nobody is left to read it)
    ├── UpstreamFailed              502  upstream_error
    ├── NoWorker                    503  no_worker           (+ Retry-After)
    ├── Draining                    503  draining            (+ Retry-After)
    ├── DeadlineExceeded            504  deadline_exceeded
    └── CacheMiss                   504  cache_miss          (`only-if-cached` and nothing cached)

Bodies have OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

from typing import Any


class HeliumError(Exception):
    """Base of all errors; `status`, `type` and `code` are what a client sees."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's JSON form."""
        return {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code},
        }

    def headers(self) -> dict[str, str]:
        """Extra response headers: `Retry-After` in whole seconds, at least 1."""
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}


class InvalidRequest(HeliumError):
    status = 400
    type = "invalid_request_error"
    code = None


class ConfigError(InvalidRequest):
    """A setting is wrong; the message names the setting and, for a typo, the nearest one."""


class Unauthorized(HeliumError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(HeliumError):
    status = 403
    type = "invalid_request_error"
    code = "insufficient_permissions"


class NotFound(HeliumError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class BodyTooLarge(HeliumError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class HeadersTooLarge(HeliumError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class QueueFull(HeliumError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class ClientGone(HeliumError):
    status = 499
    type = "client_disconnected"
    code = "client_disconnected"


class UpstreamFailed(HeliumError):
    status = 502
    type = "upstream_error"
    code = "upstream_error"


class NoWorker(HeliumError):
    status = 503
    type = "service_unavailable"
    code = "no_worker"


class Draining(HeliumError):
    status = 503
    type = "service_unavailable"
    code = "draining"


class DeadlineExceeded(HeliumError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class CacheMiss(HeliumError):
    status = 504
    type = "cache_error"
    code = "cache_miss"
