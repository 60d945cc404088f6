"""Renders texts into pictures of 512 x 512 and asks a running reward server how well it reads them.

    flowrl-dist serve-reward --config FILE       with [[reward]] name = "ocr", detector = "..." in FILE
    python tests/peers/check_ocr.py [URL]        (pillow, numpy)
"""

import base64
import io
import json
import random
import sys
import urllib.request

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


def main():
    requests = []
    for seed in range(24):
        text = TEXTS[seed % len(TEXTS)]
        buffer = io.BytesIO()
        picture(text, seed).save(buffer, format="PNG")
        image = base64.b64encode(buffer.getvalue()).decode()
        requests.append({"prompt": f'a sign that says "{text}"', "image_png_b64": image, "metadata": {}})
    body = json.dumps({"requests": requests, "rewards": ["ocr"]}).encode()
    request = urllib.request.Request(URL + "/score", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        results = json.load(answer)["results"]
    scores = [result["ocr"] for result in results]
    exact = sum(score == 1.0 for score in scores)
    mean = sum(scores) / len(scores)
    print(f"mean {mean:.3f}, {exact} of {len(scores)} exact: {[round(score, 2) for score in scores]}")
    sys.exit(0 if mean > 0.9 else 1)


main()
