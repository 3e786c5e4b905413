"""Clients of a server in a process of their own: all ask at once, each reads its stream.

    python benchmarks/streaming_client.py URL < prompts.jsonl

prompts.jsonl: lines of {"prompts": [token ids, …], "max_tokens": N}. Printed for each as a line of JSON: the times at
which each client heard something, and its text. Plain sockets, so that little of what is measured is the clients' work.
"""

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit


async def main() -> None:
    """Ask, and print what was heard, line by line."""
    place = urlsplit(sys.argv[1])
    for line in sys.stdin:
        given = json.loads(line)
        asking = (_ask(place.hostname, place.port, prompt, given["max_tokens"]) for prompt in given["prompts"])
        print(json.dumps(await asyncio.gather(*asking)), flush=True)


async def _ask(host: str | None, port: int | None, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    asked = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body = json.dumps({**asked, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    times, lines = [], []
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            lines.append(line)
    writer.close()
    events = [json.loads(line[6:]) for line in lines]
    return {"times": times, "text": "".join(choice["text"] for event in events for choice in event["choices"])}


if __name__ == "__main__":
    asyncio.run(main())
