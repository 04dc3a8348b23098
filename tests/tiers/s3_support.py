"""Real S3 servers for tests, each a process of its own on a Unix socket; a proxy makes them known by TCP."""

import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from unittest import mock

import obstore
from obstore.store import S3Store

from kvortex.testing.tier_conformance import NAMESPACE
from kvortex.tiers import S3Tier, tier_from_url
from kvortex.tiers.s3.segment import Footer, SegmentId, decode_footer
from tests.tiers.redis_support import Proxy, Way

START_S = 60.0
KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
BUCKET = "blocks"


class S3Server(ABC):
    """A server, and the proxy in front of it."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvortex-s3-"))  # a socket's path has at most 107 bytes
        self.socket = self._directory / "s.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.proxy = HttpProxy(self.socket)

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _make_bucket(self) -> None:
        """Make the bucket in a server that runs."""
        return

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        self._process = subprocess.Popen(
            self._command(), cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        due_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < due_s, "the server does not answer"
            time.sleep(0.01)
        self._make_bucket()

    def _answers(self) -> bool:
        try:
            obstore.list(self.client(retries=0), "").collect()
        except obstore.exceptions.GenericError as error:
            return "NoSuchBucket" in str(error)
        return True

    def kill(self) -> None:
        """End it at once, in whatever state; idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Have it stand still, with all its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any(" T " not in (task / "stat").read_text() for task in tasks.iterdir()):  # it takes a moment
            time.sleep(0.001)

    def go_on(self) -> None:
        """Let it run again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.proxy.__enter__()
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.proxy.__exit__()
        shutil.rmtree(self._directory)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    def client(self, retries: int = 3) -> S3Store:
        """obstore alone, around the code under test."""
        config: Any = {"endpoint": self.endpoint, "access_key_id": KEY, "secret_access_key": SECRET}
        return S3Store(
            BUCKET,
            config=config | {"region": "us-east-1"},
            client_options={"allow_http": True},
            retry_config={"max_retries": retries},
        )

    def url(self, options: str = "", prefix: str = "", bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&timeout_s=20&linger_s=0{options}"

    def tier(self, options: str = "", *, prefix: str = "", namespace: bytes = NAMESPACE) -> S3Tier:
        """A tier over it, not opened."""
        return tier_over(self.url(options, prefix), namespace)

    # -- objects, around the code under test -------------------------------------------------------

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin like this."""
        listed = obstore.list(self.client(), prefix or None).collect()
        return sorted(str(each["path"]) for each in listed)

    def get(self, name: str) -> bytes:
        return bytes(obstore.get(self.client(), name).bytes())

    def put(self, name: str, data: bytes) -> None:
        obstore.put(self.client(), name, data, use_multipart=False)

    def delete(self, *names: str) -> None:
        obstore.delete(self.client(), list(names))

    def footers(self, prefix: str, namespace: bytes = NAMESPACE, *, sealed: bool = False) -> dict[str, Footer]:
        """The footers of all segments of a namespace, by the names of their objects."""
        found = {}
        for name in self.names(f"{prefix}/{namespace.hex()}" + ("-sealed" if sealed else "")):
            number = SegmentId.of_name(name.rpartition("/")[2])
            data = self.get(name)
            assert number is not None
            footer = decode_footer(
                data[-number.footer_bytes :], namespace, number, 1 << 40
            )  # whatever is in front of it
            if isinstance(footer, Footer):
                found[name] = footer
        return found


class Moto(S3Server):
    """Keeps objects in memory, and looks at no key."""

    def _command(self) -> list[str]:
        return [sys.executable, "-c", MOTO_BY_SOCKET, str(self.socket)]

    def _make_bucket(self) -> None:
        with self.boto() as client:
            client.create_bucket(Bucket=BUCKET)

    @contextlib.contextmanager
    def boto(self) -> Iterator[Any]:
        """boto3's client, for what obstore does not do."""
        import boto3  # not above: tests inside vLLM use the other server, and have no boto3

        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        with contextlib.closing(
            boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)
        ) as client:
            yield client


MOTO_BY_SOCKET = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

app = DomainDispatcherApplication(create_backend_app)
run_simple(f"unix://{sys.argv[1]}", 0, app, threaded=True)
"""


class Rclone(S3Server):
    """Keeps objects in a directory, where they outlive it, and checks signatures."""

    def _command(self) -> list[str]:
        (self._directory / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        binary = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert binary is not None
        command = [binary, "serve", "s3", "--addr", f"unix://{self.socket}", "--auth-key", f"{KEY},{SECRET}"]
        return [*command, "--config", str(self._directory / "none"), str(self._directory / "data")]


class HttpProxy(Proxy):
    """Makes up for rclone, which answers requests for ranges with the status of whole objects, and notes all requests.

    Attributes:
        asked: method and path of each request, in order.
        answers: instead of the server's next answers, for requests that begin with these words.
    """

    def __init__(self, target: Path, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(target, tls)
        self.asked: list[str] = []
        self.answers: list[tuple[str, bytes]] = []

    def passed(self, way: Way, data: bytes) -> bytes:
        if way is Way.ASKED:
            self.asked += [match[1].decode() for match in REQUEST.finditer(data)]
        elif data.startswith(b"HTTP/1.1 "):
            if self.answers and self.asked[-1].startswith(self.answers[0][0]):
                return self.answers.pop(0)[1]
            if data.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\nContent-Range: " in data:
                return data.replace(b"200 OK", b"206 Partial Content", 1)
        return data

    def count(self, words: str) -> int:
        """Requests that begin with these words."""
        return sum(each.startswith(words) for each in self.asked)


REQUEST = re.compile(rb"(?:^|\n)((?:GET|PUT|POST|DELETE|HEAD) [^ \r\n]+) HTTP/1\.1\r\n")
LIST = f"GET /{BUCKET}?"
GET = f"GET /{BUCKET}/"
PUT = f"PUT /{BUCKET}/"
DELETE = f"POST /{BUCKET}?delete"


def refusal(status: int, code: str, message: str = "no") -> bytes:
    """An answer with an error."""
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)


def tier_over(url: str, namespace: bytes = NAMESPACE) -> S3Tier:
    tier = tier_from_url(url, namespace)
    assert isinstance(tier, S3Tier)
    return tier


@contextlib.contextmanager
def keys_in_environment() -> Iterator[None]:
    """The environment of a process that uses S3, and nothing of the one of the tests."""
    others = {name: text for name, text in os.environ.items() if not re.match(r"AWS_", name)}
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, others | keys, clear=True):
        yield
