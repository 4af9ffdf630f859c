from hf_moe_lmc.families.layouts import GATE_UP_DOWN
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="olmoe",
        model_types=("olmoe", "flex_olmo"),
        router="softmax",
        units="swiglu",
        weights=GATE_UP_DOWN,
        sizes={"expert": "num_experts", "unit": "intermediate_size", "model": "hidden_size"},
    )
)
