"""Programs in examples/ that use vendors' clients; tests/cluster/test_docs.py runs Ray Data's."""

import runpy

import pytest

from tests.clients.conftest import ROOT, Server

PRINTED = {
    "openai_sdk.py": ["Paris", "The train was late again.", "Italy: ", "Spain: "],
    "anthropic_sdk.py": ["weather {'city': "],
    "langchain_chain.py": ["Document: The library opens", "Answer: "],
    "llama_index_search.py": ["Document: The library opens", "Answer: "],
}


def test_every_example_is_run() -> None:
    found = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert found == {*PRINTED, "ray_data.py"}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_URL", server.url)
    monkeypatch.setenv("TANDEM_API_KEY", server.key)
    # In this process, because importing a client takes seconds.
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTED[name]:
        assert text in printed, printed
