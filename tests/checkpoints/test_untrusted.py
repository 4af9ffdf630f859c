"""Whatever stands in the files: a checkpoint opens, or the error is one of ours; no hang, no large allocation.

The examples are derived from the test alone, so every run sees the same. FUZZ_EXAMPLES=5000 looks further.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.contents import INDEX
from hf_moe_lmc.checkpoints.untrusted import parse_json
from hf_moe_lmc.errors import CheckpointError, MoELMCError, SymmetryError
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from tests import tiny
from tests.checkpoints.test_checkpoint import header_of, with_header

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES or 120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
slow_fuzz = settings(fuzz, max_examples=EXAMPLES or 40)

NUMBERS = st.integers() | st.sampled_from([2**31, 2**62, 2**63, 2**64, -1, 10**4000]) | st.floats()
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["", "a", "model.norm.weight", "a\nb", "\x1b[31m", "\ud800", "__metadata__"]) | st.text(max_size=8)


@contextmanager
def a_verdict(most: int = 64 << 20) -> Iterator[None]:
    """The block passes or raises one of our errors, in one piece that a terminal can show, within `most` bytes."""
    tracemalloc.start()
    try:
        yield
    except MoELMCError as error:
        assert str(error) and error.exit_code == 2
        assert all(one.isprintable() or one == "\n" for one in str(error)), repr(str(error))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most, f"{peak} bytes"


def look(folder: Path) -> None:
    """Opens a checkpoint and reads all of it."""
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.fingerprint()
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).numel() == info.numel


def shard(folder: Path, header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    (folder / "config.json").write_text("{}")
    (folder / INDEX).unlink(missing_ok=True)
    return folder


@fuzz
@given(st.dictionaries(NAMES, JUNK, max_size=4) | JUNK)
def test_any_json_as_a_header(tmp_path: Path, header: Any) -> None:
    with a_verdict():
        look(shard(tmp_path, json.dumps(header).encode()))


@fuzz
@given(
    st.dictionaries(
        NAMES,
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F8_E4M3", "F99", "BOOL"]) | JUNK,
                "shape": st.lists(st.integers(0, 4) | NUMBERS | st.booleans(), max_size=4) | JUNK,
                "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, min_size=1, max_size=3) | JUNK,
            }
        ),
        max_size=3,
    )
)
def test_headers_that_look_like_one(tmp_path: Path, header: Any) -> None:
    with a_verdict():
        look(shard(tmp_path, json.dumps(header).encode()))


@fuzz
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1) | st.integers(0, 80))
def test_any_bytes_as_a_shard(tmp_path: Path, content: bytes, length: int) -> None:
    with a_verdict():
        look(shard(tmp_path, content, b"", length))


@fuzz
@given(
    st.fixed_dictionaries(
        {
            "weight_map": st.dictionaries(
                NAMES, st.sampled_from(["model.safetensors", "../m.safetensors", "/dev/zero", "\x1b.safetensors"]) | JUNK
            )
            | JUNK
        }
    )
    | JUNK
)
def test_any_json_as_an_index(tmp_path: Path, index: Any) -> None:
    shard(tmp_path, b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}')
    (tmp_path / INDEX).write_text(json.dumps(index))
    with a_verdict():
        look(tmp_path)


KEYS = (
    "model_type", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size",
    "num_attention_heads", "rope_parameters", "quantization_config", "text_config", "num_labels", "layer_types", "dtype",
    "architectures", "auto_map", "torch_dtype", "id2label", "vocab_size", "attn_implementation", "problem_type",
)  # fmt: skip


@slow_fuzz
@given(st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3))
def test_any_value_in_a_configuration(saved: Callable[..., Path], tmp_path: Path, values: dict[str, Any]) -> None:
    config = json.loads((saved("mixtral") / "config.json").read_text())
    for file in saved("mixtral").iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with a_verdict(), Checkpoint.open(tmp_path) as checkpoint:
        read_model(checkpoint)


@fuzz
@given(
    st.sampled_from(["layers.0.expert_order", "layers.0.unit_order", "layers.0.unit_scale", "layers.0.shared_order"]),
    st.sampled_from(["", "layers.01.expert_order", "layers.²3.expert_order", "layers.0..unit_scale", "layers.0.b.unit_scale"])
    | NAMES,
    st.sampled_from(["F32", "I32", "I64", "F64", "BF16", "BOOL", "U8"]),
    st.lists(st.integers(0, 5) | NUMBERS, max_size=3),
)
def test_any_change_of_a_saved_symmetry(tmp_path: Path, old: str, new: str, dtype: str, shape: list[Any]) -> None:
    file = tmp_path / "symmetry.safetensors"
    ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(2, 3, 2)}).save(file)
    header = header_of(file)
    entry = header.pop(old)
    header[new or old] = {**entry, "dtype": dtype, "shape": shape or entry["shape"]}
    with_header(file, header)
    with a_verdict():
        ModelSymmetry.load(file)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("layers.0.unit_scale", torch.full((2, 3), torch.nan), "zero or not finite"),
        ("layers.0.unit_scale", torch.zeros(2, 3), "zero or not finite"),
        ("layers.0.expert_order", torch.tensor([0.0, 1.0]), "dtype torch.float32, expected torch.int32"),
        ("layers.0.expert_order", torch.tensor([0, 5]), "expert_order is not a permutation"),
        ("layers.0.expert_order", torch.tensor(0), "orders and scales disagree"),
        ("layers.0.shared_order", torch.tensor(0), "differ in length"),
        ("layers.0.unit_order", torch.zeros(6, dtype=torch.int32), r"must be \[expert, unit\]"),
        ("layers.00.unit_order", torch.zeros(2, 3, dtype=torch.int32), "unexpected tensor layers.00.unit_order"),
        ("rest", torch.zeros(1), "unexpected tensor rest"),
    ],
)
def test_a_symmetry_that_is_none_is_refused(tmp_path: Path, name: str, values: torch.Tensor, message: str) -> None:
    file = tmp_path / "symmetry.safetensors"
    ModelSymmetry("mixtral", 1, {0: LayerSymmetry.identity(2, 3, 2)}).save(file)
    metadata = header_of(file)["__metadata__"]
    content = {**tiny.tensors(tmp_path), name: values}
    tiny.save_file(content, file, metadata)
    with pytest.raises(SymmetryError, match=message):
        ModelSymmetry.load(file)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'{"x": {"\\u0061": 1, "a": 2}}', "key 'a' is there twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "5000 digits|4300 digits"),
        (b'{"\xff": 1}', "not UTF-8: invalid start byte at byte 2"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud800"}', r"half a surrogate pair in '\\ud800'"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"{" + b"[]," * 1_000_000, "hardly anything but brackets"),
        (b"", "Expecting value"),
    ],
)
def test_json_is_read_without_leniency(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(raw)


def test_json_that_is_well_formed_is_read() -> None:
    assert parse_json('{"a": ["\\ud83d\\ude00", "é", 1e400]}'.encode()) == {"a": ["\U0001f600", "é", float("inf")]}
    assert parse_json(b'{"a": Infinity}', constants=True) == {"a": float("inf")}  # as Python's json writes configurations


def test_memory_is_bounded_by_the_size_of_the_header(tmp_path: Path) -> None:
    for junk in (b'{"a":[' + b"1e1," * 250_000 + b"0]}", b"{" + b",".join(b'"%x":0' % i for i in range(100_000)) + b"}"):
        with a_verdict(30 * len(junk)):
            look(shard(tmp_path, junk))
    shard(tmp_path, b" " * 100)
    with (tmp_path / "model.safetensors").open("wb") as file:  # a header of 4 GB that a hole in the file pretends
        file.write((4 << 30).to_bytes(8, "little"))
        file.truncate(5 << 30)
    with a_verdict(1 << 20), pytest.raises(CheckpointError, match="not a whole safetensors file"):
        look(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a device", "a link that leads nowhere"])
def test_what_is_no_file_is_refused_at_once(copy: Callable[..., Path], file: str, kind: str) -> None:
    folder = copy("mixtral")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tiny.tensors(folder), "model.safetensors")}))
    (folder / file).unlink()
    if kind == "a named pipe":
        os.mkfifo(folder / file)
    elif kind == "a folder":
        (folder / file).mkdir()
    else:
        (folder / file).symlink_to("/dev/zero" if kind == "a device" else "nowhere")
    if file == INDEX:  # without an index, a single file is complete
        look(folder)
        (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{file}.*expected a file, found {kind}"):
        look(folder)


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}
    header = {"\x1b[2Jgone": entry, "two\nlines": {**entry, "data_offsets": [32, 64]}}
    with pytest.raises(CheckpointError) as error:
        look(shard(tmp_path, json.dumps(header).encode()))
    assert r"\x1b[2Jgone" in str(error.value) and r"two\nlines" in str(error.value) and "\x1b" not in str(error.value)


def test_an_index_of_very_many_shards_is_answered_at_once(copy: Callable[..., Path]) -> None:
    folder = copy("mixtral")
    weight_map = {f"tensor.{i}": f"model-{i:06}-of-100000.safetensors" for i in range(100_000)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with a_verdict(200 << 20), pytest.raises(CheckpointError, match="and 99992 more: missing shards") as error:
        look(folder)
    assert len(str(error.value).splitlines()) < 12
