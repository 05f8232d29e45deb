"""The demo's path from a directory of transformers' ``save_pretrained`` to one that ``from_pretrained`` loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_nemotron_h import saved_with_tokenizer

from megatron_mopd import torch_dist

ROOT = Path(__file__).parents[1]


def saved(path: Path, seed: int, **changes: Any) -> None:
    saved_with_tokenizer(path, "ME*-", seed, **{"moe_latent_size": None, "initializer_range": 0.02} | changes)


def recipe(path: Path, student: Path, teacher: Path) -> Path:
    """The demo with few steps and tasks: a base model from ``student``, one of three specialists read from ``teacher``,
    and the merged student given away."""
    tree = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    tree["dir"] = str(path.parent / "runs")
    common, stages = tree["common"], tree["stages"]
    common["model"] = {"initial": str(student), "max_sequence_length": 64}
    common["tokenizer"] = {"type": "huggingface", "path": str(student)}
    common["rollout"] |= {"prompts_per_step": 8, "max_new_tokens": 6}
    common["batching"] = {"micro_batch_size": 8, "sequences_per_step": 8}
    common["evaluation"] |= {"every": 0, "samples": 4, "final_samples": 4}
    for entry in [*common["data"]["train"], *common["data"]["held_out"]]:
        entry["size"] = 40
    for stage in stages:
        settings = stage["settings"]
        settings.setdefault("run", {})["steps"] = 2
        for entry in settings.get("data", {}).get("train", []):
            entry["size"] = 40
    gone, merged = stages[-2], stages[-1]
    domains = merged["teachers"].pop(gone["name"])
    merged["settings"]["teachers"] = {"directory": {"checkpoint": str(teacher), "domains": domains}}
    merged["settings"]["checkpoint"] = {"export": "hugging_face"}
    tree["stages"] = [*stages[:-2], merged]
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_saved_model_goes_through_the_demo_and_comes_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved(tmp_path / "student", 1)
    saved(tmp_path / "teacher", 2, hidden_size=96)  # of its own architecture
    file = recipe(tmp_path / "recipe.yaml", tmp_path / "student", tmp_path / "teacher")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=29543"]
    command += ["-m", "megatron_mopd.runner", str(file), "parallel.tensor=2"]
    subprocess.run(command, check=True, timeout=900, cwd=ROOT)
    merged = tmp_path / "runs" / "mopd"
    assert len(list((tmp_path / "runs" / "converted").iterdir())) == 2
    manifest = json.loads((merged / "checkpoints/iter_0000002/mopd_manifest.json").read_text())
    assert set(manifest["teachers"]) >= {"directory"} and len(manifest["teachers"]) == 3
    index = torch_dist.open_index(merged / "checkpoints" / "iter_0000002")
    out, before = (load_file(p / "model.safetensors") for p in (merged / "hugging_face", tmp_path / "student"))
    assert out.keys() == before.keys()
    vocabulary = len(out["lm_head.weight"])
    for name, stored in (
        ("lm_head.weight", "output_layer.weight"),
        ("backbone.layers.1.mixer.gate.weight", "decoder.layers.1.mlp.router.weight"),
        ("backbone.layers.0.mixer.out_proj.weight", "decoder.layers.0.mixer.out_proj.weight"),
    ):
        assert torch.equal(torch_dist.read(index, stored)[:vocabulary], out[name])
    assert not torch.equal(out["lm_head.weight"], before["lm_head.weight"])
    shutil.rmtree(tmp_path / "student")  # nothing is needed beside the export
    loaded: Any = AutoModelForCausalLM.from_pretrained(merged / "hugging_face", output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = AutoTokenizer.from_pretrained(merged / "hugging_face").apply_chat_template(
        [{"role": "user", "content": "back word"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 4
