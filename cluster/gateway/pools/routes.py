"""Route templates of a pool's engines."""

from collections.abc import Iterable

OTHER = "other"
"""Metric label of all paths that no engine serves; clients cannot create further series."""


class RouteTable:
    """Route templates such as ``/v1/responses/{response_id}``; most have no parameter."""

    def __init__(self, routes: Iterable[str] = ()) -> None:
        routes = tuple(dict.fromkeys(routes))
        self._exact = frozenset(route for route in routes if "{" not in route)
        self._templates = tuple(route for route in routes if "{" in route)

    def __bool__(self) -> bool:
        return bool(self._exact or self._templates)

    def find(self, path: str) -> str | None:
        """Return the route that matches a path, or None."""
        if path in self._exact:
            return path
        return next((t for t in self._templates if _matches(t, path)), None)


def _matches(template: str, path: str) -> bool:
    expected, actual = template.split("/"), path.split("/")
    if "{" in expected[-1] and ":path}" in expected[-1]:  # matches the rest, slashes included
        actual = [*actual[: len(expected) - 1], "/".join(actual[len(expected) - 1 :])]
    return len(expected) == len(actual) and all(
        part.startswith("{") or part == piece for part, piece in zip(expected, actual, strict=True)
    )
