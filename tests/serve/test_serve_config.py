"""Fields of the Serve config outside of Tandem's ``args``, checked against Serve's own schema."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.file import load
from cluster.errors import ConfigError


def write(tmp_path: Path, application: dict[str, Any], **fields: Any) -> Path:
    args = {"generators": [{"name": "g", "model": "m", "engine": "sim"}]}
    ours = {"import_path": "deployments.app:build", "args": args, **application}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [ours], **fields}))
    return path


@pytest.mark.parametrize(
    ("application", "fields", "message"),
    [
        (
            {},
            {"http_option": {}},
            "http_option: Ray Serve has no such field; did you mean 'http_options'? ",
        ),
        ({}, {"http_options": {"prot": 80}}, "http_options.prot: Ray Serve has no such field; "),
        ({"runtime-env": {}}, {}, "applications.0.runtime-env: Ray Serve has no such field; "),
    ],
)
def test_serve_fields_that_serve_would_ignore_are_rejected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    application: dict[str, Any],
    fields: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, application, **fields))
    assert str(caught.value).startswith(message)


def test_other_top_level_fields_may_hold_anchors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    path = write(tmp_path, {}, **{"x-common": {"a": 1}})
    assert load(path).config.model_names == ("g",)
