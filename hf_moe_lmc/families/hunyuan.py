from hf_moe_lmc.families.layouts import (
    FUSED,
    GATE_UP_DOWN,
    GROUPS,
    LISTED,
    SHARED_BIASES,
    SHARED_EXPERTS,
    SHARED_EXPERTS_BIASES,
)
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="hunyuan_v1_moe",
        model_types=("hunyuan_v1_moe",),
        router="softmax",
        units="swiglu",
        weights={
            **{key: spec for key, spec in GATE_UP_DOWN.items() if key != "mlp.gate.weight"},
            "mlp.gate.wg.weight": "router: expert model",
            "mlp.shared_mlp.gate_proj.weight": "shared_gate: shared model",
            "mlp.shared_mlp.up_proj.weight": "shared_up: shared model",
            "mlp.shared_mlp.down_proj.weight": "shared_down: model shared",
        },
        sizes={"expert": "num_experts", "unit": "intermediate_size", "shared": "intermediate_size", "model": "hidden_size"},
        top_k="moe_topk if isinstance(moe_topk, int) else max(moe_topk)",  # a list has one entry per layer
    )
)

register(
    MoEFamily(
        name="hy_v3",
        model_types=("hy_v3",),
        router="sigmoid",
        units="swiglu",
        weights={
            **GATE_UP_DOWN,
            "mlp.router.gate.weight": "router: expert model",
            "mlp.expert_bias": "correction_bias: expert",
            "mlp.e_score_correction_bias": "correction_bias: expert",
            "mlp.shared_mlp.gate_proj.weight": "shared_gate: shared model",
            "mlp.shared_mlp.gate_proj.bias": "shared_gate_bias: shared",
            "mlp.shared_mlp.up_proj.weight": "shared_up: shared model",
            "mlp.shared_mlp.up_proj.bias": "shared_up_bias: shared",
            "mlp.shared_mlp.down_proj.weight": "shared_down: model shared",
            "mlp.shared_mlp.down_proj.bias": "shared_down_bias: model",
            **SHARED_EXPERTS,
            **SHARED_EXPERTS_BIASES,
        },
        sizes={
            "expert": "num_experts",
            "unit": "moe_intermediate_size",
            "shared": "num_shared_experts * moe_intermediate_size or intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=LISTED,
        when=dict.fromkeys(SHARED_BIASES, "mlp_bias"),
    )
)

register(
    MoEFamily(
        name="hy_v4",
        model_types=("hy_v4",),
        router="sigmoid",
        units="clamped",
        bank_units={"shared": "swiglu"},
        weights={
            **FUSED,
            **SHARED_EXPERTS,
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.shared_experts.linear_gate.weight": "shared_gate: shared model",
        },
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "n_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=LISTED,
        mtp_prefixes=("mtp_layers.{layer}.",),
        groups=GROUPS,
    )
)
