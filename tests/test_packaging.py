"""What is declared in pyproject.toml agrees with the tree; the slow test builds and installs it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from qwen35_mlx import family

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
BESIDE = {"qwen35_mlx.convert": "convert", "qwen35_mlx.metal": "metal"}
# Folders beside the package that are no part of an installation.
OUTSIDE = {"benchmarks", "examples", "tests"}


def tracked(folder: Path, pattern: str) -> list[Path]:
    return [p for p in sorted(folder.rglob(pattern)) if "__pycache__" not in p.parts]


def test_package_list_equals_the_tree() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in tracked(ROOT / "qwen35_mlx", "*.py")
    }
    for name, folder in BESIDE.items():
        for path in [ROOT / folder, *tracked(ROOT / folder, "*.py")]:
            inside = (path if path.is_dir() else path.parent).relative_to(ROOT / folder)
            found.add(".".join((name, *inside.parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_no_package_folder_is_forgotten_at_the_root() -> None:
    here = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    built = {"build", "dist"}
    folders = {p.name for p in here if p.name not in built and next(p.rglob("*.py"), None)}
    assert folders <= OUTSIDE | {"qwen35_mlx"} | set(BESIDE.values())


def test_mapped_folders_are_the_declared_ones() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == BESIDE


def test_metal_holds_kernels_only_and_they_are_package_data() -> None:
    names = {path.name for path in (ROOT / "metal").iterdir()}
    kernels = {name for name in names if name.endswith(".metal")}
    # An empty folder would be lost in git and in an sdist; the first kernel takes the mark's place.
    mark = set() if kernels else {".gitkeep"}
    assert names == kernels | mark
    declared = PROJECT["tool"]["setuptools"]["package-data"]["qwen35_mlx.metal"]
    assert set(declared) == {"*.metal"} | mark


def test_the_version_is_said_once_more_in_the_package() -> None:
    text = (ROOT / "qwen35_mlx" / "version.py").read_text("utf-8")
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in text


def test_every_third_party_import_is_declared() -> None:
    declared = {
        re.split(r"[\[<>=~;! ]", line)[0].lower() for line in PROJECT["project"]["dependencies"]
    }
    extras = PROJECT["project"]["optional-dependencies"]
    optional = {re.split(r"[\[<>=~;! ]", line)[0].lower() for line in extras["video"]}
    names = {"PIL": "pillow"}
    imported: set[str] = set()
    for path in [*tracked(ROOT / "qwen35_mlx", "*.py"), *tracked(ROOT / "convert", "*.py")]:
        for match in re.finditer(r"^\s*(?:from|import) (\w+)", path.read_text("utf-8"), re.M):
            imported.add(match[1])
    foreign = {
        names.get(name, name).lower()
        for name in imported
        if name not in sys.stdlib_module_names and name not in ("qwen35_mlx", "__future__")
    }
    assert foreign <= declared | optional, foreign - declared - optional


def test_no_registry_is_named_where_things_are_installed() -> None:
    # The person's own pip settings decide where packages come from.
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"index-url|find-links|pypi\.|pythonhosted|download\.pytorch", text), (
            name
        )


def test_checkout_imports_the_folders_beside_the_package() -> None:
    code = (
        "import importlib.resources as r, pathlib, qwen35_mlx.convert as c;"
        "print(pathlib.Path(c.__file__).parent.name, r.files('qwen35_mlx.metal').is_dir())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.split(), done.stderr) == (["convert", "True"], "")


def test_the_demonstration_models_benchmark_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "demo_accuracy.py", "--help"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "") and "--show" in done.stdout


def test_the_memory_table_of_the_readme_is_computed() -> None:
    rows = [
        f"| {s.name} | {s.mlx_4bit_bytes / 1e9:.1f} GB | {s.mlx_8bit_bytes / 1e9:.1f} GB "
        f"| {s.mlx_bf16_bytes / 1e9:.1f} GB | {s.kv_bytes_per_token / 1e3:.0f} MB "
        f"| {s.state_bytes / 1e6:.0f} MB |"
        for s in family.SIZES
    ]
    assert "\n".join(rows) in (ROOT / "README.md").read_text("utf-8")


def test_examples_are_short_and_begin_with_how_to_run_them() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        lines = path.read_text("utf-8").splitlines()
        assert lines[0] == f"# Run, after `make demo`: .venv/bin/python examples/{path.name}"
        assert len(lines) < 40


# -- the real thing ----------------------------------------------------------------------------

CHECK = """
import importlib.metadata, importlib.resources, sys
import qwen35_mlx, qwen35_mlx.convert, qwen35_mlx.layers, qwen35_mlx.kernels
where = importlib.resources.files("qwen35_mlx.metal")
kernels = sorted(p.name for p in where.iterdir() if p.name.endswith(".metal"))
typed = importlib.resources.files("qwen35_mlx").joinpath("py.typed").is_file()
print(typed, *kernels)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what building leaves behind: a stale build/ is reused silently."""
    target = tmp_path_factory.mktemp("checkout") / "qwen35"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["install", "editable", "wheel", "wheel of sdist"])
def test_every_way_of_installing_brings_kernels_and_types(
    copy: Path, tmp_path: Path, how: str
) -> None:
    # Dependencies come from the environment that runs the tests: our own files are in question.
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=False)
    bin_folder = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    site = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    target = next((tmp_path / "venv").rglob("site-packages"))
    (target / "dependencies.pth").write_text(f"{site}\n")
    pip: list[str | Path] = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    if how == "install":
        run(*pip, copy, cwd=tmp_path)
    elif how == "editable":
        run(*pip, "-e", copy, cwd=tmp_path)
    else:
        flags = ["--wheel"] if how == "wheel" else []  # no flag: an sdist, and a wheel of it
        run(sys.executable, "-m", "build", *flags, "-o", tmp_path / "dist", copy, cwd=tmp_path)
        run(*pip, next((tmp_path / "dist").glob("*.whl")), cwd=tmp_path)
    kernels = sorted(path.name for path in (ROOT / "metal").glob("*.metal"))
    found = run(bin_folder / "python", "-c", CHECK, cwd=tmp_path).split()
    assert found == ["True", *kernels]
    help_text = run(bin_folder / "qwen35-mlx", "generate", "--help", cwd=tmp_path)
    assert "--prompt" in help_text
