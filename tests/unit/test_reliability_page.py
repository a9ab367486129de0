"""The tests that docs/explanation/reliability.md names as proofs exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "reliability.md"


def test_every_promise_names_a_test_that_exists() -> None:
    proofs = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text("utf-8"))
    assert proofs
    missing = []
    for file, test in proofs:
        text = (ROOT / file).read_text("utf-8") if (ROOT / file).exists() else ""
        if not re.search(rf"^(async )?def {test}\b", text, re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert not missing
