"""Downloads from the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from cluster.cli.models import fetch
from cluster.errors import BuildError
from cluster.models.hub import download

RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))


def test_fetch_downloads_what_is_neither_built_nor_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    downloaded = []

    def snapshot_download(model: str, **_options: Any) -> str:
        downloaded.append(model)
        return f"/cache/{model}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    local = tmp_path / "local"
    local.mkdir()
    adapters = {"law": "org/law"}
    pools = [
        {"name": "a", "model": "org/a", "adapters": adapters},
        {"name": "b", "model": str(local)},
        {"name": "c", "model": "none", "engine": "sim"},
    ]
    application = {"import_path": "deployments.app:build", "args": {"generators": pools}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    fetch(config, [])
    assert downloaded == ["org/a", "org/law"]
    assert capsys.readouterr().out.splitlines() == [
        "org/a: /cache/org/a",
        "org/law: /cache/org/law",
        f"{local}: {local}",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("403", response=RESPONSE), "requires its license to be accepted"),
        (RepositoryNotFoundError("404", response=RESPONSE), "does not exist on huggingface.co"),
        (LocalEntryNotFoundError("offline\nmore"), "cannot be downloaded: offline"),
        (httpx.ReadTimeout(""), "cannot be downloaded: ReadTimeout"),
    ],
)
def test_a_failed_download_says_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BuildError) as caught:
        download("org/model")
    assert str(caught.value).startswith("model 'org/model' ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
