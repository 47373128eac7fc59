"""What errors of a bucket's libraries mean, and those of TensorStore: a word that a person can act on."""

import errno
import os
import re
from collections.abc import Iterator

from headshare_jax.errors import HeadshareError, TryAgain

# Buckets that everybody may read are read without an account if this is set.
ANONYMOUS = "HEADSHARE_ANONYMOUS"

# What the libraries raise that is no OSError, by the names of their classes.
_UNREACHED = {"ClientError", "HTTPClientError", "ConnectionError", "RequestException", "TransportError", "TimeoutError"}
_NO_ACCOUNT = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "GoogleAuthError"}
# What an answer is called, by TensorStore too, whose errors have no kind but their text.
_FORBIDDEN = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|^Forbidden|AccessDenied|HTTP status 40[13]\b")
_LATER = re.compile(r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED|CANCELLED)\b")
_LATER_NUMBERS = {getattr(errno, name, None) for name in ("EBUSY", "EREMOTEIO")}
# Whose errors are about buckets, whatever they say.
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs"}


def refusal(error: BaseException, place: str = "A bucket", bucket: str | None = None) -> HeadshareError | None:
    """What an error of a bucket's library means, if that is known; None for one that says nothing about storage."""
    for cause in _causes(error):
        kinds, said = {kind.__name__ for kind in type(cause).__mro__}, str(cause)
        code = getattr(cause, "code", None)
        if _NO_ACCOUNT & kinds:
            return HeadshareError(
                f"{place} cannot be used: there is no account to use it with; log in, or set {ANONYMOUS}=1 for a "
                "bucket that everybody may read."
            )
        if isinstance(cause, PermissionError) or _FORBIDDEN.search(said) or code in (401, 403):
            return HeadshareError(
                f"{place} cannot be used: {bucket or 'it'} forbids it; check the name and the account."
            )
        if isinstance(cause, FileNotFoundError) and ("NoSuchBucket" in repr(cause.__cause__) or _names_no_object(said)):
            return HeadshareError(f"There is no {f'bucket {bucket}' if bucket else 'such bucket'}; check its name.")
        # Of botocore, `ClientError` is an answer; of aiohttp it is that there was none.
        answered = "BotoCoreError" not in kinds and hasattr(cause, "operation_name")
        later = isinstance(code, int) and (code >= 500 or code in (408, 429))
        later = later or (isinstance(cause, OSError) and cause.errno in _LATER_NUMBERS)
        if later or (_UNREACHED & kinds and not answered) or _LATER.match(said):
            return TryAgain(
                f"{place} was not reached ({_first_line(said) or type(cause).__name__}); try again when the network "
                "and the storage are back."
            )
    return None


def refusal_unnamed(error: BaseException) -> HeadshareError | None:
    """What an error means that nobody has put in words, if it comes from a bucket."""
    own = {type(cause).__module__.partition(".")[0] for cause in _causes(error)}
    return refusal(error) if own & _LIBRARIES or re.search(r"\b(gs|s3)://", str(error)) else None


def system_error(error: Exception) -> OSError | None:
    """The system's own error behind one of TensorStore's, which tells it in its text alone; None if there is none."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _names_no_object(said: str) -> bool:
    """Whether what was not found is a bucket's list of objects."""
    return re.search(r"(^|/)b/[^/]+/o(\?name=.*)?$", said) is not None


def _first_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[0][:200].rstrip(".")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
