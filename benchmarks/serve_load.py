"""How ``finetune101 serve`` stands a crowd: ``python benchmarks/serve_load.py --data FOLDER``.

A real server process, 50 clients for a minute; each sends one picture after the other over its own connection and waits
for each answer. Writes results/serve/load.json: latencies (p50, p99, largest) in milliseconds, errors, requests per
second, and the memory of the server before and after; latencies.txt beside it holds the latency of every request. Linux
only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune101.data.images import find_data, index_images
from finetune101.files import write_json
from finetune101.host import usable_cores

OUT = Path(__file__).parents[1] / "results" / "serve"
PICTURES = 200
WARM_SECONDS = 5.0  # before anything counts


@dataclass
class Tally:
    """What the clients saw: the latencies of right answers in ms, from ``begin`` on, and errors by their kind."""

    begin: float
    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


async def client(port: int, pictures: list[bytes], tally: Tally, end: float, seed: int) -> None:
    """Sends pictures until ``end`` (of time.perf_counter), over one connection as long as the server keeps it."""
    order, connection = random.Random(seed), None
    while time.perf_counter() < end:
        content = order.choice(pictures)
        head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        start = time.perf_counter()
        try:
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            reader, writer = connection
            writer.write(head + content)
            await writer.drain()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"content-length: (\d+)", lines)
            assert length
            body = json.loads(await reader.readexactly(int(length[1])))
            if "connection: close" in lines:
                writer.close()
                connection = None
            if " 200 " not in lines.splitlines()[0]:
                tally.errors[lines.split()[1]] += 1
            elif len(body["predictions"]) != 1:
                tally.errors["wrong answer"] += 1
            elif start >= tally.begin:
                tally.latencies.append(1000 * (time.perf_counter() - start))
        except (OSError, EOFError) as error:
            tally.errors[type(error).__name__] += 1
            connection = None
    if connection:
        connection[1].close()


def memory(pid: int) -> float:
    """Resident memory of a process in MB, without what it maps from files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def start_server(network: str) -> tuple[subprocess.Popen[str], int]:
    """A server on a free port, and the port."""
    command = [sys.executable, "-m", "finetune101", "serve", network, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    address = re.search(r":(\d+)/", line)
    if not address:
        raise SystemExit(f"the server did not start: {line}")
    return process, int(address[1])


async def crowd(
    port: int, pictures: list[bytes], clients: int, seconds: float, pid: int
) -> tuple[dict[str, Any], list[float]]:
    """What ``clients`` saw in ``seconds``, with the server's memory before, in the middle and after; the latencies."""
    begin = time.perf_counter() + WARM_SECONDS
    tally = Tally(begin)
    tasks = [asyncio.create_task(client(port, pictures, tally, begin + seconds, seed)) for seed in range(clients)]
    memories = []
    for part in (0.0, 0.5):
        await asyncio.sleep(max(0.0, begin + part * seconds - time.perf_counter()))
        memories.append(round(memory(pid), 1))
    await asyncio.gather(*tasks)
    memories.append(round(memory(pid), 1))
    p50, p99, largest = np.percentile(tally.latencies, [50, 99, 100])
    numbers = {
        "requests": len(tally.latencies),
        "requests_per_second": round(len(tally.latencies) / seconds, 1),
        "errors": sum(tally.errors.values()),
        "errors_by_kind": dict(tally.errors),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "largest_ms": round(float(largest), 1),
        "memory_mb": {"begin": memories[0], "middle": memories[1], "end": memories[2]},
        "memory_growth_mb": round(memories[2] - memories[0], 1),
    }
    return numbers, sorted(tally.latencies)


def main() -> int:
    """Prints and writes what a crowd of clients saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="Caltech-101")
    parser.add_argument("--network", default="released_finetune")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=OUT / "load.json")
    arguments = parser.parse_args()
    index = index_images(find_data(arguments.data))
    files = random.Random(0).sample([index.root / path for path in index.paths], PICTURES)
    pictures = [file.read_bytes() for file in files]
    load = os.getloadavg()[0]
    process, port = start_server(arguments.network)
    try:
        result, latencies = asyncio.run(crowd(port, pictures, arguments.clients, arguments.seconds, process.pid))
    finally:
        process.terminate()
        process.wait()
    size = sum(map(len, pictures)) / len(pictures) / 1000
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    loads = {
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }
    machine = {"cpu": names[0] if names else platform.machine(), "cores": usable_cores(), **loads}
    record = {
        "network": arguments.network,
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "picture_kb": round(size, 1),
        "machine": machine,
        **result,
    }
    write_json(arguments.out, record)
    lines = "".join(f"{latency:.1f}\n" for latency in latencies)
    arguments.out.with_name("latencies.txt").write_text(lines, encoding="utf-8")
    print(json.dumps(record, indent=1))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
