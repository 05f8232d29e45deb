"""The student: built from the configuration, alike on every layout in its hidden states, gradients and updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mopd.config import ConfigurationError, Model, Parallel

VOCAB = 101  # odd: padded to a multiple of the tensor parallel size
ONE = Parallel()
LAYOUTS = [
    pytest.param(2, Parallel(), id="dp2"),
    pytest.param(2, Parallel(tensor=2), id="tp2"),
    pytest.param(2, Parallel(tensor=2, dispatcher="allgather"), id="tp2-allgather"),
    pytest.param(2, Parallel(expert=2), id="ep2-alltoall"),
    pytest.param(2, Parallel(expert=2, dispatcher="allgather"), id="ep2-allgather"),
    pytest.param(2, Parallel(tensor=2, expert=2), id="tp2-ep2-two-ranks"),
    pytest.param(4, Parallel(tensor=2, expert=2), id="tp2-ep2-four-ranks"),
    pytest.param(4, Parallel(tensor=2, expert=2, expert_tensor=2, dispatcher="allgather"), id="tp2-ep2-etp2"),
]


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (4, length), generator=torch.Generator().manual_seed(1))


def built(parallel: Parallel, model: Model | None = None, **options: Any) -> tuple[Any, Any]:
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd import student

    groups = mopd_parallel.initialize(parallel, seed=42)
    return groups, student.build_model(model or Model(), parallel, groups, VOCAB, **options)


def wrapped(plain: Any, groups: Any, distributed: bool = False) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    return DistributedDataParallel(plain.config, settings, plain, pg_collection=groups.pg)


def loss_of(model: Any, groups: Any, mtp: bool) -> tuple[torch.Tensor, Any]:
    """This rank's part of a mean over all tokens whose gradient differs everywhere."""
    from megatron_mopd import student

    out = student.forward(model, tokens().chunk(groups.dp_size)[groups.dp_rank], mtp=mtp)
    target = torch.linspace(-1, 1, out.hidden.shape[-1])
    total = sum((h.float() - target).square().sum() for h in (out.hidden, *out.mtp_hidden))
    return total / (tokens().numel() * len(target)), out


def concat(value: torch.Tensor, axis: int, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, axis)


def whole(name: str, value: torch.Tensor, parameter: torch.Tensor, groups: Any) -> torch.Tensor:
    """A parameter-shaped tensor put together over tensor and expert parallel ranks; padded vocabulary rows cut off."""
    if ".experts." in name:
        return concat(concat(value, parameter.partition_dim, groups.pg.expt_tp), 0, groups.ep)
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    sizes = getattr(parameter, "partition_sizes", [value.shape[parameter.partition_dim]])
    blocks = value.split(sizes, parameter.partition_dim)
    full = torch.cat([concat(b, parameter.partition_dim, groups.tp) for b in blocks], parameter.partition_dim)
    return full[:VOCAB] if name.startswith(("embedding", "output_layer")) else full


def keep_map(maps: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        maps.setdefault(name, output[1])  # of the repeated MTP block: the first depth

    return hook


def train_once(parallel: Parallel, model: Model, mtp: bool = True) -> dict[str, Any]:
    """On one rank: hidden states, routing maps and whole gradients of one training step."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.router import TopKRouter

    groups, plain = built(parallel, model)
    ddp = wrapped(plain, groups)
    maps: dict[str, torch.Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(keep_map(maps, name))
    loss, out = loss_of(ddp, groups, mtp)
    loss.backward()
    finalize_model_grads([ddp], None, pg_collection=groups.pg)
    return {
        "dp_rank": groups.dp_rank,
        "hidden": concat(out.hidden.detach(), 0, groups.tp),
        "maps": {name: concat(m.view(out.hidden.shape[0], -1, m.shape[-1]), 0, groups.tp) for name, m in maps.items()},
        "gradients": {n: whole(n, p.main_grad, p, groups) for n, p in plain.named_parameters() if p.requires_grad},
    }


def joined(results: list[dict[str, Any]], key: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
    """Per-rank tensors ``[s, b/dp, ...]`` along the batch, one of each data-parallel rank."""
    by_rank = {r["dp_rank"]: key(r) for r in results}
    return torch.cat([by_rank[rank] for rank in sorted(by_rank)], 1)


@pytest.fixture(scope="module")
def one_rank(ranks: Any) -> dict[str, Any]:
    return ranks(1, train_once, ONE, Model())[0]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_layouts_agree_with_one_rank(ranks: Any, one_rank: dict[str, Any], world: int, parallel: Parallel) -> None:
    results = ranks(world, train_once, parallel, Model())
    torch.testing.assert_close(joined(results, lambda r: r["hidden"]), one_rank["hidden"], atol=1e-5, rtol=1e-4)
    for name, expected in one_rank["maps"].items():
        assert torch.equal(joined(results, lambda r, n=name: r["maps"][n]), expected), name
    for result in results:
        assert result["gradients"].keys() == one_rank["gradients"].keys()
        for name, expected in one_rank["gradients"].items():
            error = (result["gradients"][name] - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error < 1e-4, f"{name}: relative error {error:.2e}"


def losses(parallel: Parallel, precision: str, distributed: bool) -> dict[str, Any]:
    """On one rank: global losses and gradient norms of three Adam steps, and what the optimizer holds."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    groups, plain = built(parallel, precision=precision)
    ddp = wrapped(plain, groups, distributed)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=precision == "bf16",
        params_dtype=plain.config.params_dtype,
        use_distributed_optimizer=distributed,
        clip_grad=0.1,
        weight_decay=0.0,
    )
    optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False, pg_collection=groups.pg)
    history = []
    for _ in range(3):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss, _ = loss_of(ddp, groups, mtp=True)
        loss.backward()
        finalize_model_grads([ddp], None, pg_collection=groups.pg)
        success, norm, _ = optimizer.step()
        assert success
        total = loss.detach().clone()
        dist.all_reduce(total, group=groups.dp)
        if groups.tp_size > 1:  # each tensor parallel rank saw its part of the sequence
            dist.all_reduce(total, group=groups.tp)
        history.append((float(total), float(norm)))
    main = {p.dtype for o in optimizer.chained_optimizers for g in o.optimizer.param_groups for p in g["params"]}
    return {
        "history": torch.tensor(history),
        "main": main,
        "grads": {p.main_grad.dtype for p in plain.parameters() if p.requires_grad},
        "weights": {n: p.dtype for n, p in plain.named_parameters()},
    }


@pytest.mark.parametrize(("world", "parallel"), [LAYOUTS[0], LAYOUTS[1], LAYOUTS[3], LAYOUTS[6]])
def test_distributed_optimizer_takes_the_same_steps(ranks: Any, world: int, parallel: Parallel) -> None:
    expected = ranks(1, losses, ONE, "fp32", False)[0]["history"]
    for result in ranks(world, losses, parallel, "fp32", True):
        torch.testing.assert_close(result["history"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_keeps_fp32_main_parameters_and_gradients(ranks: Any, distributed: bool) -> None:
    exact = ranks(1, losses, ONE, "fp32", False)[0]["history"]
    for result in ranks(4, losses, Parallel(tensor=2, expert=2), "bf16", distributed):
        assert result["main"] == {torch.float32} and result["grads"] == {torch.float32}
        wide = {n.rpartition(".")[2] for n, dtype in result["weights"].items() if dtype == torch.float32}
        assert wide == {"A_log", "D"}  # as mcore keeps them
        torch.testing.assert_close(result["history"], exact, rtol=2e-2, atol=0)
        assert (result["history"][:, 0].diff() < 0).all()


def starting_weights(parallel: Parallel) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    groups, plain = built(parallel)
    full = {n: whole(n, p.detach(), p, groups) for n, p in plain.named_parameters()}
    copies = {n: p.detach() for n, p in plain.named_parameters() if not getattr(p, "tensor_model_parallel", False)}
    return groups.rank, full, copies


def test_a_seed_means_one_model_on_any_layout(ranks: Any) -> None:
    _, expected, _ = ranks(1, starting_weights, ONE)[0]
    for _, full, _ in ranks(4, starting_weights, Parallel(tensor=2, expert=2)):
        differing = [name for name, weight in expected.items() if not torch.equal(full[name], weight)]
        assert differing in (
            [],
            ["embedding.word_embeddings.weight", "output_layer.weight"],
        )  # padding shifts their draws


def test_duplicated_weights_start_equal_on_all_ranks(ranks: Any) -> None:
    results = ranks(4, starting_weights, Parallel(tensor=2, expert=2))
    copies = results[0][2]
    assert any("fc1_latent_proj" in name for name in copies) and any("router" in name for name in copies)
    for rank, _, others in results[1:]:
        for name, weight in copies.items():
            assert torch.equal(others[name], weight), f"{name} differs on rank {rank}"


def test_model_without_mtp_has_the_same_trunk(groups: Any) -> None:
    from megatron_mopd import student

    full = student.build_model(Model(), ONE, groups, VOCAB, mtp=True)
    bare = student.build_model(Model(), ONE, groups, VOCAB, mtp=False)
    assert student.has_mtp(full) and not student.has_mtp(bare)
    trunk = {name: p for name, p in full.named_parameters() if not name.startswith("mtp.")}
    assert trunk.keys() == dict(bare.named_parameters()).keys()
    assert all(torch.equal(p, trunk[name]) for name, p in bare.named_parameters())


@pytest.mark.parametrize(("world", "parallel"), [(1, ONE), (2, Parallel(tensor=2))])
def test_mtp_leaves_the_trunk_gradient_alone(ranks: Any, world: int, parallel: Parallel) -> None:
    with_mtp, without = (ranks(world, train_once, parallel, Model(), mtp) for mtp in (True, False))
    for one, other in zip(with_mtp, without, strict=True):
        for name, gradient in other["gradients"].items():
            if name.startswith("mtp."):
                assert one["gradients"][name].any() and not gradient.any(), name
            else:
                assert torch.equal(one["gradients"][name], gradient), name


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "shared_experts"]},
    ],
    ids=["full", "moe-and-attention", "mlp-and-shared-experts"],
)
def test_recomputation_gives_equal_gradients(ranks: Any, one_rank: dict[str, Any], options: dict[str, Any]) -> None:
    result = ranks(1, train_once, ONE, Model(override=options))[0]
    for name, expected in one_rank["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], expected, msg=lambda m, n=name: f"{n}: {m}")


def gathered(parallel: Parallel, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of gathered hidden states under a vocabulary-parallel consumer, which hands back a part per rank."""
    from megatron_mopd import student

    groups, plain = built(parallel)
    plain.config.sequence_parallel = sequence_parallel
    rows = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))
    local = rows.chunk(groups.tp_size)[groups.tp_rank] if sequence_parallel else rows
    local = local.clone().requires_grad_()
    flat = student.gather_hidden(local, groups, plain.config)
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).chunk(groups.tp_size, 1)[groups.tp_rank]
    (flat @ weight).square().sum().backward()
    assert local.grad is not None
    return flat.detach(), concat(local.grad, 0, groups.tp) if sequence_parallel else local.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gathered_hidden_states_sum_partial_gradients(ranks: Any, sequence_parallel: bool) -> None:
    flat, gradient = ranks(1, gathered, ONE, False)[0]
    for other_flat, other_gradient in ranks(2, gathered, Parallel(tensor=2), sequence_parallel):
        assert torch.equal(other_flat, flat)
        torch.testing.assert_close(other_gradient, gradient)


def test_output_weight_waits_for_parameters_that_are_gathered(groups: Any) -> None:
    from megatron_mopd import student

    plain = student.build_model(Model(), ONE, groups, VOCAB)
    waited: list[str] = []
    plain.output_layer.register_forward_pre_hook(lambda _module, *_: waited.append("output_layer"))
    assert student.forward(plain, tokens()).output_weight is plain.output_layer.weight
    assert waited == ["output_layer"]


def odd_length(parallel: Parallel) -> torch.Tensor:
    from megatron_mopd import student

    _, plain = built(parallel)
    plain.eval()
    with torch.no_grad(), student.sequence_parallel_off(plain):
        assert not plain.config.sequence_parallel
        hidden = student.forward(plain, tokens(7)).hidden
    assert plain.config.sequence_parallel == (parallel.tensor > 1)
    return hidden


@pytest.mark.parametrize(("world", "parallel"), [LAYOUTS[1], LAYOUTS[2], LAYOUTS[5], LAYOUTS[6], LAYOUTS[7]])
def test_any_length_fits_without_sequence_parallelism(ranks: Any, world: int, parallel: Parallel) -> None:
    expected = ranks(1, odd_length, ONE)[0]
    for hidden in ranks(world, odd_length, parallel):
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


def idle_experts(parallel: Parallel) -> bool:
    """All tokens alike: they choose the same experts, so most experts, here or on the other rank, see none."""
    from megatron_mopd import student

    _, plain = built(parallel)
    hidden = student.forward(plain, torch.full((2, 8), 5)).hidden
    hidden.square().sum().backward()
    experts = [p.grad for n, p in plain.named_parameters() if ".experts." in n and not n.startswith("mtp.")]
    return all(g is not None and bool(g.isfinite().all()) for g in experts)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_experts_without_tokens(ranks: Any, dispatcher: Any) -> None:
    assert all(ranks(2, idle_experts, Parallel(expert=2, dispatcher=dispatcher)))


def test_every_module_is_mcores_torchs_or_a_named_stand_in(groups: Any) -> None:
    from megatron_mopd import local_spec, student

    plain = student.build_model(Model(), ONE, groups, VOCAB)
    classes = {type(m) for m in plain.modules()}
    own = {c for c in classes if not c.__module__.startswith(("megatron.core.", "torch.nn."))}
    assert own and own <= local_spec.STAND_INS.keys()
    assert all(reason for reason in local_spec.STAND_INS.values())


def expert_bias_after_training(update: bool) -> tuple[bool, bool]:
    from megatron.core.distributed import finalize_model_grads

    groups, plain = built(ONE, Model(update_expert_bias=update))
    ddp = wrapped(plain, groups)
    before = {n: b.clone() for n, b in plain.named_buffers() if n.endswith("expert_bias")}
    loss_of(ddp, groups, mtp=True)[0].backward()
    finalize_model_grads([ddp], None, pg_collection=groups.pg)
    return bool(before), all(torch.equal(b, before[n]) for n, b in plain.named_buffers() if n in before)


@pytest.mark.parametrize("update", [False, True])
def test_expert_bias_moves_only_on_request(ranks: Any, update: bool) -> None:
    assert ranks(1, expert_bias_after_training, update)[0] == (True, not update)


@pytest.mark.parametrize("train", [False, True])
def test_router_is_trained_only_on_request(groups: Any, train: bool) -> None:
    from megatron_mopd import student

    plain = student.build_model(Model(train_router=train), ONE, groups, VOCAB)
    routers = [p for n, p in plain.named_parameters() if "router" in n]
    assert routers and all(p.requires_grad == train for p in routers)


def test_mopd_leaves_routing_to_the_checkpoint() -> None:
    from megatron_mopd import student

    config = student.transformer_config(Model(), Parallel(tensor=2, expert=2))
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0.0
    assert config.moe_z_loss_coeff is None and config.moe_expert_capacity_factor is None
    assert config.moe_router_dtype == "fp32" and config.sequence_parallel


def test_overrides_reach_mcores_fields_by_name() -> None:
    import torch.nn.functional as F

    from megatron_mopd import student

    config = student.transformer_config(
        Model(override={"moe_z_loss_coeff": 1e-3, "activation_func": "silu", "num_moe_experts": 4}), ONE
    )
    assert (config.moe_z_loss_coeff, config.activation_func, config.num_moe_experts) == (1e-3, F.silu, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"moe_router_top": 3}, "moe_router_top: .*did you mean 'moe_router_topk'"),
        ({"activation_func": "sqared_relu"}, "activation_func = 'sqared_relu': expected one of .*squared_relu"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["attention"]},
            "Megatron-Core refuses .*attention",
        ),
        ({"calculate_per_token_loss": False}, "calculate_per_token_loss = False: .*mathematics of the update"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor = 1.0: .*leave it out"),
        ({"sequence_parallel": True}, "sequence_parallel = True: follows other settings"),
        ({"overlap_p2p_comm": True}, "overlap_p2p_comm = True: .*it is False here"),
    ],
)
def test_bad_overrides_are_refused(override: dict[str, Any], message: str) -> None:
    from megatron_mopd import student

    with pytest.raises(ConfigurationError, match=message):
        student.transformer_config(Model(override=override), ONE)


def test_recomputation_that_needs_transformer_engine_is_refused(groups: Any) -> None:
    from megatron_mopd import local_spec, student

    if local_spec.have_transformer_engine():
        pytest.skip("transformer-engine is present")
    model = Model(override={"recompute_granularity": "selective", "recompute_modules": ["moe_act"]})
    with pytest.raises(ConfigurationError, match=r"recompute_modules = .*needs transformer-engine; without it use"):
        student.build_model(model, ONE, groups, VOCAB)


def test_checkpoint_names_are_transformer_engines(groups: Any) -> None:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_mopd import student

    plain = student.build_model(Model(), ONE, groups, VOCAB)
    state = plain.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    apply_factories(state)
    shapes = {v.key: v.global_shape for v in nested_values(state) if isinstance(v, ShardedTensor)}
    assert shapes["decoder.layers.0.mixer.in_proj.layer_norm_weight"] == (128,)
    assert shapes["decoder.layers.0.mixer.in_proj.weight.dt"] == (8, 128)
    assert shapes["decoder.layers.0.mixer.conv1d.weight.B"] == (64, 1, 4)
    assert shapes["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"] == (8, 128, 64)
    assert shapes["decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"] == (128,)
    assert shapes["mtp.layers.0.mtp_model_layer.layers.1.mlp.fc2_latent_proj.weight"] == (128, 64)
