#!/usr/bin/env python3
"""Serves the program's own OCR reward with a change, for regimes whose rewards no built-in one has.

    benchmarks/reward_proxy.py exact --program PROGRAM --listen http://127.0.0.1:8001

exact     1 where the whole text is read, else 0: rewarded images become rare.
outliers  of one image in a hundred the score is replaced by 10, whatever it shows: a reward model
          that fails now and then. The picture's bytes decide which: the same in every run.

The reward is called ocr-CHANGE. It starts `flowrl-dist serve-reward --reward ocr` for itself,
speaks docs/REWARDS.md's "flowrl" format, and ends when its standard input does.
"""

import argparse
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHARE, OUTLIER = 0.01, 10.0


def exact(score, image):
    return 1.0 if score == 1.0 else 0.0


def outliers(score, image):
    drawn = int.from_bytes(hashlib.sha256(image.encode()).digest()[:8], "big") / 2**64
    return OUTLIER if drawn < SHARE else score


CHANGES = {"exact": exact, "outliers": outliers}


def changed(answer, asked, change, name):
    """The OCR server's answer to these requests, under another name; failures stay failures."""
    results, errors = [], []
    for result, error, request in zip(
        answer["results"], answer.get("errors") or [None] * len(asked), asked
    ):
        score = result.get("ocr")
        results.append({} if score is None else {name: change(score, request["image_png_b64"])})
        errors.append({name: error["ocr"]} if error else None)
    return {"results": results, "errors": errors}


def handler(upstream, change, name):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            try:
                urllib.request.urlopen(f"{upstream}/health", timeout=60).close()
                self.reply(200, {"status": "ok", "rewards": [name]})
            except OSError as error:
                self.reply(503, {"error": str(error)})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["requests"]
            body = json.dumps({"rewards": ["ocr"], "requests": asked}).encode()
            request = urllib.request.Request(
                f"{upstream}/score", body, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=600) as answer:
                    self.reply(200, changed(json.load(answer), asked, change, name))
            except urllib.error.HTTPError as error:
                self.reply(error.code, {"error": error.read().decode(errors="replace")})
            except OSError as error:
                self.reply(503, {"error": str(error)})

        def log_message(self, *_):
            pass

    return Handler


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("change", choices=CHANGES)
    parser.add_argument("--program", required=True)
    parser.add_argument("--listen", default="http://127.0.0.1:8001")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [options.program, "serve-reward", "--reward", "ocr", "--listen", f"127.0.0.1:{port}"]
    reward = subprocess.Popen(serve, stdin=subprocess.DEVNULL)
    place = urlsplit(options.listen)
    make = handler(f"http://127.0.0.1:{port}", CHANGES[options.change], f"ocr-{options.change}")
    server = ThreadingHTTPServer((place.hostname, place.port), make)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent closes our input when it is done with us
    try:
        sys.stdin.buffer.read()
    finally:
        reward.terminate()
        reward.wait()


if __name__ == "__main__":
    main()
