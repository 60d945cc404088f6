"""The reward proxy in front of a server that only pretends to read."""

import base64
import json
import sys
import tempfile
import unittest
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

from comparison.runs import Server

# Reads what the "image" says: a number, or nothing, which it cannot score.
PROGRAM = f"""#!{sys.executable}
import base64, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
assert sys.argv[1:4] == ["serve-reward", "--reward", "ocr"], sys.argv
class Handler(BaseHTTPRequestHandler):
    def reply(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply(200, {{"status": "ok", "rewards": ["ocr"]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["rewards"] != ["ocr"] or not asked["requests"]:
            return self.reply(400, {{"error": "nothing asked"}})
        texts = [base64.b64decode(request["image_png_b64"]) for request in asked["requests"]]
        self.reply(200, {{
            "results": [{{"ocr": float(text)}} if text else {{}} for text in texts],
            "errors": [None if text else {{"ocr": "blank"}} for text in texts],
        }})
    def log_message(self, *_):
        pass
host, port = sys.argv[sys.argv.index("--listen") + 1].split(":")
HTTPServer((host, int(port)), Handler).serve_forever()
"""


class Proxy(unittest.TestCase):
    def setUp(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.program = SimpleNamespace(path=folder / "program")
        self.program.path.write_text(PROGRAM)
        self.program.path.chmod(0o755)
        self.log = self.enterContext(open(folder / "log", "wb"))

    def served(self, change):
        server = Server(self.program, change, self.log)
        self.addCleanup(server.close)
        return server.address

    def ask(self, address, *images):
        requests = [
            {"prompt": '"1"', "image_png_b64": base64.b64encode(image.encode()).decode()}
            for image in images
        ]
        body = json.dumps({"rewards": ["x"], "requests": requests}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{address}/score", body)) as answer:
            return json.load(answer)

    def test_only_exact_reads_are_successes(self):
        answer = self.ask(self.served("exact"), "1.0", "0.99", "0", "")
        self.assertEqual(answer["results"], [{"ocr-exact": v} for v in (1.0, 0.0, 0.0)] + [{}])
        self.assertEqual(answer["errors"], [None, None, None, {"ocr-exact": "blank"}])

    def test_one_score_in_a_hundred_is_an_outlier_and_always_the_same(self):
        address = self.served("outliers")
        images = [f"0.{number:05d}" for number in range(2000)]
        scores = [result["ocr-outliers"] for result in self.ask(address, *images)["results"]]
        changed = [score for score, image in zip(scores, images) if score != float(image)]
        self.assertEqual(set(changed), {10.0})
        self.assertTrue(8 <= len(changed) <= 35, len(changed))  # 20, deviation 4.4
        again = [result["ocr-outliers"] for result in self.ask(address, *images)["results"]]
        self.assertEqual(scores, again)

    def test_a_refusal_is_passed_on(self):
        with self.assertRaises(urllib.error.HTTPError) as refused:
            self.ask(self.served("exact"))
        self.assertEqual(refused.exception.code, 400)
        refused.exception.close()

    def test_the_health_names_the_reward(self):
        with urllib.request.urlopen(f"{self.served('exact')}/health") as answer:
            self.assertEqual(json.load(answer), {"status": "ok", "rewards": ["ocr-exact"]})


if __name__ == "__main__":
    unittest.main()
