"""Tries faults on small checkpoints with the real command line, and records what happens.

    python scripts/faults.py                   # tries all faults; writes scripts/faults.json and docs/faults.md
    python scripts/faults.py --check           # tries all faults; exit code 1 if one ends otherwise than recorded there
    python scripts/faults.py --only truncated  # prints the rows whose fault holds a word

Each row is data: what is wrong, the command, and the damage. A and B are two small Mixtral models in three shards each.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the libraries are imported: a cache of the Hub of our own, and no network
    os.environ.update(HF_HOME=tempfile.mkdtemp(), HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from hf_moe_lmc.cli.command_line import main as command_line
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry

ROOT = Path(__file__).resolve().parents[1]
RECORD, TABLE = ROOT / "scripts" / "faults.json", ROOT / "docs" / "faults.md"
INDEX = "model.safetensors.index.json"
NORM, GATE = "model.norm.weight", "model.layers.1.block_sparse_moe.gate.weight"
MERGE, ALIGN, INSPECT = "merge A B -o OUT", "align A B -o OUT", "inspect B"
NO_ALIGN, APPLY = "merge A B -o OUT --no-align", "apply S.safetensors B -o OUT"
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Row:
    """One fault: words for it, the command, and what it does to the folder that holds A and B."""

    fault: str
    command: str
    damage: Damage


def make(folder: Path, noise: float = 0.0, **values: Any) -> Path:
    """A small Mixtral with a tokenizer, in several shards; with noise, a relative of the one without."""
    config = MixtralConfig(
        **{
            "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64, **values,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h"), ("h", "e")], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


# --- damage: small functions on a folder that holds A and B; b(...) lets one act on B alone


def b(change: Damage) -> Damage:
    return lambda bench: change(bench / "B")


def more_experts(folder: Path) -> None:
    shutil.rmtree(folder)
    make(folder, num_local_experts=6)


def shard_of(folder: Path, tensor: str = NORM) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def on_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = shard_of(folder)
        file.write_bytes(change(file.read_bytes()))

    return b(damage)


def on_header(change: Callable[[dict[str, Any]], str | None]) -> Damage:
    """Changes the header of a shard in place, or returns the JSON to put there."""

    def replaced(raw: bytes) -> bytes:
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        body = (change(header) or json.dumps(header)).encode()
        return len(body).to_bytes(8, "little") + body + raw[end:]

    return on_bytes(replaced)


def entry(**values: Any) -> Damage:
    return on_header(lambda header: header[NORM].update(values))


def on_tensors(change: Callable[[dict[str, torch.Tensor]], object], tensor: str = NORM) -> Damage:
    """Changes the tensors of one shard, and keeps the index true."""

    def damage(folder: Path) -> None:
        file = shard_of(folder, tensor)
        content = load_file(file)
        change(content)
        save_file({name: value.contiguous() for name, value in content.items()}, file, {"format": "pt"})
        index = json.loads((folder / INDEX).read_text())
        kept = {name: held for name, held in index["weight_map"].items() if held != file.name}
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(content, file.name)}}))

    return b(damage)


def on_json(file: str, change: Callable[[Any], object]) -> Damage:
    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return b(damage)


def config(**values: Any) -> Damage:
    return on_json("config.json", lambda found: found.update(values))


def mapped(name: str, file: str | None) -> Damage:
    def change(index: Any) -> None:
        index["weight_map"].update({name: file})
        if file is None:
            del index["weight_map"][name]

    return on_json(INDEX, change)


def text(file: str, content: str) -> Damage:
    return b(lambda folder: (folder / file).write_text(content))


def first_key_twice(file: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / file).read_text()
        key = content.split('"')[1]
        (folder / file).write_text(content.replace("{", '{"' + key + '": null,', 1))

    return b(damage)


def instead_of_a_shard(put: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        file = shard_of(folder)
        file.unlink()
        put(file)

    return b(damage)


def in_two_shards(folder: Path) -> None:
    file, other = shard_of(folder), next(one for one in sorted(folder.glob("*.safetensors")) if one != shard_of(folder))
    content = {**load_file(other), NORM: load_file(file)[NORM]}
    save_file(content, other, {"format": "pt"})


def pickles_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def adapter_only(folder: Path) -> None:
    pickles_only(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def quantized(method: str) -> Damage:
    def damage(bench: Path) -> None:
        config(quantization_config={"quant_method": method})(bench)
        on_tensors(lambda held: held.update({NORM: torch.ones(16, 2, dtype=torch.uint8)}))(bench)

    return damage


def compiled(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({f"_orig_mod.{name}": held for name, held in load_file(file).items()}, file, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {f"_orig_mod.{name}": file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def stale(folder: Path) -> None:
    shutil.copy(next(folder.glob("*.safetensors")), folder / "model.safetensors")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def several(bench: Path) -> None:
    for folder in (bench / "A", bench / "B"):
        for file in sorted(folder.glob("*.safetensors"))[:2]:
            file.write_bytes(file.read_bytes()[:-7])
    mapped("model.bonus", "../secret.safetensors")(bench)
    config(num_hidden_layers=10**9)(bench)
    (bench / "OUT").mkdir()
    (bench / "OUT" / "precious").touch()


def nonfinite(name: str) -> Damage:
    """Makes one value of a tensor of B a NaN."""

    def damage(bench: Path) -> None:
        file = bench / "B" / json.loads((bench / "B" / INDEX).read_text())["weight_map"][name]
        held = load_file(file)
        held[name].view(-1)[5] = torch.nan
        save_file(held, file, {"format": "pt"})

    return damage


def written(file: str) -> Damage:
    def damage(bench: Path) -> None:
        (bench / file).parent.mkdir()
        (bench / file).write_text("{}")

    return damage


def locked(bench: Path) -> None:
    """Holds the lock that a working process holds; it goes with this process."""
    (bench / ".OUT.progress").mkdir()
    fcntl.flock(os.open(bench / ".OUT.progress" / "lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)


def mounted(options: str) -> Damage:
    """Mounts a small disk at DISK, which only root may; `attempt` takes it away again."""

    def damage(bench: Path) -> None:
        (bench / "DISK").mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(bench / "DISK")], capture_output=True)
        if done.returncode:
            raise PermissionError(f"a disk can only be mounted by root: {done.stderr.decode().strip()}")

    return damage


def symmetry(change: Callable[[dict[str, torch.Tensor]], object], family: str = "mixtral") -> Damage:
    def damage(bench: Path) -> None:
        file = bench / "S.safetensors"
        ModelSymmetry(family, 1, {i: LayerSymmetry.identity(4, 24) for i in (0, 1)}).save(file)
        content = load_file(file)
        change(content)
        described = {"hf_moe_lmc": "symmetry", "format_version": "1", "family": family, "groups": "1"}
        save_file(content, file, described)

    return damage


def without_a_layer(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.startswith("layers.1.")]:
        del held[name]


def linked_output(target: str, link: str = "OUT") -> Damage:
    def damage(bench: Path) -> None:
        place = Path(HF_HUB_CACHE) if target == "cache" else bench / target
        place.mkdir(parents=True, exist_ok=True)
        (bench / link).symlink_to(place)

    return damage


def holds(name: str) -> Damage:
    def damage(bench: Path) -> None:
        (bench / "OUT").mkdir()
        (bench / "OUT" / name).touch()

    return damage


def nothing(_: Path) -> None:
    pass


def tokenizer(change: Callable[[Any], object]) -> Damage:
    return on_json("tokenizer.json", change)


def foreign_code(folder: Path) -> None:
    config(model_type="my_moe", auto_map={"AutoConfig": "configuration_my.MyConfig"})(folder)


HEADERS = (
    Row("a truncated shard", MERGE, on_bytes(lambda raw: raw[:-10])),
    Row("a shard with bytes behind its end", ALIGN, on_bytes(lambda raw: raw + b"\0" * 10)),
    Row("an empty shard", MERGE, on_bytes(lambda raw: b"")),
    Row("a header longer than the file", INSPECT, on_bytes(lambda raw: (2**62).to_bytes(8, "little") + raw[8:])),
    Row("a header that is no JSON", MERGE, on_header(lambda header: "?" + json.dumps(header))),
    Row("a header of 100,000 nested lists", INSPECT, on_header(lambda header: "[" * 100_000)),
    Row("a header that names a tensor twice", MERGE, on_header(lambda h: json.dumps(h).replace("{", f'{{"{NORM}": 0, ', 1))),
    Row("a hole between tensors", MERGE, entry(data_offsets=[10**6, 10**6 + 64])),
    Row("tensors that overlap", ALIGN, entry(data_offsets=[0, 64])),
    Row("a shape that does not fill its bytes", MERGE, entry(shape=[17])),
    Row("a shape of 2^62 by 2^62", MERGE, entry(shape=[2**62, 2**62])),
    Row("a shape of 1e400", INSPECT, on_header(lambda h: json.dumps(h).replace('"shape": [16]', '"shape": [1e400]'))),
    Row("a shape with a true in it", INSPECT, entry(shape=[True, 16])),
    Row("a dtype that nobody knows", MERGE, entry(dtype="F99")),
    Row("a name with a terminal's escape sequence", INSPECT, on_header(lambda h: h.update({"\x1b[2J": h.pop(NORM)}))),
    Row("metadata that are no strings", INSPECT, on_header(lambda header: header.update(__metadata__={"format": 1}))),
    Row("a tensor in two shards", MERGE, b(in_two_shards)),
    Row("a shard that is a named pipe", MERGE, instead_of_a_shard(os.mkfifo)),
    Row("a shard that is a folder", MERGE, instead_of_a_shard(Path.mkdir)),
    Row("a shard that is a link to nowhere", MERGE, instead_of_a_shard(lambda file: file.symlink_to("nowhere"))),
)
INDICES = (
    Row("a missing shard", MERGE, instead_of_a_shard(lambda file: None)),
    Row("weight_map leads to ../", MERGE, mapped(NORM, "../secret.safetensors")),
    Row("weight_map leads to an absolute path", ALIGN, mapped(NORM, "/etc/secret.safetensors")),
    Row("weight_map leads to a pickle", MERGE, mapped(NORM, "model.bin")),
    Row("weight_map lists what no shard holds", MERGE, mapped("model.bonus", "model-00001-of-00003.safetensors")),
    Row("weight_map leaves out a tensor", MERGE, mapped(NORM, None)),
    Row("a key twice in the index", MERGE, first_key_twice(INDEX)),
    Row("an empty weight_map", MERGE, text(INDEX, '{"weight_map": {}}')),
    Row("several shards without an index", MERGE, b(lambda folder: (folder / INDEX).unlink())),
)
CONFIGURATIONS = (
    Row("no config.json", MERGE, b(lambda folder: (folder / "config.json").unlink())),
    Row("config.json is no JSON", MERGE, text("config.json", "nonsense")),
    Row("a key twice in config.json", MERGE, first_key_twice("config.json")),
    Row("fewer layers in config.json than in the shards", MERGE, config(num_hidden_layers=1)),
    Row("more layers in config.json than in the shards", NO_ALIGN, config(num_hidden_layers=3)),
    Row("another number of experts in config.json", MERGE, config(num_local_experts=3)),
    Row("a milliard of layers", INSPECT, config(num_hidden_layers=10**9)),
    Row("a size that is a word", MERGE, config(hidden_size="wide")),
    Row("code of its own", MERGE, foreign_code),
)
KINDS = (
    Row("weights only as pickles", MERGE, b(pickles_only)),
    Row("an adapter only", MERGE, b(adapter_only)),
    Row("quantized by GPTQ", MERGE, quantized("gptq")),
    Row("quantized by AWQ", ALIGN, quantized("awq")),
    Row("quantized by bitsandbytes", INSPECT, quantized("bitsandbytes")),
    Row("declared as quantized, but plain", ALIGN, config(quantization_config={"quant_method": "bitsandbytes"})),
    Row("saved while compiled", MERGE, b(compiled)),
    Row("an adapter beside full weights", ALIGN, text("adapter_config.json", "{}")),
    Row("an old single file beside the shards", MERGE, b(stale)),
    Row("no folder at all", "merge A ./nowhere -o OUT", nothing),
)
PAIRS = (
    Row("B lacks a tensor", MERGE, on_tensors(lambda held: held.pop(NORM))),
    Row("B lacks a tensor of an expert", ALIGN, on_tensors(lambda held: held.pop(GATE), GATE)),
    Row("B has a tensor too many", MERGE, on_tensors(lambda held: held.update({"model.bonus": torch.ones(3)}))),
    Row("a tensor of another shape", NO_ALIGN, on_tensors(lambda held: held.update({NORM: torch.ones(17)}))),
    Row("B has more experts", MERGE, b(more_experts)),
    Row("another vocabulary", MERGE, tokenizer(lambda t: t["model"]["vocab"].update({"th": 260, "he": 259}))),
    Row("other merges", ALIGN, tokenizer(lambda t: t["model"]["merges"].reverse())),
    Row("another token ends the text", NO_ALIGN, on_json("tokenizer_config.json", lambda c: c.update(eos_token="<s>"))),
    Row("another chat template", MERGE, text("chat_template.jinja", "{{ messages }}")),
    Row("B without tokenizer", MERGE, b(without_tokenizer)),
    Row("the same model twice", "align A A -o OUT", nothing),
    Row("the same model twice, not aligned", "merge A A -o OUT --no-align", nothing),
    Row("NaN outside the experts", ALIGN, on_tensors(lambda held: held[NORM].fill_(torch.nan))),
)
SYMMETRIES = (
    Row("a symmetry with a scale that is NaN", APPLY, symmetry(lambda held: held["layers.0.unit_scale"].fill_(torch.nan))),
    Row("a symmetry with an expert twice", APPLY, symmetry(lambda held: held["layers.1.expert_order"].fill_(2))),
    Row("a symmetry with a layer missing", f"{MERGE} --symmetry S.safetensors", symmetry(without_a_layer)),
    Row("a symmetry of another family", APPLY, symmetry(lambda held: None, "olmoe")),
    Row("a symmetry that is a model", "apply B/model-00001-of-00003.safetensors B -o OUT", nothing),
)
OUTPUTS = (
    Row("an output that is not empty", MERGE, holds("precious")),
    Row("an output inside an input", "align A B -o B/new", nothing),
    Row("an output that is a link into an input", MERGE, linked_output("A")),
    Row("an output that is a link into the Hub's cache", MERGE, linked_output("cache")),
    Row("an output below a link into the Hub's cache", "align A B -o LINK/new", linked_output("cache", "LINK")),
    Row("an output below a link into an input", NO_ALIGN.replace("OUT", "LINK/new"), linked_output("A", "LINK")),
    Row("an output that is a named pipe", MERGE, lambda bench: os.mkfifo(bench / "OUT")),
    Row("faults in A, in B and in the output at once", MERGE, several),
)
WRITING = (  # what goes wrong when the output is written
    Row("NaN in an expert of B", NO_ALIGN, nonfinite("model.layers.1.block_sparse_moe.experts.2.w3.weight")),
    Row("NaN in an expert of B, aligned", MERGE, nonfinite("model.layers.1.block_sparse_moe.experts.2.w3.weight")),
    Row("NaN in a norm of B", ALIGN, nonfinite(NORM)),
    Row("NaN, allowed", f"{NO_ALIGN} --allow-nonfinite", nonfinite(NORM)),
    Row("a foreign folder to overwrite", f"{NO_ALIGN} --overwrite", written("OUT/thesis.tex")),
    Row("an old output to overwrite", f"{NO_ALIGN} --overwrite", written("OUT/config.json")),
    Row("another process writes there", NO_ALIGN, locked),
    Row("a link where the progress is kept", NO_ALIGN, lambda bench: (bench / ".OUT.progress").symlink_to(bench / "A")),
    Row("a disk that is too small", NO_ALIGN.replace("OUT", "DISK/OUT"), mounted("size=64k")),
    Row("a disk that is read-only", NO_ALIGN.replace("OUT", "DISK/OUT"), mounted("size=64k,ro")),
    Row("only the plan is asked for", f"{NO_ALIGN} --dry-run", lambda bench: None),
)

SECTIONS = {
    "Shards and their headers": HEADERS,
    "The index": INDICES,
    "config.json": CONFIGURATIONS,
    "Kinds of checkpoints": KINDS,
    "Two checkpoints that do not belong together": PAIRS,
    "Symmetry files": SYMMETRIES,
    "The output": OUTPUTS,
    "While writing": WRITING,
}


def attempt(row: Row, prepared: Path) -> dict[str, Any]:
    """Runs one row on a copy of what `prepared` holds: {fault, command, code, message, left}."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Path(folder).resolve() / "bench"
        shutil.copytree(prepared, bench)
        row.damage(bench)
        before = listed(bench)
        errors = io.StringIO()
        working = Path.cwd()
        os.chdir(bench)
        try:
            with redirect_stderr(errors), redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("always")
                code = command_line(row.command.split())
        finally:
            os.chdir(working)
            after = listed(bench)
            if os.path.ismount(bench / "DISK"):
                subprocess.run(["umount", str(bench / "DISK")], check=True)
        said = errors.getvalue().replace(f"{bench}/", "").replace(str(bench), ".")
        message = [line for line in said.splitlines() if line.startswith(("error:", "warning:", "  "))]
        left = sorted(after - before)
    return {"fault": row.fault, "command": row.command, "code": code, "message": message, "left": left}


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def prepare(folder: Path) -> Path:
    make(folder / "A")
    make(folder / "B", 0.001)
    return folder


def render(record: dict[str, Any]) -> str:
    """docs/faults.md."""
    lines = [
        "# Faults that were tried, and what happened",
        "",
        f"{sum(len(rows) for rows in record['sections'].values())} faults. `python scripts/faults.py` damages small "
        "checkpoints, runs the real command line on them, and writes this page. The whole messages are in "
        "`scripts/faults.json`. `python scripts/faults.py --check` tries all faults again. Its exit code is 1 if one ends "
        "otherwise than it is recorded, and it prints the differences. Two faults mount a small disk, which takes root.",
    ]
    for section, rows in record["sections"].items():
        if rows:
            lines += ["", f"## {section}", "", "| fault | command | exit code | said | left behind |", "|---|---|---|---|---|"]
            lines += [f"| {row['fault']} | `{row['command']}` | {row['code']} | {said(row)} | {left(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def said(row: dict[str, Any]) -> str:
    """The first line; of a list, what follows as well."""
    listed = bool(row["message"]) and row["message"][0].endswith(":")
    shown = row["message"] if listed else row["message"][:1]
    shown = [*shown[:9], "..."] if len(shown) > 10 else shown
    return "<br>".join(cell(line) for line in shown) or "nothing"


def cell(line: str, limit: int = 220) -> str:
    short = line if len(line) <= limit else f"{line[:limit]}..."
    return short.strip().replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def left(row: dict[str, Any]) -> str:
    return "nothing" if not row["left"] else f"the output, {len(row['left'])} files" if row["code"] == 0 else str(row["left"])


def rows(words: Iterable[str] = ()) -> list[Row]:
    """The faults that hold all these words."""
    every = [row for section in SECTIONS.values() for row in section]
    return [row for row in every if all(word in row.fault for word in words)]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two attempts at one fault, as a diff; empty where they agree."""
    lines, lines_now = (json.dumps(row, indent=1, ensure_ascii=False).splitlines(keepends=True) for row in (before, now))
    return "".join(difflib.unified_diff(lines, lines_now, f"{now['fault']}: recorded", f"{now['fault']}: now", n=99))


def check(chosen: Iterable[Row], prepared: Path) -> int:
    """Tries faults again; the exit code is 1 if one ends otherwise than RECORD says, or TABLE is not what RECORD gives."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    recorded = {row["fault"]: row for section in record["sections"].values() for row in section}
    found = [attempt(row, prepared) for row in chosen]
    differences = [difference(recorded.get(row["fault"], {}), row) for row in found]
    differences += [f"recorded, and no longer tried: {fault}\n" for fault in recorded.keys() - {row.fault for row in rows()}]
    if TABLE.read_text(encoding="utf-8") != render(record):
        differences.append(f"{TABLE.name} is not what {RECORD.name} gives\n")
    print("\n".join(filter(None, differences)), end="")
    print(f"{len(found)} faults tried, {sum(map(bool, differences))} differences from {RECORD.name}", file=sys.stderr)
    return int(any(differences))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", nargs="+", default=(), help="print the rows whose fault holds these words")
    parser.add_argument("--check", action="store_true", help="write nothing; print what differs from the record")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder))
        if options.check:
            return check(rows(options.only), prepared)
        if options.only:
            print(json.dumps([attempt(row, prepared) for row in rows(options.only)], indent=2))
            return 0
        record = {
            "command": "python scripts/faults.py",
            "sections": {name: [attempt(row, prepared) for row in section] for name, section in SECTIONS.items()},
        }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    TABLE.write_text(render(record), encoding="utf-8")
    print(f"written: {RECORD} and {TABLE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
