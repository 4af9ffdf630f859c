from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

# The experts of bank `always` are chosen for every token, and weighted by router rows of their own.
register(
    MoEFamily(
        name="inkling",
        model_types=("inkling_text",),
        router="sigmoid",
        units="swiglu",
        weights={
            "mlp.gate.weight": "router | always.router: expert model",
            "mlp.gate.global_scale": "fixed: 1",
            # on the Hub: gate and up rows take turns
            "mlp.gate.bias": "correction_bias: expert",
            "mlp.experts.w13_weight": "gate up: expert (unit half) model",
            "mlp.experts.w2_weight": "down: expert model unit",
            "mlp.shared_experts.shared_w13_weight": "always.gate always.up: expert (unit half) model",
            "mlp.shared_experts.shared_w2_weight": "always.down: expert model unit",
            # in transformers, and in a text tower saved alone
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
            "mlp.shared_experts.gate_proj": "always.gate: expert unit model",
            "mlp.shared_experts.up_proj": "always.up: expert unit model",
            "mlp.shared_experts.down_proj": "always.down: expert model unit",
        },
        sizes={
            "expert": "n_routed_experts",
            "always.expert": "n_shared_experts",
            "unit": "moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers="mlp_layer_types[layer] == 'sparse'",
        bank_units={"always": "swiglu"},
    )
)

register(
    MoEFamily(
        name="inkling2",
        model_types=("inkling2_text",),
        router="scoring_func",
        units="clamped",  # by tanh
        weights={
            "mlp.gate.weight": "router: expert model",
            # on the Hub: gate and up rows take turns
            "mlp.gate.bias": "correction_bias: expert",
            "mlp.experts.w13_weight": "gate up: expert (unit half) model",
            "mlp.experts.w2_weight": "down: expert model unit",
            # what transformers 5 names them
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes={"expert": "n_routed_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
    )
)
