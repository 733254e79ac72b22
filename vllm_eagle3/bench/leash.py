"""Runs a command that must not outlive whoever asked for it.

``python -m vllm_eagle3.bench.leash COMMAND...`` ends the command, and all that it started, when
stdin ends: the other end of that pipe closes with its process, however that one dies. Start it
as the leader of a session.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    # For the command, which gets it, too: this process waits until it has cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: None)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sys.exit(child.wait())


if __name__ == "__main__":
    main()
