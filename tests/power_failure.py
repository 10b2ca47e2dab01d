"""What a power failure would leave: which files were on the disk when they got their names."""

import os
from pathlib import Path

import pytest


class Disk:
    """Watches fsync(2) and rename(2) of this process.

    A rename may reach the disk before what it names, and a name only with its directory. So what
    is published has to be flushed before, each file and directory of it as it is then, and the
    directory that it is published in afterwards.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._flushed: dict[int, os.stat_result] = {}  # by inode, as it was then
        self._lost: dict[Path, set[Path]] = {}
        self.names: dict[Path, set[str]] = {}  # those on the disk, of each directory flushed
        fsync = os.fsync

        def watched_fsync(descriptor: int) -> None:
            fsync(descriptor)
            stat = os.fstat(descriptor)
            self._flushed[stat.st_ino] = stat
            for path in self._lost:
                if path.parent.stat().st_ino == stat.st_ino:
                    self._lost[path].discard(path.parent)
                for above in path.parents:
                    if above.stat().st_ino == stat.st_ino:
                        self.names[above] = {each.name for each in above.iterdir()}

        def watch(rename):
            def watched(source, target) -> None:
                source, target = Path(source).absolute(), Path(target).absolute()
                unflushed = {each for each in [source, *source.rglob("*")] if self._is_newer(each)}
                rename(source, target)
                moved = {target / each.relative_to(source) for each in unflushed}
                self._lost[target] = moved | {target.parent}

            return watched

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "rename", watch(os.rename))
        monkeypatch.setattr(os, "replace", watch(os.replace))

    def _is_newer(self, path: Path) -> bool:
        now, then = path.stat(), self._flushed.get(path.stat().st_ino)
        return then is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)

    def lost(self, path: Path) -> set[Path]:
        """What could lack of `path`; its directory stands for its name."""
        return self._lost[path.absolute()]
