"""The paper's experiment, at a size that a laptop trains: pairs of MoE models that share everything but their MoE blocks.

Protocol (Sec. 6.2 of arXiv 2509.11348): train a base; replace the MoE blocks of some layers by freshly initialised
ones, once per seed; train only those blocks, everything else frozen. Two such models compute nearly the same function
with unrelated expert weights, so a straight line between them crosses a barrier that alignment can lower.

The text is what every Python installation carries: the documentation strings of its standard library and the reference
topics behind `help()`.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralForCausalLM, MixtralConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe_lmc.runtime.progress import tracked
from hf_moe_lmc.runtime.threads import products_of, suited

AUXILIARY_LOSS_WEIGHT = 0.02
GRADIENT_CLIP = 1.0
HELD_OUT_EVERY = 10  # every tenth file is kept for evaluation
VOCABULARY = 1024
EXPERTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts"}  # what counts them in a configuration


@dataclass(frozen=True)
class Corpus:
    """Documents split by file, so that no held-out sentence was trained on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def standard_library_text(root: Path | None = None, minimum_characters: int = 400) -> Corpus:
    """Documentation strings of the standard library (or of the modules below `root`), one document per module."""
    documents = []
    for path in tracked(library_modules(root or Path(sysconfig.get_paths()["stdlib"])), desc="reading", unit="file"):
        text = "\n\n".join(documentation(path))
        if len(text) >= minimum_characters:
            documents.append(text)
    held_out = tuple(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    train = tuple(text for i, text in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1)
    return Corpus(train=train, held_out=held_out)


def library_modules(root: Path) -> list[Path]:
    """The modules below a folder in a fixed order, without tests and what was installed."""
    left_out = {"site-packages", "test", "tests", "lib2to3"}
    return [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]


def documentation(path: Path) -> Iterator[str]:
    """The documentation strings of a module; none of one that does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a few modules of the library are written not to parse
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield docstring
        elif path.parent.name == "pydoc_data" and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def small_mixtral(*, hidden_size: int, layers: int, intermediate_size: int) -> MixtralConfig:
    """A Mixtral of four experts, two per token, for the tokenizer of `train_tokenizer`."""
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=intermediate_size,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without BOS, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All documents in one row of token ids, [tokens], each closed by the end-of-text token."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def reinitialise(model: PreTrainedModel, layers: Sequence[int], *, std: float, seed: int) -> None:
    """Draws router and experts of the MoE blocks in `layers` anew, normal with standard deviation `std`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in model.model.layers[layer].mlp.parameters():
                parameter.copy_(torch.empty_like(parameter, device="cpu").normal_(std=std, generator=generator))


@dataclass(frozen=True)
class Training:
    """AdamW with a short warm-up and a cosine decay to a tenth of the rate."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    batch: int = 16
    sequence: int = 64
    warmup: int = 20


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    recipe: Training,
    *,
    seed: int,
    layers: Sequence[int] | None = None,
    progress: Callable[[int], object] = lambda step: None,
) -> float:
    """Trains `model` in place on random windows of `tokens`; returns the mean loss of the last 20 steps, nats per token.

    With `layers`, only the MoE blocks of those layers are trained and everything else stays frozen; the router's
    load-balancing loss then counts on those blocks alone. A dense model has none.
    """
    trained = range(model.config.num_hidden_layers) if layers is None else layers
    dense = isinstance(model, MistralForCausalLM)
    active = 1 if dense else model.config.num_experts_per_tok
    for parameter in model.parameters():
        parameter.requires_grad_(layers is None)
    for layer in trained:
        for parameter in model.model.layers[layer].mlp.parameters():
            parameter.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=recipe.warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, recipe.steps - recipe.warmup, eta_min=recipe.learning_rate / 10
            ),
        ],
        milestones=[recipe.warmup],
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses = []
    with suited(products_of(model, recipe.batch * recipe.sequence, active)):
        for step in range(1, recipe.steps + 1):
            starts = torch.randint(len(tokens) - recipe.sequence, (recipe.batch, 1), generator=generator)
            batch = tokens[starts + torch.arange(recipe.sequence)].to(model.device)
            if dense:
                language_loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                language_loss.backward()
            else:
                language_loss, balance = _routed_losses(model, batch, trained)
                (language_loss + AUXILIARY_LOSS_WEIGHT * balance).backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(language_loss.item())
            progress(step)
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _routed_losses(model: PreTrainedModel, batch: torch.Tensor, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the next token, and the load-balancing loss of the routers of some layers."""
    output = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
    balance = load_balancing_loss_func(
        tuple(output.router_logits[layer] for layer in layers),
        getattr(model.config, EXPERTS[model.config.model_type]),
        model.config.num_experts_per_tok,
    )
    return output.loss - model.config.router_aux_loss_coef * output.aux_loss, torch.as_tensor(balance)
