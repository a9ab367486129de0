import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readmes_tree_is_that_of_the_files() -> None:
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts/tree.py")
    assert spec is not None
    assert spec.loader is not None
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == tree.readme_with_tree(readme), "run: python scripts/tree.py"
