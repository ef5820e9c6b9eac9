"""launch.serve: what it refuses before the model is read, and that it starts."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

from tests.launch.calls import call_elsewhere


def test_a_port_in_use_and_a_missing_index_are_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        base = ["--model=tiny", f"--workdir={tmp_path}"]
        in_use, no_index = call_elsewhere("launch.serve", [*base, f"--port={port}"], [*base, "--port=0"], tiny=True)
    assert in_use.code == 1 and f"port is {port} at host 'localhost'" in in_use.err and "--port" in in_use.err
    assert no_index.code == 1 and f"index is '{tmp_path}/index', which has no index.json" in no_index.err


def test_it_serves_until_it_is_stopped(engine):
    folder, workdir = engine.index.folder, engine.run.root.workdir
    script = (
        "import tests.conftest; from tests.launch import calls; calls._use_tiny_model(); from launch import common; "
        "from launch import serve; from absl import app; common.adopt_shared_flags(); app.run(serve.main)"
    )
    flags = ["--model=tiny", f"--workdir={workdir}", f"--index={folder}", "--port=0", "--sampler_steps=1"]
    with subprocess.Popen([sys.executable, "-c", script, *flags], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.match(r"http://localhost:\d+", process.stdout.readline()).group()
            about = json.load(urllib.request.urlopen(f"{address}/api/about", timeout=60))
            assert about["images"] == 13 and about["model"] == "tiny" and "exact" in about["methods"]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, 130, -signal.SIGINT)
        finally:
            process.kill()
