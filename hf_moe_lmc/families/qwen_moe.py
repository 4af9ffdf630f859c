from hf_moe_lmc.family import MoEFamily, register

EXPERTS = {
    "mlp.gate.weight": "router: expert model",
    "mlp.experts.{expert}.gate_proj.weight": "gate: unit model",
    "mlp.experts.{expert}.up_proj.weight": "up: unit model",
    "mlp.experts.{expert}.down_proj.weight": "down: model unit",
    "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
    "mlp.experts.down_proj": "down: expert model unit",
}
SPARSE_STEP = "layer not in (mlp_only_layers or []) and num_experts > 0 and (layer + 1) % decoder_sparse_step == 0"

register(
    MoEFamily(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        router="softmax",
        units="swiglu",
        weights={
            **EXPERTS,
            "mlp.shared_expert.gate_proj.weight": "shared_gate: shared model",
            "mlp.shared_expert.up_proj.weight": "shared_up: shared model",
            "mlp.shared_expert.down_proj.weight": "shared_down: model shared",
            "mlp.shared_expert_gate.weight": "shared_router: 1 model",
        },
        sizes={
            "expert": "num_experts",
            "unit": "moe_intermediate_size",
            "shared": "shared_expert_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=SPARSE_STEP,
    )
)

register(
    MoEFamily(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        router="softmax",
        units="swiglu",
        weights=EXPERTS,
        sizes={"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        moe_layers=SPARSE_STEP,
    )
)
