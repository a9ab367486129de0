"""Parsing of YAML, with one-line errors and without duplicate keys."""

from typing import Any

import yaml

from cluster.errors import ConfigError

# Written in C, four times faster; absent if PyYAML was built without libyaml.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE_TAG = "tag:yaml.org,2002:merge"


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of a YAML (or JSON) text.

    Raises:
        ConfigError: it is not valid YAML, or a mapping has a key twice, of which YAML's loaders
            silently keep the last; one line with ``where`` and the line in the text.
    """
    try:
        loader = _LOADER(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_keys(root, where)
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None


def _check_keys(root: yaml.Node, where: str) -> None:
    remaining: list[yaml.Node] = [root]
    visited: set[int] = set()
    while remaining:
        node = remaining.pop()
        if id(node) in visited:  # an alias of an anchor
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            remaining += node.value
        elif isinstance(node, yaml.MappingNode):
            _check_mapping(node, where)
            remaining += [value for _, value in node.value]


def _check_mapping(node: yaml.MappingNode, where: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
            continue
        line = key.start_mark.line + 1
        if first := lines.get((key.tag, key.value)):
            raise ConfigError(
                f"{where}, line {line}: duplicate key {key.value!r}; it is also in line {first}"
            )
        lines[key.tag, key.value] = line
