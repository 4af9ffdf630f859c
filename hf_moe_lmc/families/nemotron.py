from hf_moe_lmc.families.layouts import GROUPS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="nemotron_h",
        model_types=("nemotron_h",),
        router="sigmoid",
        units="mlp_hidden_act if mlp_hidden_act in ('relu', 'relu2') else 'plain'",  # not gated
        weights={
            "mixer.gate.weight": "router: expert model",
            "mixer.gate.e_score_correction_bias": "correction_bias: expert",
            # on the Hub
            "mixer.experts.{expert}.up_proj.weight": "up: unit latent",
            "mixer.experts.{expert}.down_proj.weight": "down: latent unit",
            # on the Hub in nemo_speechlm
            "mixer.experts.gate_and_up_projs": "up: expert latent unit",
            "mixer.experts.down_projs": "down: expert unit latent",
            # what transformers 5 saves after a fused load
            "mixer.experts.up_proj": "up: expert unit latent",
            "mixer.experts.down_proj": "down: expert latent unit",
            "mixer.shared_experts.up_proj.weight": "shared_up: shared model",
            "mixer.shared_experts.up_proj.bias": "shared_up_bias: shared",
            "mixer.shared_experts.down_proj.weight": "shared_down: model shared",
            "mixer.shared_experts.down_proj.bias": "shared_down_bias: model",
            # to the width of the experts and back, where that is another
            "mixer.fc1_latent_proj.weight": "fixed: latent model",
            "mixer.fc1_latent_proj.bias": "fixed: latent",
            "mixer.fc2_latent_proj.weight": "fixed: model latent",
            "mixer.fc2_latent_proj.bias": "fixed: model",
        },
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "moe_shared_expert_intermediate_size or intermediate_size",
            "model": "hidden_size",
            "latent": "moe_latent_size or hidden_size",
        },
        moe_layers="layers_block_type[layer] == 'moe'",
        groups=GROUPS,
        layer_prefix="backbone.layers.{layer}.",
        when={
            "shared_up_bias": "mlp_bias",
            "shared_down_bias": "mlp_bias",
            **{f"mixer.{name}_latent_proj.weight": "moe_latent_size" for name in ("fc1", "fc2")},
            **{f"mixer.{name}_latent_proj.bias": "moe_latent_size and mlp_bias" for name in ("fc1", "fc2")},
        },
    )
)
