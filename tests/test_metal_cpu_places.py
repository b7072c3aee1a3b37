"""Lines that a report names: of the kernel's file, or of the text that it shares with others."""

from pathlib import Path

import mlx.core as mx
import pytest

from metal_cpu import CompileError, Launch, emulated, once, require_clean
from metal_cpu.translate import pieces
from qwen35_mlx.kernels import library

G = "uint i = thread_position_in_grid.x;\n"


def test_the_report_names_the_line_of_the_metal_file() -> None:
    header = "// What it does.\n\ninline float past(const device float* p, uint i) {\n" \
        "  return p[i + 1];\n}\n"  # fmt: skip
    launch, _ = once(
        G + "o[i] = past(x, i);\n", {"x": mx.zeros(32)}, {"o": ((32,), mx.float32)}, (32, 1, 1),
        (32, 1, 1), header=header,
    )  # fmt: skip
    (problem,) = launch.problems
    assert (problem.kind, problem.line, problem.kernel) == ("out of bounds", 4, "once")
    assert "thread 31" in problem.message
    assert "x[32] of 32 elements" in problem.message
    body = G + "o[i] = x[i] + x[i + 1];"
    launch, _ = once(body, {"x": mx.zeros(32)}, {"o": ((32,), mx.float32)}, (32, 1, 1), (32, 1, 1),
                     header=header)  # fmt: skip
    # Header of 5 lines and an empty one, the line `// body`, then the body's second line.
    assert launch.problems[0].line == 5 + 1 + 1 + 2


def test_every_line_of_the_kernels_is_said_to_be_where_it_is() -> None:
    metal = Path(__file__).parents[1] / "metal"
    helpers = {path.stem for path in metal.glob("*.metal")} - set(library.names())
    assert helpers == {"loads", "products", "swiglu_products"}
    seen = set()
    with emulated():
        for name in library.names():
            made = library.kernel(name, ("x",), ("y",))
            found = pieces(made.header, "", 0), pieces(made.source, "", 0)
            assert [part[0] for part in found[1]] == [found[0][-1][0]] == [name]
            for file, first, text in [*found[0], *found[1]]:
                seen.add(file)
                whole = (metal / f"{file}.metal").read_text(encoding="utf-8").splitlines()
                given = text.splitlines()
                assert whole[first - 1 : first - 1 + len(given)] == given
    assert seen == helpers | set(library.names())


READER = """// reads
// with: first second

inline float twice(float x) { return 2.0f * x; }

// body
  threadgroup float kept[1];
  const uint i = thread_position_in_grid.x;
  if (i == 0) kept[0] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = twice(past(x, i)) + kept[0];
"""
FIRST = "// nothing\n"
SECOND = """// One element further.

inline float past(const device float* p, uint i) {
  return p[i + 1];
}
"""


def read(monkeypatch: pytest.MonkeyPatch, reader: str = READER, second: str = SECOND) -> Launch:
    """One launch of a kernel that two other files are put before."""
    texts = {"reader": reader, "first": FIRST, "second": second}
    monkeypatch.setattr(library, "_text", texts.__getitem__)
    with emulated() as launches:
        library.kernel("reader", ("x",), ("o",))(
            inputs=[mx.ones(33)], output_shapes=[(32,)], output_dtypes=[mx.float32],
            grid=(32, 1, 1), threadgroup=(32, 1, 1),
        )  # fmt: skip
    return launches[0]


def test_a_problem_in_shared_text_names_its_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_clean([read(monkeypatch)])
    (problem,) = read(monkeypatch, second=SECOND.replace("i + 1", "i + 2")).problems
    assert (problem.kind, problem.kernel, problem.line) == ("out of bounds", "reader", 4)
    assert problem.message.endswith("(in second.metal)")
    for wrong in ("return double(p[i]);", "return p[j];"):
        with pytest.raises(CompileError, match=r"^second\.metal:4:"):
            read(monkeypatch, second=SECOND.replace("return p[i + 1];", wrong))


def test_behind_shared_text_the_kernel_has_its_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = read(monkeypatch, READER.replace("past(x, i)", "x[i + 2]")).problems
    assert (problem.kind, problem.line) == ("out of bounds", 11)
    assert "(in " not in problem.message
    for wrong, line in (("double", 4), ("j *", 4)):
        with pytest.raises(CompileError, match=rf"^reader\.metal:{line}:"):
            read(monkeypatch, READER.replace("2.0f *", f"{wrong}(2) *"))
    for wrong in ("double(x[i])", "x[j]"):
        with pytest.raises(CompileError, match=r"^reader\.metal:11:"):
            read(monkeypatch, READER.replace("past(x, i)", wrong))
    (problem,) = read(monkeypatch, READER.replace("if (i == 0) kept", "kept")).problems
    assert (problem.kind, problem.line) == ("race", 9)
    assert "(line 9)" in problem.message
