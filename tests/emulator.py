"""Google Cloud Storage on this machine: the emulator of the package index, with what it lacks.

`gcp-storage-emulator` does not know if-generation-match, and does not tell an object's generation
when it is downloaded. Both are added here, as Google documents them. Requests can be watched too:
one can be refused, or end the program that sends it.
"""

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from urllib.parse import unquote

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

from soft_jax.store import formats

BUCKET = "runs-here"
Watch = Callable[[str, str], HTTPStatus | None]


class Emulator:
    """A running emulator with one empty bucket, `BUCKET`."""

    def __init__(self):
        self.storage = _InMemory(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        # Gets the method and the object's name, before a request and after it; returns a status to
        # refuse it with.
        self.before: Watch = lambda method, name: None
        self.after: Watch = lambda method, name: None
        # It logs what it is asked for and hasn't got, which is nothing wrong.
        for name in ("gcp_storage_emulator", "api.object"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._http = _Server(("127.0.0.1", 0), partial(_Handler, self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables by which Google's clients find it, and need no sign-in."""
        url = f"http://127.0.0.1:{self._http.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            # gcsfs would ask Google itself what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def objects(self) -> dict[str, bytes]:
        """Return the content of every object by name."""
        names = sorted(self.storage.objects.get(BUCKET, {}))
        return {name: self.storage.get_file(BUCKET, name) for name in names}

    def put(self, name: str, content: bytes) -> None:
        """Write an object as another program would."""
        kind, size = "application/octet-stream", str(len(content))
        told = objects._make_object_resource("", BUCKET, name, kind, size)
        self.storage.create_file(BUCKET, name, content, objects._checksums(content, told))

    def generation(self, name: str) -> str:
        """Return the generation of an object, "0" where there is none."""
        return self.storage.objects.get(BUCKET, {}).get(name, {"generation": "0"})["generation"]

    def calm(self) -> None:
        """Watch nothing any more."""
        self.before = self.after = lambda method, name: None


@contextlib.contextmanager
def running() -> Iterator[Emulator]:
    """Run an emulator that this program finds, and those that it starts."""
    emulator = Emulator()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in emulator.environment.items():
            patch.setenv(name, value)
        yield emulator
    emulator.close()


def url(*names: str) -> str:
    """Return how a path in the bucket is written."""
    return "/".join((f"gs://{BUCKET}", *names))


def lock(**changes) -> bytes:
    """Return a lock as another host's program writes it."""
    data = {
        "host": "elsewhere",
        "process": 7,
        "machine": "another",
        "time": time.time(),
        "token": "theirs",
    }
    return json.dumps(formats.stamped("lock", data | changes)).encode()


def kill_at(emulator: Emulator, run: str, name: str, committed: bool) -> None:
    """Kill the program that writes the object `name` into the folder `run`.

    That is when the object is there if `committed`, else before it is.
    """

    def strike(method: str, there: str) -> HTTPStatus | None:
        if method == "GET" or there != f"{run}/{name}":
            return None
        if committed and there not in emulator.objects:  # its upload has only been announced
            return None
        holder = json.loads(emulator.objects[f"{run}/.lock"])
        os.kill(holder["process"], signal.SIGKILL)
        return HTTPStatus.SERVICE_UNAVAILABLE

    emulator.calm()
    if committed:
        emulator.after = strike
    else:
        emulator.before = strike


def _object_of(request: server.Request) -> str:
    """Return the name of the object that a request is about; of a listing, how they begin."""
    for key in ("name", "prefix"):
        if name := request.query.get(key):
            return name[0]
    if request.query.get("uploadType") == ["multipart"]:
        return request.data["meta"]["name"]
    found = re.search(r"/b/[^/]+/o/(.*)$", request.path)
    return unquote(found[1]) if found else ""


class _InMemory(Storage):
    def _write_config_to_file(self) -> None:
        """Do nothing: all that is known of objects would be written at each change, for nobody."""


class _Server(HTTPServer):
    # TensorStore opens many connections at once. What a queue of five, the default, has no room for
    # is tried again a second later.
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that are gone before they have their answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(server.RequestHandler):
    def __init__(self, emulator: Emulator, *args):
        self.emulator = emulator
        super().__init__(emulator.storage, *args)

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.rfile = io.BytesIO(body)
        request = server.Request(self, method)
        name = _object_of(request)
        self.rfile = io.BytesIO(body)  # for who answers
        status, wanted = self.emulator.before(method, name), request.query.get("ifGenerationMatch")
        if wanted and wanted[0] != self.emulator.generation(name):
            status = status or HTTPStatus.PRECONDITION_FAILED
        if status:
            self._refuse(status)
            return
        self._name = name if "media" in request.query.get("alt", []) else ""
        server.Router(self).handle(method)
        self.emulator.after(method, name)

    def _refuse(self, status: HTTPStatus) -> None:
        response = server.Response(self)
        response.status = status
        response.json({"error": {"code": status.value, "message": status.phrase}})
        response.close()

    def end_headers(self) -> None:
        if getattr(self, "_name", ""):
            self.send_header("X-Goog-Generation", self.emulator.generation(self._name))
        super().end_headers()


for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
    setattr(_Handler, f"do_{_method}", lambda self, method=_method: self._answer(method))
