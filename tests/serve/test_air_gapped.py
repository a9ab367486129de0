"""Installation from a directory of wheels, with the variables of how-to/air-gapped.md."""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.running import ROOT

PAGE = (ROOT / "docs" / "how-to" / "air-gapped.md").read_text("utf-8")


def test_the_page_downloads_every_list_that_up_installs() -> None:
    installed = re.findall(r"-r (requirements/\S+\.txt)", (ROOT / "scripts" / "lib.sh").read_text())
    assert {name for name in installed if name not in PAGE} == {"requirements/clients.txt"}


def test_uv_installs_from_the_directory_alone(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tandem_offline_probe-1-py3-none-any.whl"
    info = "tandem_offline_probe-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("probe.py", "")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tandem-offline-probe\nVersion: 1\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    listed = f"tandem-offline-probe==1 --hash=sha256:{digest}\n"
    (tmp_path / "list.txt").write_text(listed)
    exports = " ".join(re.findall(r"^export (.+)$", PAGE, re.MULTILINE))
    variables = dict(pair.split("=", 1) for pair in exports.replace("$PWD", str(tmp_path)).split())
    assert {"UV_OFFLINE", "UV_FIND_LINKS", "PIP_NO_INDEX", "PIP_FIND_LINKS"} == variables.keys()
    uv = Path(sys.executable).with_name("uv")
    options = ["--no-deps", "--require-hashes", "-r", tmp_path / "list.txt"]
    done = subprocess.run(
        [uv, "pip", "install", "--python", sys.executable, "--target", tmp_path / "out", *options],
        env={**os.environ, **variables, "UV_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "probe.py").exists()
