"""The promises that no linter checks: sizes, import seams, documents true to the tree, a lock that names no place."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_mopd", "kernels")
OURS = sorted(path for folder in (*PACKAGES, "tools") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.py"))

# Import with torch alone: they must be usable where Megatron-Core is not installed, and quick to test.
WITHOUT_MEGATRON = ("records", "masks", "batch", "metrics", "predictions", "report", "presets", "guards")
WITHOUT_MEGATRON += ("host", "intervals", "shards", "recipe.report", "preflight.numbers")
# May construct an unpickler; everything else reads safetensors, JSON or `torch.load(weights_only=True)`.
UNPICKLING = {"megatron_mopd/torch_dist.py"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    return ((node, dotted(node.func)) for node in ast.walk(module) if isinstance(node, ast.Call))


def imported(module: ast.Module) -> set[str]:
    """Full names of everything a module imports, anywhere in it: ``from a import b`` gives ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_there_is_something_to_check() -> None:
    assert len(OURS) > 10


def test_functions_stay_within_80_lines() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1}"
        for path in OURS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not long


def test_files_stay_within_400_lines() -> None:
    sizes = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in OURS}
    assert not {name: lines for name, lines in sizes.items() if lines > 400}


def test_terminal_output_goes_through_rich_or_logging() -> None:
    bare = []
    for path in OURS:
        module = tree(path)
        if "rich.print" not in imported(module):
            bare += [f"{name_of(path)}:{call.lineno}" for call, name in calls(module) if name == "print"]
    assert not bare


def test_functions_are_annotated() -> None:
    bare = []
    for path in OURS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any(dotted(d) == "triton.jit" for d in node.decorator_list):
                    continue  # its parameters are pointers and blocks, and Triton reads annotations as specialisations
                named = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                missing = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
                if missing or (node.returns is None and node.name != "__init__"):
                    bare.append(f"{name_of(path)}:{node.lineno} {node.name} {missing}")
    assert not bare


def test_no_broad_except_and_no_stub() -> None:
    found = []
    for path in OURS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or dotted(node.type) in ("Exception", "BaseException")
            ):
                found.append(f"{name_of(path)}:{node.lineno} broad except")
            if isinstance(node, ast.Name) and node.id == "NotImplementedError":
                found.append(f"{name_of(path)}:{node.lineno} stub")
    assert not found


def test_settings_are_read_by_name_without_a_second_default() -> None:
    defaults = [
        f"{name_of(path)}:{call.lineno}"
        for path in OURS
        for call, name in calls(tree(path))
        if name == "getattr"
        and len(call.args) == 3
        and dotted(call.args[0]).split(".")[-1] in ("config", "settings", "args", "cfg")
    ]
    assert not defaults


def test_foreign_bytes_are_unpickled_in_one_place() -> None:
    found = []
    for path in OURS:
        for call, name in calls(tree(path)):
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load"):
                found.append(f"{name_of(path)}:{call.lineno} {name}")
            safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
            if name == "torch.load" and not safe:
                found.append(f"{name_of(path)}:{call.lineno} torch.load without weights_only=True")
    assert not [entry for entry in found if entry.split(":")[0] not in UNPICKLING]


def test_parallel_is_the_only_reader_of_parallel_state() -> None:
    readers = set()
    for path in OURS:
        module = tree(path)
        asked = (dotted(node) for node in ast.walk(module) if isinstance(node, ast.Attribute))
        # host replaces the function that makes groups, which reads nothing.
        if any(".parallel_state." in n for n in imported(module)) or any(
            re.search(r"\bparallel_state\.(get|is|model)_", name) for name in asked
        ):
            readers.add(name_of(path))
    assert readers == {"megatron_mopd/parallel.py"}


def test_nothing_imports_from_tests_tools_or_examples() -> None:
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in [*OURS, *SCRIPTS, *(ROOT / "tests").rglob("*.py")]
        for name in imported(tree(path))
        if name.split(".")[0] in ("tests", "tools", "examples")
    ]
    assert not wrong


def test_kernels_needs_torch_triton_and_numpy_alone() -> None:
    foreign = {
        f"{name_of(path)}: {name}"
        for path in (ROOT / "kernels").rglob("*.py")
        for name in imported(tree(path))
        if name.split(".")[0] not in {"torch", "triton", "numpy", "mopd_kernels"} | sys.stdlib_module_names
    }
    assert not foreign


def test_no_python_file_shadows_the_kernels_package() -> None:
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


SEAM = """
import json, sys
import megatron_mopd.config
found = {"config": sorted(n for n in ("torch", "megatron.core") if n in sys.modules)}
import importlib, pkgutil
import megatron_mopd.objectives
light = [f"megatron_mopd.{n}" for n in %r]
light += [m.name for m in pkgutil.iter_modules(megatron_mopd.objectives.__path__, "megatron_mopd.objectives.")]
for name in light:
    importlib.import_module(name)
found["light"] = sorted(n for n in ("megatron.core", "transformers", "reasoning_gym") if n in sys.modules)
print(json.dumps(found))
"""

UNTOUCHED = """
import json, pkgutil, importlib, sys, types
import torch, torch.distributed, torch.nn.functional, torch.cuda
import megatron.core.models.hybrid.hybrid_model, megatron.core.optimizer, megatron.core.dist_checkpointing
import megatron.core.distributed, megatron.core.tensor_parallel.random, megatron.core.ssm.mamba_mixer
watched = [m for n, m in sorted(sys.modules.items())
           if n in ("torch", "torch.cuda", "torch.distributed", "torch.nn.functional") or n.startswith("megatron.core")]
watched += [torch.Tensor, torch.nn.Module]
classes = {v for m in watched for v in vars(m).values() if isinstance(v, type)}
watched += [c for c in classes if c.__module__.startswith("megatron.core")]
before = [{k: v for k, v in vars(m).items() if callable(v)} for m in watched]
import megatron_mopd, mopd_kernels
names = [m.name for p in (megatron_mopd, mopd_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    importlib.import_module(name)
assert len(watched) > 300
changed = [f"{m.__name__}.{k}" for m, was in zip(watched, before) for k, v in was.items() if vars(m).get(k) is not v]
print(json.dumps({"imported": names, "changed": changed, "joined": torch.distributed.is_initialized()}))
"""


def fresh_python(program: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_config_needs_no_torch_and_the_mathematics_no_megatron() -> None:
    assert fresh_python(SEAM % (WITHOUT_MEGATRON,)) == {"config": [], "light": []}


def test_importing_any_module_patches_and_joins_nothing() -> None:
    found = fresh_python(UNTOUCHED)
    assert {"megatron_mopd.host", "megatron_mopd.parallel"} <= set(found["imported"])
    assert not found["changed"] and not found["joined"]


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".python-version", ".pre-commit-config.yaml"]
)
def test_document_is_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_contributing_fits_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80


def words_of_make() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def commands(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line] + re.findall(r"`((?:make|python|torchrun) [^`]+)`", text)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_the_documents_exist(document: str) -> None:
    wrong = []
    for line in commands(document):
        for word in re.findall(r"\bmake ([a-z][a-z0-9 -]*)", line):
            wrong += [f"make {w}" for w in word.split() if w not in words_of_make()]
        for module in re.findall(r"-m ((?:megatron_mopd|mopd_kernels)[\w.]*)", line):
            place = ROOT / module.replace(".", "/")
            there = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
            wrong += [] if there else [f"-m {module}"]
        for path in re.findall(r"(?<![\w/.])((?:examples|tools|tests)/[\w./-]+)", line):
            wrong += [] if (ROOT / path).exists() else [path]
    assert commands(document) and not wrong


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_named_files_of_the_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    targets += re.findall(r"`((?:megatron_mopd|kernels|tools|examples|tests)/[\w./-]+)`", text)
    bare = re.findall(r"`(\w+\.py)`", text)  # beside the file of a row of README's table: in the same folder
    assert not [t for t in targets if not (ROOT / t).exists()]
    assert not [name for name in bare if not any((ROOT / d / name).exists() for d in ("", "megatron_mopd", "tools"))]


def test_readme_shows_a_command_before_line_25() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("```") for line in lines[:24])


def test_demo_and_test_install_by_themselves() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in ("lint", "test", "test-slow", "demo", "bench"):
        assert re.search(rf"^{word}: \$\(STAMP\)", makefile, flags=re.MULTILINE), word


def pins() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, flags=re.MULTILINE))


def test_lock_names_no_place_and_hashes_everything() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    line = re.compile(r"[a-z0-9.-]+==[^\s;/:@]+( ; [\w\s.'\"<>=()]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert not [t for t in text.splitlines() if not line.fullmatch(t)]
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins()) and all("--hash=sha256:" in e for e in entries)


def test_lock_holds_the_versions_this_project_is_measured_with() -> None:
    held = pins()
    assert {n: held[n] for n in ("torch", "megatron-core", "transformers")} == {
        "torch": "2.13.0",
        "megatron-core": "0.19.2",
        "transformers": "5.23.0",
    }
    assert tuple(int(x) for x in held["numpy"].split(".")[:2]) < (2, 4)


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    given: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    return given


def test_distribution_holds_two_packages_and_light_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    given = setup_arguments(monkeypatch)
    assert {p.split(".")[0] for p in given["packages"]} == {"megatron_mopd", "mopd_kernels"}
    assert "megatron_mopd.objectives" in given["packages"]
    assert {re.split(r"[^\w-]", r)[0] for r in given["install_requires"]} == {"torch", "triton", "numpy"}
    extras = [re.split(r"[^\w-]", r)[0] for group in given["extras_require"].values() for r in group]
    assert "megatron-core" in extras and "apex" not in extras  # apex on PyPI is not NVIDIA's
    locked = {*extras} - {re.split(r"[^\w-]", r)[0] for r in given["extras_require"]["gpu"]}
    assert locked <= pins().keys()
