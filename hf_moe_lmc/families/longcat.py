from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

# Zero experts return their input. transformers allocates gate and up projections for them that nothing reads.
register(
    MoEFamily(
        name="longcat_flash",
        model_types=("longcat_flash",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.router.classifier.weight": "router | zero.router: expert model",
            "mlp.router.classifier.bias": "router_bias | zero.router_bias: expert",
            "mlp.router.e_score_correction_bias": "correction_bias | zero.correction_bias: expert",
            "mlp.experts.{expert}.gate_proj.weight": "gate | zero.gate: unit model",
            "mlp.experts.{expert}.up_proj.weight": "up | zero.up: unit model",
            "mlp.experts.{expert}.down_proj.weight": "down: model unit",
            "mlp.experts.gate_up_proj": "gate up | zero.gate zero.up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes={
            "expert": "n_routed_experts",
            "zero.expert": "zero_expert_num",
            "unit": "expert_ffn_hidden_size",
            "model": "hidden_size",
        },
        top_k="moe_topk",
        layers="num_layers",
        bank_units={"zero": "rigid"},
        when={
            "router_bias": "attr('router_bias', False)",
            "zero.router_bias": "attr('router_bias', False)",
            "zero.gate": None,
            "zero.up": None,
        },
    )
)
