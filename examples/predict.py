"""Ask an artefact from Python, without a server.

python examples/predict.py runs/demo "My card has not arrived" "What is my PIN?"
"""

from __future__ import annotations

import sys

import lexmill as lm


def main(artifact: str, texts: list[str]) -> None:
    model = lm.load(artifact)
    for text, answer in zip(texts, model.predict(texts), strict=True):
        print(f"{answer['label']}\t{answer['score']:.3f}\t{text}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
