from hf_moe_lmc.families.layouts import GATE_UP_DOWN
from hf_moe_lmc.family import MoEFamily, register

WEIGHTS = {
    **GATE_UP_DOWN,
    # n_shared_experts are one MLP on disk and in the forward pass
    "mlp.shared_experts.gate_proj.weight": "shared_gate: shared model",
    "mlp.shared_experts.up_proj.weight": "shared_up: shared model",
    "mlp.shared_experts.down_proj.weight": "shared_down: model shared",
}
SIZES = {
    "expert": "n_routed_experts",
    "unit": "moe_intermediate_size",
    "shared": "(n_shared_experts or 0) * moe_intermediate_size",
    "model": "hidden_size",
}

register(
    MoEFamily(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        router="softmax",
        units="swiglu",
        weights=WEIGHTS,
        sizes=SIZES,
        moe_layers="layer >= first_k_dense_replace",
        groups="n_group if topk_method == 'group_limited_greedy' and topk_group < n_group else 1",
    )
)

register(
    MoEFamily(
        name="deepseek_v3",
        model_types=("deepseek_v3",),
        router="sigmoid",
        units="swiglu",
        weights={**WEIGHTS, "mlp.gate.e_score_correction_bias": "correction_bias: expert"},
        sizes=SIZES,
        moe_layers="layer >= first_k_dense_replace",
        groups="n_group if (n_group or 1) > 1 and topk_group < n_group else 1",
        extra_layers="num_nextn_predict_layers",
    )
)
