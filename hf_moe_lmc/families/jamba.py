from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="jamba",
        model_types=("jamba",),
        router="softmax",
        units="swiglu",
        weights={
            "feed_forward.router.weight": "router: expert model",
            "feed_forward.experts.{expert}.gate_proj.weight": "gate: unit model",
            "feed_forward.experts.{expert}.up_proj.weight": "up: unit model",
            "feed_forward.experts.{expert}.down_proj.weight": "down: model unit",
            "feed_forward.experts.gate_up_proj": "gate up: expert (half unit) model",
            "feed_forward.experts.down_proj": "down: expert model unit",
        },
        sizes={"expert": "num_experts", "unit": "intermediate_size", "model": "hidden_size"},
        moe_layers="layers_num_experts[layer] > 1",
    )
)
