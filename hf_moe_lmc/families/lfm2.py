from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="lfm2_moe",
        model_types=("lfm2_moe",),
        router="sigmoid",
        units="swiglu",
        weights={
            "feed_forward.gate.weight": "router: expert model",
            "feed_forward.expert_bias": "correction_bias: expert",
            "feed_forward.experts.{expert}.w1.weight": "gate: unit model",
            "feed_forward.experts.{expert}.w3.weight": "up: unit model",
            "feed_forward.experts.{expert}.w2.weight": "down: model unit",
            "feed_forward.experts.gate_up_proj": "gate up: expert (half unit) model",
            "feed_forward.experts.down_proj": "down: expert model unit",
        },
        sizes={"expert": "num_experts", "unit": "moe_intermediate_size", "model": "hidden_size"},
        moe_layers="layer >= num_dense_layers",
        when={"correction_bias": "use_expert_bias"},
    )
)
