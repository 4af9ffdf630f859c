from hf_moe_lmc.families.layouts import (
    DEEPSEEK_SIZES,
    FIRST_DENSE,
    GATE_UP_DOWN,
    GREEDY_GROUPS,
    GROUPS,
    LISTED,
    SHARED_BIASES,
    SHARED_EXPERTS,
    SHARED_EXPERTS_BIASES,
)
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

WEIGHTS = {**GATE_UP_DOWN, **SHARED_EXPERTS}
WITH_BIAS = {**WEIGHTS, "mlp.gate.e_score_correction_bias": "correction_bias: expert"}
register(
    MoEFamily(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        router="softmax",
        units="swiglu",
        weights={
            **WEIGHTS,
            **SHARED_EXPERTS_BIASES,
        },
        sizes=DEEPSEEK_SIZES,
        moe_layers=FIRST_DENSE,
        groups=GREEDY_GROUPS,
        when=dict.fromkeys(SHARED_BIASES, "attr('mlp_bias', False) and n_shared_experts"),
    )
)

register(
    MoEFamily(
        name="deepseek_v3",
        model_types=("deepseek_v3", "dots1"),
        router="sigmoid",
        units="swiglu",
        weights=WITH_BIAS,
        sizes=DEEPSEEK_SIZES,
        moe_layers=FIRST_DENSE,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="deepseek_v32",
        model_types=("deepseek_v32", "axk2"),
        router="sigmoid",
        units="swiglu",
        weights=WITH_BIAS,
        sizes=DEEPSEEK_SIZES,
        moe_layers=LISTED,
        groups=GROUPS,  # axk2 also has checkpoints without groups: None
    )
)

register(
    MoEFamily(
        name="axk1",
        model_types=("axk1",),
        router="sigmoid",
        units="swiglu",
        # on the Hub the norm's name begins outside of the block, and dense layers have it too
        weights={**WITH_BIAS, "mlp.post_mlp_layernorm.weight": "fixed"},
        sizes=DEEPSEEK_SIZES,
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="dots3_note",
        model_types=("dots3_note_text",),
        router="sigmoid",
        units="swiglu",
        weights=WITH_BIAS,
        sizes={**DEEPSEEK_SIZES, "shared": "n_shared_experts * shared_experts_intermediate_size"},
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="solar_open",
        model_types=("solar_open",),
        router="sigmoid",
        units="swiglu",
        weights=WITH_BIAS,
        sizes=DEEPSEEK_SIZES,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="exaone_moe",
        model_types=("exaone_moe",),
        router="sigmoid",
        units="swiglu",
        weights={**WITH_BIAS, "mlp.e_score_correction_bias": "correction_bias: expert"},
        sizes={**DEEPSEEK_SIZES, "expert": "num_experts", "shared": "num_shared_experts * moe_intermediate_size"},
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="bailing_hybrid",
        model_types=("bailing_hybrid",),
        router="sigmoid",
        units="swiglu",
        weights={**WITH_BIAS, "mlp.gate.expert_bias": "correction_bias: expert"},
        sizes={**DEEPSEEK_SIZES, "expert": "num_experts", "shared": "num_shared_experts * moe_intermediate_size"},
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="beam",
        model_types=("beam",),
        router="sigmoid",
        units="swiglu",
        weights={**GATE_UP_DOWN, "mlp.gate.e_score_correction_bias": "correction_bias: expert"},
        sizes={"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        moe_layers=LISTED,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="mimo_v2_flash",
        model_types=("mimo_v2_flash",),
        router="sigmoid",
        units="swiglu",
        weights={**GATE_UP_DOWN, "mlp.gate.e_score_correction_bias": "correction_bias: expert"},
        sizes={"expert": "n_routed_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        moe_layers=LISTED,
        groups=GROUPS,
    )
)
