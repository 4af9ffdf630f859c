from hf_moe_lmc.families.layouts import DEEPSEEK_SIZES, FIRST_DENSE, GATE_UP_DOWN, GROUPS, LISTED, SHARED_EXPERTS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

WEIGHTS = {**GATE_UP_DOWN, **SHARED_EXPERTS, "mlp.gate.e_score_correction_bias": "correction_bias: expert"}
register(
    MoEFamily(
        name="glm4_moe",
        model_types=("glm4_moe", "glm4v_moe_text"),
        router="sigmoid",
        units="swiglu",
        weights=WEIGHTS,
        sizes=DEEPSEEK_SIZES,
        moe_layers=FIRST_DENSE,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="glm4_moe_lite",
        model_types=("glm4_moe_lite", "glm_moe_dsa"),
        router="sigmoid",
        units="swiglu",
        weights=WEIGHTS,
        sizes=DEEPSEEK_SIZES,
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="glm5_next",
        model_types=("glm5_next_text",),
        router="sigmoid",
        units="clamped",
        weights=WEIGHTS,
        sizes=DEEPSEEK_SIZES,
        moe_layers=LISTED,
        groups=GROUPS,
    )
)
