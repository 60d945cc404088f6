#!/usr/bin/env python3
"""A reward server in Python's standard library: puts a scoring function of yours behind [[reward]] name = "remote".

    python3 launch/peers/reward_server.py                                          the example below, at 127.0.0.1:8000
    python3 launch/peers/reward_server.py --score my_scores:score --name geneval   yours, from my_scores.py in this folder

In the run's configuration:

    [[reward]]
    name = "remote"
    reward = "geneval"
    url = "http://127.0.0.1:8000"

The function gets one request, all its images at once, and returns one value an image, in their order:

    def score(images: list[bytes], prompts: list[str], metadata: list[dict]) -> list[float | None | str]

An image is a PNG file; `PIL.Image.open(io.BytesIO(image)).convert("RGB")` reads it. The metadata is the line of the .jsonl
prompt file that the prompt came from, {} for a text file. None: the reward does not apply to this prompt. A string: why this
image could not be scored. An exception fails the whole request, which the run tries again (`retries`).

Requests are scored one at a time, so the function may use a GPU without a lock. Other machines may ask only with a token:
--listen 0.0.0.0:8000 --token-env REWARD_TOKEN, and `token_env = "REWARD_TOKEN"` in the run's configuration.
The format is described in docs/REWARDS.md.
"""

import argparse
import base64
import hmac
import importlib
import json
import math
import os
import struct
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Of a request: bytes of its body, images, and pixels of one image and of all.
MOST_BYTES, MOST_IMAGES, MOST_PIXELS, MOST_PIXELS_IN_ALL = 64 << 20, 1024, 1 << 22, 1 << 28
MOST_CONNECTIONS = 512
BODIES = threading.BoundedSemaphore(4)  # that are in memory at a time
SECONDS = 60  # for a body to come; connections that are silent for as long are closed
SHORTEST_TOKEN = 16


def example(images, prompts, metadata):
    """Minus the size of each PNG file in kB, to try the way with: plain pictures score higher."""
    return [-len(image) / 1000 for image in images]


def pixels(image):
    """How many pixels a PNG file says it has; flat pictures compress to nothing, so they are not decoded to be counted."""
    if len(image) < 24 or not image.startswith(b"\x89PNG") or image[12:16] != b"IHDR":
        raise ValueError("an image is no PNG")
    width, height = struct.unpack(">II", image[16:24])
    if width * height > MOST_PIXELS:
        raise ValueError(f"an image of {width} x {height}; send up to {MOST_PIXELS} pixels")
    return width * height


def read(body, name):
    """Images, prompts and metadata of a request's body; raises KeyError, TypeError or ValueError where it is wrong."""
    asked = json.loads(body)
    for reward in asked["rewards"]:
        if reward != name:
            raise ValueError(f"there is no reward {reward!r}, but {name!r}")
    requests = asked["requests"]
    if len(requests) > MOST_IMAGES:
        raise ValueError(f"{len(requests)} images; send up to {MOST_IMAGES}")
    images = [base64.b64decode(request["image_png_b64"], validate=True) for request in requests]
    if sum(pixels(image) for image in images) > MOST_PIXELS_IN_ALL:
        raise ValueError(f"more than {MOST_PIXELS_IN_ALL} pixels in all images")
    return images, [request["prompt"] for request in requests], [request.get("metadata") or {} for request in requests]


def answer(scores, count, name):
    """What /score says of `count` images with these scores."""
    scores = list(scores)
    if len(scores) != count:
        raise ValueError(f"the scoring function returned {len(scores)} values for {count} images")
    results, errors = [], []
    for value in scores:
        failure = value if isinstance(value, str) else None
        if failure is None and value is not None:
            value = float(value)
            failure = None if math.isfinite(value) else f"the score is {value}"
        results.append({} if failure else {name: value})
        errors.append({name: failure} if failure else None)
    return {"results": results, "errors": errors}


def handler(score, name, token):
    """The class that answers requests."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open between requests
        timeout = SECONDS

        def reply(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status != 200:  # a body may be unread
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def allowed(self):
            given = self.headers.get("Authorization", "").encode()
            return token is None or hmac.compare_digest(given, f"Bearer {token}".encode())

        def do_GET(self):
            if not self.allowed():
                return self.reply(401, {"error": "this server wants its token, as Authorization: Bearer ..."})
            if self.path != "/health":
                return self.reply(404, {"error": "ask /health or /score"})
            self.reply(200, {"status": "ok", "rewards": [name]})

        def do_POST(self):
            if not self.allowed():
                return self.reply(401, {"error": "this server wants its token, as Authorization: Bearer ..."})
            if self.path != "/score":
                return self.reply(404, {"error": "ask /health or /score"})
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                return self.reply(411, {"error": "say with Content-Length how long the body is"})
            if int(length[:20]) > MOST_BYTES:
                return self.reply(413, {"error": f"{length[:20]} bytes; send up to {MOST_BYTES}"})
            with BODIES:
                self.scored(int(length))

        def body(self, length):
            """So many bytes; None where they do not come in time."""
            end, parts = time.monotonic() + SECONDS, []
            while length > 0 and time.monotonic() < end:
                part = self.rfile.read1(min(length, 1 << 16))
                if not part:
                    return None
                parts.append(part)
                length -= len(part)
            return None if length else b"".join(parts)

        def scored(self, length):
            body = self.body(length)
            if body is None:
                return self.reply(408, {"error": f"the body took over {SECONDS} s"})
            try:
                images, prompts, metadata = read(body, name)
            except (KeyError, TypeError, ValueError) as error:
                return self.reply(400, {"error": f"{type(error).__name__}: {error}"})
            try:
                with one_at_a_time:
                    scores = score(images, prompts, metadata)
                answered = answer(scores, len(images), name)
            except Exception as error:  # the request may be tried again
                traceback.print_exc()
                return self.reply(500, {"error": f"{type(error).__name__}: {error}"})
            self.reply(200, answered)

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    """One thread a connection, of which there are so many at most; clients beyond them wait."""

    request_queue_size = 256  # many ranks come at once
    free = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def process_request(self, request, client_address):
        self.free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", metavar="MODULE:FUNCTION", help="the scoring function; without it an example")
    parser.add_argument("--name", default="example", help="the reward's name, as the run's configuration has it")
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--token-env", metavar="NAME", help="the environment variable that holds the token")
    given = parser.parse_args()

    score = example
    if given.score:
        module, _, function = given.score.partition(":")
        sys.path.insert(0, os.getcwd())
        score = getattr(importlib.import_module(module), function or "score")
    token = os.environ.get(given.token_env) if given.token_env else None
    if given.token_env and not token:
        parser.error(f"--token-env {given.token_env}: there is no such variable; export it with the token")
    if token and (len(token) < SHORTEST_TOKEN or not all("!" <= c <= "~" for c in token)):
        parser.error(f"--token-env {given.token_env}: the token must have {SHORTEST_TOKEN} characters or more, and no spaces; "
                     "make one with: openssl rand -hex 32")
    host, _, port = given.listen.rpartition(":")
    if token is None and host not in ("127.0.0.1", "localhost"):
        parser.error(f"--listen {given.listen}: other machines could ask this server; give --token-env as well")
    server = Server((host, int(port)), handler(score, given.name, token))
    print(f"serving {given.name} at http://{host}:{server.server_port}", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
