"""A server of objects in memory for benchmarks: as much of S3 as a tier asks for, without keys and without care.

The servers that can be had as Python packages take 3 to 20 CPU seconds for a GiB, which would be all that one measures.

python benchmarks/object_server.py PORT [--latency-ms 0]
"""

import argparse
import bisect
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
HEAD_BYTES = 1 << 16


@dataclass
class Bucket:
    """All objects of all buckets, by path."""

    objects: dict[str, bytearray] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Connection:
    """One client; a thread each."""

    def __init__(self, bucket: Bucket, sock: socket.socket, latency_s: float) -> None:
        self._bucket, self._sock, self._latency_s = bucket, sock, latency_s
        self._rest = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        with self._sock:
            while (head := self._head()) is not None:
                self._answer(*head)

    def _head(self) -> tuple[str, str, dict[str, str]] | None:
        data = self._rest
        while b"\r\n\r\n" not in data:
            more = self._sock.recv(HEAD_BYTES)
            if not more:
                return None
            data += more
        head, _, self._rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        return method, target, {name.lower(): text for name, text in headers.items()}

    def _body(self, headers: dict[str, str]) -> bytearray:
        body = bytearray(int(headers.get("content-length", 0)))
        view = memoryview(body)
        view[: len(self._rest)] = self._rest
        have, self._rest = len(self._rest), b""
        while have < len(body):
            have += self._sock.recv_into(view[have:], 0, socket.MSG_WAITALL)
        return body

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        parts = urlsplit(target)
        path, query = unquote(parts.path), dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self._body(headers)
        if self._latency_s:
            time.sleep(self._latency_s)
        if method == "PUT":
            self._bucket.objects[path] = body
            self._send("200 OK", [], {"ETag": '"1"'})
        elif method == "POST":
            for key in re.findall(rb"<Key>([^<]*)</Key>", body):
                self._bucket.objects.pop(f"{path.rstrip('/')}/{key.decode()}", None)
            self._send("200 OK", [b"<DeleteResult></DeleteResult>"])
        elif "list-type" in query:
            self._send("200 OK", [self._listing(path.rstrip("/") + "/", query)])
        elif path in self._bucket.objects:
            self._send_range(self._bucket.objects[path], headers.get("range"))
        else:
            self._send("404 Not Found", [b"<Error><Code>NoSuchKey</Code></Error>"])

    def _send_range(self, data: bytearray, asked: str | None) -> None:
        headers = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if asked is None:
            self._send("200 OK", [data], headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send("206 Partial Content", [memoryview(data)[start:stop]], headers)

    def _listing(self, folder: str, query: dict[str, str]) -> bytes:
        prefix = folder + query.get("prefix", "")
        with self._bucket.lock:
            names = sorted(name for name in list(self._bucket.objects) if name.startswith(prefix))
        after = folder + (query.get("continuation-token") or query.get("start-after", ""))
        begin = bisect.bisect_right(names, after)
        page = names[begin : begin + PAGE]
        more = begin + PAGE < len(names)
        text = "".join(
            f"<Contents><Key>{escape(name.removeprefix(folder))}</Key><Size>{len(self._bucket.objects[name])}</Size>"
            '<ETag>"1"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>'
            for name in page
        )
        token = (
            f"<NextContinuationToken>{escape(page[-1].removeprefix(folder))}</NextContinuationToken>" if more else ""
        )
        truncated = str(more).lower()
        return f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{token}{text}</ListBucketResult>".encode()

    def _send(
        self, status: str, body: list[bytes | bytearray | memoryview], headers: dict[str, str] | None = None
    ) -> None:
        nbytes = sum(map(len, body))
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {nbytes}"]
        lines += [f"{name}: {text}" for name, text in (headers or {}).items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        sent = self._sock.sendmsg([head, *body])
        for part in [head, *body]:
            if sent < len(part):
                self._sock.sendall(memoryview(part)[sent:])
            sent = max(sent - len(part), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="before each answer")
    arguments = parser.parse_args()
    bucket = Bucket()
    with socket.create_server(("127.0.0.1", arguments.port), backlog=1024) as server:
        while True:
            connection = Connection(bucket, server.accept()[0], arguments.latency_ms / 1000)
            threading.Thread(target=connection.serve, daemon=True).start()


if __name__ == "__main__":
    main()
