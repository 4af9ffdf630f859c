from hf_moe_lmc.families.layouts import FUSED, GATE_UP_DOWN, LISTED, SHARED_EXPERT, SPARSE_STEP
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

SIZES = {"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"}
SIZES_WITH_SHARED = {**SIZES, "shared": "shared_expert_intermediate_size"}
GATED_SHARED_EXPERT = {
    **GATE_UP_DOWN,
    **SHARED_EXPERT,
    "mlp.shared_expert_gate.weight": "shared_router: 1 model",
}

register(
    MoEFamily(
        name="qwen2_moe",
        model_types=("qwen2_moe", "qwen3_next"),
        router="softmax",
        units="swiglu",
        weights=GATED_SHARED_EXPERT,
        sizes=SIZES_WITH_SHARED,
        moe_layers=SPARSE_STEP,
    )
)

register(
    MoEFamily(
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe_text", "qwen4_exp_text", "qwen3_omni_moe_talker_text"),
        router="softmax",
        units="swiglu",
        weights=GATED_SHARED_EXPERT,
        sizes=SIZES_WITH_SHARED,
    )
)

register(
    MoEFamily(
        name="qwen3_moe",
        model_types=("qwen3_moe", "qwen3_omni_moe_text"),
        router="softmax",
        units="swiglu",
        weights=GATE_UP_DOWN,
        sizes=SIZES,
        moe_layers=SPARSE_STEP,
        towers={"qwen3_omni_moe": "thinker.model."},  # the talker has experts, too
    )
)

register(
    MoEFamily(
        name="qwen3_vl_moe_text",
        model_types=("qwen3_vl_moe_text",),
        router="softmax",
        units="swiglu",
        weights=FUSED,
        sizes=SIZES,
        moe_layers=SPARSE_STEP,
    )
)

register(
    MoEFamily(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.gate.weight": "router: expert model",
            # on the Hub: inputs first; in memory, and saved from there: outputs first
            "mlp.experts.gate_up_proj": ("gate up: expert model (half unit)", "gate up: expert (half unit) model"),
            "mlp.experts.down_proj": ("down: expert unit model", "down: expert model unit"),
        },
        sizes=SIZES,
        moe_layers=SPARSE_STEP,
    )
)

register(
    MoEFamily(
        name="mellum",
        model_types=("mellum",),
        router="softmax",
        units="swiglu",
        weights=GATE_UP_DOWN,
        sizes=SIZES,
        moe_layers=LISTED,
    )
)

register(
    MoEFamily(
        name="flint",
        model_types=("flint",),
        router="sigmoid",
        units="swiglu",
        weights={**GATE_UP_DOWN, **SHARED_EXPERT},
        sizes=SIZES_WITH_SHARED,
        moe_layers=SPARSE_STEP,
    )
)
