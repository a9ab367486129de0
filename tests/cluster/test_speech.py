"""Whisper on vLLM in a real cluster, with speech from ``espeak-ng``."""

import json
import os
import re
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from tests.cluster.conftest import (
    ROOT,
    RunningCluster,
    router_config,
    serve_config,
    wait_until,
)

SENTENCES = (
    "The weather was warm this morning, so we walked along the river to the old market.",
    "Please send the report to the office before Friday, and call me if anything is missing.",
    "A cluster of small computers can answer many questions at the same time.",
    "The train to the city leaves at nine and arrives shortly before noon.",
)
RATE = 16_000
LIMIT_S, LIMIT_BYTES = 320.0, 14 * 1024**2
PATH = "/v1/audio/transcriptions"
PAGE = (ROOT / "docs" / "how-to" / "speech.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
MAX_ERROR_RATE = 0.4
"""Word error rate that a working model stays below; tiny.en makes errors on a synthetic voice."""

pytestmark = pytest.mark.timeout(900)
Say = Callable[[str], Path]


def config() -> dict[str, Any]:
    """Return a configuration with a speech model alone."""
    whisper = {
        "name": "whisper",
        "model": "whisper-tiny.en",
        "kv_cache_memory_bytes": "256MiB",
        "resources": {"cpus": 0.5},
        "audio": {"max_duration_s": LIMIT_S, "max_file_bytes": LIMIT_BYTES},
    }
    return serve_config(generators=[whisper], router=router_config(1))


@pytest.fixture(scope="module")
def say(tmp_path_factory: pytest.TempPathFactory) -> Say:
    """Return a function that speaks a text into a WAV file."""
    directory = tmp_path_factory.mktemp("speech")

    def speak(text: str) -> Path:
        file = directory / f"{len(list(directory.iterdir()))}.wav"
        command = ["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(file), text]
        subprocess.run(command, check=True, timeout=60)
        return file

    return speak


@pytest.fixture(scope="module")
def speech(say: Say) -> Path:
    return say(SENTENCES[0])


@pytest.fixture(scope="module")
def http(sim_cluster: RunningCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sim_cluster.http_url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def client(sim_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{sim_cluster.http_url}/v1", api_key="none", max_retries=0, timeout=300
    ) as openai_client:
        yield openai_client


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def error_rate(said: str, heard: str) -> float:
    """Return the word error rate: the edit distance in words by the number of words."""
    reference, found = words(said), words(heard)
    distances = list(range(len(found) + 1))
    for row, expected in enumerate(reference, 1):
        diagonal, distances[0] = distances[0], row
        for column, word in enumerate(found, 1):
            cost = diagonal + (word != expected)
            diagonal = distances[column]
            distances[column] = min(cost, diagonal + 1, distances[column - 1] + 1)
    return distances[-1] / len(reference)


def wav(path: Path, samples: NDArray[Any], rate: int = RATE) -> Path:
    """Write samples, [frames] or [frames, channels], from -1 to 1."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def read_wav(path: Path) -> tuple[NDArray[Any], int]:
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        return samples, file.getframerate()


def transcribe(http: httpx.Client, content: bytes, **fields: str) -> httpx.Response:
    return http.post(PATH, data=fields, files={"file": ("speech.wav", content, "audio/wav")})


def test_speech_is_recognized(client: openai.OpenAI, say: Say) -> None:
    heard = []
    for sentence in SENTENCES:
        found = client.audio.transcriptions.create(model="whisper", file=say(sentence)).text
        print(f"{error_rate(sentence, found):.2f}: {found}")
        heard.append(found)
    rate = error_rate(" ".join(SENTENCES), " ".join(heard))
    print(f"word error rate of {len(SENTENCES)} sentences: {rate:.3f}")
    assert rate < MAX_ERROR_RATE


def test_every_format(client: openai.OpenAI, http: httpx.Client, speech: Path) -> None:
    create = client.audio.transcriptions.create
    text = create(model="whisper", file=speech).text
    assert create(model="whisper", file=speech, response_format="text") == f"{text}\n"
    verbose = create(model="whisper", file=speech, response_format="verbose_json", language="en")
    assert verbose.language == "en"
    assert verbose.segments
    assert 0 < verbose.segments[-1].end <= float(verbose.duration)
    srt = str(create(model="whisper", file=speech, response_format="srt"))
    assert srt.startswith("1\n00:00:00,")
    vtt = str(create(model="whisper", file=speech, response_format="vtt"))
    assert vtt.startswith("WEBVTT\n\n00:00:00.")
    for subtitles in (srt, vtt):
        assert error_rate(SENTENCES[0], re.sub(r"[^\n]*-->[^\n]*|WEBVTT", "", subtitles)) < 0.5
    with speech.open("rb") as file:  # OpenAI's client deprecates translations
        translated = http.post("/v1/audio/translations", files={"file": file})
    assert translated.json()["text"] == text


def test_streams_have_the_events_of_openai(client: openai.OpenAI, speech: Path) -> None:
    text = client.audio.transcriptions.create(model="whisper", file=speech).text
    with client.audio.transcriptions.create(model="whisper", file=speech, stream=True) as stream:
        events = list(stream)
    assert "".join(each.delta for each in events[:-1] if hasattr(each, "delta")).strip() == text
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == text


def test_a_long_stereo_recording(http: httpx.Client, say: Say, tmp_path: Path) -> None:
    samples, rate = read_wav(say(" ".join(SENTENCES)))
    pause = np.zeros(rate)
    times = round(300 / ((len(samples) + rate) / rate))
    mono = np.concatenate([np.concatenate([samples, pause])] * times)
    mono = mono[: len(mono) // 2 * 2].reshape(-1, 2).mean(axis=1)  # half of the rate is enough
    stereo = np.stack([mono, mono * 0.5], axis=1)
    file = wav(tmp_path / "long.wav", stereo, rate // 2)
    answer = transcribe(http, file.read_bytes(), response_format="verbose_json")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    errors = error_rate(" ".join(SENTENCES * times), found["text"])
    print(f"word error rate of {found['duration']:.0f} s: {errors:.3f}")
    assert errors < MAX_ERROR_RATE
    assert found["duration"] == pytest.approx(300, abs=20)
    starts = [segment["start"] for segment in found["segments"]]
    assert starts == sorted(starts)
    assert 250 < found["segments"][-1]["end"] <= found["duration"]


def test_usage_includes_the_audio(http: httpx.Client, speech: Path) -> None:
    def counted() -> float:
        text = http.get("/metrics").text
        found = re.search(
            r'^tandem_prompt_tokens_total{model="whisper"} (\S+)$', text, re.MULTILINE
        )
        return float(found.group(1)) if found else 0.0

    samples, rate = read_wav(speech)
    before = counted()
    assert transcribe(http, speech.read_bytes()).status_code == 200
    tokens = 100 * len(samples) / rate  # one per 10 ms
    wait_until(lambda: counted() >= before + tokens, 60, "counting the tokens")


def test_silence_and_noise(http: httpx.Client, tmp_path: Path) -> None:
    silence = wav(tmp_path / "silence.wav", np.zeros(RATE * 3)).read_bytes()
    assert transcribe(http, silence).json()["text"] == ""
    assert transcribe(http, silence, response_format="srt").text == ""
    assert "transcript.text.done" in transcribe(http, silence, stream="true").text
    generator = np.random.default_rng(0)
    noise = wav(tmp_path / "noise.wav", generator.normal(0, 0.1, RATE * 3).clip(-1, 1))
    heard = transcribe(http, noise.read_bytes())
    print(f"in noise: {heard.text}")
    assert heard.status_code == 200


def test_what_cannot_be_transcribed_is_refused(
    http: httpx.Client, speech: Path, tmp_path: Path
) -> None:
    good = speech.read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n"
    too_long = wav(tmp_path / "long.wav", np.zeros(int(8000 * (LIMIT_S + 5))), 8000).read_bytes()
    cases: list[tuple[int, bytes, dict[str, str]]] = [
        (400, b"", {}),
        (400, b"not audio " * 100, {}),
        (400, good[:40], {}),
        (400, playlist, {}),
        (400, good, {"language": "de"}),
        (400, good, {"response_format": "docx"}),
        (400, good, {"response_format": "srt", "stream": "true"}),
        (400, good, {"response_format": "verbose_json", "timestamp_granularities[]": "word"}),
        (400, good, {"temperature": "nan"}),
        (404, good, {"model": "other"}),
        (413, too_long, {}),
        (413, bytes(LIMIT_BYTES + 1), {}),
    ]
    for status, content, fields in cases:
        answer = transcribe(http, content, **fields)
        assert answer.status_code == status, (fields, content[:20], answer.text)
        assert answer.json()["error"]["message"]
    for form in ({"data": {"model": "whisper", "file": "text"}}, {"json": {"model": "whisper"}}):
        assert http.post(PATH, **form).status_code in (400, 422)  # type: ignore[arg-type]
    models = {"model": ["whisper", "whisper"]}
    answer = http.post(PATH, data=models, files={"file": good})
    assert "several fields" in answer.json()["error"]["message"]
    # The prompt is text: these tokens would end it.
    tokens = "<|endoftext|><|startoftranscript|> " * 200
    assert transcribe(http, good, prompt=tokens).json()["text"]


def test_the_blocks_of_the_page_run(
    sim_cluster: RunningCluster, speech: Path, tmp_path: Path
) -> None:
    (tmp_path / "speech.wav").write_bytes(speech.read_bytes())
    path = os.pathsep.join([str(Path(sys.executable).parent), sim_cluster.env["PATH"]])
    env = {
        **sim_cluster.env,
        "PATH": path,
        "RAY_ADDRESS": sim_cluster.ray_address,
        "PYTHONPATH": str(ROOT),
    }
    assert len(BLOCKS) == 5
    for kind, code in BLOCKS:
        code = code.replace("http://127.0.0.1:8000", sim_cluster.http_url)
        code = code.replace("curl -s", "curl --fail-with-body -sS")
        shell = ["bash", "-euo", "pipefail", "-c", code]
        command = [sys.executable, "-c", code] if kind == "python" else shell
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "market" in done.stdout or "river" in done.stdout, done.stdout


def test_the_command_writes_every_format(sim_cluster: RunningCluster, speech: Path) -> None:
    done = sim_cluster.tandem("transcribe", str(speech), "--format", "json", timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"]
    missing = sim_cluster.tandem("transcribe", "/no/such.wav")
    assert missing.returncode == 1
    assert "No such file" in missing.stderr
