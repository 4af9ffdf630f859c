from hf_moe_lmc.families.layouts import GATE_UP_DOWN
from hf_moe_lmc.family import MoEFamily, register

SPARSE_STEP = "layer not in (mlp_only_layers or []) and num_experts > 0 and (layer + 1) % decoder_sparse_step == 0"

register(
    MoEFamily(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        router="softmax",
        units="swiglu",
        weights={
            **GATE_UP_DOWN,
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
        weights=GATE_UP_DOWN,
        sizes={"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        moe_layers=SPARSE_STEP,
    )
)
