"""The model store: where models lie, which default models there are, and which are built.

A default model lies in ``<home>/models/<name>`` and counts as built when its manifest names the
current recipe and every file it lists has the listed size. Reads only; ``cluster.models.build``
writes. Importing this module loads neither torch nor transformers: builders import them.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cluster.errors import ConfigError, TandemError

MANIFEST = "manifest.json"

Kind = Literal["generator", "classifier"]
Fact = str | int | float
Facts = dict[str, Fact]
Progress = Callable[[str, float | None], None]
"""Called with what is being done, and the share of it that is done (None: not known)."""
Builder = Callable[[Path, Progress], Facts]
"""Writes a model into an empty directory; returns what is worth knowing about the result."""

# A Hugging Face id: "name" or "owner/name" (huggingface_hub.utils.validate_repo_id, shortened).
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class BuildError(TandemError):
    """A default model cannot be built."""


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """A model that ``tandem models build`` makes from packages of the Python index."""

    name: str
    kind: Kind
    description: str
    recipe: str
    """Version of the recipe; a model that another version built is built again."""
    builder: Builder


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What ``tandem models list`` says of one default model."""

    name: str
    kind: Kind
    description: str
    path: Path
    built: bool
    size_bytes: int
    """Of all files of the model; 0 when it is not built."""
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a builder left behind, read back from ``manifest.json``."""

    name: str
    recipe: str
    build_s: float
    files: dict[str, int]
    """Relative path to size in bytes, the manifest left out."""
    facts: Facts


def _build_smollm2(out: Path, progress: Progress) -> Facts:
    from cluster.models import smollm2

    return smollm2.build(out, progress)


def _build_sentiment(out: Path, progress: Progress) -> Facts:
    from cluster.models import sentiment

    return sentiment.build(out, progress)


CATALOGUE: Mapping[str, DefaultModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            DefaultModel(
                name="smollm2-135m-instruct",
                kind="generator",
                description="SmolLM2-135M-Instruct, a small chat model (Apache-2.0)",
                recipe="2",
                builder=_build_smollm2,
            ),
            DefaultModel(
                name="sentiment-minilm",
                kind="classifier",
                description="MiniLM-L6 fine-tuned to tell negative from positive texts",
                recipe="2",
                builder=_build_sentiment,
            ),
        )
    }
)


def home() -> Path:
    """The cache directory: ``TANDEM_HOME``, or ``~/.cache/tandem``."""
    return Path(os.environ.get("TANDEM_HOME") or "~/.cache/tandem").expanduser().absolute()


def models_dir() -> Path:
    """The directory that holds the built models, one directory each."""
    return home() / "models"


def resolve(model: str, catalogue: Mapping[str, DefaultModel] = CATALOGUE) -> str:
    """What to hand to vLLM or transformers for a ``model`` of the configuration.

    A default model's name gives its directory, an existing directory its absolute path;
    anything else that can be a Hugging Face id comes back unchanged.

    Raises:
        ConfigError: the default model is not built, or there is no such directory.
    """
    if model in catalogue:
        path = models_dir() / model
        if manifest(catalogue[model]) is None:
            raise ConfigError(f"model {model!r} is not built in {path}; run `tandem models build`")
        return str(path)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return str(path.absolute())
    if not _HUB_ID.fullmatch(model) or path.is_file():
        raise ConfigError(
            f"model: {model!r} is not a directory; allowed: a directory, a Hugging Face id, "
            f"or one of {', '.join(catalogue)}"
        )
    return model


def list_models(catalogue: Mapping[str, DefaultModel] = CATALOGUE) -> list[ModelRow]:
    """One row for each default model, in the catalogue's order."""
    return [_row(model) for model in catalogue.values()]


def _row(model: DefaultModel) -> ModelRow:
    found = manifest(model)
    return ModelRow(
        name=model.name,
        kind=model.kind,
        description=model.description,
        path=models_dir() / model.name,
        built=found is not None,
        size_bytes=sum(found.files.values()) if found else 0,
        facts=found.facts if found else {},
    )


def manifest(model: DefaultModel) -> Manifest | None:
    """The manifest of ``model``, or None where its current recipe has not been built whole."""
    directory = models_dir() / model.name
    try:
        found = _parse((directory / MANIFEST).read_text(encoding="utf-8"))
        whole = all((directory / f).stat().st_size == size for f, size in found.files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent, or not ours: to be built
    current = (found.name, found.recipe) == (model.name, model.recipe)
    return found if current and whole else None


def _parse(text: str) -> Manifest:
    raw: dict[str, Any] = json.loads(text)
    return Manifest(
        name=str(raw["name"]),
        recipe=str(raw["recipe"]),
        build_s=float(raw["build_s"]),
        files={str(path): int(size) for path, size in raw["files"].items()},
        facts=dict(raw["facts"]),
    )
