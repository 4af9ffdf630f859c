from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

# The router is an MLP; the last of its classes skips the experts, and stays where it is.
register(
    MoEFamily(
        name="zaya",
        model_types=("zaya",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.gate.router_mlp.out_proj.weight": "router | skip.router: expert rank",
            "mlp.gate.balancing_biases": "correction_bias | skip.correction_bias: expert",
            "mlp.gate.down_proj.weight": "fixed: rank model",
            "mlp.gate.down_proj.bias": "fixed: rank",
            "mlp.gate.router_states_scale": "fixed: rank",
            "mlp.gate.router_mlp.norm.weight": "fixed: rank",
            "mlp.gate.router_mlp.fc1.weight": "fixed: rank rank",
            "mlp.gate.router_mlp.fc1.bias": "fixed: rank",
            "mlp.gate.router_mlp.fc2.weight": "fixed: rank rank",
            "mlp.gate.router_mlp.fc2.bias": "fixed: rank",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes={
            "expert": "num_experts",
            "skip.expert": "1",
            "unit": "moe_intermediate_size",
            "model": "hidden_size",
            "rank": "router_hidden_size",
        },
        bank_units={"skip": "rigid"},
        when={"mlp.gate.router_states_scale": "layer > 0"},
    )
)
