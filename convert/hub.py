"""Why something was not fetched: whether the same call can do it later."""

import os
from collections.abc import Iterator

_TRUE = ("1", "ON", "YES", "TRUE")
# Answers of a server that is busy, and does not say that there is no such thing.
_LATER = (408, 425, 429)


def is_unreached(error: BaseException) -> bool:
    """Whether a hub was not reached, or did not answer, although it was asked."""
    if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        return False
    return any(_is_of_the_network(cause) for cause in _causes(error))


def _is_of_the_network(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _LATER or status >= 500
    # The HTTP library's own errors are no OSErrors; which library it is, depends on the hub client's release.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in kinds


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
