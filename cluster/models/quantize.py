"""Quantization of a generator to compressed-tensors, which vLLM's CPU and GPU kernels load.

AutoRound (arXiv:2309.05516) does the work in another process
(``cluster.models.quantize_worker``), because it changes global state of PyTorch. Loads no torch.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.errors import BuildError, ConfigError

SCHEMES = ("fp8", "w4a16", "w8a8")
"""Schemes of ``quantize_worker``, which this process does not import."""
GROUP_SIZES = (128, 64, 32)
"""Input channels of w4a16 that share a scale; the largest that divides all layers is used."""
LIBRARY = "auto-round"
WORKER = "cluster.models.quantize_worker"
SEQUENCE_TOKENS = 128
"""Length of the calibration sequences into which the texts are cut."""
_GENERATOR = "ForCausalLM"
_COPIED = ("generation_config.json", "chat_template.jinja", "tokenizer_config.json")
"""Files that AutoRound leaves out or rewrites."""
_TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of a quantization."""

    scheme: str
    iterations: int = 0
    """Steps of learned rounding per layer (w4a16); 0 rounds to the nearest value, weighted by the
    activations of the texts."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Part of a model's ``config.json``."""

    name: str
    """Class in transformers, such as ``LlamaForCausalLM``."""
    input_sizes: tuple[int, ...]
    """Input channels of its linear layers, as far as the configuration names them."""

    @property
    def is_generator(self) -> bool:
        return self.name.endswith(_GENERATOR)

    def group_size(self) -> int:
        """Return the group size of w4a16.

        Raises:
            ConfigError: no supported size divides the model's layers.
        """
        for size in GROUP_SIZES:
            if all(inputs % size == 0 for inputs in self.input_sizes):
                return size
        sizes = ", ".join(map(str, self.input_sizes))
        raise ConfigError(
            f"w4a16 needs layers whose inputs are multiples of {GROUP_SIZES[-1]}; "
            f"this model has {sizes}. Use w8a8."
        )


def packaged_texts(name: str) -> list[str]:
    """Return the texts ``calibration`` or ``held_out`` that Tandem brings."""
    return (_TEXTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def read_architecture(directory: Path) -> Architecture:
    """Read the architecture of a model that is not quantized.

    Raises:
        ConfigError: there is no model in the directory, or it is quantized.
    """
    config = _read_config(directory)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise ConfigError(f"{directory} is quantized already ({method}); use the original model")
    heads = config.get("num_attention_heads", 0) * config.get("head_dim", 0)
    sizes = config.get("hidden_size"), config.get("intermediate_size"), heads
    return Architecture(_architecture_name(config), tuple(size for size in sizes if size))


def architecture_name(directory: Path) -> str:
    """Return the class of a model in transformers, such as ``LlamaForCausalLM``.

    Raises:
        ConfigError: there is no model in the directory.
    """
    return _architecture_name(_read_config(directory))


def is_generator(directory: Path) -> bool:
    """Return True if the directory has a text generator.

    Raises:
        ConfigError: there is no model in the directory.
    """
    return architecture_name(directory).endswith(_GENERATOR)


def check_quantizable(directory: Path, out: Path, scheme: str) -> Architecture:
    """Return the architecture of a generator that can be quantized.

    Raises:
        ConfigError: the scheme or the model does not suit, or ``out`` exists.
        BuildError: AutoRound is not installed.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme: got {scheme!r}; allowed: {', '.join(SCHEMES)}")
    if out.exists():
        raise ConfigError(f"{out} already exists; choose a new directory with --out")
    found = read_architecture(directory)
    if not found.is_generator:
        raise ConfigError(
            f"{directory} is a {found.name}; only generators (*{_GENERATOR}) are quantized to "
            "files. Encoders are quantized when they are loaded: set `dtype: int8` of the "
            "classifier (w8a8; there is no w4a16 or fp8), and measure it with `tandem models "
            f"compare {directory} {directory} --dtypes float32,int8`."
        )
    if scheme == "w4a16":
        found.group_size()
    if find_spec("auto_round") is None:
        raise BuildError(f"{LIBRARY} is not installed; run `pip install 'tandem[compress]'`")
    return found


def quantize(directory: Path, out: Path, options: QuantizeOptions, texts: Sequence[str]) -> None:
    """Quantize a generator; ``out`` is complete or does not exist.

    Raises:
        ConfigError: see ``check_quantizable``.
        BuildError: AutoRound is not installed, or fails.
    """
    found = check_quantizable(directory, out, options.scheme)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    job = {
        **asdict(options),
        "model": str(directory),
        "out": str(scratch / "new"),
        "group_size": found.group_size() if options.scheme == "w4a16" else None,
        "sequence_tokens": SEQUENCE_TOKENS,
        "texts": list(texts),
    }
    try:
        _run_worker(job)
        fresh = _complete(directory, scratch / "new")
        fresh.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def weights_bytes(directory: Path) -> int:
    """Return the size of a model's weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory} has no readable config.json: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{directory}/config.json is not an object")
    return config


def _architecture_name(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "model without architecture"


def _run_worker(job: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", WORKER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise BuildError(f"{LIBRARY} failed: {lines[-1] if lines else done.returncode}")


def _complete(source: Path, made: Path) -> Path:
    """Return the directory with the files in it that AutoRound wrote, or the files it left out.

    Raises:
        BuildError: AutoRound wrote something else than a compressed-tensors model, perhaps in a
            directory below.
    """
    configs = [path.parent for path in made.rglob("config.json")]
    fresh = configs[0] if len(configs) == 1 else made
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8")) if configs else {}
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        raise BuildError(f"{LIBRARY} wrote no compressed-tensors model")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, fresh / name)
    fresh.chmod(0o755)
    for file in fresh.iterdir():
        file.chmod(0o644)  # of safetensors: readable for its owner only
    return fresh
