"""A server for one reward, with the standard library alone; `protocol` says what it speaks."""

import contextlib
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dreamlite_jax.rewards import protocol
from dreamlite_jax.rewards.base import Reward, scored

LARGEST = 2**30  # bytes of a request
_WAITING = 128  # connections not yet taken: those of many hosts come at the same time


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection; waits for nothing and takes nothing."""
    timeout = connection.gettimeout()
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False  # it has nothing more to say
    except OSError:
        return True  # reset
    finally:
        connection.settimeout(timeout)


def server(reward: Reward, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server to be run by `serve_forever`; port 0 takes a free one (`server_address`).

    Requests are read and answered side by side, but scored one after the other: models are not made
    to be called from several threads. One whose client has left meanwhile is not scored: it has
    asked again, and the queue would grow by all that nobody waits for.
    """
    one_at_a_time, about = threading.Lock(), protocol.describe(reward)
    answered = dropped = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200, protocol.with_answered(about, answered))

        def do_POST(self) -> None:
            nonlocal answered, dropped
            try:
                length = int(self.headers.get("Content-Length", -1))
                if not 0 <= length <= LARGEST:
                    self.close_connection = True  # its body stays unread
                    raise ValueError(f"{length} bytes; expected a body of at most {LARGEST}")
                name, requests = protocol.read_request(self.rfile.read(length))
            except ValueError as error:
                self._answer(400, protocol.failure(error))
                return
            try:
                with one_at_a_time:
                    if has_left(self.connection):
                        dropped += 1
                        logging.warning(
                            "%s waits no longer: not scored (%d so far)",
                            self.address_string(),
                            dropped,
                        )
                        self.close_connection = True
                        return
                    scores = scored(reward, requests)
                    answered += not has_left(self.connection)
            except Exception as error:  # whatever a reward raises, the server stays
                logging.exception("the reward failed")
                self._answer(500, protocol.failure(error))
            else:
                self._answer(200, protocol.reply(name, scores))

        def _answer(self, status: int, body: bytes) -> None:
            with contextlib.suppress(ConnectionError):  # a client that waits no longer asks again
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, form: str, *args) -> None:
            logging.debug("%s " + form, self.address_string(), *args)

    made = ThreadingHTTPServer((host, port), Handler)
    made.daemon_threads = True
    made.socket.listen(_WAITING)
    return made
