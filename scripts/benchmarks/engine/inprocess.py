"""The default cluster's engine in one process, without HTTP: the upper bound of a server.

Runs as ``python -m benchmarks.engine.inprocess MODEL``, which reads loads and writes their token
times, each as one line of JSON.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.endpoint import TargetError
from benchmarks.engine.measure import COMPLETION_TOKENS
from benchmarks.targets.home import ROOT, Home, new_home
from benchmarks.targets.running import format_command
from benchmarks.token_times import TokenTimes

RESULT = "RESULT "
"""Start of each line that is a result; the others are vLLM's output."""
COMMAND = ("-m", "benchmarks.engine.inprocess")


@dataclass(frozen=True, slots=True)
class InProcessSender:
    """Sends prompts to the engine's process."""

    home: Home
    child: subprocess.Popen[str]

    def send(self, prompts: Sequence[str], concurrent: int) -> TokenTimes:
        """Generate for all prompts, ``concurrent`` at a time."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([list(prompts), concurrent]) + "\n")
        self.child.stdin.flush()
        return TokenTimes(**self.read_result())

    def check(self, prompt: str) -> None:
        """Do nothing: the process checks the tokens of every response."""

    def read_result(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(RESULT):
                found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                return found
        return self.home.fail(f"{self.child.args!r} exited with {self.child.wait()}.")


@contextlib.contextmanager
def start_engine(model: str) -> Iterator[tuple[InProcessSender, float, str]]:
    """Yield a sender, the seconds from the start to the first token, and the command line."""
    with new_home("engine") as home, home.log.open("w") as log:
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *COMMAND, model],
            env=home.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with child:
            try:
                sender = InProcessSender(home, child)
                sender.read_result()
                yield (
                    sender,
                    time.monotonic() - began,
                    format_command((sys.executable, *COMMAND, model), {}),
                )
            finally:
                child.kill()


async def _main(model: str) -> None:
    from cluster.config.file import load
    from cluster.engines.vllm.launcher import LlmLauncher

    config = load(ROOT / "ray-config.yaml").config.generators[0]
    launcher = LlmLauncher(config, model, {}, None)
    llm = (await launcher.start(list)).llm
    try:
        _write_result(asdict(await _generate_all(llm, ["Hello"], 1)))
        while line := await asyncio.to_thread(sys.stdin.readline):
            prompts, concurrent = json.loads(line)
            _write_result(asdict(await _generate_all(llm, prompts, concurrent)))
    finally:
        await launcher.stop()


def _write_result(result: dict[str, Any]) -> None:
    print(f"{RESULT}{json.dumps(result)}", flush=True)


async def _generate_all(llm: Any, prompts: list[str], concurrent: int) -> TokenTimes:
    times = TokenTimes()
    waiting = iter(prompts)
    began, cpu_s = time.perf_counter(), time.process_time()

    async def generate_in_turn() -> None:
        for prompt in waiting:
            await _generate(llm, prompt, times)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(generate_in_turn())
    times.wall_s = time.perf_counter() - began
    times.client_cpu_s = time.process_time() - cpu_s
    return times


async def _generate(llm: Any, prompt: str, times: TokenTimes) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=COMPLETION_TOKENS,
        ignore_eos=True,
        temperature=0,
        output_kind=RequestOutputKind.DELTA,
    )
    last_s, num_tokens = time.perf_counter(), 0
    async for output in llm.generate(prompt, params, f"bench-{id(params)}-{last_s}"):
        now_s = time.perf_counter()
        (times.itl_s if num_tokens else times.ttft_s).append(now_s - last_s)
        last_s = now_s
        num_tokens += len(output.outputs[0].token_ids)
    if num_tokens != COMPLETION_TOKENS:
        raise TargetError(f"Generated {num_tokens} tokens, not {COMPLETION_TOKENS}.")
    times.num_tokens += num_tokens


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
