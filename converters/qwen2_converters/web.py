"""HTTP as a downloader needs it: redirects followed by ourselves, and every failure sorted into try again, new address, or give up.

Proxies (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) and certificates (SSL_CERT_FILE, SSL_CERT_DIR) are those of the environment. No
cookie is kept, no password looked up, no body unpacked.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Self

from qwen2_converters.remote import Address
from qwen2_local import __version__
from qwen2_local.errors import FetchFailed

if TYPE_CHECKING:
    import httpx2

_REDIRECTS = 10
_REDIRECT = (301, 302, 303, 307, 308)
_EXPIRED = (400, 401, 403, 410)  # Object stores answer any of these once a signature is too old.
_TRY_AGAIN = (408, 425, 429)
_CERTIFICATES = "If your network inspects traffic, name its certificate in SSL_CERT_FILE."
_LATER = "Try again later: what has come is kept."


class TryAgain(Exception):
    """A failure that may pass. after_s: how long the server asks to wait. unreachable: there was no answer at all."""

    def __init__(self, what: str, *, after_s: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.after_s = after_s
        self.unreachable = unreachable


class Expired(Exception):
    """The address is refused: it is too old, or was never allowed."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. connect: until a connection stands. read: without a single byte, while waiting for an answer or in the midst of it."""

    connect: float = 15.0
    read: float = 30.0


def open_client(*, headers: Mapping[str, str] | None = None, **options: Any) -> httpx2.Client:
    """A client that uses the environment's proxies and certificates and keeps no cookie. options: as for httpx2.Client.

    Raises FetchFailed where the environment names a proxy or certificates that cannot be used.
    """
    import httpx2

    agent = {"User-Agent": f"qwen2-local/{__version__}"}
    try:
        return httpx2.Client(headers={**agent, **(headers or {})}, cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])), **options)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise FetchFailed("The proxy that the environment names cannot be used.", hint="Set HTTPS_PROXY to an http:// address.") from error
    except OSError as error:
        raise FetchFailed("The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read.", hint=_CERTIFICATES) from error


class Web:
    """Connections to servers, shared by threads. Use it in a `with` block."""

    def __init__(self, timeouts: Timeouts | None = None) -> None:
        """Raises FetchFailed where the environment names a proxy or certificates that cannot be used."""
        import httpx2

        chosen = timeouts or Timeouts()
        self._client = open_client(
            headers={"Accept-Encoding": "identity", "Accept": "*/*"}, timeout=httpx2.Timeout(chosen.read, connect=chosen.connect, pool=None)
        )
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._waiting: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing a socket under a thread that waits on it could let it read from whatever gets the number next.
        if not self._waiting:
            self._client.close()

    def hang_up(self) -> None:
        """Breaks every answer that is being read, so that a thread stuck in one goes on (with TryAgain). One that `waits` is not reached."""
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    # Not SSLSocket's own, which takes the socket apart under the thread that reads it.
                    socket.socket.shutdown(one, socket.SHUT_RDWR)

    def waits(self, thread: threading.Thread) -> bool:
        """Whether `thread` waits in `get` for a connection or an answer."""
        with self._lock:
            return thread.ident in self._waiting

    @contextmanager
    def get(self, name: str, address: Address, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a GET, its body unread, with status 200, 206 or 416, for the block; failures while reading it are sorted too.

        The address's own headers stay with its host; `headers` (Range) go wherever a redirect leads. name: of the file, for messages.
        Raises TryAgain, Expired, FetchFailed.
        """
        import httpx2

        host = address.url
        try:
            url = httpx2.URL(address.url)
            home, at_home = _origin(url), True
            for _ in range(_REDIRECTS + 1):
                host = _host(url)
                if url.scheme not in ("http", "https") or not url.host:
                    raise FetchFailed(f"{name}: its address is no web address, {url.scheme!r} is not fetched.", hint="Use https.")
                at_home = at_home and _origin(url) == home
                with self._answer(url, {**(address.headers if at_home else {}), **headers}) as response:
                    if response.status_code not in _REDIRECT:
                        _sort_status(name, response, host)
                        with self._reading(response):
                            yield response
                        return
                    url = _next(name, response, url, host)
            raise FetchFailed(f"{name}: {host} redirects in circles.", hint=_LATER)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise FetchFailed(f"{name}: {host} leads to an address that is none.", hint=_LATER) from error
        except httpx2.HTTPError as error:
            raise _sort(name, error, host) from error

    @contextmanager
    def _answer(self, url: httpx2.URL, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        me = threading.get_ident()
        with self._lock:
            self._waiting.add(me)
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                with self._lock:
                    self._waiting.discard(me)
                yield response
        finally:
            with self._lock:
                self._waiting.discard(me)

    @contextmanager
    def _reading(self, response: httpx2.Response) -> Iterator[None]:
        stream = response.extensions.get("network_stream")
        handle = stream.get_extra_info("socket") if stream else None
        with self._lock:
            self._open |= {handle} if handle else set()
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(handle)


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)


def _host(url: httpx2.URL) -> str:
    """What messages call a server: never the path or query, which may hold a signature, nor a password."""
    return url.netloc.decode("ascii", "replace")


def _next(name: str, response: httpx2.Response, url: httpx2.URL, host: str) -> httpx2.URL:
    target = url.join(response.headers.get("Location", ""))
    if "Location" not in response.headers:
        raise TryAgain(f"{host} redirects to nowhere")
    if url.scheme == "https" and target.scheme != "https":
        raise FetchFailed(f"{name}: {host} redirects to an address without encryption at {_host(target)}, which is refused.", hint=_LATER)
    if target.userinfo:
        raise FetchFailed(f"{name}: {host} redirects to an address with a password in it, which is refused.", hint=_LATER)
    return target


def _sort_status(name: str, response: httpx2.Response, host: str) -> None:
    status = response.status_code
    if status in _TRY_AGAIN or 500 <= status < 600:
        raise TryAgain(f"{host} is busy (status {status})", after_s=_retry_after(response.headers.get("Retry-After", "")))
    if status in _EXPIRED:
        raise Expired(f"{host} refuses it (status {status})")
    if status == 404:
        raise FetchFailed(f"{name}: {host} does not have it (status 404).", hint="It was moved or deleted: list what there is again.")
    if status == 407:
        raise FetchFailed(f"{name}: the proxy asks for a password (status 407).", hint="Set HTTPS_PROXY to http://USER:PASSWORD@HOST:PORT.")
    if status not in (200, 206, 416):
        raise FetchFailed(f"{name}: {host} answers with status {status}.", hint=_LATER)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchFailed(f"{name}: {host} sends it compressed, though asked not to.", hint=_LATER)


def _retry_after(value: str) -> float:
    """Seconds, from a number or a date; 0 for neither."""
    if value.strip().isdecimal():
        return float(value[:12])
    with suppress(ValueError, OverflowError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _sort(name: str, error: httpx2.HTTPError, host: str) -> Exception:
    import httpx2

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return FetchFailed(f"{name}: {host} has no certificate that is trusted here ({cause.verify_message}).", hint=_CERTIFICATES)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx2.ProxyError):
        return TryAgain("the proxy does not let the request through", unreachable=True)
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return TryAgain(f"{host} cannot be reached", unreachable=True)
    if isinstance(error, httpx2.TimeoutException):
        return TryAgain(f"{host} has stopped answering")
    return TryAgain(f"the connection to {host} broke")
