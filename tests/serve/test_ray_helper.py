"""Scripts of Ray run in forks of one process."""

import json
import subprocess
import sys
from pathlib import Path


def test_each_script_has_its_name_its_options_and_a_process(tmp_path: Path) -> None:
    scripts = [[str(tmp_path / f"{name}.py"), f"--{name}"] for name in ("first", "second", "own")]
    code = (
        "import os, sys\n"
        "line = ' '.join([__name__, *sys.argv, f'{os.getpid()}'])\n"
        "os.write(1, line.encode() + b'\\n')\n"  # at once, as the processes share the pipe
    )
    for script, _ in scripts:
        Path(script).write_text(code, encoding="utf-8")
    *forked, own = scripts
    command = [sys.executable, "-m", "cluster.launch.ray_helper", json.dumps(forked), *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [line.split() for line in process.stdout]  # until all processes have ended
    assert sorted(line[:3] for line in lines) == sorted(["__main__", *script] for script in scripts)
    pids = {line[1]: int(line[3]) for line in lines}
    assert pids[own[0]] == process.pid
    assert len({*pids.values()}) == len(scripts)
