#!/usr/bin/env python3
"""Writes README's file tree from the first line of each file's own words: python scripts/tree.py"""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "## Where things are\n"
FOLDERS = {
    "cluster": "everything that is not a Serve deployment",
    "cluster/accounting": "what requests cost: joules, money, by tenant and hour",
    "cluster/admission": "who is let in, and in which order",
    "cluster/autoscaling": "how many replicas",
    "cluster/batching": "which texts are computed together",
    "cluster/cli": "the `tandem` command",
    "cluster/client": "for other Ray jobs",
    "cluster/devices": "GPUs as they are, and which have failed",
    "cluster/engines": "what computes; only here are vllm and torch imported",
    "cluster/engines/encoder": "BERT and its relatives",
    "cluster/engines/encoder/packed": "BERT without padding, on CPUs and on GPUs",
    "cluster/engines/encoder/tasks": "one module for each thing that an encoder does",
    "cluster/engines/sim": "the simulated engine",
    "cluster/gateway": "what the router does with a request, without Ray",
    "cluster/gateway/builtin/pages": "the router's own pages",
    "cluster/launch": "starting and stopping a local cluster",
    "cluster/leaks": "memory that grows while the traffic does not",
    "cluster/link": "one connection for each router and replica",
    "cluster/models": "models on disk: where they are, how they are made and measured",
    "cluster/monitoring": "Prometheus, alerts, Grafana's pages",
    "cluster/routing": "which replica",
    "cluster/simulation": "hours of a pool's traffic in seconds, with the live policies",
    "cluster/tracing": "OpenTelemetry's spans of requests",
    "deployments": "everything that is a Serve deployment",
    "docs": "architecture, configuration, decisions (adr/)",
    "examples": "programs to start from",
    "requirements": "pinned lists with hashes, written by scripts/lock",
    "scripts": "the commands that a person types",
    "scripts/benchmarks": "what ./scripts/bench measures, and against whom",
    "scripts/benchmarks/autoscale": "the autoscaling policy and Ray Serve's own, in simulated time",
    "scripts/benchmarks/classify": "texts a second of the classifier, and of its peers",
    "scripts/benchmarks/engine": "SmolLM2 through the cluster, vLLM's server and Ray Serve's",
    "scripts/benchmarks/handle": "the client against a bare handle of Ray Serve",
    "scripts/benchmarks/memory": "the router's memory",
    "scripts/benchmarks/metrics": "what counting and tracing cost",
    "scripts/benchmarks/overload": "admission with more load than there is capacity",
    "scripts/benchmarks/routing": "decisions timed, and policies on traces",
    "scripts/benchmarks/stream": "streams of the simulated engine",
    "scripts/benchmarks/targets": "the servers that are measured, started and ended",
    "tests": "unit/ (neither Ray nor torch), serve/ (loopback), cluster/ (real Ray, vLLM, models)",
}
TOLD = {"pyproject.toml": "the package, its extras, and the settings of every tool"}
SHOWN = ("cluster/", "deployments/", "scripts/", "examples/", "ray-config.yaml", "pyproject.toml")


def tree() -> str:
    """The tree as Markdown: one line for each tracked file of the project's code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = {Path(name) for name in listed.stdout.split() if (ROOT / name).exists()}
    shown = {file for file in files if str(file).startswith(SHOWN)}
    folders = {Path(name) for name in FOLDERS}
    lines = []
    for path in sorted(shown | folders, key=_order):
        indent = "  " * (len(path.parts) - 1)
        name = f"{path.name}/" if path in folders else path.name
        what = FOLDERS[str(path)] if path in folders else first_words(ROOT / path)
        if what:
            lines.append(f"{indent + name:<34} {what}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def _order(path: Path) -> list[tuple[bool, str]]:
    # Files before folders, each by name.
    parts = [(True, part) for part in path.parts]
    if str(path) not in FOLDERS:
        parts[-1] = (False, path.name)
    return parts


def first_words(file: Path) -> str:
    """The first sentence of a module's docstring, or of a script's or a config's first comment."""
    if file.name in TOLD:
        return TOLD[file.name]
    text = file.read_text(encoding="utf-8")
    if file.name == "__init__.py":
        return ""
    if file.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    else:
        said = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "")
    return said.split(". ")[0].rstrip(".")


def readme_with_tree(readme: str) -> str:
    """README's text with its tree written anew."""
    before, _, after = readme.partition(MARK)
    rest = after.partition("\n## ")
    return f"{before}{MARK}\n{tree()}{rest[1]}{rest[2]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme_with_tree(path.read_text(encoding="utf-8")), encoding="utf-8")
