"""Stream a chat, compare sentences by their embeddings, and run a batch, with OpenAI's client.

Run it anywhere: `TANDEM_URL=... TANDEM_API_KEY=... python examples/openai_sdk.py`.
"""

import json
import os
import time

from openai import OpenAI

SENTENCES = ["I loved this film.", "What a wonderful movie.", "The train was late again."]


def chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=20,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def compare(client: OpenAI) -> None:
    """Print the cosine similarity of the first sentence to the others."""
    found = client.embeddings.create(model="sentiment", input=SENTENCES)
    first, *others = (row.embedding for row in found.data)  # of unit length
    for sentence, other in zip(SENTENCES[1:], others, strict=True):
        print(f"{sum(a * b for a, b in zip(first, other, strict=True)):.2f}  {sentence}")


def run_batch(client: OpenAI) -> None:
    lines = [
        {
            "custom_id": country,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "smollm2",
                "max_tokens": 20,
                "messages": [{"role": "user", "content": f"What is the capital of {country}?"}],
            },
        }
        for country in ("Italy", "Spain")
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("capitals.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch
    for line in client.files.content(batch.output_file_id).text.splitlines():
        answer = json.loads(line)
        message = answer["response"]["body"]["choices"][0]["message"]
        print(f"{answer['custom_id']}: {message['content']}")


if __name__ == "__main__":
    url = os.environ.get("TANDEM_URL", "http://127.0.0.1:8000")
    key = os.environ.get("TANDEM_API_KEY", "none")
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        chat(client)
        compare(client)
        run_batch(client)
