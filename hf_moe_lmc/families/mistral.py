from hf_moe_lmc.families.layouts import DEEPSEEK_SIZES, FIRST_DENSE, FUSED, GROUPS, LISTED, SHARED_EXPERTS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="mistral4",
        model_types=("mistral4",),
        router="softmax",
        units="swiglu",
        weights={**FUSED, **SHARED_EXPERTS},
        sizes=DEEPSEEK_SIZES,
        moe_layers=FIRST_DENSE,
        groups=GROUPS,
    )
)

register(
    MoEFamily(
        name="mistral_large4",
        model_types=("mistral_large4_text",),
        router="softmax",
        units="swiglu",
        weights={
            # on the Hub: no name for the block
            "gate.weight": "router: expert model",
            "experts.{expert}.w1.weight": "gate: unit model",
            "experts.{expert}.w3.weight": "up: unit model",
            "experts.{expert}.w2.weight": "down: model unit",
            "shared_experts.w1.weight": "shared_gate: shared model",
            "shared_experts.w3.weight": "shared_up: shared model",
            "shared_experts.w2.weight": "shared_down: model shared",
            # the text tower alone
            "shared_experts.gate_proj.weight": "shared_gate: shared model",
            "shared_experts.up_proj.weight": "shared_up: shared model",
            "shared_experts.down_proj.weight": "shared_down: model shared",
            # what transformers 5 saves after a fused load, and what it makes of that when it is saved again
            "experts.gate_up_proj": "gate up: expert (half unit) model",
            "experts.down_proj": "down: expert model unit",
            **FUSED,
            **SHARED_EXPERTS,
        },
        sizes=DEEPSEEK_SIZES,
        moe_layers=LISTED,
        groups=GROUPS,
        mtp_prefixes=("mtp_dspark.layers.{layer}.", "mtp_dspark.{layer}."),
    )
)
