"""Process that ``inprocess`` drives: reads loads and writes their token times, as lines of JSON.

Runs as ``python -m benchmarks.engine.worker MODEL``.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.endpoint import TargetError
from benchmarks.engine.inprocess import RESULT
from benchmarks.engine.measure import COMPLETION_TOKENS
from benchmarks.targets.home import ROOT
from benchmarks.token_times import TokenTimes


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
