"""The clients of the documentation: their versions and examples."""

import re
from importlib.metadata import version

import pytest

from tests.clients.conftest import ROOT, Server

PAGE = (ROOT / "docs" / "how-to" / "call-the-api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```py\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
VERSIONS = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", PAGE, flags=re.MULTILINE)


def test_the_listed_versions_are_tested() -> None:
    assert VERSIONS
    assert {name: version(name) for name, _ in VERSIONS} == dict(VERSIONS)


@pytest.mark.parametrize("code", EXAMPLES, ids=[code.splitlines()[0] for code in EXAMPLES])
def test_an_example_runs(server: Server, capsys: pytest.CaptureFixture[str], code: str) -> None:
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"none"', f'"{server.key}"')
    # In this process, because importing a client takes seconds.
    exec(code, {"__name__": "example"})
    assert capsys.readouterr().out.strip()
