#!/usr/bin/env bash
# Fetches the model that finds lines of text in large pictures, for [[reward]] name = "ocr", detector = "...": PP-OCRv4's
# detector (PaddlePaddle, Apache-2.0) out of the Python package rapidocr-onnxruntime 1.4.4, checked by its digest.
#
#   launch/fetch-ocr.sh [FOLDER]     default: models/ocr
set -euo pipefail

folder=${1:-models/ocr}
model=ch_PP-OCRv4_det_infer.onnx
digest=d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9

right() {
    [[ -f $1 ]] && echo "$digest  $1" | sha256sum --check --status
}

if right "$folder/$model"; then
    echo "$folder/$model is there already"
    exit 0
fi
for tool in python3 sha256sum; do
    if ! command -v "$tool" >/dev/null; then
        echo "fetch-ocr: $tool is missing; install it" >&2
        exit 2
    fi
done
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$temporary" rapidocr-onnxruntime==1.4.4
python3 -m zipfile -e "$temporary"/rapidocr_onnxruntime-1.4.4-*.whl "$temporary/package"
found=$temporary/package/rapidocr_onnxruntime/models/$model
if ! right "$found"; then
    echo "fetch-ocr: $model has another digest than expected; it was not installed" >&2
    exit 1
fi
mkdir -p "$folder"
mv "$found" "$folder/$model"
echo "$folder/$model: set detector = \"$folder/$model\" in the [[reward]] section of ocr"
