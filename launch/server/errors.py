"""Errors as clients of the OpenAI interface read them: a status, and what was wrong with which field."""

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          429: "rate_limit_error"}


class Refused(Exception):
    """A request that is answered with an error.

    param: the field at fault. code: a word that programs test for. retry_after: seconds; None: trying again
      does not help.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Of the response; clients of OpenAI's package repeat some statuses unless told not to."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status >= 500 or self.status in (408, 409) else {}

    @property
    def body(self) -> dict:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refused:
    """Returns the error for a request that its sender must change."""
    return Refused(400, message, param, code)
