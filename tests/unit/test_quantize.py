"""Quantization without AutoRound: what is refused before it starts, and what is left of a run."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.errors import BuildError, ConfigError
from cluster.models import quantize as quantization
from cluster.models.quantize import QuantizeOptions, packaged_texts, quantize, read_architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "head_dim": 64,
}


def model(directory: Path, **config: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**LLAMA, **config}))
    (directory / "generation_config.json").write_text('{"temperature": 0.2}')
    return directory


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)


def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Replace AutoRound's process by ``code``, which has the ``job`` and the ``out`` directory."""
    (tmp_path / "scripted_quantizer.py").write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "job = json.load(sys.stdin)\nout = Path(job['out'])\n" + textwrap.dedent(code)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(quantization, "WORKER", "scripted_quantizer")


@pytest.mark.parametrize(
    ("scheme", "config", "message"),
    [
        ("int3", {}, "scheme: got 'int3'; allowed: fp8, w4a16, w8a8"),
        ("w8a8", {"quantization_config": {"quant_method": "awq"}}, r"quantized already \(awq\)"),
        ("w8a8", {"architectures": None}, "is a model without architecture"),
        ("w8a8", {"architectures": ["T5ForConditionalGeneration"]}, "only generators"),
        ("w4a16", {"architectures": ["BertForSequenceClassification"]}, "set `dtype: int8`"),
        ("w4a16", {"hidden_size": 80}, "multiples of 32; this model has 80, 1536, 576. Use w8a8"),
    ],
)
def test_unsuitable_models_and_schemes_are_refused(
    tmp_path: Path, scheme: str, config: dict[str, Any], message: str
) -> None:
    source = model(tmp_path / "model", **config)
    with pytest.raises(ConfigError, match=message):
        quantize(source, tmp_path / "out", QuantizeOptions(scheme), ["text"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_output_directory_is_kept(tmp_path: Path) -> None:
    source, out = model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    done = CliRunner().invoke(
        app, ["models", "quantize", str(source), "--scheme", "w8a8", "--out", str(out)]
    )
    assert isinstance(done.exception, ConfigError)
    assert "already exists; choose a new directory" in str(done.exception)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not an object"):
        read_architecture(tmp_path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    source = model(tmp_path / "model")
    with pytest.raises(BuildError, match=r"pip install 'tandem\[compress\]'"):
        quantize(source, tmp_path / "out", QuantizeOptions("w8a8"), ["text"])


@pytest.mark.parametrize(("hidden", "group"), [(512, 128), (576, 64), (96, 32)])
def test_the_largest_group_that_divides_all_layers_is_used(
    tmp_path: Path, hidden: int, group: int
) -> None:
    found = read_architecture(model(tmp_path / "model", hidden_size=hidden, head_dim=128))
    assert found.group_size() == group


def test_the_result_keeps_the_models_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(
        monkeypatch,
        tmp_path,
        """
        nested = out / "model-w4g64"
        nested.mkdir(parents=True)
        config = {"quantization_config": {"quant_method": "compressed-tensors"}, "job": job}
        (nested / "config.json").write_text(json.dumps(config))
        (nested / "generation_config.json").write_text("{}")
        """,
    )
    source, out = model(tmp_path / "model"), tmp_path / "below" / "out"
    quantize(source, out, QuantizeOptions("w4a16", iterations=5), ["one", "two"])
    job = json.loads((out / "config.json").read_text())["job"]
    assert (job["scheme"], job["group_size"], job["iterations"]) == ("w4a16", 64, 5)
    assert job["texts"] == ["one", "two"]
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.2}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ConfigError, match="compressed-tensors"):
        quantize(out, tmp_path / "again", QuantizeOptions("w8a8"), ["text"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('a log line', file=sys.stderr)\nsys.exit('no memory')", "failed: no memory"),
        ("out.mkdir()", "wrote no compressed-tensors model"),
        ("out.mkdir()\n(out / 'config.json').write_text('{}')", "wrote no compressed-tensors"),
    ],
)
def test_a_failed_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    worker(monkeypatch, tmp_path, code)
    place = tmp_path / "place"
    with pytest.raises(BuildError, match=message):
        quantize(model(tmp_path / "model"), place / "out", QuantizeOptions("w8a8"), ["text"])
    assert list(place.iterdir()) == []


def test_held_out_texts_are_not_used_for_calibration() -> None:
    calibration, held_out = packaged_texts("calibration"), packaged_texts("held_out")
    assert len(calibration) >= 16
    assert len(held_out) >= 10
    assert not set(calibration) & set(held_out)
    assert all(text.strip() for text in calibration + held_out)


def test_models_of_two_kinds_are_not_compared(tmp_path: Path) -> None:
    generator = str(model(tmp_path / "a"))
    other = str(model(tmp_path / "b", architectures=["BertForMaskedLM"]))
    done = CliRunner().invoke(app, ["models", "compare", generator, other])
    assert isinstance(done.exception, ConfigError)
    assert f"{generator} is a generator and the other model is not" in str(done.exception)
    args = ["models", "compare", generator, generator, "--dtypes", "float32,int8"]
    done = CliRunner().invoke(app, args)
    assert isinstance(done.exception, ConfigError)
    assert "--dtypes is for classifiers" in str(done.exception)
