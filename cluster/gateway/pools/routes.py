"""The paths that a pool's engines serve, and which of them a request's path is."""

from collections.abc import Iterable

OTHER = "other"
"""Stands for every path that no engine serves, so that clients cannot make new labels."""


class RouteTable:
    """Route templates such as ``/v1/responses/{response_id}``; most have no parameter."""

    def __init__(self, routes: Iterable[str] = ()) -> None:
        routes = tuple(dict.fromkeys(routes))
        self._exact = frozenset(route for route in routes if "{" not in route)
        self._templates = tuple(route for route in routes if "{" in route)

    def __bool__(self) -> bool:
        return bool(self._exact or self._templates)

    def find(self, path: str) -> str | None:
        """The route that a path fits; None where none does."""
        if path in self._exact:
            return path
        return next((t for t in self._templates if _matches(t, path)), None)


def _matches(template: str, path: str) -> bool:
    wanted, given = template.split("/"), path.split("/")
    if "{" in wanted[-1] and ":path}" in wanted[-1]:
        given = [*given[: len(wanted) - 1], "/".join(given[len(wanted) - 1 :])]
    return len(wanted) == len(given) and all(
        part.startswith("{") or part == piece for part, piece in zip(wanted, given, strict=True)
    )
