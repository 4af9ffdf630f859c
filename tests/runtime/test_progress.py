"""Progress is a bar on a terminal, and a line every half minute in a log file."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_moe_lmc.runtime import progress
from hf_moe_lmc.runtime.progress import bar, quiet_transformers, silenced, tracked


@pytest.fixture(autouse=True)
def shown_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the environment variable, which the tests set."""
    for module in (progress, sys.modules["huggingface_hub.utils.tqdm"]):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "progress_bar_states", {})


class Clock:
    """Time that only passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_log_file_gets_a_line_every_half_minute_and_one_at_the_end(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with bar(total=1000, initial=400, desc="matching layers", unit="layer") as shown:
        for _ in range(400):  # eight a second
            clock.now += 0.125
            shown.update()
        assert capsys.readouterr().err == "matching layers: 640 of 1000 layers after 30 s, about 45 s left\n"
        shown.update(200)
    assert capsys.readouterr().err == "matching layers: 1000 of 1000 layers after 50 s\n"


def test_bytes_are_sizes_and_a_stop_is_said(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt), bar(total=3_000_000_000, desc="writing", unit="B") as shown:
        shown.update(1_500_000_000)
        clock.now += 200
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "writing: 1.5 GB of 3 GB after 3 min, stopped\n"


def test_items_are_tracked(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    assert list(tracked([3, 1, 2], desc="comparing", unit="tensor")) == [3, 1, 2]
    assert capsys.readouterr().err == "comparing: 3 of 3 tensors after 0 s\n"


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(total=3, desc="a", unit="step", quiet=True) as shown:
        shown.update(3)
    for _ in range(2):
        with silenced(), silenced(), bar(total=3, desc="b", unit="step") as shown:
            shown.update(3)
            assert are_progress_bars_disabled()
        assert not are_progress_bars_disabled() and capsys.readouterr().err == ""


@pytest.mark.parametrize("asked", [True, False])
def test_silence_holds_whatever_the_environment_asks_of_the_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    for module in (progress, sys.modules["huggingface_hub.utils.tqdm"]):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", asked)
    with silenced(), bar(total=3, desc="b", unit="step") as shown:
        shown.update(3)
    assert capsys.readouterr().err == ""
    with bar(total=3, desc="b", unit="step") as shown:
        shown.update(3)
    assert bool(capsys.readouterr().err) is not asked


@pytest.mark.parametrize("of_hub", [True, False])
@pytest.mark.parametrize("of_transformers", [True, False])
def test_bars_of_transformers_are_silenced_and_all_is_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, of_transformers: bool, of_hub: bool
) -> None:
    logging = transformers.utils.logging
    monkeypatch.setattr(logging, "_tqdm_active", of_transformers)
    (enable_progress_bars if of_hub else disable_progress_bars)()
    for _ in range(2):
        with quiet_transformers():
            assert list(logging.tqdm([1, 2], desc="Writing model shards")) == [1, 2]
        assert capsys.readouterr().err == ""
        assert logging.is_progress_bar_enabled() is of_transformers and are_progress_bars_disabled() is not of_hub
    list(logging.tqdm([1, 2], desc="Writing model shards"))  # the control
    assert bool(capsys.readouterr().err) is of_transformers


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    source = "from hf_moe_lmc.runtime.progress import tracked; list(tracked([1, 2, 3], desc='comparing', unit='tensor'))"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    subprocess.run([sys.executable, "-c", source], stderr=theirs, env=environment, check=True)
    shown = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "comparing: 100%|" in shown and "3/3" in shown and "\r" in shown
