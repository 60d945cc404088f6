"""Renders texts into pictures of 512 x 512 and asks a running reward server how well it reads them; rapidocr-onnxruntime,
which runs the same models on onnxruntime, reads the same pictures. Ours must not be behind by more than one text.

    flowrl-dist serve-reward --config FILE       with [[reward]] name = "ocr", detector = "..." in FILE
    python tests/peers/check_ocr.py [URL]        (pillow, numpy, rapidocr-onnxruntime)
"""

import base64
import io
import json
import random
import sys
import time
import urllib.request

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr_onnxruntime import RapidOCR

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
FONTS = ["DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf"]
TEXTS = ["Spring Collection 2024", "Hello World", "OPEN", "Forever Yours", "Step Goal Achieved", "No Parking", "Welcome Home", "SALE 50 OFF"]


def font(name, size):
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # a machine without it
        return ImageFont.load_default(size)


def picture(text, seed):
    rng = random.Random(seed)
    y, x = np.mgrid[:512, :512]
    ground = np.stack([150 + 60 * np.sin(x / (40 + 9 * seed)), 140 + 50 * np.cos(y / 70), 160 + 0 * x], -1).astype(np.uint8)
    image = Image.fromarray(ground)
    face = font(FONTS[seed % len(FONTS)], rng.choice([32, 40, 52]))
    lines = text.rsplit(" ", 1) if seed % 3 == 0 else [text]
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    top = rng.randint(120, 300)
    for i, line in enumerate(lines):
        left = (512 - draw.textlength(line, font=face)) / 2
        draw.text((left, top + 70 * i), line, font=face, fill=rng.choice([(20, 20, 60, 255), (250, 250, 240, 255), (120, 10, 10, 255)]))
    layer = layer.rotate(rng.choice([0, 0, 8, -12]), resample=Image.BICUBIC)
    image.paste(layer, (0, 0), layer)
    return image


def distance(a, b):
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def score(text, read):
    """As flow_grpo/ocr.py: 1 where the text is part of what was read, else by the edit distance."""
    want, read = ("".join(words.split()).lower() for words in (text, read))
    return 1.0 if want in read else 1.0 - min(distance(want, read), len(want)) / len(want)


def peer_scores(pictures):
    reader = RapidOCR()
    scores = []
    for text, image in pictures:
        lines, _ = reader(np.asarray(image.convert("RGB"))[:, :, ::-1])
        scores.append(score(text, "".join(line[1] for line in lines or [])))
    return scores


def told(who, scores, seconds):
    """Prints how well they read, and gives the mean."""
    mean = sum(scores) / len(scores)
    exact = sum(value == 1.0 for value in scores)
    each = [round(value, 2) for value in scores]
    print(f"{who}: mean {mean:.3f}, {exact} of {len(scores)} exact, {1e3 * seconds / len(scores):.0f} ms an image: {each}")
    return mean


def main():
    pictures = [(TEXTS[seed % len(TEXTS)], picture(TEXTS[seed % len(TEXTS)], seed)) for seed in range(24)]
    requests = []
    for text, drawn in pictures:
        buffer = io.BytesIO()
        drawn.save(buffer, format="PNG")
        image = base64.b64encode(buffer.getvalue()).decode()
        requests.append({"prompt": f'a sign that says "{text}"', "image_png_b64": image, "metadata": {}})
    body = json.dumps({"requests": requests, "rewards": ["ocr"]}).encode()
    request = urllib.request.Request(URL + "/score", body, {"Content-Type": "application/json"})
    begun = time.time()
    with urllib.request.urlopen(request, timeout=600) as answer:
        results = json.load(answer)["results"]
    ours = told("flowrl-dist", [result["ocr"] for result in results], time.time() - begun)
    begun = time.time()
    peers = told("rapidocr-onnxruntime", peer_scores(pictures), time.time() - begun)
    sys.exit(0 if ours > 0.9 and ours > peers - 1 / len(pictures) else 1)


main()
