"""The tests that the pages on reliability and security name as proofs exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/explanation/reliability.md", "SECURITY.md"])
def test_every_promise_names_a_test_that_exists(page: str) -> None:
    proofs = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text("utf-8"))
    assert proofs
    missing = []
    for file, test in proofs:
        text = (ROOT / file).read_text("utf-8") if (ROOT / file).exists() else ""
        if not re.search(rf"^(async )?def {test}\b", text, re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert not missing
