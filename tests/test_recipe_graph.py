"""The graph of a recipe: who came of whom as data, and a picture in which no line runs behind a box."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mopd.recipe import graph, graph_plot
from megatron_mopd.recipe.graph_layout import BOX, Layout, arrange
from megatron_mopd.recipe.schema import Recipe, Stage, load_recipe

EXAMPLES = sorted(p for p in (Path(__file__).parents[1] / "examples").glob("*.yaml") if "\nstages:" in p.read_text())
SFT = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "run": {"steps": 2}}
TEACHERS = {"one": ["a"], "two": ["b"]}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    stages = [
        {"name": "student", "settings": SFT},
        {"name": "one", "initial": "student", "settings": SFT},
        {"name": "two", "initial": "student", "settings": SFT},
        {"name": "look", "type": "preflight", "initial": "student", "teachers": TEACHERS},
        {
            "name": "warm",
            "initial": "student",
            "after": "look",
            "teachers": TEACHERS,
            "settings": SFT | {"source": {"type": "traces"}},
        },
        {"name": "mopd", "initial": "warm", "teachers": TEACHERS, "settings": {"run": {"steps": 3}}},
        {
            "name": "boosted",
            "initial": "mopd",
            "settings": {"objective": {"type": "mtp_boosting"}, "run": {"steps": 1}},
        },
        {"name": "small", "type": "quantize", "initial": "boosted", "settings": {"recipe": "ultra-ptq"}},
    ]
    data = [
        {"type": "reasoning_gym", "domain": d, "family": "spell_backward", "size": 4, "template": d + " {word}"}
        for d in "ab"
    ]
    tree = {"dir": str(tmp_path / "runs"), "common": {"data": {"train": data}}, "stages": stages}
    tree["common"]["batching"] = {"sequences_per_step": 4}  # type: ignore[index]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path, [])


def finish(recipe: Recipe, name: str, **files: Any) -> None:
    directory = recipe.dir / name
    directory.mkdir(parents=True)
    (directory / "stage.json").write_text(json.dumps({"fingerprint": "", "finished": True}))
    for file, tree in files.items():
        (directory / f"{file}.json").write_text(json.dumps(tree))


def edges(made: graph.Graph) -> set[tuple[str, str, str]]:
    return {(edge["source"], edge["kind"], edge["target"]) for edge in made["edges"]}


def test_a_planned_recipe_is_all_there(recipe: Recipe) -> None:
    made = graph.write(recipe)
    assert made == json.loads((recipe.dir / "graph.json").read_text())
    nodes = {node["name"]: node for node in made["nodes"]}
    assert [nodes[name]["what"] for name in ("student", "look", "warm", "mopd", "boosted", "small")] == [
        "SFT, 2 steps",
        "overlap, decisions",
        "warm-up on traces, 2 steps",
        "MOPD, 3 steps",
        "MTP boosting, 1 steps",
        "ultra-ptq",
    ]
    assert nodes["mopd"]["domains"] == ["a", "b"] and nodes["mopd"]["checkpoint_id"] is None
    assert {node["state"] for node in made["nodes"]} == {"planned"}
    taught = {(name, kind, who) for name in TEACHERS for kind, who in (("traces", "warm"), ("teacher", "mopd"))}
    assert edges(made) == taught | {
        ("student", "initial", "one"),
        ("student", "initial", "two"),
        ("student", "measured", "look"),
        ("one", "measured", "look"),
        ("two", "measured", "look"),
        ("look", "decides", "warm"),
        ("student", "initial", "warm"),
        ("warm", "initial", "mopd"),
        ("mopd", "initial", "boosted"),
        ("boosted", "quantized", "small"),
    }
    assert next(e["domains"] for e in made["edges"] if (e["source"], e["target"]) == ("two", "mopd")) == ["b"]


def test_a_finished_recipe_names_what_it_found(recipe: Recipe) -> None:
    for name in ("student", "one", "two"):
        finish(recipe, name)
        place = recipe.dir / name / "checkpoints" / "iter_0000002"
        place.mkdir(parents=True)
        for file, text in ((".metadata", ""), ("metadata.json", "{}")):
            (place / file).write_text(text)
        (place / "mopd_manifest.json").write_text(json.dumps({"checkpoint_id": f"id of {name}"}))
    entries = {"one": {"decision": "go"}, "two": {"decision": "warm_up"}}
    finish(recipe, "look", preflight={"teachers": entries})
    finish(recipe, "small", result={"quantized": {"bits_per_element": 4.854}})
    made = graph.build(recipe)
    nodes = {node["name"]: node for node in made["nodes"]}
    assert nodes["two"]["checkpoint_id"] == "id of two" and nodes["warm"]["state"] == "planned"
    assert nodes["look"]["note"] == "1 go, 1 warm up" and nodes["small"]["note"] == "4.85 bits a parameter"
    assert {e for e in edges(made) if e[1] == "traces"} == {("two", "traces", "warm")}  # the only one in need


def test_teachers_that_came_as_checkpoints_are_in_it(recipe: Recipe, tmp_path: Path) -> None:
    """One node each, whatever they teach; two checkpoints of one name are two."""

    def given(place: str, *domains: str) -> dict[str, Any]:
        return {"checkpoint": str(tmp_path / place), "domains": list(domains)}

    outside = {"look": given("mine", "b"), "warm": given("mine", "b"), "mopd": given("other", "b")}

    def from_outside(stage: Stage) -> Stage:
        if stage.name not in outside:
            return stage
        settings = stage.settings | {"teachers": {"mine": outside[stage.name]}}
        return stage.model_copy(update={"teachers": {"one": ["a"]}, "settings": settings})

    made = graph.build(recipe.model_copy(update={"stages": [from_outside(stage) for stage in recipe.stages]}))
    nodes = {node["name"]: node for node in made["nodes"] if node["type"] == "external"}
    assert list(nodes) == ["mine", f"mine, {tmp_path / 'other'}"]
    assert {(n["state"], tuple(n["domains"]), n["checkpoint_id"]) for n in nodes.values()} == {("given", ("b",), None)}
    found = edges(made)
    assert {("mine", "measured", "look"), ("mine", "traces", "warm"), ("one", "teacher", "mopd")} <= found
    assert (f"mine, {tmp_path / 'other'}", "teacher", "mopd") in found and ("mine", "teacher", "mopd") not in found
    graph_plot.save(made, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 1000


def test_what_starts_from_a_skipped_warm_up_starts_from_its_start(recipe: Recipe) -> None:
    entries = {name: {"decision": "go"} for name in TEACHERS}
    finish(recipe, "look", preflight={"teachers": entries})
    (recipe.dir / "warm").mkdir()
    (recipe.dir / "warm" / "skipped.json").write_text("{}")
    found = edges(graph.build(recipe))
    assert ("student", "initial", "mopd") in found and not {e for e in found if e[0] == "warm" or e[1] == "traces"}


# --------------------------------------------------------------------------- the picture


def layouts() -> list[Layout]:
    made = [graph.build(load_recipe(path, [])) for path in EXAMPLES]
    return [
        arrange([n["name"] for n in g["nodes"]], [(e["source"], e["target"], e["kind"]) for e in g["edges"]])
        for g in made
    ]


def test_boxes_keep_apart_and_lines_run_from_left_to_right() -> None:
    for layout in layouts():
        for (x0, y0), (x1, y1) in combinations(layout.boxes.values(), 2):
            assert abs(x0 - x1) > BOX[0] or abs(y0 - y1) > BOX[1] + 0.1
        for (source, target, _), points in layout.lines.items():
            assert points[0][0] == layout.boxes[source][0] + BOX[0] / 2
            assert points[-1][0] == layout.boxes[target][0] - BOX[0] / 2
            assert [x for x, _ in points] == sorted(x for x, _ in points)
            assert abs(points[-1][1] - layout.boxes[target][1]) < BOX[1] / 2


def test_no_line_runs_behind_a_box() -> None:
    for layout in layouts():
        for points in layout.lines.values():
            for (left, y), (right, level) in zip(points[1:-1:2], points[2:-1:2], strict=True):  # within a layer
                assert y == level
                for x, height in layout.boxes.values():
                    inside = left - 0.01 <= x - BOX[0] / 2 and x + BOX[0] / 2 <= right + 0.01
                    assert not inside or abs(height - y) > BOX[1] / 2


def test_lines_that_share_no_source_keep_apart() -> None:
    for layout in layouts():
        lanes = {
            (edge[0], edge[2], points[i][0]): points[i][1]
            for edge, points in layout.lines.items()
            for i in range(1, len(points) - 1, 2)
        }
        for (one, y), (other, level) in combinations(lanes.items(), 2):
            assert one[2] != other[2] or abs(y - level) > 0.15


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_text_of_a_box_fits_it(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import FancyBboxPatch

    made = graph.build(load_recipe(path, ["dir=runs/nowhere"]))
    for node in made["nodes"]:
        node["checkpoint_id"] = "0123456789abcdef" * 4
    figure = graph_plot.figure(made)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    boxes = [p.get_window_extent(canvas.get_renderer()) for p in axes.patches if isinstance(p, FancyBboxPatch)]
    assert len(boxes) == len(made["nodes"])
    for text in axes.texts:
        extent = text.get_window_extent(canvas.get_renderer())
        (around,) = [b for b in boxes if b.contains((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)]
        assert around.x0 <= extent.x0 and extent.x1 <= around.x1 and around.y0 - 1 <= extent.y0, text.get_text()


def test_the_same_graph_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    made = graph.build(recipe)
    for name in ("a.png", "b.png"):
        graph_plot.save(made, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_chain_of_one_stage_is_drawn(tmp_path: Path) -> None:
    node = {"name": "only", "type": "train", "what": "SFT", "domains": [], "state": "planned", "note": ""}
    graph_plot.save({"nodes": [node | {"checkpoint_id": None}], "edges": []}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000
