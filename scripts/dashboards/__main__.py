"""``python -m dashboards``: write every file below ``cluster/monitoring/grafana`` again."""

from pathlib import Path

import cluster.monitoring
from dashboards.files import files

ROOT = Path(cluster.monitoring.__file__).parent / "grafana"

if __name__ == "__main__":
    for path, text in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
