from hf_moe_lmc.families.layouts import SHARED_BIASES, SHARED_EXPERTS, SHARED_EXPERTS_BIASES
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="step3p7",
        model_types=("step3p5",),  # the text tower of step3p7
        router="sigmoid",
        units="'clamped' if swiglu_limits and swiglu_limits[layer] else 'swiglu'",
        weights={
            # on the Hub
            "moe.gate.weight": "router: expert model",
            "moe.router_bias": "correction_bias: expert",
            "moe.gate_proj.weight": "gate: expert unit model",
            "moe.up_proj.weight": "up: expert unit model",
            "moe.down_proj.weight": "down: expert model unit",
            "share_expert.gate_proj.weight": "shared_gate: shared model",
            "share_expert.up_proj.weight": "shared_up: shared model",
            "share_expert.down_proj.weight": "shared_down: model shared",
            "share_expert.gate_proj.bias": "shared_gate_bias: shared",
            "share_expert.up_proj.bias": "shared_up_bias: shared",
            "share_expert.down_proj.bias": "shared_down_bias: model",
            # in transformers, and in a text tower saved alone
            "mlp.gate.weight": "router: expert model",
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
            **SHARED_EXPERTS,
            **SHARED_EXPERTS_BIASES,
        },
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "share_expert_dim",
            "model": "hidden_size",
        },
        moe_layers="mlp_layer_types[layer] == 'sparse'",
        bank_units={"shared": "'clamped' if swiglu_limits_shared and swiglu_limits_shared[layer] else 'swiglu'"},
        when=dict.fromkeys(SHARED_BIASES, "mlp_bias"),
    )
)
