"""The client in a second driver process with a different namespace."""

import json
import subprocess
import sys

from tests.cluster.conftest import ALIASES, CLASSIFIER_ALIASES, ROOT, RunningCluster

DRIVER = """
import asyncio, json, sys
import ray
ray.init(address=sys.argv[1], namespace="someone-else", logging_level="ERROR")
from cluster.client import Tandem
from cluster.errors import InvalidRequestError, NotFoundError, UnavailableError

tandem = Tandem()
out = {}
out["models"] = sorted(tandem.models())
ask = dict(temperature=0, max_tokens=16)
out["chat"] = tandem.chat("What is the capital of France?", **ask).text
out["chats"] = [c.text for c in tandem.chats(["What is the capital of France?"] * 3, **ask)]
out["generate"] = tandem.generate("Once upon a time", max_tokens=4).usage.completion_tokens
out["generates"] = len(tandem.generate(["a", "b", "c"], max_tokens=2))
deltas = list(tandem.stream("What is the capital of France?", **ask))
out["stream"] = "".join(d.text for d in deltas)
out["pieces"] = sum(1 for _ in tandem.stream("Count.", max_tokens=64, ignore_eos=True))
out["usage"] = deltas[-1].usage.completion_tokens
out["labels"] = [c.label for c in tandem.classify(["I loved it.", "A boring mess."])]
out["label"] = tandem.classify("A wonderful film.").label
out["many"] = len(tandem.classify(["fine"] * 2500))
out["width"] = len(tandem.embed("a text").vector)
out["widths"] = [len(e.vector) for e in tandem.embed(["a", "b"])]

def error_of(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

out["unknown"] = error_of(lambda: tandem.chat("hi", model="nope"))
out["unknown_stream"] = error_of(lambda: list(tandem.stream("hi", model="nope")))
out["bad"] = error_of(lambda: tandem.chat("hi", max_tokens=-1))
out["absent"] = error_of(lambda: Tandem("no-such-app").chat("hi"))

async def asynchronous():
    text = (await tandem.achat("What is the capital of France?", **ask)).text
    pieces = [d.text async for d in tandem.astream("What is the capital of France?", **ask)]
    labels, vectors = await asyncio.gather(
        tandem.aclassify(["I loved it.", "A boring mess."]), tandem.aembed(["a", "b"])
    )
    generated = await tandem.agenerate(["a", "b"], max_tokens=2)
    return [text, "".join(pieces), [c.label for c in labels], len(vectors), len(generated)]

out["async"] = asyncio.run(asynchronous())

@ray.remote(num_cpus=0)
def from_a_task():
    return Tandem().chat("What is the capital of France?", **ask).text

out["task"] = ray.get(from_a_task.remote())
print(json.dumps(out))
"""


def test_all_methods_work_from_another_job(cluster: RunningCluster) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, cluster.ray_address],
        env=cluster.env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["models"] == sorted(["smollm2", *ALIASES, "sentiment", *CLASSIFIER_ALIASES])
    assert "Paris" in out["chat"]
    assert out["chats"] == [out["chat"]] * 3
    assert out["generate"] == 4
    assert out["generates"] == 3
    assert out["stream"] == out["chat"]
    assert out["pieces"] > 3
    assert out["usage"] > 3
    assert out["labels"] == ["POSITIVE", "NEGATIVE"]
    assert out["label"] == "POSITIVE"
    assert out["many"] == 2500
    assert out["width"] == 384
    assert out["widths"] == [384, 384]
    assert out["unknown"][0] == out["unknown_stream"][0] == "NotFoundError"
    assert "Known models" in out["unknown"][1]
    assert out["bad"][0] == "InvalidRequestError"
    assert out["absent"][0] == "UnavailableError"
    assert out["async"] == [out["chat"], out["chat"], ["POSITIVE", "NEGATIVE"], 2, 2]
    assert out["task"] == out["chat"]
