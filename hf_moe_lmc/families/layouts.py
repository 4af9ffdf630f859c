"""Key templates that many families share."""

# One tensor per expert, as on the Hub, or what transformers 5 saves after a fused load.
GATE_UP_DOWN = {
    "mlp.gate.weight": "router: expert model",
    "mlp.experts.{expert}.gate_proj.weight": "gate: unit model",
    "mlp.experts.{expert}.up_proj.weight": "up: unit model",
    "mlp.experts.{expert}.down_proj.weight": "down: model unit",
    "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
    "mlp.experts.down_proj": "down: expert model unit",
}
