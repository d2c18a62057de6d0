"""What `warm_python` of commandline.py runs: it has another process run Python, and ends as that process does.

Without an import of ours or of a package, so that it starts within milliseconds.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(address: str, python: str, *words: str):
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    ignored = [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    passed = [int(name) for name in os.listdir("/proc/self/fd")]
    passed = [number for number in passed if os.path.exists(f"/proc/self/fd/{number}") and os.get_inheritable(number)]
    about = dict(words=words, python=python, cwd=os.getcwd(), environment=dict(os.environ), ignored=ignored)
    about |= dict(descriptors=passed)
    network = os.open("/proc/self/ns/net", os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\n"], [network, *passed])
        server.sendall(json.dumps(about).encode() + b"\n")
        answers = server.makefile()
        process = int(answers.readline())
        for number in PASSED_ON:
            if number not in ignored:
                signal.signal(number, lambda number, frame: os.kill(process, number))
        status = int(answers.readline() or -signal.SIGKILL)  # nothing if the tests have ended
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
