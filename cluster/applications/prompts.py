"""Prompts from template files. Values are inserted once, so no value is read as a template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from cluster.errors import ConfigError

BUILTIN = Path(__file__).parent / "templates"
PLACEHOLDERS: Mapping[str, frozenset[str]] = {
    "answer": frozenset({"question", "passages", "sentinel"}),
    "aspects": frozenset({"text", "aspects"}),
    "classify": frozenset({"text", "labels"}),
    "extract": frozenset({"text", "instructions"}),
    "summarize": frozenset({"text", "length", "style", "language"}),
    "summarize-merge": frozenset({"text", "length", "style", "language"}),
    "translate": frozenset(
        {"text", "source", "target", "glossary", "formality", "format", "context"}
    ),
}
"""Names of the templates, and what each may refer to as `$name`."""

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Template of a conversation: a system message and a user message."""

    system: Template
    user: Template

    def messages(
        self, values: Mapping[str, str], examples: Sequence[tuple[Mapping[str, str], str]] = ()
    ) -> list[Message]:
        """Return the conversation for some values.

        Args:
            values: Values by placeholder. Nothing in them is expanded.
            examples: Values that differ in each earlier turn, and the answer of that turn.
        """
        system = self.system.substitute(values).strip()
        messages = [{"role": "system", "content": system}] if system else []
        for changes, answer in examples:
            turn = self.user.substitute({**values, **changes}).strip()
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.user.substitute(values).strip()}]


def load_prompts(directory: str | None) -> dict[str, Prompt]:
    """Return all prompts by name; files in ``directory`` replace the built-in ones.

    Raises:
        ConfigError: A file cannot be read, has an unknown name, or refers to unknown values.
    """
    files = {name: BUILTIN / f"{name}.yaml" for name in PLACEHOLDERS}
    if directory is not None:
        own = Path(directory)
        if not own.is_dir():
            raise ConfigError(f"applications.templates: {directory} is not a directory")
        for file in sorted(own.glob("*.yaml")):
            if file.stem not in PLACEHOLDERS:
                raise ConfigError(
                    f"{file}: no such template; allowed: {', '.join(sorted(PLACEHOLDERS))}"
                )
            files[file.stem] = file
    return {name: _load(file, PLACEHOLDERS[name]) for name, file in files.items()}


def _load(file: Path, allowed: frozenset[str]) -> Prompt:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("user"), str):
        raise ConfigError(f"{file}: expected a mapping with `user`, and optionally `system`")
    if unknown := sorted(content.keys() - {"system", "user"}):
        raise ConfigError(f"{file}: unknown {', '.join(map(str, unknown))}; allowed: system, user")
    texts = str(content.get("system") or ""), content["user"]
    for text in texts:
        template = Template(text)
        if not template.is_valid():
            raise ConfigError(f"{file}: `$` must start a name such as $text; write $$ for a dollar")
        if unknown := sorted(set(template.get_identifiers()) - allowed):
            names = ", ".join(f"${name}" for name in sorted(allowed))
            raise ConfigError(f"{file}: unknown ${unknown[0]}; allowed: {names}")
    return Prompt(Template(texts[0]), Template(texts[1]))
