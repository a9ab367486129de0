"""Write the generated files for monitoring: ``python -m dashboards [--check]``.

With ``--check``, write nothing and fail if a file is out of date.
"""

import sys

from dashboards.files import make_files


def main(arguments: list[str]) -> int:
    """Write the files, or with ``--check`` report those that differ; return the exit status."""
    stale = {
        path: text
        for path, text in make_files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path} is out of date; run `python -m dashboards`")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
