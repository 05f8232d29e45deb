"""What conversion refuses before it writes, and what it survives: damaged files, NaN, full disks, kills, low memory."""

from __future__ import annotations

import builtins
import io
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mopd import conversion, names, torch_dist
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config, inspection, jobs
from megatron_mopd.conversion import weights as views
from megatron_mopd.conversion.partial_directory import DiskFullError, open_partial

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "vocab_size": 50, "hidden_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "ssm_state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_latent_size": 12,
    "moe_shared_expert_intermediate_size": 24, "routed_scaling_factor": 2.5,
}  # fmt: skip
UP = "backbone.layers.3.mixer.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def source(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Hugging Face directory of random tensors in two shards."""
    path.mkdir(parents=True)
    config = CONFIG | changes
    (path / "config.json").write_text(json.dumps(config))
    model = hugging_face_config.architecture(config, "test")
    shapes = hugging_face_config.megatron_shapes(model)
    tensors = {}
    for piece in names.hugging_face_pieces(shapes):
        shape = names.layout(piece, shapes, model.preset.num_query_groups, model.preset.vocab_size).shape
        tensors[piece.name] = torch.randn(shape).to(dtype)
    put(path, tensors)
    return path


def put(path: Path, tensors: dict[str, Tensor]) -> None:
    order = sorted(tensors)
    placed = {name: FIRST if i < len(order) // 2 else SECOND for i, name in enumerate(order)}
    for file in (FIRST, SECOND):
        save_file({n: t.contiguous() for n, t in tensors.items() if placed[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def get(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = get(path)
    edit(tensors)
    put(path, tensors)


def change_index(path: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    file = path / "model.safetensors.index.json"
    tree = json.loads(file.read_text())
    edit(tree["weight_map"])
    file.write_text(json.dumps(tree))


def change_config(path: Path, **values: Any) -> None:
    tree = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def cut(file: Path, size: int) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(size)


def twice(path: Path) -> None:
    tensors = load_file(path / SECOND)
    save_file(tensors | {"backbone.embeddings.weight": torch.zeros(50, 32)}, path / SECOND)


# --------------------------------------------------------------------------- refused before anything is written

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: cut(p / SECOND, (p / SECOND).stat().st_size - 7), rf"{SECOND}: truncated, \d+ bytes of"),
    "no-header": (lambda p: cut(p / SECOND, 5), rf"{SECOND}: truncated, 5 bytes hold no whole header"),
    "not-safetensors": (lambda p: (p / FIRST).write_bytes(b"\x08" + bytes(7) + b"[1, 2] x" + bytes(99)), "damaged"),
    "missing-file": (lambda p: (p / SECOND).unlink(), rf": 1 problem, .*\n  files \(1\): {SECOND}: missing"),
    "elsewhere": (lambda p: change_index(p, lambda m: m.update({UP: FIRST})), "not in the file that the index names"),
    "outside": (lambda p: change_index(p, lambda m: m.update({UP: "../x.safetensors"})), "outside its directory"),
    "twice": (twice, rf"there twice \(1\): backbone.embeddings.weight \({FIRST} and {SECOND}\)"),
    "shape": (
        lambda p: change(p, lambda t: t.update({UP: torch.zeros(40, 31)})),
        rf"of another shape \(1\): {UP} \[40, 31\], expected \[40, 32\]",
    ),
    "missing": (lambda p: change(p, lambda t: t.pop(UP)), rf"missing \(1\): {UP}"),
    "unknown": (lambda p: change(p, lambda t: t.update({"backbone.x": torch.zeros(1)})), "unknown .*: backbone.x"),
    "bias": (
        lambda p: change(p, lambda t: t.update({"backbone.layers.3.mixer.up_proj.bias": torch.zeros(40)})),
        r"unknown to config.json \(1\): backbone.layers.3.mixer.up_proj.bias",
    ),
    "two-prefixes": (
        lambda p: change(p, lambda t: t.update({"model.norm_f.weight": t.pop("backbone.norm_f.weight")})),
        r"missing \(1\): backbone.norm_f.weight\n.*unknown to config.json \(1\): model.norm_f.weight",
    ),
    "both-storages": (
        lambda p: change(p, lambda t: t.update({"backbone.layers.2.mixer.experts.up_proj": torch.zeros(4, 16, 12)})),
        r"there twice \(4\): backbone.layers.2.mixer.experts.0.up_proj.weight",
    ),
    "quantised": (lambda p: change(p, lambda t: t.update({UP: t[UP].to(torch.int8)})), r"not converted .*torch.int8"),
    "mixed-dtypes": (
        lambda p: change(p, lambda t: t.update({"backbone.layers.1.mixer.k_proj.weight": torch.zeros(16, 32).half()})),
        "of different dtypes within one Megatron tensor .*linear_qkv",
    ),
    "no-mtp": (
        lambda p: change_config(p, num_nextn_predict_layers=1, mtp_layers_block_type=["attention", "moe"]),
        r"missing \(\d+\): mtp.layers.0.eh_proj.weight(.|\n)*--without-mtp",
    ),
    "unknown-mtp": (
        lambda p: change(p, lambda t: t.update({"mtp.layers.0.enorm.weight": torch.zeros(32)})),
        r"unknown to config.json \(1\): mtp.layers.0.enorm.weight(.|\n)*--without-mtp",
    ),
    "model-type": (lambda p: change_config(p, model_type="llama"), "model_type = 'llama'"),
    "pattern": (lambda p: change_config(p, hybrid_override_pattern="M*X-"), "'X' is no layer"),
    "two-patterns": (lambda p: change_config(p, layers_block_type=["moe"] * 4), "two spellings of the layers differ"),
    "no-pattern": (lambda p: change_config(p, hybrid_override_pattern=None), "has neither layers_block_type nor"),
    "dimension": (lambda p: change_config(p, head_dim=None), r"head_dim is missing, and the pattern has \*"),
    "groups": (lambda p: change_config(p, num_key_value_heads=3), "num_key_value_heads = 3 does not divide"),
    "no-config": (lambda p: (p / "config.json").unlink(), r"config.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_everything_named_and_nothing_written(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(source(tmp_path / "hf"))
    with pytest.raises(ConfigurationError) as raised:
        conversion.hugging_face_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert re.search(message, str(raised.value)), raised.value
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_one_error_lists_all_problems_and_long_lists_are_cut(tmp_path: Path) -> None:
    path = source(tmp_path / "hf", hybrid_override_pattern="M*E-" + "-" * 30)

    def edit(tensors: dict[str, Tensor]) -> None:
        for layer in range(5, 30):
            del tensors[f"backbone.layers.{layer}.norm.weight"]
        tensors["extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(49, 32)

    change(path, edit)
    with pytest.raises(ConfigurationError) as raised:
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron")
    text = str(raised.value)
    assert "27 problems, nothing was written" in text and "missing (25): backbone.layers.5.norm.weight, " in text
    assert "and 5 more" in text and "(1): extra" in text and "lm_head.weight [49, 32], expected [50, 32]" in text
    found = inspection.inspect(path, identify=False)
    assert found.tensors == len(get(path))
    assert {kind: len(items) for kind, items in found.problems.items()} == {
        "missing": 25, "unknown to config.json": 1, "of another shape": 1
    }  # fmt: skip


def test_mtp_can_be_left_out_whether_it_is_there_or_not(tmp_path: Path) -> None:
    mtp = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    with_mtp = source(tmp_path / "with", **mtp)
    trunk = {name: tensor for name, tensor in get(with_mtp).items() if not name.startswith("mtp.")}
    put(source(tmp_path / "without", **mtp), trunk)
    for kind in ("with", "without"):
        conversion.hugging_face_to_megatron(tmp_path / kind, tmp_path / f"m-{kind}", without_mtp=True)
        conversion.megatron_to_hugging_face(tmp_path / f"m-{kind}", tmp_path / f"back-{kind}")
        found = get(tmp_path / f"back-{kind}")
        assert found.keys() == trunk.keys() and all(torch.equal(found[name], trunk[name]) for name in trunk)
    conversion.hugging_face_to_megatron(with_mtp, tmp_path / "whole")
    conversion.megatron_to_hugging_face(tmp_path / "whole", tmp_path / "cut", without_mtp=True)
    assert get(tmp_path / "cut").keys() == trunk.keys()


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def overwrite(release: Path, content: Callable[[int], bytes]) -> None:
    chunk = torch_dist.open_index(release).tensors["decoder.layers.3.mlp.linear_fc2.weight"].chunks[0]
    with open(release / chunk.file, "r+b") as file:
        file.seek(chunk.start)
        file.write(content(chunk.length))


def hostile(marker: Path) -> Callable[[int], bytes]:
    stream = io.BytesIO()
    torch.save(_Attack(marker), stream)
    return lambda length: stream.getvalue().ljust(length, b"\0")


def other_manifest(release: Path) -> None:
    manifest = json.loads((release / "mopd_manifest.json").read_text())
    (release / "mopd_manifest.json").write_text(json.dumps(manifest | {"checkpoint_id": "0" * 64}))


def drop_chunk(release: Path) -> None:
    metadata = pickle.loads((release / ".metadata").read_bytes())
    del metadata.state_dict_metadata["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"].chunks[2]
    (release / ".metadata").write_bytes(pickle.dumps(metadata))


MEGATRON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda r: cut(r / "__0_0.distcp", 3000), r"__0_0.distcp: truncated, 3000 bytes of"),
    "overwritten": (lambda r: overwrite(r, bytes), r"linear_fc2.weight: damaged at byte \d+"),
    "hostile": (lambda r: overwrite(r, hostile(r / "marker")), "damaged|refused, its pickle uses posix.system"),
    "incomplete": (drop_chunk, r"the chunks of .*linear_fc1.weight hold 0 of 192 elements at \[2, 0, 0\]"),
    "exchanged": (other_manifest, "says checkpoint_id 000000000000, the tensors give"),
    "no-companion": (lambda r: (r / "hugging_face/tokenizer_config.json").unlink(), "config.json is missing; .*--like"),
}


@pytest.mark.parametrize(("damage", "message"), MEGATRON.values(), ids=MEGATRON.keys())
def test_damaged_megatron_directory_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source(tmp_path / "hf")
    (tmp_path / "hf/tokenizer_config.json").write_text("{}")
    conversion.hugging_face_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    damage(tmp_path / "megatron/release")
    with pytest.raises(ConfigurationError, match=message):
        conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "megatron/release/marker").exists()


def test_megatron_tensors_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    conversion.hugging_face_to_megatron(source(tmp_path / "hf"), tmp_path / "megatron")
    like = source(tmp_path / "like", hybrid_override_pattern="M*EM", intermediate_size=44)
    with pytest.raises(ConfigurationError) as raised:
        conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back", like=like)
    text = str(raised.value)
    assert "missing (8): backbone.layers.3.mixer.A_log, " in text
    assert "unknown to config.json (2): backbone.layers.3.mixer.down_proj.weight, " in text
    assert not list(tmp_path.glob("back*"))


def test_strange_tensors_and_objects_of_a_megatron_directory_are_named(tmp_path: Path) -> None:
    conversion.hugging_face_to_megatron(source(tmp_path / "hf"), tmp_path / "megatron")
    file = tmp_path / "megatron/release/.metadata"
    metadata = pickle.loads(file.read_bytes())
    state = metadata.state_dict_metadata
    for name, twin in (
        ("decoder.layers.0.mixer.gate_bias", "output_layer.weight"),
        ("decoder.layers.0.norm.weight", "decoder.layers.0.mixer.in_proj.layer_norm_weight"),
        ("decoder.layers.3.mlp.linear_fc1.secret", "output_layer._extra_state/shard_0_1"),
    ):
        state[name] = state[twin]
        places = {k: v for k, v in metadata.storage_data.items() if k.fqn == twin}
        metadata.storage_data |= {type(k)(name, k.offset): v for k, v in places.items()}
    del state["decoder.layers.0.mixer.in_proj.weight.dt"]
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigurationError) as raised:
        conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    text = str(raised.value)
    assert "(M, *, E, -) (1): 'decoder.layers.0.mixer.gate_bias'" in text and "secret" in text
    assert "there twice (1): 'backbone.layers.0.norm.weight'" in text
    assert "missing beside its other parts (1): 'decoder.layers.0.mixer.in_proj.weight.dt'" in text


# --------------------------------------------------------------------------- NaN, overwriting, room


def test_nan_is_named_and_passes_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WORKERS", 1)  # so that files before the one with NaN are whole
    path = source(tmp_path / "hf", torch.bfloat16)
    change(path, lambda t: t[UP].view(-1)[17:18].fill_(float("nan")))
    with pytest.raises(ConfigurationError, match=rf"NaN in {UP}; .*--allow-nan"):
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron", shards=3)
    assert not (tmp_path / "megatron").exists()
    with caplog.at_level(logging.WARNING):
        done = conversion.hugging_face_to_megatron(path, tmp_path / "megatron", shards=3, allow_nan=True)
    assert done.nan == (UP,) and f"NaN in {UP}" in caplog.text and done.resumed > 0
    with pytest.raises(ConfigurationError, match=f"NaN in {UP}"):
        conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    conversion.megatron_to_hugging_face(tmp_path / "megatron", tmp_path / "back", allow_nan=True)
    assert inspection.differences(path, tmp_path / "back") == []


def test_infinity_is_no_nan(tmp_path: Path) -> None:
    path = source(tmp_path / "hf")
    change(path, lambda t: t[UP].view(-1)[:2].copy_(torch.tensor([float("inf"), -float("inf")])))
    assert not conversion.hugging_face_to_megatron(path, tmp_path / "megatron").nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_nan_is_seen_and_nothing_else(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    nan = every.view(dtype).isnan()
    assert not views.has_nan(memoryview(every[~nan].numpy()).cast("B"), dtype)
    for bits in every[nan]:
        block = torch.stack([every[0], bits, every[-1]])
        block[[0, 2]] = torch.tensor([-float("inf"), float("inf")], dtype=dtype).view(torch.int16)
        assert views.has_nan(memoryview(block.numpy()).cast("B"), dtype), hex(bits & 0xFFFF)


def test_nothing_is_overwritten_and_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = source(tmp_path / "hf"), tmp_path / "megatron"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(ConfigurationError, match="exists already and is not overwritten"):
        conversion.hugging_face_to_megatron(path, target)
    (target / "mine").unlink()  # an empty directory is no loss
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(ConfigurationError, match=r"[\d,]{6,} bytes are to be written and 1,000 are free"):
            conversion.hugging_face_to_megatron(path, target)
    with pytest.raises(ConfigurationError, match="lies inside"):
        conversion.hugging_face_to_megatron(path, path / "megatron")
    assert not list(target.iterdir()) and not (tmp_path / "megatron.partial").exists()
    conversion.hugging_face_to_megatron(path, target)


# --------------------------------------------------------------------------- full disks and kills


@pytest.mark.parametrize(
    ("direction", "options", "third"),
    [
        ("hugging_face_to_megatron", {"shards": 4}, "__2_0.distcp"),
        ("megatron_to_hugging_face", {"largest_shard": 20_000}, "model-00003-of-*"),
        ("hugging_face_to_megatron", {"shards": 4}, "mopd_manifest.json"),
    ],
)
def test_full_disk_is_an_error_with_numbers_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, options: dict[str, Any], third: str
) -> None:
    path = source(tmp_path / "hf")
    if direction == "megatron_to_hugging_face":
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron")
        path = tmp_path / "megatron"
    convert = getattr(conversion, direction)
    convert(path, tmp_path / "whole", **options)
    builtin, by_path, met = builtins.open, io.open, []
    monkeypatch.setattr(jobs, "WORKERS", 1)

    def full(opened: Callable[..., Any], file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if "w" in mode and Path(str(file)).match(third):
            met.append(file)
            file = "/dev/full"
        return opened(file, mode, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", partial(full, builtin))
        patch.setattr(io, "open", partial(full, by_path))  # pathlib's
        with pytest.raises(DiskFullError, match=r"No space left.* bytes are free, [\d,]{4,} bytes are still"):
            convert(path, tmp_path / "out", **options)
    assert met and not (tmp_path / "out").exists()
    done = convert(path, tmp_path / "out", **options)
    assert done.resumed > 0 and (done.resumed == done.size) == (third == "mopd_manifest.json")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_source_that_loses_its_end_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "hf")
    monkeypatch.setattr(jobs, "WORKERS", 1)

    def shorten(done: int, total: int) -> None:
        if done:
            cut(path / SECOND, 2000)

    with pytest.raises(ConfigurationError, match=f"{SECOND}: truncated while it was read; copy it again"):
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron", report=shorten)
    assert not (tmp_path / "megatron").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_mopd import conversion
from megatron_mopd.conversion import jobs
jobs.WORKERS = 1
def report(done, total):
    if done > 0.6 * total:
        os.kill(os.getpid(), signal.SIGKILL)
getattr(conversion, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]), report=report, **eval(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("direction", "options"),
    [("hugging_face_to_megatron", {"shards": 4}), ("megatron_to_hugging_face", {"largest_shard": 20_000})],
)
def test_killed_conversion_goes_on_behind_its_last_file(
    tmp_path: Path, direction: str, options: dict[str, Any]
) -> None:
    path = source(tmp_path / "hf")
    if direction == "megatron_to_hugging_face":
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron")
        path = tmp_path / "megatron"
    convert = getattr(conversion, direction)
    convert(path, tmp_path / "straight", **options)
    command = [sys.executable, "-c", KILLED, direction, str(path), str(tmp_path / "out"), repr(options)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "out.partial"
    assert partial.is_dir() and not (tmp_path / "out").exists()
    lines = (partial / ".journal.jsonl").read_text().splitlines()[1:]
    finished = {name: (partial / name).stat() for name in (json.loads(line)["file"] for line in lines)}
    assert finished
    with open(partial / ".journal.jsonl", "a") as journal:
        journal.write('{"file": "torn')  # power fails while a line is written
    done = convert(path, tmp_path / "out", **options)
    assert 0 < done.resumed < done.size and not partial.exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    for name, before in finished.items():
        after = (tmp_path / "out" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_unfinished_work_on_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "hf")
    with pytest.raises(InterruptedError):
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron", shards=3, report=interrupt)
    for other in ({"shards": 2}, {}):
        if not other:
            change(path, lambda t: t[UP].zero_())
        with pytest.raises(
            ConfigurationError, match=r"megatron.partial: holds an unfinished conversion of something else"
        ):
            conversion.hugging_face_to_megatron(path, tmp_path / "megatron", **{"shards": 3, **other})
    with (
        open_partial(tmp_path / "x", "mark", {}, 0),
        pytest.raises(ConfigurationError, match="another process is writing it"),
        open_partial(tmp_path / "x", "mark", {}, 0),
    ):
        pass


@pytest.mark.parametrize("kind", ["directory", "file", "source"])
def test_files_of_other_origin_under_the_partial_name_are_left_alone(tmp_path: Path, kind: str) -> None:
    path, partial = source(tmp_path / "hf"), tmp_path / "megatron.partial"
    if kind == "directory":
        partial.mkdir()
        (partial / "mine").write_text("precious")
    elif kind == "file":
        partial.write_text("precious")
    else:
        path = path.rename(partial)
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=r"megatron.partial: is in the way and no unfinished conversion; move"):
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron")
    assert contents(tmp_path) == before


def test_target_must_be_a_name_that_a_directory_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for target, what in (("../link", "is a link"), ("../dangling", "is a link"), (".", "no name"), ("..", "no name")):
        with pytest.raises(ConfigurationError, match=rf"^{re.escape(target)}: .*{what}.*; name a new directory"):
            conversion.hugging_face_to_megatron(path, Path(target))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "empty", "hf", "link"]


def test_target_that_appears_meanwhile_is_not_overwritten_and_no_work_is_lost(tmp_path: Path) -> None:
    path, target = source(tmp_path / "hf"), tmp_path / "megatron"

    def intrude(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("precious")

    with pytest.raises(ConfigurationError, match="exists already and is not overwritten"):
        conversion.hugging_face_to_megatron(path, target, report=intrude)
    assert contents(target) == {"mine": b"precious"}
    (target / "mine").unlink()
    done = conversion.hugging_face_to_megatron(path, target)
    assert done.resumed == done.size and inspection.differences(path, target) == []


def test_second_process_that_was_behind_the_first_does_not_do_its_work_again(tmp_path: Path) -> None:
    import fcntl

    target, lock = tmp_path / "x", fcntl.flock

    def first_finishes(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        target.mkdir()
        (target / "whole").write_text("")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", first_finishes)
        with pytest.raises(ConfigurationError, match="exists already"), open_partial(target, "mark", {}, 0):
            pytest.fail("began")


@pytest.mark.parametrize("text", ["garbage\n", "[1]\n", '{"fingerprint": "mark"}\n\0\0\n'])
def test_damaged_journal_is_an_error_with_a_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/.journal.jsonl").write_text(text)
    with (
        pytest.raises(ConfigurationError, match=r"\.journal\.jsonl: damaged: .*; remove .*x\.partial and start again"),
        open_partial(tmp_path / "x", "mark", {}, 0),
    ):
        pytest.fail("began")


def interrupt(done: int, total: int) -> None:
    if done > total // 2:
        raise InterruptedError


def test_a_journaled_file_that_is_not_as_noted_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WORKERS", 1)
    path = source(tmp_path / "hf")
    conversion.hugging_face_to_megatron(path, tmp_path / "straight", shards=3)
    with pytest.raises(InterruptedError):
        conversion.hugging_face_to_megatron(path, tmp_path / "megatron", shards=3, report=interrupt)
    cut(tmp_path / "megatron.partial/release/__0_0.distcp", 100)
    conversion.hugging_face_to_megatron(path, tmp_path / "megatron", shards=3)
    assert contents(tmp_path / "megatron") == contents(tmp_path / "straight")


# --------------------------------------------------------------------------- memory

MEASURED = """
import re, sys
from pathlib import Path
from megatron_mopd import conversion
def peak():  # of this program alone; getrusage's also knows the process that started it
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before, root = peak(), Path(sys.argv[1])
conversion.hugging_face_to_megatron(root / "hf", root / "megatron", shards=2)
middle = peak()
conversion.megatron_to_hugging_face(root / "megatron", root / "back")
print(middle - before, peak() - before)
"""


def test_memory_stays_far_below_the_largest_tensor(tmp_path: Path) -> None:
    """96 MiB in one tensor (and in one chunk of the Megatron directory), two files at a time."""
    path = source(tmp_path / "hf", torch.bfloat16, vocab_size=49_152, hidden_size=1024, tie_word_embeddings=True)
    change(path, lambda tensors: tensors.pop("lm_head.weight"))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for grown in map(int, done.stdout.split()):
        assert 0 < grown < 16 * 2**20, f"{grown:,} bytes"
    chunks = torch_dist.open_index(tmp_path / "megatron/release").tensors["embedding.word_embeddings.weight"].chunks
    assert len(chunks) == 1 and inspection.differences(path, tmp_path / "back") == []
