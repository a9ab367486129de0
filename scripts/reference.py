"""Reference pages generated from code, as hooks of MkDocs (see ``mkdocs.yml``).

A page says ``<!-- generated: NAME -->`` where the text of ``GENERATORS[NAME]`` goes. Links that
leave ``docs/`` become plain text: they work on GitHub and have no page on the site.
"""

import ast
import inspect
import itertools
import posixpath
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

import cluster.client
from cluster.cli.app import app
from cluster.config import TandemConfig
from cluster.metrics import Metric, table
from cluster.monitoring.foreign import RAY, VLLM

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_TYPE_NAMES = {
    Any: "any value",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    ByteSize: "bytes",
}
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]*)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the markers of a page and unlink files outside ``docs/``."""
    folder = posixpath.dirname(page.file.src_uri)

    def unlink(link: re.Match[str]) -> str:
        leaves = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if leaves else link[0]

    return MARKER.sub(lambda marker: GENERATORS[marker[1]](), _LINK.sub(unlink, markdown))


# -- metrics ---------------------------------------------------------------------------------------


def tandem_metrics() -> str:
    """Return the table of Tandem's metrics."""
    return _table(
        ("metric", "kind", "labels", "meaning"),
        (
            (
                f"`{one.name}`",
                one.kind,
                _codes(one.labels),
                f"{one.help}{_buckets(one)}{_former_name(one)}",
            )
            for one in table.all_metrics()
        ),
    )


def foreign_metrics(metrics: Mapping[str, str]) -> str:
    """Return the table of metrics that Ray or vLLM exports."""
    return _table(("metric", "meaning"), ((f"`{name}`", text) for name, text in metrics.items()))


def _buckets(metric: Metric) -> str:
    if not metric.buckets:
        return ""
    return f" {len(metric.buckets)} buckets from {metric.buckets[0]:g} to {metric.buckets[-1]:g}."


def _former_name(metric: Metric) -> str:
    return f" Formerly `{metric.deprecated_name}`." if metric.deprecated_name else ""


# -- configuration ---------------------------------------------------------------------------------


def configuration() -> str:
    """Return a section with a table of fields for each section of the configuration."""
    return "\n".join(_section("args", TandemConfig, None, {}))


def _section(
    path: str, model: type[BaseModel], preset: BaseModel | None, anchors: dict[str, str]
) -> Iterator[str]:
    """Yield one section and those below it.

    ``preset`` has the defaults that the parent sets. ``anchors`` has the sections that exist; one
    that would be equal is linked instead of repeated.
    """
    described = attribute_docs(model)
    rows, nested = [], []
    for name, field in model.model_fields.items():
        section = next(models_in(field.annotation), None)
        description = field.description or described.get(name, "")
        if name in getattr(model, "restart_fields", ()):
            description += " A change replaces replicas."
        value = getattr(preset, name) if preset else field.get_default(call_default_factory=True)
        kind = _type(field)
        if section is not None:
            child = f"{path}.{name}".removeprefix("args.")
            preset_below = value if isinstance(value, BaseModel) else None
            key = f"{section.__name__} {preset_below!r}"
            if key not in anchors:
                nested.append((child, section, preset_below))
            kind = f"[{kind}](#{anchors.setdefault(key, _anchor(child))})"
        default = "required" if field.is_required() else _yaml(value)
        rows.append((f"`{name}`", kind, default, description))
    yield f"## `{path}` {{ #{_anchor(path)} }}\n"
    yield f"{_prose(inspect.getdoc(model))}\n"
    yield _table(("field", "type", "default", "description"), rows)
    for below in nested:
        yield from _section(*below, anchors)


def _anchor(path: str) -> str:
    return path.replace(".", "-").replace("_", "-")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a field holds, itself or in a list."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    if next(models_in(annotation), None):
        return "list of sections" if typing.get_origin(annotation) is tuple else "section"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    return f"{_type_name(annotation)}{_bounds(field)}"


def _type_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return f"{_type_name(arguments[0])} or `null`"
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"map of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> str:
    symbols = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    is_size = ByteSize in (field.annotation, *typing.get_args(field.annotation))
    found = []
    for one in field.metadata:
        for bound, symbol in symbols.items():
            value = getattr(one, bound, None)
            if value:
                found.append(f"{symbol} {_yaml(ByteSize(value)) if is_size else value}")
            elif value == 0 and not is_size:
                found.append(f"{symbol} 0")
    return f", {', '.join(found)}" if found else ""


def _yaml(value: Any) -> str:
    """Return a value as code in YAML; an empty text for sections and empty collections."""
    if isinstance(value, BaseModel) or value in ({}, ()):
        return ""
    if isinstance(value, ByteSize) and value:
        return f"`{value.human_readable(separator='').replace('.0', '')}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(one) for one in value)}]`"
    if isinstance(value, float):
        return f"`{value:.10g}`"
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )


# -- command line ----------------------------------------------------------------------------------


def cli() -> str:
    """Return one section for each command of ``tandem``."""
    return "\n".join(_command("tandem", typer.main.get_command(app)))


def _command(path: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from _command(f"{path} {name}", child)
        return
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([path, *(_argument(one) for one in arguments)])
    yield f"## {path}\n\n```text\n{usage}{' [OPTIONS]' if options else ''}\n```\n"
    yield f"{_prose(command.help)}\n"
    rows = [(f"`{_argument(one)}`", getattr(one, "help", "") or "", "") for one in arguments]
    for one in options:
        names = [f"{name} {one.metavar}" if one.metavar else name for name in one.opts]
        rows.append((_codes(names), one.help or "", _option_default(one)))
    if rows:
        yield _table(("option", "description", "default"), rows)


def _argument(one: Any) -> str:
    return one.metavar or (one.name.upper() if one.required else f"[{one.name.upper()}]")


def _option_default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag or option.default is None:
        return ""
    return f"`{option.default}`"


# -- client ----------------------------------------------------------------------------------------


def client() -> str:
    """Return the methods of ``Tandem`` and the fields of its results."""
    parts = [f"## Tandem\n\n{_prose(inspect.getdoc(cluster.client.Tandem))}\n"]
    methods = _methods(cluster.client.Tandem)
    for name, method in methods.items():
        if f"a{name}" in methods:
            text = f"{_prose(ast.get_docstring(method))}\n\nAsync form: `a{name}`."
        elif name[0] == "a" and name[1:] in methods:
            continue
        else:
            text = _prose(ast.get_docstring(method))
        signature = _signature(method)
        parts.append(f"### {name}\n\n```python\n{signature}\n```\n\n{text}\n")
    parts.append("## Results\n")
    for name in sorted(set(cluster.client.__all__) - {"Tandem"}):
        result_type = getattr(cluster.client, name)
        docs = attribute_docs(result_type)
        fields = [
            (
                f"`{node.target.id}`",
                f"`{ast.unparse(node.annotation)}`",
                docs.get(node.target.id, ""),
            )
            for node in _class_body(result_type)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
        parts.append(f"### {name}\n\n{_prose(inspect.getdoc(result_type))}\n")
        parts.append(_table(("field", "type", "description"), fields))
    return "\n".join(parts)


def _methods(owner: type) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    # The last definition of a name is the implementation; those before it are overloads.
    return {
        node.name: node
        for node in _class_body(owner)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_"
    }


def _signature(method: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a method's signature, with one parameter per line if it does not fit in one line."""
    parameters = ast.unparse(method.args).removeprefix("self").removeprefix(", ")
    parameters = parameters.replace("=", " = ").replace("wire.", "")
    result = f" -> {ast.unparse(method.returns)}" if method.returns else ""
    line = f"{method.name}({parameters}){result}"
    if len(line) <= 72:
        return line
    lines = re.sub(r", (?=[*\w]+(?::|,|$))", ",\n    ", parameters)
    return f"{method.name}(\n    {lines},\n){result}"


# -- helpers ---------------------------------------------------------------------------------------


def _class_body(owner: type) -> list[ast.stmt]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def attribute_docs(owner: type) -> dict[str, str]:
    """Return the docstring below each annotated attribute of a class, those of its bases too."""
    found = {}
    for one in reversed([one for one in owner.__mro__ if one.__module__.startswith("cluster.")]):
        body = _class_body(one)
        for attribute, below in itertools.pairwise(body):
            if (
                isinstance(attribute, ast.AnnAssign)
                and isinstance(attribute.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[attribute.target.id] = " ".join(str(below.value.value).split())
    return found


def _prose(docstring: str | None) -> str:
    text = (docstring or "").replace("``", "`").strip()
    # Google's sections become lists.
    text = re.sub(r"^(Args|Raises):$", r"\1:\n", text, flags=re.MULTILINE)
    return re.sub(r"^ {4}(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)


def _codes(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    # Python-Markdown takes a pipe inside a code span as text, backslash included.
    parts = re.split("(`[^`]*`)", text.replace("``", "`").replace("\n", " "))
    return "".join(part if part[:1] == "`" else part.replace("|", "\\|") for part in parts)


GENERATORS = {
    "metrics": tandem_metrics,
    "ray_metrics": lambda: foreign_metrics(RAY),
    "vllm_metrics": lambda: foreign_metrics(VLLM),
    "configuration": configuration,
    "cli": cli,
    "client": client,
}
