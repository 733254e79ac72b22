"""Two chats at once with the server of serve.sh, and what the drafts brought.

python openai_client.py [http://localhost:8000]
"""

import asyncio
import sys
import urllib.request

from openai import AsyncOpenAI

QUESTIONS = ["What is the capital of France?", "Write a haiku about the sea."]


async def chat(client: AsyncOpenAI, number: int, question: str) -> None:
    stream = await client.chat.completions.create(
        model="target",
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0.0,
        stream=True,
    )
    async for chunk in stream:
        # One chunk for each step of the engine: accepted drafts come together.
        if chunk.choices and chunk.choices[0].delta.content:
            print(f"chat {number}: {chunk.choices[0].delta.content!r}", flush=True)


def counter(metrics: str, name: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(f"vllm:{name}_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def main() -> None:
    server = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
        await asyncio.gather(*(chat(client, n, q) for n, q in enumerate(QUESTIONS, 1)))
    with urllib.request.urlopen(f"{server}/metrics") as answer:
        metrics = answer.read().decode()
    drafts = counter(metrics, "spec_decode_num_drafts")
    accepted = counter(metrics, "spec_decode_num_accepted_tokens")
    print(f"{accepted:.0f} drafts accepted in {drafts:.0f} forwards", end="")
    print(f", {1 + accepted / drafts:.2f} tokens for each" if drafts else "")


if __name__ == "__main__":
    asyncio.run(main())
