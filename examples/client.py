"""Ask a running `lexmill serve` with nothing but the standard library.

    lexmill serve runs/demo &
    python examples/client.py http://127.0.0.1:8100 "My card has not arrived" "What is my PIN?"

A server that is busy answers 503 and says in `Retry-After` when to try again; this client asks up to three times.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def classify(server: str, texts: list[str], attempts: int = 3) -> list[dict[str, Any]]:
    """One answer a text, in order. Ends the program with the server's own words where it refuses."""
    body = json.dumps({"texts": texts}).encode()
    request = Request(f"{server}/v1/classify", body, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)["answers"]
    except HTTPError as error:
        with error:
            if error.code != 503 or attempts == 1:
                raise SystemExit(f"HTTP {error.code}: {_said(error)}") from error
            time.sleep(float(error.headers["Retry-After"]))
    return classify(server, texts, attempts - 1)


def _said(error: HTTPError) -> str:
    fault = json.load(error)["error"]
    return " - ".join(fault[part] for part in ("where", "message", "hint") if fault[part])


def main(server: str, texts: list[str]) -> None:
    for text, answer in zip(texts, classify(server, texts), strict=True):
        print(f"{answer['label']}\t{answer['score']:.3f}\t{text}")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2:])
