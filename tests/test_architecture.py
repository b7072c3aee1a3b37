"""Imports inside the package point one way, and `import qwen35_mlx` brings nothing heavy."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwen35_mlx"

# Module (or sub-package) -> what of ours it imports, exactly. Each row names rows above it only.
# Every module has a row, so that a new module or edge is a decision, not an accident.
ALLOWED: dict[str, str] = {
    "version": "",
    "errors": "",
    "files": "errors",
    "packing": "errors files",
    "config": "errors files packing",
    "shards": "errors files",
    "checkpoint": "errors shards",
    # What goes in and what comes out: nothing of these knows the model.
    "web": "errors",
    "source": "errors web",
    "settings": "errors files",
    "image": "errors source settings",
    "movie": "errors source image",
    "video": "errors files source settings image movie",
    "tokenizer": "errors",
    "budget": "",
    "sandbox": "budget",
    "template": "errors files sandbox",
    "messages": "errors",
    "prompt": "errors image video tokenizer template messages",
    "arguments": "",
    "parse": "errors arguments",
    # The computation, which knows token ids and arrays only.
    "kernels": "packing",
    "sampling": "errors kernels",
    "family": "errors sampling",
    "cache": "config",
    "layers": "config cache kernels packing",
    "model": "config cache kernels layers",
    # Which kernels are right on this machine.
    "shapes": "config packing",
    "proof": "",
    "apart": "proof",
    "trials": "kernels packing proof apart shapes",
    "choice": "version errors files kernels proof apart shapes",
    "memory": "errors config cache kernels layers",
    "loader": "errors packing config shards checkpoint family memory layers model shapes choice",
    "engine": "errors prompt sampling cache model",
    # What a GPU would do with it, counted without one.
    "layouts": "",
    "dispatches": "layouts",
    "stand_ins": "layouts",
    "graph": "layouts stand_ins",
    "launches": "layouts dispatches stand_ins graph",
    "decode_step": "packing config checkpoint sampling cache kernels layers model shapes graph "
    "launches",
    # The program.
    "hub": "errors files config shards template family",
    "api": "errors files config image video tokenizer template prompt parse sampling family cache "
    "model memory loader engine hub",
    "__init__": "version errors prompt parse sampling api",
    "terminal": "errors parse",
    "commands": "",
    "convert": "errors files packing config shards checkpoint image video template prompt "
    "tokenizer family cache layers model memory engine hub api __init__ terminal commands",
    "generate": "__init__ errors family memory shapes hub sampling api terminal commands",
    "subject": "errors family hub convert",
    "bench": "family kernels stand_ins graph launches decode_step terminal commands subject",
    "chips": "",
    "doctor": "errors proof shapes choice terminal commands subject chips",
    "__main__": "__init__ terminal",
}
HEAVY = (
    "torch",
    "transformers",
    "mlx_lm",
    "mlx_vlm",
    "rich",
    "av",
    "click",
    "huggingface_hub.hf_api",
)


def modules() -> list[Path]:
    found = [*PACKAGE.rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path: Path) -> tuple[str, ...]:
    """("layers", "rope") for qwen35_mlx/layers/rope.py."""
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).with_suffix("").parts
    return path.relative_to(ROOT).with_suffix("").parts


def imported(path: Path) -> Iterator[str]:
    """Our own modules that run when the file, or a function of it, does; not those for types."""
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    package = ("qwen35_mlx", *name_of(path)[:-1])
    names = {name_of(module)[0] for module in modules()}
    for node in ast.walk(tree):
        # The package itself names for types what its `__getattr__` imports when first used.
        if id(node) in typing_only and path != PACKAGE / "__init__.py":
            continue
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "qwen35_mlx":
                yield target[1] if len(target) > 1 and target[1] in names else "__init__"


@pytest.mark.parametrize("row", ALLOWED)
def test_each_row_imports_what_it_names_and_nothing_else(row: str) -> None:
    files = [path for path in modules() if name_of(path)[0] == row]
    found = {name for path in files for name in imported(path)} - {row}
    wanted = set(ALLOWED[row].split())
    assert found == wanted, f"new: {sorted(found - wanted)}; gone: {sorted(wanted - found)}"


def test_each_row_names_rows_above_it_only() -> None:
    seen: set[str] = set()
    for row, names in ALLOWED.items():
        assert set(names.split()) <= seen, f"{row}: {sorted(set(names.split()) - seen)}"
        seen.add(row)


def test_every_module_has_a_row() -> None:
    assert set(ALLOWED) == {name_of(path)[0] for path in modules()}


def test_importing_the_package_brings_nothing_heavy_and_is_fast() -> None:
    code = f"import sys, qwen35_mlx; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.stdout.split(), done.stderr) == ([], "")
    # Work, not waiting: other tests run beside this one. Usual are 0.3 s; transformers takes 3.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2.0


@pytest.mark.parametrize(
    "command",
    [
        ["qwen35_mlx"],
        ["qwen35_mlx.generate"],
        ["qwen35_mlx.convert"],
        ["qwen35_mlx.bench"],
        ["qwen35_mlx.doctor"],
    ],
)
def test_help_computes_nothing(command: list[str]) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({command[0]!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "banned = ('torch', 'transformers', 'mlx_lm', 'rich', 'huggingface_hub', 'av')\n"
        "print('BANNED', *[m for m in banned if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("BANNED"), done.stdout[-300:] + done.stderr[-2000:]


def test_library_modules_neither_print_nor_exit() -> None:
    talkers = {"generate", "terminal", "__main__", "convert", "bench", "doctor", "trials"}
    for path in modules():
        if name_of(path)[0] in talkers:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "exit", "sys.exit", "os._exit"), f"{path}: {called}"
