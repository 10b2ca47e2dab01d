"""Record what the first minute of `make demo` shows on a terminal of 80 columns and 24 lines.

    pip install pyte
    make demo; rm -r runs/demo    # so that everything is installed
    python docs/record_demo.py > docs/first_minute.txt

Writes the screen at some instants, as pyte (a terminal in Python) shows it, then the longest
silence and the widest line. The machine should be idle.
"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pyte

COLUMNS, LINES = 80, 24
SECONDS = 60
INSTANTS = (0.5, 3, 6, 10, 20, 30, 45, SECONDS)
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def main() -> None:
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    demo = subprocess.Popen(
        ["make", "demo"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    began = last = time.monotonic()
    silences, written = [(0.0, 0.0)], b""
    for instant in INSTANTS:
        while (left := began + instant - time.monotonic()) > 0:
            if not select.select([ours], [], [], left)[0]:
                continue
            told = os.read(ours, 65536)
            now = time.monotonic()
            silences.append((now - last, last - began))
            last, written = now, written + told
            stream.feed(told)
        print(f"--- after {instant} s {'-' * 50}")
        print("\n".join(line.rstrip() for line in screen.display).rstrip())
    os.killpg(demo.pid, signal.SIGTERM)
    demo.wait()
    silence, at = max(silences)
    lines = re.split(rb"[\r\n]+", ESCAPES.sub(b"", written))
    widest = max(len(line.decode(errors="replace")) for line in lines)
    print(f"--- longest silence {silence:.1f} s, {at:.1f} s after the start", end="; ")
    print(f"widest line {widest} of {COLUMNS} columns")
    sys.exit(widest > COLUMNS)


if __name__ == "__main__":
    main()
