"""The room as a whole."""

from __future__ import annotations

import subprocess
import sys

from lexmill.data.bundled import banking77


def test_importing_the_room_loads_no_torch_pyarrow_or_tokenizers() -> None:
    code = "import lexmill.data, sys; print(*({'torch', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_bundled_data_carries_its_licence() -> None:
    train, test = banking77()
    assert train.is_file()
    assert test.is_file()
    assert "Creative Commons Attribution 4.0" in (train.parent / "LICENSE.md").read_text("utf-8")
