"""The state of a folder after a power cut, computed from the journal that faults.c writes.

A file's bytes are on the disk once fsync of the file has returned; its name is on the disk once fsync of its folder has
returned. Each of the other bytes and names may or may not be on the disk. VARIANTS lists the cases that are tested.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

PAGE_BYTES = 4096
VARIANTS = ("nothing unsynced", "names without bytes", "bytes without names", "some pages")
Tree = Mapping[str, bytes]  # by path


@dataclass
class Disk:
    """The names and bytes that programs see, and those that are on the disk."""

    names: dict[str, int]  # inode by path
    names_synced: dict[str, int]
    bytes_synced: dict[int, bytes]
    last_bytes: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """Return the state of a folder whose files are completely on the disk."""
        files = {str(p): p for p in folder.rglob("*") if p.is_file()}
        names = {name: path.stat().st_ino for name, path in files.items()}
        return cls(dict(names), dict(names), {names[name]: path.read_bytes() for name, path in files.items()})

    def replay(self, shadow: Path) -> None:
        journal = shadow / "journal"
        for line in journal.read_text().splitlines() if journal.exists() else []:
            what, *rest = line.split("\t")
            if what == "create":
                self.names[rest[1]] = int(rest[0])
                self.bytes_synced.setdefault(int(rest[0]), b"")
            elif what == "sync":
                self.bytes_synced[int(rest[0])] = (shadow / rest[1]).read_bytes()
            elif what == "syncfolder":
                self._sync_folder(rest[0])
            elif what == "rename":
                moved, source, target, replaced, kept = rest
                self.names.pop(source, None)
                self.names[target] = int(moved)
                self._keep(replaced, kept, shadow)
            elif what == "unlink":
                gone, path, kept = rest
                self.names.pop(path, None)
                self._keep(gone, kept, shadow)

    def _keep(self, inode: str, copy: str, shadow: Path) -> None:
        if int(copy) > 0:
            self.last_bytes[int(inode)] = (shadow / copy).read_bytes()

    def _sync_folder(self, folder: str) -> None:
        for name in [n for n in self.names_synced if str(PurePath(n).parent) == folder]:
            del self.names_synced[name]
        self.names_synced.update({n: i for n, i in self.names.items() if str(PurePath(n).parent) == folder})

    def after_power_cut(self, variant: str, seed: int) -> Tree:
        """Return the files after the power cut. Call `replay` and `look` first."""
        draw = random.Random(seed)
        names = self.names_synced if variant in ("nothing unsynced", "bytes without names") else self.names
        if variant == "some pages" and draw.random() < 0.5:
            names = self.names_synced
        return {name: self._bytes(inode, variant, draw) for name, inode in names.items()}

    def _bytes(self, inode: int, variant: str, draw: random.Random) -> bytes:
        synced = self.bytes_synced.get(inode, b"")
        last = self.last_bytes.get(inode, synced)
        if variant == "bytes without names":
            return last
        if variant != "some pages" or synced == last:
            return synced
        size = draw.choice([len(synced), len(last)])
        pages = range(0, size, PAGE_BYTES)
        mixed = b"".join(draw.choice([synced, last])[at : at + PAGE_BYTES].ljust(PAGE_BYTES, b"\0") for at in pages)
        return mixed[:size]

    def look(self, folder: Path) -> None:
        """Read the bytes of all named files at the moment of the power cut."""
        for name, inode in self.names.items():
            path = Path(name)
            if folder in path.parents and path.exists():
                self.last_bytes[inode] = path.read_bytes()


def write_tree(folder: Path, tree: Tree) -> None:
    """Make the files in this folder equal to those of the tree. Subfolders are not deleted."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if str(path) not in tree or path.read_bytes() != tree[str(path)]:
            path.unlink()
    for name, data in tree.items():
        path = Path(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o600)
