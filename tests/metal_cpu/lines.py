"""From an address in a compiled kernel to a line of its text: reads ELF and its line table.

Only what our own compilations contain: 64-bit little-endian ELF, DWARF 4. Other files (on a Mac
the table stays in the object) have no lines, and a problem then says 0.
"""

import bisect
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Line:
    """A place in the text: `NAME.metal` or `NAME.signature`, and its line."""

    file: str
    number: int


NOWHERE = Line("", 0)


class _Reader:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return int(value)

    def uleb(self) -> int:
        value = shift = 0
        while True:
            byte = self.take("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def sleb(self) -> int:
        start = self.at
        value = self.uleb()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if self.data[self.at - 1] & 0x40 else value

    def string(self) -> str:
        end = self.data.index(b"\0", self.at)
        text = self.data[self.at : end].decode("utf-8", errors="replace")
        self.at = end + 1
        return text


def _section(data: bytes, wanted: str) -> bytes:
    if data[:6] != b"\x7fELF\x02\x01":
        return b""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = headers[names_at]
    for header in headers:
        if _Reader(data, names[4] + header[0]).string() == wanted:
            return data[header[4] : header[4] + header[5]]
    return b""


@dataclass
class _Row:
    """The registers of the line program."""

    address: int = 0
    file: int = 1
    line: int = 1


class _Program:
    """One unit's line program, run into a list of (address, file, line)."""

    def __init__(self, reader: _Reader) -> None:
        self.r = reader
        self.end = reader.take("I") + reader.at
        self.version = reader.take("H")
        begin = reader.take("I") + reader.at
        self.step, _, _ = reader.take("B"), reader.take("B"), reader.take("B")
        self.line_base, self.line_range = reader.take("b"), reader.take("B")
        self.opcode_base = reader.take("B")
        self.lengths = [reader.take("B") for _ in range(self.opcode_base - 1)]
        while reader.string():
            pass  # folders
        self.files = [""]
        while name := reader.string():
            self.files.append(name)
            for _ in range(3):
                reader.uleb()
        reader.at = begin

    def rows(self) -> list[tuple[int, str, int]]:
        found: list[tuple[int, str, int]] = []
        row = _Row()
        while self.r.at < self.end:
            row = self._execute(row, found)
        return found

    def _emit(self, row: _Row, found: list[tuple[int, str, int]]) -> None:
        found.append((row.address, self.files[row.file], row.line))

    def _execute(self, row: _Row, found: list[tuple[int, str, int]]) -> _Row:
        op = self.r.take("B")
        if op >= self.opcode_base:
            op -= self.opcode_base
            row.address += op // self.line_range * self.step
            row.line += self.line_base + op % self.line_range
            self._emit(row, found)
        elif op == 0:
            return self._extended(row, found)
        elif op == 1:
            self._emit(row, found)
        elif op == 2:
            row.address += self.r.uleb() * self.step
        elif op == 3:
            row.line += self.r.sleb()
        elif op == 4:
            row.file = self.r.uleb()
        elif op == 8:
            row.address += (255 - self.opcode_base) // self.line_range * self.step
        elif op == 9:
            row.address += self.r.take("H")
        else:
            for _ in range(self.lengths[op - 1]):
                self.r.uleb()
        return row

    def _extended(self, row: _Row, found: list[tuple[int, str, int]]) -> _Row:
        end = self.r.uleb() + self.r.at
        op = self.r.take("B")
        if op == 1:
            found.append((row.address, "", 0))
            row = _Row()
        elif op == 2:
            row.address = self.r.take("Q")
        self.r.at = end
        return row


@cache
def _table(library: Path) -> tuple[list[int], list[tuple[int, str, int]]]:
    data = _section(library.read_bytes(), ".debug_line")
    reader = _Reader(data)
    rows: list[tuple[int, str, int]] = []
    while reader.at < len(data):
        program = _Program(reader)
        if program.version == 4:
            rows += program.rows()
        reader.at = program.end
    rows.sort(key=lambda row: row[0])
    return [row[0] for row in rows], rows


def find(library: Path, offset: int) -> Line:
    """The line of the instruction at `offset` in the library's image."""
    addresses, rows = _table(library)
    at = bisect.bisect_right(addresses, offset) - 1
    # Line 0 marks code that belongs to several lines; the one before it is the nearest.
    while at >= 0 and rows[at][2] == 0 and rows[at][1]:
        at -= 1
    return Line(rows[at][1], rows[at][2]) if at >= 0 else NOWHERE
