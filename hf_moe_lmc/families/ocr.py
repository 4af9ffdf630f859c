from hf_moe_lmc.families.layouts import (
    GATE_UP_DOWN,
    GREEDY_GROUPS,
    LISTED,
    SHARED_BIASES,
    SHARED_EXPERTS,
    SHARED_EXPERTS_BIASES,
)
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="deepseek_ocr2",
        model_types=("deepseek_ocr2_text", "unlimited_ocr_text"),
        router="softmax",
        units="swiglu",
        weights={
            **GATE_UP_DOWN,
            **SHARED_EXPERTS,
            **SHARED_EXPERTS_BIASES,
        },
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "n_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=LISTED,
        groups=GREEDY_GROUPS,
        when=dict.fromkeys(SHARED_BIASES, "mlp_bias"),
    )
)
