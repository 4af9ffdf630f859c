from hf_moe_lmc.families.layouts import SHARED_EXPERTS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="afmoe",
        model_types=("afmoe",),
        router="sigmoid",
        units="swiglu",
        weights={
            "mlp.router.gate.weight": "router: expert model",
            "mlp.expert_bias": "correction_bias: expert",
            "mlp.experts.{expert}.gate_proj.weight": "gate: unit model",
            "mlp.experts.{expert}.up_proj.weight": "up: unit model",
            "mlp.experts.{expert}.down_proj.weight": "down: model unit",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
            **SHARED_EXPERTS,
        },
        sizes={
            "expert": "num_experts",
            "unit": "moe_intermediate_size",
            "shared": "num_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers="layer >= num_dense_layers",
    )
)
