"""Many users of the page at once: concurrent instant questions, their latency, and whether any is lost.

python -m benchmarks.load --address=http://localhost:8000 --concurrent=50 --questions=500

Start launch.serve before. A user asks, waits for the answer and asks again, as the page's script does. Pictures are
drawn for `--prompts` different captions first, so that what is measured is looking up and not drawing.
"""

import json
import threading
import time
import urllib.parse
import urllib.request
from typing import Any

import numpy as np
from absl import app, flags

_ADDRESS = flags.DEFINE_string("address", "http://localhost:8000", "Where the page is.")
_CONCURRENT = flags.DEFINE_integer("concurrent", 50, "Users at once.", lower_bound=1)
_QUESTIONS = flags.DEFINE_integer("questions", 500, "Questions of all users together.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Different prompts.", lower_bound=1, upper_bound=60)


def call(path: str, post: bool = False) -> dict[str, Any]:
    """The JSON answer of the server."""
    request = urllib.request.Request(_ADDRESS.value + path, b"" if post else None)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def ask(number: int) -> dict[str, Any]:
    """Asks and waits for the answer."""
    query = urllib.parse.urlencode({"method": "instant", "prompt": f"picture {number % _PROMPTS.value}", "seed": 0})
    name = call(f"/api/ask?{query}", post=True)["request"]
    while True:
        found = call(f"/api/request/{name}?wait=1")
        if found["state"] not in ("waiting", "running"):
            return found


def main(argv):
    del argv
    for number in range(_PROMPTS.value):
        ask(number)
    numbers, times, lost = iter(range(_QUESTIONS.value)), [], []
    guard = threading.Lock()

    def user() -> None:
        while True:
            with guard:
                number = next(numbers, None)
            if number is None:
                return
            began = time.perf_counter()
            try:
                found = ask(number)
                wrong = found["state"] != "done" or not found["cards"]
            except (OSError, ValueError, KeyError):
                wrong = True
            with guard:
                times.append(1000 * (time.perf_counter() - began))
                if wrong:
                    lost.append(number)

    began = time.perf_counter()
    users = [threading.Thread(target=user) for _ in range(_CONCURRENT.value)]
    for each in users:
        each.start()
    for each in users:
        each.join()
    spent = time.perf_counter() - began
    line = {
        "concurrent": _CONCURRENT.value,
        "questions": len(times),
        "lost": len(lost),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "per_second": round(len(times) / spent, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
