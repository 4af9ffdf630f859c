from hf_moe_lmc.families.layouts import GROUPS, LISTED, SHARED_EXPERTS, W1_W2_W3
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="kimi_linear",
        model_types=("kimi_linear",),
        router="sigmoid",
        units="swiglu",
        weights={
            **W1_W2_W3,
            "block_sparse_moe.gate.e_score_correction_bias": "correction_bias: expert",
            "block_sparse_moe.shared_experts.gate_proj.weight": "shared_gate: shared model",
            "block_sparse_moe.shared_experts.up_proj.weight": "shared_up: shared model",
            "block_sparse_moe.shared_experts.down_proj.weight": "shared_down: model shared",
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            **SHARED_EXPERTS,
        },
        sizes={
            "expert": "num_experts",
            "unit": "moe_intermediate_size",
            "shared": "num_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=LISTED,
        groups=GROUPS,
    )
)
