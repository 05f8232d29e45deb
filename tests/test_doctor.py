"""doctor: what it finds, what it calls missing, and that it never imports what it only looks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mopd import doctor
from megatron_mopd.doctor import Row


def _rows(rows: Iterator[Row] | list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def here() -> dict[str, Row]:
    return _rows(doctor.probe())


def test_this_machine_has_what_it_needs(here: dict[str, Row]) -> None:
    assert [row for row in here.values() if row.status == "missing"] == []
    assert here["python"].value.startswith("3.12") and here["python"].status == "ok"
    assert here["torch"].value == importlib.metadata.version("torch")
    assert here["megatron-core"].value.startswith("0.19.") and here["megatron-core"].status == "ok"
    assert here["triton"].status == "ok"
    assert "GiB free" in here["host memory"].value


def test_every_row_gives_its_reason(here: dict[str, Row]) -> None:
    for row in here.values():
        assert row.name and row.value and row.reason
        assert row.status in ("ok", "absent", "acts", "warning", "missing")


def test_resolutions_are_those_of_a_run(here: dict[str, Row]) -> None:
    from megatron_mopd import presets

    cuda = torch.cuda.is_available()
    assert here["precision"].value == presets.resolve_precision("auto", torch.device("cuda" if cuda else "cpu"))
    assert here["backend"].value == ("nccl" if cuda else "gloo")


@pytest.mark.parametrize("interpreted", [True, False])
def test_log_ratio_kernels_are_those_that_auto_resolves_to(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> None:
    monkeypatch.setattr("mopd_kernels.dispatch.interpreting", lambda: interpreted)
    (row,) = doctor._kernels()
    assert importlib.metadata.version("triton") in row.reason and "kernels.impl auto" in row.reason
    if not torch.cuda.is_available():
        assert (row.value, row.status) == ("reference", "ok") and "no CUDA" in row.reason
        assert ("TRITON_INTERPRET=1" in row.reason) is not interpreted
    else:
        assert (row.value, row.status) == ("triton", "warning" if interpreted else "ok")


def test_kernels_that_cannot_run_on_a_device_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, **options))
    monkeypatch.setattr("mopd_kernels.dispatch.interpreting", lambda: False)
    (row,) = doctor._kernels()
    assert (row.value, row.status) == ("reference", "warning") and "tensors on cpu" in row.reason


def test_a_plan_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "megatron_mopd.memory.report", None)
    monkeypatch.delattr("megatron_mopd.memory.report", raising=False)
    assert doctor.main(["--preset", "tiny", "--world", "1"]) == 1
    assert "pip install -e '.[train]'" in capsys.readouterr().err


def test_stand_ins_are_listed_with_their_reasons(here: dict[str, Row]) -> None:
    from megatron_mopd import host, local_spec

    if not torch.cuda.is_available():
        for remedy in host.REMEDIES:
            assert here[f"host: {remedy.name}"] == Row(f"host: {remedy.name}", remedy.where, "acts", remedy.reason)
    if not local_spec.have_transformer_engine():
        assert "no transformer-engine" in here["local_spec: LayerNormColumnLinear"].value
        acting = {name.removeprefix("local_spec: ") for name in here if name.startswith("local_spec: ")}
        assert acting == {stand_in.__name__ for stand_in in local_spec.STAND_INS}


@pytest.mark.parametrize(("engine", "mamba"), [(True, False), (False, True)])
def test_only_the_stand_ins_of_the_absent_package_act(
    monkeypatch: pytest.MonkeyPatch, engine: bool, mamba: bool
) -> None:
    from megatron_mopd import local_spec

    monkeypatch.setattr(local_spec, "have_transformer_engine", lambda: engine)
    monkeypatch.setattr(local_spec, "have_mamba_ssm", lambda: mamba)
    rows = _rows(doctor._stand_ins())
    assert ("local_spec: LayerNormColumnLinear" in rows) is not engine
    assert ("local_spec: GatedRMSNorm" in rows) is not mamba


def test_no_stand_in_acts_where_everything_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd import local_spec

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(local_spec, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(local_spec, "have_mamba_ssm", lambda: True)
    assert {row.status for row in doctor._stand_ins()} == {"ok"}


def test_an_installed_package_that_does_not_import_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd import local_spec

    monkeypatch.setattr(local_spec, "have_mamba_ssm", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: "2.2.6" if name == "mamba-ssm" else None)
    row = _rows(doctor._stand_ins())["mamba-ssm import"]
    assert (row.value, row.status) == ("2.2.6", "warning") and "rebuild" in row.reason


# ------------------------------------------------------------------ requirements


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("torch", "2.10.1", "missing"),
        ("torch", "2.11.0+cu130", "ok"),
        ("torch", "2.15.0a0", "ok"),
        ("torch", "2.16.0", "missing"),
        ("megatron-core", "0.18.2", "missing"),
        ("megatron-core", "0.19.2", "ok"),
        ("megatron-core", "0.20.0", "missing"),
        ("einops", None, "missing"),
        ("transformer-engine", None, "absent"),
        ("transformer-engine", "2.9.0", "ok"),
    ],
)
def test_versions_are_held_against_the_requirements(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, status: str
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: version if n == name else real(n))
    row = _rows(doctor._requirements())[name]
    assert row.status == status
    assert row.value == (version or "not installed")
    if status == "missing":
        assert f"pip install '{name}" in row.reason


def test_developers_tools_are_no_requirement(here: dict[str, Row]) -> None:
    assert not {"ruff", "pytest", "pre-commit"} & here.keys()


def test_a_checkout_that_is_not_installed_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    (row,) = doctor._requirements()
    assert row.status == "missing" and "pip install -e '.[train]'" in row.reason


@pytest.mark.parametrize(("version", "status"), [((3, 11), "missing"), ((3, 12), "ok"), ((3, 13), "warning")])
def test_python_is_held_against_its_version(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1, "final", 0))
    (row,) = doctor._python()
    assert row.status == status


# ------------------------------------------------------------------ apex


def _fake_package(monkeypatch: pytest.MonkeyPatch, folder: Path, *parts: str) -> None:
    """A package apex that must not be imported, with the given subfolders."""
    package = folder / "apex"
    for part in ("", *parts):
        (package / part).mkdir(parents=True, exist_ok=True)
        (package / part / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(folder))


def test_nvidias_apex_is_known_by_its_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_package(monkeypatch, tmp_path, "multi_tensor_apply", "optimizers")
    (row,) = doctor._apex()
    assert row.status == "warning" and "without CUDA extensions" in row.value and doctor.APEX_BUILD in row.reason
    (tmp_path / "amp_C.py").write_text("raise AssertionError('imported')\n")
    importlib.invalidate_caches()
    (row,) = doctor._apex()
    assert row.status == "ok" and "amp_C" in row.reason and "fused_weight_gradient_mlp_cuda" not in row.reason


def test_another_apex_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_package(monkeypatch, tmp_path, "models")
    (row,) = doctor._apex()
    assert row.status == "warning" and "another project" in row.reason and str(tmp_path) in row.value


def test_apex_is_never_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = doctor._apex()
    assert row.status == "absent" and "github.com/NVIDIA/apex" in row.reason
    assert not any(line.startswith("apex") for line in importlib.metadata.requires(doctor.DISTRIBUTION) or [])


# ------------------------------------------------------------------ the program


@pytest.mark.parametrize("rich", [True, False])
def test_exit_status_and_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rich: bool) -> None:
    if not rich:
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    rows = [Row("torch", "2.13[cu]", "ok", "because"), Row("wandb", "not installed", "absent", "optional")]
    monkeypatch.setattr(doctor, "PROBES", (lambda: iter(rows),))
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "2.13[cu]" in said and "optional" in said and "this machine can train" in said
    rows.append(Row("einops", "not installed", "missing", "pip install einops"))
    assert doctor.main() == 1
    assert "missing: einops" in capsys.readouterr().out


def test_the_program_runs_as_documented() -> None:
    result = subprocess.run([sys.executable, "-m", "megatron_mopd.doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "this machine can train" in result.stdout
    assert "Warning" not in result.stderr


def test_importing_it_imports_no_third_party_package() -> None:
    code = (
        "import sys; before = set(sys.modules); import megatron_mopd.doctor;"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['megatron_mopd']"
