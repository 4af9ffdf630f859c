from hf_moe_lmc.families.layouts import GATE_UP_DOWN, LISTED, SHARED_EXPERTS
from hf_moe_lmc.family import MoEFamily, register

register(
    MoEFamily(
        name="deepseek_ocr2",
        model_types=("deepseek_ocr2_text", "unlimited_ocr_text"),
        router="softmax",
        units="swiglu",
        weights={
            **GATE_UP_DOWN,
            **SHARED_EXPERTS,
            "mlp.shared_experts.gate_proj.bias": "shared_gate_bias: shared",
            "mlp.shared_experts.up_proj.bias": "shared_up_bias: shared",
            "mlp.shared_experts.down_proj.bias": "shared_down_bias: model",
        },
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "n_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers=LISTED,
        groups="n_group if topk_method == 'group_limited_greedy' and topk_group < n_group else 1",
        when=dict.fromkeys(("shared_gate_bias", "shared_up_bias", "shared_down_bias"), "mlp_bias"),
    )
)
