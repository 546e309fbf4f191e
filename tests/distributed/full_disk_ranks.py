"""train.py on a full disk: the ranks of a test of the command line."""

from __future__ import annotations

import shutil

import train

_disk_usage = shutil.disk_usage


def main() -> None:
    shutil.disk_usage = lambda path: _disk_usage(path)._replace(free=1000)
    train.main()
