from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="jetmoe",
        model_types=("jetmoe",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.router.layer.weight": "router: expert model",
            "mlp.input_linear.weight": "gate up: expert (half unit) model",
            "mlp.output_linear.weight": "down: expert model unit",
            "mlp.bias": "fixed: model",
            # experts of the attention: queries and output; all share keys and values, so their units stay
            "self_attention.experts.router.layer.weight": "attention.router: expert model",
            "self_attention.experts.input_linear.weight": "attention.up: expert unit model",
            "self_attention.experts.output_linear.weight": "attention.down: expert model unit",
            "self_attention.experts.bias": "fixed: model",
        },
        sizes={
            "expert": "num_local_experts",
            "unit": "intermediate_size",
            "model": "hidden_size",
            "attention.unit": "kv_channels * num_key_value_heads",
        },
        bank_units={"attention": "rigid"},
        blocks=("mlp.", "self_attention.experts."),
    )
)
