"""HTTP client of the command line; errors are raised as ``TandemError``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import httpx

from cluster.client import wire
from cluster.errors import TandemError, UnavailableError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0
DATA_PATH = "/dashboard/data"
DRAIN_PATH = "/drain"


@contextmanager
def connect(
    url: str, key: str | None, *, timeout_s: float = READ_TIMEOUT_S
) -> Iterator["RouterClient"]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    hooks = {"response": [_raise_for_error]}
    with httpx.Client(base_url=url, headers=headers, timeout=timeout, event_hooks=hooks) as client:
        yield RouterClient(url, client)


def _raise_for_error(response: httpx.Response) -> None:
    if not response.is_success:
        content = response.read()
        raise wire.error_from(response.status_code, response.headers.raw, content)


class RouterClient:
    """Sends requests to one router."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self._url = url
        self._client = client

    def get(self, path: str) -> Any:
        with self._errors():
            return self._client.get(path).json()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._errors():
            return self._client.post(path, json=body).json()

    def delete(self, path: str) -> Any:
        with self._errors():
            return self._client.delete(path).json()

    def upload(self, path: str, name: str, content: IO[bytes], fields: Mapping[str, str]) -> Any:
        """Send a form with a file, which is read piece by piece."""
        with self._errors():
            return self._client.post(path, data=fields, files={"file": (name, content)}).json()

    def upload_for_text(
        self, path: str, name: str, content: IO[bytes], fields: Mapping[str, str]
    ) -> str:
        """Send a form as ``upload`` does, and return the answer unread."""
        with self._errors():
            return self._client.post(path, data=fields, files={"file": (name, content)}).text

    def upload_for_events(
        self, path: str, name: str, content: IO[bytes], fields: Mapping[str, str]
    ) -> Iterator[Any]:
        """Send a form as ``upload`` does, and yield the events of the answer."""
        form = {"data": fields, "files": {"file": (name, content)}}
        yield from self._events(path, form)

    def download(self, path: str) -> Iterator[bytes]:
        """Yield the body of an answer as it arrives."""
        with self._errors(), self._client.stream("GET", path) as response:
            yield from response.iter_bytes()

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """Send a POST request and yield the JSON of each server-sent event until ``[DONE]``."""
        yield from self._events(path, {"json": body})

    def _events(self, path: str, content: Mapping[str, Any]) -> Iterator[Any]:
        with self._errors(), self._client.stream("POST", path, **content) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if line.startswith("data:"):
                    yield wire.event(data)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise UnavailableError(
                f"no router responds at {self._url}; check the cluster with `tandem status`"
            ) from None
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise UnavailableError(f"{self._url}: the connection was lost: {error!r}") from None
        except httpx.TransportError as error:
            raise TandemError(f"{self._url}: {error!r}") from None
