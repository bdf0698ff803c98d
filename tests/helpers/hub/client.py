"""Clients of the loopback Hub: in processes of their own, since they read the address of the Hub on import."""

import os
import subprocess
import sys


def run_client(hub, script, tmp_path, *arguments, token="hf_test", check=True):
    """Run `script` in a new process, since the client reads its endpoint on import; returns the finished process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    client = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Uploads to Xet storage go around the API, in several commits.
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        # What is meant for any other host ends here, too, and never on the network.
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), hub.url),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=kept | client,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done
