from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

# The up projection enters as up + 1, after a clamp unless `swiglu_limit` is infinite. Before transformers 5.19 it is always 7.
UNITS = "'shifted' if attr('swiglu_limit', 7.0) < 1e999 else 'affine'"
SIZES = {"expert": "num_local_experts", "unit": "intermediate_size", "model": "hidden_size"}
WEIGHTS = {
    "mlp.router.weight": "router: expert model",
    "mlp.router.bias": "router_bias: expert",
    "mlp.experts.down_proj": "down: expert unit model",
    "mlp.experts.down_proj_bias": "down_bias: expert model",
}

register(
    MoEFamily(
        name="gpt_oss",
        model_types=("gpt_oss",),
        router="softmax",
        units=UNITS,
        weights={
            **WEIGHTS,
            # gate and up take turns
            "mlp.experts.gate_up_proj": "gate up: expert model (unit half)",
            "mlp.experts.gate_up_proj_bias": "gate_bias up_bias: expert (unit half)",
        },
        sizes=SIZES,
    )
)

register(
    MoEFamily(
        name="openai_privacy_filter",
        model_types=("openai_privacy_filter",),
        router="softmax",
        units=UNITS,
        weights={
            **WEIGHTS,
            "mlp.experts.gate_up_proj": "gate up: expert model (half unit)",
            "mlp.experts.gate_up_proj_bias": "gate_bias up_bias: expert (half unit)",
        },
        sizes=SIZES,
    )
)
