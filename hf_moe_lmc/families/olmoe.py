from hf_moe_lmc.family import MoEFamily, register

register(
    MoEFamily(
        name="olmoe",
        model_types=("olmoe",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.gate.weight": "router: expert model",
            "mlp.experts.{expert}.gate_proj.weight": "gate: unit model",
            "mlp.experts.{expert}.up_proj.weight": "up: unit model",
            "mlp.experts.{expert}.down_proj.weight": "down: model unit",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes={"expert": "num_experts", "unit": "intermediate_size", "model": "hidden_size"},
    )
)
