"""Key templates, sizes and rules that many families share."""

# All experts in one tensor, as in memory.
FUSED = {
    "mlp.gate.weight": "router: expert model",
    "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
    "mlp.experts.down_proj": "down: expert model unit",
}
# One tensor per expert, as on the Hub, or what transformers 5 saves after a fused load.
GATE_UP_DOWN = {
    **FUSED,
    "mlp.experts.{expert}.gate_proj.weight": "gate: unit model",
    "mlp.experts.{expert}.up_proj.weight": "up: unit model",
    "mlp.experts.{expert}.down_proj.weight": "down: model unit",
}
# The same with Mixtral's names on the Hub: w1 is the gate, w3 the linear branch.
W1_W2_W3 = {
    **FUSED,
    "block_sparse_moe.gate.weight": "router: expert model",
    "block_sparse_moe.experts.{expert}.w1.weight": "gate: unit model",
    "block_sparse_moe.experts.{expert}.w3.weight": "up: unit model",
    "block_sparse_moe.experts.{expert}.w2.weight": "down: model unit",
}
# Several shared experts are one MLP on disk and in the forward pass.
SHARED_EXPERTS = {
    "mlp.shared_experts.gate_proj.weight": "shared_gate: shared model",
    "mlp.shared_experts.up_proj.weight": "shared_up: shared model",
    "mlp.shared_experts.down_proj.weight": "shared_down: model shared",
}
SHARED_EXPERTS_BIASES = {
    "mlp.shared_experts.gate_proj.bias": "shared_gate_bias: shared",
    "mlp.shared_experts.up_proj.bias": "shared_up_bias: shared",
    "mlp.shared_experts.down_proj.bias": "shared_down_bias: model",
}
SHARED_BIASES = ("shared_gate_bias", "shared_up_bias", "shared_down_bias")  # their roles, for `when`
SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj.weight": "shared_gate: shared model",
    "mlp.shared_expert.up_proj.weight": "shared_up: shared model",
    "mlp.shared_expert.down_proj.weight": "shared_down: model shared",
}

# As DeepSeek's configurations name them.
DEEPSEEK_SIZES = {
    "expert": "n_routed_experts",
    "unit": "moe_intermediate_size",
    "shared": "(n_shared_experts or 0) * moe_intermediate_size",
    "model": "hidden_size",
}

# DeepSeek's groups of experts: those of the `topk_group` best groups compete.
GROUPS = "n_group if (n_group or 1) > 1 and topk_group < n_group else 1"
GREEDY_GROUPS = "n_group if topk_method == 'group_limited_greedy' and topk_group < n_group else 1"  # DeepSeek-V2's

# Which layers are MoE layers.
FIRST_DENSE = "layer >= first_k_dense_replace"
LISTED = "mlp_layer_types[layer] == 'sparse'"
SPARSE_STEP = "layer not in (mlp_only_layers or []) and num_experts > 0 and (layer + 1) % decoder_sparse_step == 0"
