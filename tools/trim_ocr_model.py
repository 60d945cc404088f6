#!/usr/bin/env python3
"""Make assets/ocr/ppocrv4_rec_ascii.onnx: the PP-OCRv4 mobile recogniser with its classes cut to ASCII.

    python3 -m venv venv && venv/bin/pip install onnx==1.19.1 numpy==2.4.6
    venv/bin/pip download --no-deps rapidocr-onnxruntime==1.4.4
    venv/bin/python tools/trim_ocr_model.py rapidocr_onnxruntime-1.4.4-py3-none-any.whl assets/ocr

Only the last layer changes: of its 6625 classes 96 stay, the CTC blank, `!` to `~` and the space.
The script stops where the wheel, the model in it or its own result is not the known one.
"""

import argparse
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

WHEEL_SHA256 = "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf"
MODEL_IN_WHEEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
MODEL_SHA256 = "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"
RESULT_SHA256 = "0e733656b1727aa52b44c9f2479e0fa2514cbc86993cb0e6abe553f36e55fd8e"
CLASSES = 6625
NAME = "ppocrv4_rec_ascii"


def checked(data: bytes, sha256: str, what: str) -> bytes:
    """The data, or the end of the program where it is not what it should be."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{what}: sha256 is {found}, expected {sha256}; use the pinned versions")
    return data


def kept_classes(model: onnx.ModelProto) -> tuple[list[int], list[str]]:
    """The indices to keep, and the characters of all but the first (the blank)."""
    listed = next(p.value for p in model.metadata_props if p.key == "character").split("\n")
    characters = ["<blank>", *listed, " "]
    if len(characters) != CLASSES:
        raise SystemExit(f"the model lists {len(characters)} classes, expected {CLASSES}")
    ascii_characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    indices = [0, *(characters.index(c) for c in ascii_characters), CLASSES - 1]
    return indices, [*ascii_characters, " "]


def slice_head(graph: onnx.GraphProto, indices: list[int]) -> None:
    """Cuts every constant whose last dimension is the classes: the last layer's weight and bias."""
    cut = 0
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type != "Constant" or attribute.name != "value":
                continue
            value = numpy_helper.to_array(attribute.t)
            if value.ndim and value.shape[-1] == CLASSES:
                kept = np.ascontiguousarray(value[..., indices])
                attribute.t.CopyFrom(numpy_helper.from_array(kept, attribute.t.name))
                cut += 1
    if cut != 2:
        raise SystemExit(f"{cut} constants have {CLASSES} classes, expected 2")
    graph.output[0].type.tensor_type.shape.dim[-1].dim_value = len(indices)
    del graph.value_info[:]  # shapes of the old head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="folder for the model and its keys")
    args = parser.parse_args()

    checked(args.wheel.read_bytes(), WHEEL_SHA256, str(args.wheel))
    with zipfile.ZipFile(args.wheel) as wheel:
        model = onnx.load_from_string(checked(wheel.read(MODEL_IN_WHEEL), MODEL_SHA256, MODEL_IN_WHEEL))

    indices, characters = kept_classes(model)
    slice_head(model.graph, indices)
    keys = "\n".join(characters)
    del model.metadata_props[:]
    model.metadata_props.add(key="character", value=keys)
    onnx.checker.check_model(model)

    args.out.mkdir(parents=True, exist_ok=True)
    data = checked(model.SerializeToString(), RESULT_SHA256, "the trimmed model")
    (args.out / f"{NAME}.onnx").write_bytes(data)
    (args.out / f"{NAME}.keys.txt").write_text(keys + "\n")


if __name__ == "__main__":
    main()
