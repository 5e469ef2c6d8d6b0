"""Object stores as obstore opens them, and what their errors mean.

obstore tries again by itself after a 5xx, 429 or 408, a refused or broken connection and a time-out, and goes
on where a body was cut off. It does neither with the body of a listing, and it counts each request alone. So
it is given few seconds here, and `remote.Bucket` has the patience.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from .source import SourceGoneError

_CONNECT = 5.0  # seconds until a connection must stand
_SILENCE = 10.0  # seconds without a byte after which a connection counts as broken
_REQUEST = 600.0  # seconds that a request may take, however slowly it goes on
_OWN = 5.0  # seconds in which obstore tries again by itself

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
}

_STATUS = re.compile(r"status code: (\d{3}[\w -]*)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_METADATA = re.compile(r"performing \w+ http://(169\.254\.169\.254|metadata\.google)")
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_TOKEN = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


def patience() -> float:
    """Seconds that a store which does not answer is waited for: $DALI_VIEWS_RETRY_SECONDS, by default 60.

    Raises:
        ValueError: The variable is no number of seconds.
    """
    told = os.environ.get("DALI_VIEWS_RETRY_SECONDS", "60")
    try:
        seconds = float(told)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ValueError(f"DALI_VIEWS_RETRY_SECONDS is a number of seconds, not {told!r}; mend or unset it.")
    return seconds


def open_store(url: str, bound: float) -> Any:
    """The obstore store of a bucket ("s3://bucket", "gs://bucket") or a server ("https://host").

    Raises:
        SourceGoneError: There are no credentials.
        ValueError: obstore is not installed, or refuses the settings of the environment.
    """
    try:
        from obstore import store
    except ImportError as error:
        raise ValueError(f"To read {url}, install obstore: pip install obstore boto3.") from error
    scheme, _, name = url.partition("://")
    plain = any(os.environ.get(name, "").startswith("http:") for name in _ENDPOINTS.get(scheme, ()))
    options: dict[str, Any] = {
        "client_options": {
            "allow_http": scheme == "http" or plain,
            "connect_timeout": timedelta(seconds=_within(_CONNECT, bound)),
            "read_timeout": timedelta(seconds=_within(_SILENCE, bound)),
            "timeout": timedelta(seconds=_REQUEST),
        },
        "retry_config": {
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=min(_OWN, bound / 4)),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1)},
        },
    }
    try:
        if scheme == "s3":
            return store.S3Store(name, **options, **_aws(url))
        return store.GCSStore(name, **options) if scheme == "gs" else store.HTTPStore(url, **options)
    except SourceGoneError:
        raise
    except Exception as error:  # obstore's own for a setting, a file of credentials, a name
        raise ValueError(f"{url} cannot be opened ({_first(error)}); check the settings.") from error


def _within(seconds: float, bound: float) -> float:
    return min(seconds, max(bound / 4, 0.5))  # so that there is a second time


def _aws(url: str) -> dict[str, Any]:
    """Credentials and region of boto3, which knows profiles and single sign-on, where none are given."""
    anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "on", "yes")
    if anonymous or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    try:
        import boto3
    except ImportError:
        return {}
    try:
        session = boto3.Session()
        found = session.get_credentials()
        if found is None:
            raise ValueError("there are none")
        provider = _frozen(found)
        provider()
    except Exception as error:  # botocore's own for a profile that is absent, or a sign-on that is over
        raise SourceGoneError(
            f"No credentials for {url} ({_first(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, or AWS_SKIP_SIGNATURE=true for a public bucket."
        ) from error
    region = os.environ.get("AWS_REGION") or session.region_name
    return {"credential_provider": provider} | ({"region": region} if region else {})


def _frozen(credentials: Any) -> Callable[[], dict[str, Any]]:
    """What obstore asks for credentials; boto3 renews them."""
    from datetime import datetime, timezone

    def ask() -> dict[str, Any]:
        now = credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(timezone.utc) + timedelta(minutes=5),
        }

    return ask


def judged(error: Exception, bucket: str, key: str) -> Exception | None:
    """What an error of obstore's means for the reader of an object; None if to try again may help."""
    told, kind = str(error), type(error).__name__
    found, named = _STATUS.search(told), _CODE.search(told)
    status, code = int(found[1][:3]) if found else 0, named[1] if named else ""
    words = " ".join(filter(None, [found and found[1].strip(), code])) or _first(error)
    if _METADATA.search(told):
        return SourceGoneError(f"No credentials for {bucket} ({words}); set them in the environment.")
    if (status >= 500 and status != 501) or status in (408, 429):
        return None
    if isinstance(error, FileNotFoundError) or status == 404:
        if code == "NoSuchBucket" or not key:
            return SourceGoneError(f"There is no bucket {bucket}; check its name.")
        return FileNotFoundError(errno.ENOENT, "no such object", f"{bucket}/{key}")
    if code in _REGION or "redirect without LOCATION" in told:
        return SourceGoneError(f"{bucket} lies in another region ({words}); set AWS_REGION to it.")
    if code == "InvalidObjectState":
        return OSError("it is archived; restore the object first")
    if status in (401, 403) or code in _TOKEN:
        return SourceGoneError(f"{bucket} may not be read ({words}); check the credentials and its name.")
    if kind in ("InvalidPathError", "ValueError"):
        return OSError(f"no name that can be asked for ({_first(error)})")
    if status == 416:
        return OSError("it is shorter than it was when it was indexed")
    if status in (405, 501):
        return SourceGoneError(f"{bucket} cannot be listed ({words}); name its files one by one.")
    if status >= 400:
        return SourceGoneError(f"{bucket} refuses the request ({words}); check its name and the settings.")
    return None


def changed() -> OSError:
    """The error of an object that is another one now."""
    return OSError("it has changed since it was indexed; index the images again")


def cause(error: Exception) -> str:
    """Why an object store did not answer, in a few words."""
    told = str(error)
    if found := _STATUS.search(told):
        return found[1].strip()
    if "kind: Connect" in told:
        return "no connection"
    return "no answer in time" if "imeout" in told or "TimedOut" in told else "the connection broke"


def _first(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line or type(error).__name__
