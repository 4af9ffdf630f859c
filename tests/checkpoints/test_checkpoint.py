from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.contents import INDEX
from hf_moe_lmc.errors import CheckpointError
from tests import tiny


def header_of(file: Path) -> dict:
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_header(file: Path, header: dict) -> None:
    """Replaces the header, keeping the data."""
    raw = file.read_bytes()
    body = json.dumps(header).encode()
    file.write_bytes(len(body).to_bytes(8, "little") + body + raw[8 + int.from_bytes(raw[:8], "little") :])


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_reads_what_safetensors_wrote(tmp_path: Path, shard: str) -> None:
    folder = tiny.save(tiny.make_model("deepseek_v3").to(torch.bfloat16), tmp_path / "m", "per-expert", shard)
    stored = tiny.tensors(folder)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors.keys() == stored.keys()
        assert len(checkpoint.shards) == len(list(folder.glob("*.safetensors")))
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
        for name, tensor in stored.items():
            assert tiny.same_bytes(checkpoint.read(name).view(tensor.shape), tensor), name
        part = checkpoint.read("model.embed_tokens.weight", 16, 32)
        assert torch.equal(part, stored["model.embed_tokens.weight"].view(-1)[16:48])
        pieces = [values for _, values in checkpoint.chunks("model.embed_tokens.weight")]
        assert torch.equal(torch.cat(pieces), stored["model.embed_tokens.weight"].view(-1))


def test_the_fingerprint_sees_every_tensor_header_and_the_configuration(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    first = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == first

    def nudge(content: dict[str, torch.Tensor]) -> None:
        content["model.layers.1.block_sparse_moe.experts.4.w2.weight"][7, 11] += 1

    tiny.edit(folder, nudge)
    second = Checkpoint.open(folder).fingerprint()
    tiny.edit_config(folder, rms_norm_eps=0.5)
    assert len({first, second, Checkpoint.open(folder).fingerprint()}) == 3


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def lengthen(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0" * 10)


def empty_shard(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lying_length(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def broken_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8] = ord("?")
    file.write_bytes(raw)


def lying_shape(folder: Path) -> None:
    header = header_of(folder / "model.safetensors")
    header["model.norm.weight"]["shape"] = [17]
    with_header(folder / "model.safetensors", header)


def negative_shape(folder: Path) -> None:
    header = header_of(folder / "model.safetensors")
    header["model.norm.weight"]["shape"] = [-16, -1]
    with_header(folder / "model.safetensors", header)


def overlap(folder: Path) -> None:
    header = header_of(folder / "model.safetensors")
    header["model.norm.weight"]["data_offsets"] = [0, 64]
    with_header(folder / "model.safetensors", header)


def unknown_dtype(folder: Path) -> None:
    header = header_of(folder / "model.safetensors")
    header["model.norm.weight"]["dtype"] = "F99"
    with_header(folder / "model.safetensors", header)


def index_with(folder: Path, **changes: str | None) -> None:
    weight_map = dict.fromkeys(tiny.tensors(folder), "model.safetensors")
    weight_map.update({name.replace("__", "."): file for name, file in changes.items() if file})
    for name in [name.replace("__", ".") for name, file in changes.items() if file is None]:
        del weight_map[name]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def quantized(folder: Path) -> None:
    tiny.edit_config(folder, quantization_config={"quant_method": "gptq"})
    name = "model.layers.0.self_attn.q_proj"
    tiny.edit(folder, lambda content: content.update({f"{name}.qweight": torch.ones(2, 16, dtype=torch.int32)}))


def two_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


BAD = [
    (truncate, "model.safetensors: truncated"),
    (lengthen, "longer than its header says"),
    (empty_shard, "not a whole safetensors file"),
    (lying_length, "not a whole safetensors file"),
    (broken_header, "header is not valid JSON"),
    (lying_shape, "tensor model.norm.weight: .17. of torch.float32 does not fill"),
    (negative_shape, "tensor model.norm.weight: .* does not fill"),
    (overlap, "hole or overlap"),
    (unknown_dtype, "tensor model.norm.weight: dtype or field 'F99'"),
    (lambda f: index_with(f, model__norm__weight="../other/model.safetensors"), "a path that leaves the folder"),
    (lambda f: index_with(f, model__norm__weight="/etc/model.safetensors"), "a path that leaves the folder"),
    (lambda f: index_with(f, model__norm__weight="gone.safetensors"), "shard gone.safetensors, listed in .* is missing"),
    (lambda f: index_with(f, model__norm__weight="model.bin"), "not to a .safetensors file"),
    (lambda f: index_with(f, model__norm__weight=None), "model.norm.weight: in model.safetensors, not listed"),
    (lambda f: index_with(f, model__extra="model.safetensors"), "model.extra: listed in model.safetensors, not there"),
    (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    (lambda f: (f / INDEX).write_text("[]"), "expected a JSON object"),
    (lambda f: (f / INDEX).write_text("{}"), "weight_map is missing or empty"),
    (lambda f: (f / "config.json").write_text("nonsense"), "config.json: not valid JSON"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "model.safetensors").unlink(), "found neither"),
    (pickle_only, "weights only as pickles .pytorch_model.bin"),
    (adapter_only, "holds an adapter only"),
    (quantized, "declares quantized weights .quantization_config: .*gptq"),
    (two_shards, "1 safetensors files .* but no model.safetensors.index.json"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_damage_is_refused_with_the_file_and_what_is_wrong(
    copy: Callable[..., Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = copy("mixtral")
    Checkpoint.open(folder)  # the control: whole, it opens
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(folder)
    assert str(folder) in str(error.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.ones(2), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"same": "a.safetensors", "a": "a.safetensors", "b": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tensor same is in two shards"):
        Checkpoint.open(tmp_path)


def test_what_is_local_is_never_asked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    missing = ("./a/b", "/no/where", "~/nowhere-at-all", "a/b/c", "runs/model", "a/", "a\\b", "name")
    for name in (*missing, str(tmp_path / "x"), tmp_path / "y"):
        with pytest.raises(CheckpointError, match="the Hub was not asked"):
            Checkpoint.open(name)
    with pytest.raises(CheckpointError, match="found a file"):
        Checkpoint.open("file")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open("~nobody-of-that-name/model")
    with pytest.raises(CheckpointError, match="neither a local folder nor a Hub id"):
        Checkpoint.open("no spaces/in ids")


def test_side_files_are_what_goes_with_the_weights(copy: Callable[..., Path]) -> None:
    folder = copy("olmoe")
    foreign = ("optimizer.pt", "trainer_state.json", "README.md", ".gitattributes", "consolidated.safetensors", "modeling_x.py")
    for name in (*foreign, "LICENSE.md", "chat_template.jinja", "vocab.bpe", "tokenizer.model.v3"):
        (folder / name).write_text("x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "state.json").write_text("x")
    found = Checkpoint.open(folder).side_files()
    expected = {"LICENSE.md", "chat_template.jinja", "vocab.bpe", "tokenizer.model.v3"}
    assert set(found) == expected | {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
